"""etcd is restored from older data while the cluster runs: noticed, refused, and accepted."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE, serial_of
from sheepfs_tools.local.processes import ManagedProcess, wait_for
from sheepfs_tools.sheepctl.__main__ import main

SIZE = 3 * OBJECT_SIZE
NOTICED = "it was restored from older data"
ACCEPT = "sheepctl metadata accept"


def has_noticed(process: ManagedProcess) -> bool:
    return NOTICED in process.log.read_text()


def have_seen(mounted: Mounted) -> bool:
    epoch = mounted.status()["epoch"]
    directories = [mounted.cluster.node_directory(number) for number in mounted.cluster.nodes]
    return all(
        json.loads((path / "sheepfs.json").read_text())["epoch"] >= epoch for path in directories
    )


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(100_000)


class Disk:
    """A VDI in use, and what it reads as."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self.content = bytearray(SIZE)

    def write(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)
        os.fsync(self._fd)
        self.content[offset : offset + len(data)] = data

    def is_free(self) -> bool:
        """Whether this mount may write, which it tells by writing what is there already."""
        try:
            os.pwrite(self._fd, self.content[:BLOCK_SIZE], 0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def check(self) -> None:
        # Around the page cache: what the nodes have.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(self._fd, SIZE, 0) == self.content

    def close(self) -> None:
        os.close(self._fd)


class SavedEtcd:
    """A copy of etcd's data directory, and the way back to it."""

    def __init__(self, mounted: Mounted) -> None:
        self._cluster = mounted.cluster
        self._data = mounted.cluster.directory / "etcd"
        self._saved = mounted.cluster.directory / "etcd.saved"
        self._cluster.etcd.kill()
        shutil.copytree(self._data, self._saved)
        self._cluster.start_etcd()

    def restore(self) -> None:
        self._cluster.etcd.kill()
        shutil.rmtree(self._data)
        shutil.copytree(self._saved, self._data)
        self._cluster.start_etcd()


class Operator:
    """Runs sheepctl in this process."""

    def __init__(self, mounted: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
        self._cluster = mounted.cluster
        self._capsys = capsys

    def sheepctl(self, *words: str) -> tuple[int, str]:
        """Give the exit code and all that is printed."""
        code = main([*self._cluster.options, *words])
        told = self._capsys.readouterr()
        return code, told.out + told.err

    def info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.sheepctl("vdi", "info", name, "--json")[1])
        return found

    def keys(self) -> object:
        """Everything that is in etcd."""
        path = self._cluster.directory / "exported"
        path.unlink(missing_ok=True)
        assert self.sheepctl("metadata", "export", str(path))[0] == 0
        return json.loads(path.read_text())["keys"]


def test_an_etcd_restored_from_older_data_is_refused_until_it_is_accepted(
    new_cluster: Callable[[], Mounted], capsys: pytest.CaptureFixture[str]
) -> None:
    mounted = new_cluster()
    operator = Operator(mounted, capsys)
    first = Disk(mounted.create("first", str(SIZE)))
    first.write(0, noise(1))
    saved = SavedEtcd(mounted)
    mounted.wait_healthy()
    # The first of two copies makes another map, which every daemon reads and writes down.
    late = Disk(mounted.create("late", str(SIZE), copies=2))
    mounted.wait_healthy()
    wait_for(partial(have_seen, mounted), 20, "all daemons to read the newest map")
    late.write(5000, noise(2))
    first.write(OBJECT_SIZE, noise(3))
    lost = operator.info("late")
    saved.restore()

    who_runs_notices_and_goes_on(mounted, first, late)
    before = operator.keys()
    for disk in (first, late):
        disk.close()
    who_starts_is_refused(mounted, operator)
    assert operator.keys() == before
    who_runs_is_ended_and_the_operator_accepts(mounted, operator)

    assert (mounted.path / "first.raw").read_bytes() == first.content
    assert not (mounted.path / "late.raw").exists()
    new = Disk(mounted.create("new", str(SIZE)))
    made = operator.info("new")
    assert made["id"] > lost["id"]
    assert serial(made) > serial(lost)
    new.write(0, noise(9))
    new.check()
    new.close()
    again = Disk(mounted.path / "first.raw")
    again.content[:] = first.content
    wait_for(again.is_free, 30, "the lock that came back with etcd's data to end")
    again.write(OBJECT_SIZE + 70, noise(10))
    again.check()
    again.close()
    mounted.assert_replicas_agree("first")


def who_runs_notices_and_goes_on(mounted: Mounted, *disks: Disk) -> None:
    cluster = mounted.cluster
    for process in (*cluster.nodes.values(), *cluster.mounts.values()):
        wait_for(partial(has_noticed, process), 20, f"{process.name} to notice")
    for number, disk in enumerate(disks):
        disk.write(2 * OBJECT_SIZE - 50_000, noise(4 + number))
        disk.write(100, noise(6 + number))
        disk.check()


def who_starts_is_refused(mounted: Mounted, operator: Operator) -> None:
    for words in (("create", "unlucky", "1G"), ("clone", "first", "unlucky")):
        code, told = operator.sheepctl("vdi", *words)
        assert code == 2, told
        assert "etcd knows less than node" in told
        assert ACCEPT in told
    node = mounted.cluster.nodes[1]
    node.stop()
    node.start()
    wait_for(lambda: node.pid is None, 20, "the daemon to refuse to start")
    assert ACCEPT in node.last_words(3)
    assert "knows less than this data directory" in node.last_words(3)
    # When their keys in etcd are gone the others serve all the same.
    wait_for(
        lambda: "still serve (node 2 at" in operator.sheepctl("metadata", "accept", "--yes")[1],
        20,
        "etcd to forget the daemons",
    )


def who_runs_is_ended_and_the_operator_accepts(mounted: Mounted, operator: Operator) -> None:
    cluster = mounted.cluster
    for process in (*cluster.nodes.values(), *cluster.mounts.values()):
        process.kill()
    data = ["--data", *(str(cluster.node_directory(number)) for number in cluster.nodes)]
    code, told = operator.sheepctl("metadata", "accept", *data)
    assert (code, "add --yes" in told) == (2, True), told
    assert "VDIs or snapshots were made later" in told
    code, told = operator.sheepctl("metadata", "accept", "--yes", "--json", *data)
    assert code == 0, told
    mounted.start()


def serial(info: dict[str, Any]) -> int:
    return serial_of(int(info["layer"]))
