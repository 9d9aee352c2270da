"""The conformance tests that the real disk and FaultyDisk both pass, and FaultyDisk's own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fakes.faulty_disk import FaultyDisk
from storaged.store.disk import Disk, FileDisk, read_file, replace_file, write_all


@pytest.fixture(params=["file", "faulty"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return FileDisk(tmp_path) if request.param == "file" else FaultyDisk()


def _make(disk: Disk, path: str, data: bytes = b"") -> int:
    fd = disk.open(path, create=True)
    write_all(disk, fd, data, 0)
    return fd


def test_what_was_written_is_read_back_and_gaps_are_zeros(disk: Disk) -> None:
    fd = _make(disk, "a", b"head")
    assert disk.pwrite(fd, b"tail", 10_000) == 4
    assert disk.pread(fd, 20_000, 0) == b"head" + bytes(9_996) + b"tail"
    assert disk.pread(fd, 10, 30_000) == b""
    disk.close(fd)


def test_what_was_just_written_is_in_memory(disk: Disk) -> None:
    fd = _make(disk, "a", b"x" * 8192)
    buffer = bytearray(4096)
    try:
        assert disk.pread_nowait(fd, buffer, 4096) == 4096
    except BlockingIOError:
        pytest.skip("this file system has no RWF_NOWAIT")
    assert buffer == b"x" * 4096
    disk.close(fd)


def test_a_punched_range_reads_as_zeros_and_keeps_the_size(disk: Disk) -> None:
    fd = _make(disk, "a", b"x" * 20_000)
    disk.punch(fd, 1_000, 10_000)
    assert disk.pread(fd, 30_000, 0) == b"x" * 1_000 + bytes(10_000) + b"x" * 9_000
    disk.close(fd)


def test_truncate_cuts_and_growing_again_gives_zeros(disk: Disk) -> None:
    fd = _make(disk, "a", b"x" * 10_000)
    disk.truncate(fd, 5_000)
    disk.truncate(fd, 10_000)
    assert disk.pread(fd, 20_000, 0) == b"x" * 5_000 + bytes(5_000)
    disk.close(fd)


def test_open_with_truncate_empties_the_file(disk: Disk) -> None:
    disk.close(_make(disk, "a", b"x" * 100))
    fd = disk.open("a", truncate=True)
    assert disk.pread(fd, 100, 0) == b""
    disk.close(fd)


def test_opening_what_is_not_there_is_refused(disk: Disk) -> None:
    with pytest.raises(FileNotFoundError):
        disk.open("a")
    with pytest.raises(FileNotFoundError):
        disk.open("no/a", create=True)


def test_an_unlinked_file_is_readable_while_open(disk: Disk) -> None:
    fd = _make(disk, "a", b"data")
    disk.unlink("a")
    assert disk.listdir("") == []
    assert disk.pread(fd, 4, 0) == b"data"
    disk.fdatasync(fd)
    disk.close(fd)
    with pytest.raises(FileNotFoundError):
        disk.unlink("a")


def test_rename_replaces_across_directories(disk: Disk) -> None:
    disk.mkdir("d")
    disk.close(_make(disk, "d/a", b"old"))
    disk.close(_make(disk, "b", b"new"))
    disk.rename("b", "d/a")
    disk.fsync_dir("d")
    disk.fsync_dir("")
    assert read_file(disk, "d/a") == b"new"
    assert disk.listdir("") == ["d"]


def test_making_a_directory_twice_is_refused(disk: Disk) -> None:
    disk.mkdir("d")
    with pytest.raises(FileExistsError):
        disk.mkdir("d")


def test_a_lock_is_held_until_its_descriptor_closes(disk: Disk) -> None:
    fd = disk.lock("lock")
    with pytest.raises(BlockingIOError):
        disk.lock("lock")
    disk.close(fd)
    disk.close(disk.lock("lock"))


def test_space_is_positive_and_syncfs_works(disk: Disk) -> None:
    total, free = disk.space()
    assert 0 < free <= total
    disk.syncfs()


def test_replace_file_leaves_no_temporary_file(disk: Disk) -> None:
    disk.mkdir("tmp")
    replace_file(disk, "a", b"one")
    replace_file(disk, "a", b"two")
    assert read_file(disk, "a") == b"two"
    assert disk.listdir("tmp") == []


def test_punch_falls_back_to_zeros_where_holes_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FileDisk(tmp_path)

    class NoHoles:
        @staticmethod
        def fallocate(*_: int) -> int:
            import ctypes
            import errno

            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(disk, "_libc", NoHoles())
    fd = _make(disk, "a", b"x" * 100)
    disk.punch(fd, 10, 20)
    assert disk.pread(fd, 100, 0) == b"x" * 10 + bytes(20) + b"x" * 70
    disk.close(fd)


def test_a_power_cut_keeps_what_was_synced() -> None:
    for seed in range(20):
        disk = FaultyDisk()
        disk.mkdir("tmp")
        disk.fsync_dir("")
        replace_file(disk, "a", b"kept" * 5000)
        fd = disk.open("a")
        disk.pwrite(fd, b"lost", 4096)
        disk.power_cut(random.Random(seed))
        assert read_file(disk, "a")[:4096] == b"kept" * 1024


def test_power_cuts_lose_keep_and_tear_what_was_not_synced() -> None:
    outcomes = set()
    for seed in range(60):
        disk = FaultyDisk()
        fd = _make(disk, "a", bytes(4096))
        disk.fdatasync(fd)
        disk.fsync_dir("")
        disk.pwrite(fd, b"x" * 4096, 0)
        disk.close(_make(disk, "b"))
        disk.power_cut(random.Random(seed))
        found = read_file(disk, "a").count(b"x")
        outcomes.add("all" if found == 4096 else "torn" if found else "none")
        outcomes.add("named" if "b" in disk.listdir("") else "nameless")
    assert outcomes == {"all", "torn", "none", "named", "nameless"}


def test_a_full_faulty_disk_writes_what_fits_and_then_refuses() -> None:
    disk = FaultyDisk()
    disk.capacity = 8192
    fd = disk.open("a", create=True)
    assert disk.pwrite(fd, bytes(12_288), 0) == 8192
    with pytest.raises(OSError, match="No space"):
        disk.pwrite(fd, b"x", 8192)
    disk.close(fd)
