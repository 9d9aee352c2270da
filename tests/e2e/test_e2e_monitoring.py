"""To see what a cluster does: metrics, top, --watch, object locate."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e.cluster import Mounted, object_bytes
from sheepfs_tools.local.processes import wait_for

MIB = 1 << 20


def metrics(mounted: Mounted, program: str) -> dict[str, float]:
    """Scrape a program; of a metric with labels the sum."""
    port = mounted.cluster.ports[f"{program}-metrics"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def command(mounted: Mounted, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sheepfs_tools.sheepctl", *mounted.cluster.options, *arguments]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write and read a block again and again, until the end of the block."""
    stop = threading.Event()

    def work() -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            while not stop.is_set():
                os.pwrite(fd, b"x" * 4096, 0)
                os.fsync(fd)
                os.pread(fd, 4096, 0)
        finally:
            os.close(fd)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_daemons_and_mount_tell_prometheus_what_was_done(mounted: Mounted) -> None:
    path = mounted.create("counted", "64M")
    before = [metrics(mounted, f"node{n}") for n in (1, 2, 3)]
    fd = os.open(path, os.O_RDWR)
    for number in range(8):
        os.pwrite(fd, b"y" * 4096, number * 4096)
    os.fsync(fd)
    os.close(fd)

    def grown(name: str) -> list[float]:
        after = [metrics(mounted, f"node{n}") for n in (1, 2, 3)]
        return [new[name] - old[name] for new, old in zip(after, before, strict=True)]

    wait_for(lambda: min(grown("sheepfs_node_writes_total")) >= 8, 10, "the writes to be counted")
    assert min(grown("sheepfs_node_write_bytes_total")) >= 8 * 4096
    assert min(grown("sheepfs_node_flush_seconds_count")) >= 1
    node = metrics(mounted, "node1")
    assert node["sheepfs_cluster_nodes"] == 3
    assert node["sheepfs_cluster_groups_stopped"] == 0
    assert node["sheepfs_node_size_bytes"] > node["sheepfs_node_free_bytes"] > 0
    mount = metrics(mounted, "mount")
    assert mount["sheepfs_vdi_writes_total"] == 8
    assert mount["sheepfs_mount_nodes_linked"] == 3


def test_top_shows_what_programs_do_through_mounts_and_what_nodes_do(mounted: Mounted) -> None:
    path = mounted.create("busy", "64M")
    with writing(path):

        def shown() -> bool:
            found = json.loads(mounted.cluster.sheepctl("top", "--once", "--json").stdout)
            busy = [row for row in found["vdis"] if row["name"] == "busy.raw"]
            return (
                bool(busy)
                and busy[0]["write"]["per_s"] > 1
                and 0 < busy[0]["write"]["mean_s"] <= 2 * busy[0]["write"]["p99_s"]
                and busy[0]["write"]["bytes_per_s"]
                == pytest.approx(4096 * busy[0]["write"]["per_s"])
                and {row["node"] for row in found["nodes"] if row["write"]["per_s"] > 1}
                == {1, 2, 3}
            )

        wait_for(shown, 30, "top to show the load")
        text = mounted.cluster.sheepctl("top", "--once").stdout
    assert "busy.raw" in text
    assert "WRITE MB/s" in text


def test_locate_names_the_file_that_has_the_byte(mounted: Mounted) -> None:
    path = mounted.create("found", "64M")

    def write(text: bytes) -> None:
        with path.open("r+b", 0) as file:
            file.seek(9 * MIB)
            file.write(text)
            os.fsync(file.fileno())

    def locate(name: str, offset: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            mounted.cluster.sheepctl("object", "locate", name, offset, "--json").stdout
        )
        return found

    def bytes_there(place: dict[str, Any]) -> set[bytes]:
        files = [mounted.cluster.node_directory(n) / place["path"] for n in (1, 2, 3)]
        return {object_bytes(file)[MIB : MIB + 10] for file in files}

    write(b"here it is")
    place = locate("found", "9M")
    assert (place["index"], place["within"], place["hole"]) == (2, MIB, False)
    assert sorted(member["node"] for member in place["members"]) == [1, 2, 3]
    assert len({member["version"] for member in place["members"]}) == 1
    assert bytes_there(place) == {b"here it is"}
    hole = locate("found", "40M")
    assert (hole["hole"], hole["oid"], hole["members"]) == (True, None, [])
    beyond = mounted.cluster.sheepctl("object", "locate", "found", "64M", check=False)
    assert beyond.returncode == 2
    assert "there is no byte" in beyond.stderr

    mounted.cluster.sheepctl("vdi", "snapshot", "found", "--tag", "old")
    write(b"here it wa")
    assert locate("found@old", "9M") == {**place, "name": "found@old.raw"}
    assert locate("found", "9M")["layer"] > place["layer"]


def test_watch_prints_an_object_a_line_until_interrupted(mounted: Mounted) -> None:
    process = subprocess.Popen(
        command(mounted, "cluster", "status", "--watch", "0.5", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors == ""
    assert all(json.loads(line) for line in lines)


def test_watch_on_a_terminal_begins_each_time_at_its_top(mounted: Mounted) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(mounted, "node", "list", "--watch", "0.5"), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        seen = b""
        while seen.count(b"\x1b[2J") < 3:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert seen.count(b"ADDRESS") >= 2
    assert b"Traceback" not in seen
