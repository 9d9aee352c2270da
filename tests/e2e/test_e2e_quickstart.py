"""tools/quickstart: start, find the data again, stop without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import missing_for_mount
from sheepfs_tools.local.cluster import LocalCluster, is_mounted, unmount_lazily
from sheepfs_tools.local.processes import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


class Quickstart:
    """Runs the script in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "sheepfs"
        self.mount = directory / "mnt"

    def argv(self, *arguments: str) -> list[str]:
        script = str(REPOSITORY / "tools" / "quickstart")
        return [script, "--dir", str(self.directory), "--mount", str(self.mount), *arguments]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            self.argv(*arguments), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all processes that work in the directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (OSError, UnicodeDecodeError):
                    continue
                if str(self.directory) in line and "quickstart" not in line:
                    found.append(line)
        return found

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert not is_mounted(self.mount)


@pytest.fixture
def quickstart(tmp_path: Path) -> Iterator[Quickstart]:
    if reason := missing_for_mount():
        pytest.skip(reason)
    if not (REPOSITORY / ".venv" / "bin" / "python").exists():
        pytest.skip("no .venv: tools/test makes it")
    result = Quickstart(tmp_path)
    yield result
    LocalCluster(result.directory).destroy()
    if is_mounted(result.mount):
        unmount_lazily(result.mount)


def test_detached_quickstart_ends_in_a_mounted_disk_and_stop_leaves_nothing_but_the_data(
    quickstart: Quickstart,
) -> None:
    output = quickstart.run("--detach")
    assert "sheepctl cluster status" in output
    disk = quickstart.mount / "vm1.raw"
    assert disk.stat().st_size == 20 << 30
    with disk.open("r+b") as file:
        file.seek(5 << 30)
        file.write(b"still here")
        file.flush()
        os.fsync(file.fileno())

    assert "--stop" in quickstart.run("--detach"), "a run beside a running one must be harmless"

    quickstart.run("--stop")
    quickstart.assert_nothing_left()
    quickstart.run("--stop")

    quickstart.run("--detach")
    with disk.open("rb") as file:
        file.seek(5 << 30)
        assert file.read(10) == b"still here"
    listed = LocalCluster(quickstart.directory).sheepctl("vdi", "list", "--json").stdout
    assert [fact["name"] for fact in json.loads(listed)] == ["vm1.raw"]
    quickstart.run("--stop")
    quickstart.assert_nothing_left()


def test_ctrl_c_stops_everything(quickstart: Quickstart) -> None:
    script = subprocess.Popen(
        quickstart.argv(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: (quickstart.mount / "vm1.raw").exists(), 60, "the first disk")
        script.send_signal(signal.SIGINT)
        output, _ = script.communicate(timeout=60)
    finally:
        script.kill()
        script.wait()
    assert script.returncode == 0, output
    quickstart.assert_nothing_left()


def test_stop_takes_away_a_mount_whose_process_was_killed(quickstart: Quickstart) -> None:
    quickstart.run("--detach")
    cluster = LocalCluster(quickstart.directory)
    cluster.mounts[quickstart.mount].kill()
    quickstart.run("--stop")
    quickstart.assert_nothing_left()
