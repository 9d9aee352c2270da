"""Small disks of their own fill up: by clients, and so far that a node has no room to recover."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Mounted, run
from e2e.guest import DONE, build_guest, control, missing_for_guest
from e2e.power import LosableDisk, missing
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import wait_for

MIB = 1 << 20
SMALL = 64 << 10


class SmallDisks:
    """A mounted cluster; each node has a small file system of its own.

    Args:
        size_mib: of each of them.
    """

    def __init__(self, directory: Path, size_mib: int) -> None:
        self.size_mib = size_mib
        cluster = LocalCluster(directory / "data")
        cluster.directory.mkdir(parents=True)
        self.disks = {}
        for number in cluster.nodes:
            path = directory / f"disk{number}"
            self.disks[number] = LosableDisk(
                directory / f"{number}.img", path, "ext4", f"{size_mib}M"
            )
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
def small(tmp_path: Path, soak: bool) -> Iterator[SmallDisks]:
    if reason := missing("ext4"):
        pytest.skip(reason)
    cluster = SmallDisks(tmp_path, 1024 if soak else 128)
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
    mounted, cluster, size = small.mounted, small.mounted.cluster, small.size_mib
    path = mounted.create("big", f"{2 * size}M")
    fd = os.open(path, os.O_RDWR)
    try:
        # Clients fill the disks up to the reserve: ENOSPC, and all that was flushed is there.
        last = size * 3 // 2
        end = fill(fd, 0, last)
        assert size * 0.3 < end < size * 0.95, f"the disks hold {size} MiB"
        status = mounted.status()
        assert any("nearly full" in reason for reason in status["reasons"]), status["reasons"]
        for number in (0, end // 2, end - 1):
            assert os.pread(fd, MIB, number * MIB) == block(number + 1)

        # A discard makes room, and writers go on.
        discard(fd, 0, 16 * MIB)
        os.fsync(fd)
        assert fill(fd, last, last + 6) == last + 6

        # A node comes back with a new disk on which there is no room for its share.
        cluster.nodes[3].kill()
        for file in small.disks[3].path.glob("data/*"):
            remove(file)
        ballast = small.disks[3].path / "ballast"
        wait_for(lambda: takes(ballast, size * 55 // 100 * MIB), 20, "the old disk's room")
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


def test_a_deletion_makes_room_and_nothing_that_was_flushed_is_lost(small: SmallDisks) -> None:
    mounted, size = small.mounted, small.size_mib
    spare = mounted.create("spare", f"{size // 8}M")
    spare.write_bytes(bytes([7]) * (size // 8 * MIB))
    run("sync", spare)
    fd = os.open(mounted.create("kept", f"{size}M"), os.O_RDWR)
    try:
        end = fill(fd, 0, size)
        assert end < size, "the disks are full"
        mounted.cluster.sheepctl("vdi", "delete", "spare", "--now")
        first, goal = end, end + size // 16

        def filled() -> bool:
            nonlocal end
            end = fill(fd, end, goal)
            return end == goal

        wait_for(filled, 60, "room for what is written next")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for number in range(end):
            assert os.pread(fd, MIB, number * MIB) == block(number + 1), f"{number} of {first}"
    finally:
        os.close(fd)
    mounted.assert_replicas_agree("kept")


def test_a_guest_on_full_disks_stops_and_goes_on_when_there_is_room(
    small: SmallDisks, tmp_path: Path
) -> None:
    if reason := missing_for_guest():
        pytest.skip(reason)
    mounted, size = small.mounted, small.size_mib
    spare = mounted.create("spare", f"{size}M")
    with spare.open("r+b") as file:
        for number in range(size // 2):
            file.write(block(number + 1))
    run("sync", spare)
    files = size * 45 // 100 // 10
    guest = build_guest(tmp_path / "guest")
    disk, console, monitor = mounted.create("vm1", f"{size}M"), tmp_path / "log", tmp_path / "qmp"
    options = ("-qmp", f"unix:{monitor},server=on,wait=off")
    machine = guest.boot(disk, f"write files={files}", console, *options)
    try:
        # QEMU's default (werror=enospc): the machine stands still, and its guest sees no error.
        wait_for(
            lambda: machine.poll() is not None or is_out_of_room(monitor),
            300,
            "the guest to fill the disks",
        )
        assert machine.poll() is None, console.read_text()[-3000:]
        mounted.cluster.sheepctl("vdi", "delete", "spare", "--now")

        def is_done() -> bool:
            if machine.poll() is None and is_out_of_room(monitor):
                control(monitor, "cont")
            return machine.poll() is not None

        wait_for(is_done, 300, "the guest to go on")
    finally:
        machine.kill()
        machine.wait()
    assert DONE in console.read_text(), console.read_text()[-3000:]
    verified = guest.run(disk, f"verify files={files}")
    assert verified.count(": OK") == files, verified[-3000:]
    mounted.assert_replicas_agree("vm1")


def is_out_of_room(monitor: Path) -> bool:
    """Tell whether QEMU has stopped its machine for want of room."""
    try:
        return bool(control(monitor, "query-status")["status"] == "io-error")
    except OSError:
        return False  # It is about to start, or to end.


def discard(fd: int, offset: int, length: int) -> None:
    """Discard a range (fallocate with FALLOC_FL_PUNCH_HOLE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, 0x02 | 0x01, ctypes.c_int64(offset), ctypes.c_int64(length))
    assert result == 0, os.strerror(ctypes.get_errno())


def takes(path: Path, size_bytes: int) -> bool:
    """Take room on a disk; False: what was removed from it a moment ago is not free yet."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
    return True


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
