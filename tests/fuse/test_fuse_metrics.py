"""What a mount counts of programs' requests, and its port for metrics."""

from __future__ import annotations

import re
import socket
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.mount_process import PROGRAM, MountProcess, can_mount, mounted
from sheepfs_tools.local.processes import wait_for

DIRECT = "f = os.open('{name}', os.O_RDWR | os.O_DIRECT); m = mmap.mmap(-1, 4096); "


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountProcess]:
    if not can_mount():
        pytest.skip("/dev/fuse cannot be opened")
    process = MountProcess(tmp_path_factory.mktemp("mount"))
    try:
        process.start(
            "--metrics", "127.0.0.1:0",
            MEMORY_VDIS="a.raw,b.raw,bad.raw,c.raw",
        )  # fmt: skip
        yield process
    finally:
        process.clean_up()


def port_of(mount: MountProcess) -> int:
    found = re.search(r"metrics are served at port (\d+)", mount.log)
    assert found, mount.log
    return int(found[1])


class Scrape:
    """The metrics at one time."""

    def __init__(self, mount: MountProcess) -> None:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port_of(mount)}/metrics", timeout=10
        ) as answer:
            text = answer.read().decode()
        self._values = {
            (sample.name, sample.labels.get("vdi", ""), sample.labels.get("le")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, vdi: str) -> float:
        return self._values.get((f"sheepfs_vdi_{name}", vdi, None), 0)


def scrape_when(mount: MountProcess, name: str, vdi: str, value: float) -> Scrape:
    """Scrape until a metric has its value: what is served may be a second old."""
    found: list[Scrape] = []

    def has_it() -> bool:
        found.append(Scrape(mount))
        return found[-1](name, vdi) == value

    wait_for(has_it, 10, f"{name} of {vdi} to be {value}")
    return found[-1]


def test_a_write_through_the_mount_is_counted_once_and_so_is_a_read(mount: MountProcess) -> None:
    mount.python(
        DIRECT.format(name="a.raw")
        + "[os.pwritev(f, [m], 4096 * i) for i in range(5)]; os.fsync(f);"
        + "[os.preadv(f, [m], 0) for _ in range(3)]"
    )
    scrape = scrape_when(mount, "flushes_total", "a.raw", 1)
    assert (scrape("writes_total", "a.raw"), scrape("write_bytes_total", "a.raw")) == (5, 20_480)
    assert (scrape("reads_total", "a.raw"), scrape("read_bytes_total", "a.raw")) == (3, 12_288)
    assert scrape("write_seconds_count", "a.raw") == 5
    assert 0 < scrape("write_seconds_sum", "a.raw") < 5
    assert scrape("reads_total", "b.raw") == 0


def test_a_request_that_fails_is_an_error_and_nothing_else(mount: MountProcess) -> None:
    mount.python(
        DIRECT.format(name="bad.raw")
        + """
try:
    os.preadv(f, [m], 0)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    )
    scrape = scrape_when(mount, "read_errors_total", "bad.raw", 1)
    assert scrape("reads_total", "bad.raw") == scrape("read_bytes_total", "bad.raw") == 0


def test_figures_go_on_when_a_file_is_opened_again(mount: MountProcess) -> None:
    for _ in range(2):
        mount.python(DIRECT.format(name="c.raw") + "os.pwritev(f, [m], 0)")
    scrape_when(mount, "writes_total", "c.raw", 2)


def test_strangers_at_the_port_do_not_stop_the_mount(mount: MountProcess) -> None:
    strangers = []
    for number in range(40):
        stranger = socket.create_connection(("127.0.0.1", port_of(mount)), timeout=10)
        stranger.sendall([b"", b"GET /me", b"\x16\x03\x01" * 100, b"A" * 30_000][number % 4])
        strangers.append(stranger)
    mount.python(DIRECT.format(name="b.raw") + "os.pwritev(f, [m], 0)")
    scrape_when(mount, "writes_total", "b.raw", 1)
    for stranger in strangers:
        stranger.close()


def test_an_address_that_cannot_be_listened_at_is_one_clear_line(unmounted: MountProcess) -> None:
    for address in ("127.0.0.1", "127.0.0.1:99999"):
        done = unmounted.run(
            sys.executable, PROGRAM, "-f", "--metrics", address, str(unmounted.path)
        )
        assert done.returncode == 2
        assert f"cannot listen at {address}" in done.stderr.splitlines()[-1]
        assert not mounted(unmounted.path)
