"""Small disks of their own fill up: by clients, and so far that a node has no room to recover."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.power import LosableDisk, missing
from sheepfs_tools.local_cluster import LocalCluster
from sheepfs_tools.processes import wait_for

MIB = 1 << 20
SMALL = 64 << 10


class SmallDisks:
    """A mounted cluster; each node has a small file system of its own."""

    def __init__(self, directory: Path) -> None:
        cluster = LocalCluster(directory / "data")
        cluster.directory.mkdir(parents=True)
        self.disks = {}
        for number in cluster.nodes:
            path = directory / f"disk{number}"
            self.disks[number] = LosableDisk(directory / f"{number}.img", path, "ext4", "128M")
            (path / "data").mkdir()
            cluster.node_directory(number).symlink_to(path / "data")
        self.mounted = Mounted(cluster, directory / "mnt")

    def is_joining(self) -> bool:
        """Tell whether a node says that it has yet to catch up."""
        return any(row["joining"] for row in self.mounted.status()["nodes"])

    def destroy(self) -> None:
        """Take everything away."""
        self.mounted.cluster.destroy()
        for disk in self.disks.values():
            disk.unmount()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisks]:
    if reason := missing("ext4"):
        pytest.skip(reason)
    cluster = SmallDisks(tmp_path)
    try:
        cluster.mounted.start()
        yield cluster
    finally:
        cluster.destroy()


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (MIB // 8)


def fill(fd: int, first: int, end: int) -> int:
    """Write blocks of 1 MiB until there is no room; give the number of the first that failed."""
    for number in range(first, end):
        try:
            os.pwrite(fd, block(number + 1), number * MIB)
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return number
    return end


def test_full_disks_stop_writers_only_and_recovery_stops_short_of_the_reserve(
    small: SmallDisks,
) -> None:
    mounted, cluster = small.mounted, small.mounted.cluster
    path = mounted.create("big", "256M")
    fd = os.open(path, os.O_RDWR)
    try:
        # Clients fill the disks up to the reserve: ENOSPC, and all that was flushed is there.
        end = fill(fd, 0, 200)
        assert 40 < end < 120, "the disks hold 128 MiB"
        status = mounted.status()
        assert any("nearly full" in reason for reason in status["reasons"]), status["reasons"]
        for number in (0, end // 2, end - 1):
            assert os.pread(fd, MIB, number * MIB) == block(number + 1)

        # A discard makes room, and writers go on.
        discard(fd, 0, 16 * MIB)
        os.fsync(fd)
        assert fill(fd, 200, 206) == 206

        # A node comes back with a new disk on which there is no room for its share.
        cluster.nodes[3].kill()
        for file in small.disks[3].path.glob("data/*"):
            remove(file)
        ballast = small.disks[3].path / "ballast"
        ballast.write_bytes(bytes(70 * MIB))
        cluster.start_node(3)
        wait_for(
            lambda: "the disk is full" in " ".join(mounted.status()["reasons"]), 30, "a full disk"
        )
        # Clients go on meanwhile: recovery leaves some room for them on the node.
        os.pwrite(fd, block(7777)[:SMALL], 20 * MIB)
        discard(fd, 24 * MIB, 8 * MIB)
        os.fsync(fd)
        assert small.is_joining()

        # With room it goes on by itself.
        ballast.unlink()
        wait_for(lambda: not small.is_joining(), 60, "recovery to end")
        assert os.pread(fd, SMALL, 20 * MIB) == block(7777)[:SMALL]
    finally:
        os.close(fd)
    done = cluster.sheepctl("vdi", "check", "big", "--deep", check=False, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    path.unlink()
    assert all(cluster.nodes[number].pid is not None for number in cluster.nodes)


def discard(fd: int, offset: int, length: int) -> None:
    """Discard a range (fallocate with FALLOC_FL_PUNCH_HOLE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, 0x02 | 0x01, ctypes.c_int64(offset), ctypes.c_int64(length))
    assert result == 0, os.strerror(ctypes.get_errno())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
