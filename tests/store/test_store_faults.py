"""ObjectStore on a disk that fills up, fails and loses power."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from store_helpers import copy, flush, get, level, open_store, put, trust

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import (
    DiskError,
    NoSpaceError,
    ObjectNotFoundError,
    RecoveringError,
)
from sheepfs.core.geometry import data_object
from storaged.store.disk import DiskSpace
from storaged.store.entry import SUSPECT
from storaged.store.objects import ObjectStore

A = data_object(7, 0)
B = data_object(8, 1)
C = data_object(9, 1)
_DATA = random.Random(5).randbytes(1 << 20)
_MANY = [data_object(9, i) for i in range(40)]


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


def _fill(store: ObjectStore) -> None:
    with pytest.raises(NoSpaceError):
        _append(store)


def _append(store: ObjectStore) -> None:
    for offset in range(1 << 20, 4 << 20, 4096):
        put(store, A, offset, _DATA[:4096])


def _create(store: ObjectStore, oids: list[int]) -> None:
    for oid in oids:
        put(store, oid, 0, b"x", create=True)


# --- full ---


def test_the_reserve_is_kept_and_discard_and_delete_still_work(disk: FaultyDisk) -> None:
    disk.capacity = 4 << 20
    store = open_store(disk, reserve_bytes=1 << 20)
    put(store, A, 0, _DATA, create=True)
    put(store, B, 0, b"small", create=True)
    _fill(store)
    assert 1 << 20 <= disk.space().free < (1 << 20) + 8192
    held = get(store, A)
    version = store.get(A).version  # type: ignore[union-attr]
    with pytest.raises(NoSpaceError):
        put(store, A, (4 << 20) - 4096, b"x")
    with pytest.raises(NoSpaceError):
        put(store, data_object(1, 1), 0, b"x" * 8192, create=True)
    assert get(store, A) == held
    assert store.get(A).version == version  # type: ignore[union-attr]
    assert get(store, B, 0, 5) == b"small"
    assert store.get(data_object(1, 1)) is None
    assert store.usage().free < 8192
    put(store, A, 0, b"what is there can be overwritten")
    store.punch(A, 0, 1 << 20, 5)
    put(store, A, (4 << 20) - 4096, _DATA[:4096])
    store.delete(A)
    put(store, B, 0, _DATA)
    flush(store)


@pytest.mark.parametrize("shared", [False, True])
def test_on_a_full_disk_a_copy_goes_back_to_what_it_was_but_does_not_grow(
    disk: FaultyDisk, shared: bool
) -> None:
    disk.capacity = 4 << 20
    store = open_store(disk, reserve_bytes=1 << 20)
    base = data_object(1, 0)
    put(store, base, 0, _DATA, create=True)
    for oid in (B, C):
        if shared:
            copy(store, base, oid)
        else:
            put(store, oid, create=True)
        put(store, oid, 0, _DATA[:65_536])
    put(store, A, create=True)
    version = put(store, C, 4096, b"taken by this member, and not by another")
    put(store, C, 1 << 20, b"in a block of its own")
    _fill(store)
    with pytest.raises(NoSpaceError):
        level(store, A, data_object(1, 1), version)
    level(store, B, C, version)
    assert get(store, C) == get(store, B)
    with pytest.raises(NoSpaceError):
        level(store, A, C, version + 1)


def test_the_default_reserve_is_five_percent(disk: FaultyDisk) -> None:
    disk.capacity = 1 << 30
    store = open_store(disk)
    assert store.usage().total == 1 << 30
    assert store.usage().free == disk.space().free - (1 << 30) // 20


def test_no_space_from_the_system_in_a_hole_changes_nothing(disk: FaultyDisk) -> None:
    store = open_store(disk, reserve_bytes=0)
    put(store, A, 0, _DATA[:8192], create=True)
    put(store, A, 0, _DATA[:8192])
    disk.faults["pwrite"] = errno.ENOSPC
    with pytest.raises(NoSpaceError):
        put(store, A, 8192, _DATA[:65_536])
    with pytest.raises(NoSpaceError):
        put(store, B, 0, _DATA[:65_536], create=True)
    disk.faults.clear()
    assert store.verify(A) == []
    assert get(store, A, 0, 16_384) == _DATA[:8192] + bytes(8192)
    assert store.get(B) is None
    assert store.suspects() == []


def test_no_space_from_the_system_half_way_makes_a_suspect(disk: FaultyDisk) -> None:
    store = open_store(disk, reserve_bytes=0)
    put(store, A, 0, _DATA[:8192], create=True)
    flush(store)
    disk.faults["pwrite"] = errno.EDQUOT
    with pytest.raises(NoSpaceError):
        put(store, A, 4096, _DATA[:65_536])
    disk.faults.clear()
    with pytest.raises(RecoveringError):
        get(store, A, 0, 1)
    flush(store)
    store.trim_marks()
    disk.kill()
    store = open_store(disk)
    assert store.suspects() == [A]
    store.launder(A, 1)
    assert get(store, A, 0, 8192) == _DATA[:8192]


@pytest.mark.parametrize("room", [0, 1 << 20, (4 << 20) - 8192])
def test_a_disk_that_fills_up_within_a_patch_stays_in_use(
    disk: FaultyDisk, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(disk, reserve_bytes=0)
    for start in range(0, 4 << 20, 1 << 20):
        put(store, A, start, _DATA, create=not start)
    put(store, B, 0, b"old", create=True)
    flush(store)
    new = data_object(8, 2)
    # The last of these has no room for the new object's header only.
    for target, left in ((B, room), (new, room + 3 * 4096)):

        def look_and_fill(left: int = left) -> DiskSpace:
            # Another user of the disk takes the room between the look at it and the write.
            disk.fill(left)
            return DiskSpace(disk.capacity, 1 << 30)

        with monkeypatch.context() as patched:
            patched.setattr(disk, "space", look_and_fill)
            with pytest.raises(NoSpaceError):
                level(store, A, target, 99)
        disk.capacity = 1 << 40
    assert store.get(new) is None
    assert store.suspects() == [B]
    flush(store)
    assert get(store, A, 0, 1 << 20) == _DATA
    for target in (B, new):
        level(store, A, target, 99)
        assert get(store, target) == get(store, A)
    flush(store)
    disk.kill()
    assert open_store(disk, reserve_bytes=0).usage().objects == 3


# --- failing ---


def _every_call(store: ObjectStore) -> list[Callable[[], object]]:
    return [
        lambda: store.get(A),
        lambda: store.read(A, 0, 1, wait=False),
        lambda: store.read(A, 0, 1, wait=True),
        lambda: store.write(A, 0, b"x", 9),
        lambda: store.write(A, 0, b"x", 9, create=True, pool=3, pg=0),
        lambda: store.punch(A, 0, 1, 9),
        lambda: store.delete(A),
        lambda: store.mark([B]),
        lambda: store.write(B, 0, b"x", 9, create=True, pool=3, pg=0, base=A),
        lambda: store.punch(B, 0, 1, 9, pool=3, pg=0, base=A),
        lambda: store.unshare(B, A),
        lambda: store.sums(A),
        lambda: store.layout(A),
        lambda: store.extents(A),
        lambda: store.verify(A),
        lambda: store.quarantine(A),
        lambda: store.launder(A, 1),
        lambda: store.list(3, 0),
        lambda: store.begin_flush(None),
        lambda: store.trim_marks(),
        lambda: store.set_token(1, 1),
        lambda: store.set_node_id(1),
    ]


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_flush_every_call_fails_for_good(
    disk: FaultyDisk, count: int, number: int
) -> None:
    store = open_store(disk)
    for oid in [A, *_MANY[1:count]]:
        put(store, oid, 0, b"x", create=True)
    job = store.begin_flush(None)
    assert job is not None
    disk.faults = dict.fromkeys(("fdatasync", "syncfs", "fsync_dir"), number)
    with pytest.raises(DiskError):
        job.run()
    disk.faults.clear()
    with pytest.raises(DiskError):
        store.end_flush(job)
    with pytest.raises(DiskError):
        job.run()
    for call in _every_call(store):
        with pytest.raises(DiskError):
            call()
    with pytest.raises(DiskError):
        store.close()
    assert not open_store(disk).was_clean


def test_what_a_failed_flush_left_in_memory_only_is_not_taken_for_stored(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"old" * 4096, create=True)
    put(store, B, 0, b"old" * 4096, create=True)
    flush(store)
    store.trim_marks()
    version = put(store, A, 0, b"new" * 4096)
    job = store.begin_flush(None)
    assert job is not None
    disk.faults["fdatasync"] = errno.EIO
    with pytest.raises(DiskError):
        job.run()
    disk.fail_write_back()
    disk.faults.clear()
    store.close(clean=False)
    store = open_store(disk)
    entry = store.get(A)
    assert entry is not None
    assert entry.state == SUSPECT
    assert entry.version < version
    trust(store, A)
    assert get(store, A, 0, 12_288) == b"old" * 4096
    # What a sync succeeds with now is on the disk.
    put(store, B, 0, b"new" * 4096)
    flush(store)
    disk.power_cut(random.Random(1))
    store = open_store(disk)
    trust(store, B)
    assert get(store, B, 0, 12_288) == b"new" * 4096


@pytest.mark.parametrize("fault", ["pwrite", "punch", "truncate", "unlink", "rename"])
def test_a_failed_change_is_final(disk: FaultyDisk, fault: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "pwrite": lambda: put(store, A, 0, b"y"),
        "punch": lambda: store.punch(A, 0, 4096, 9),
        "truncate": lambda: put(store, A, 0, b"y", create=True),
        "unlink": lambda: store.delete(A),
        "rename": lambda: store.quarantine(A),
    }
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    disk.faults[fault] = errno.EIO
    with pytest.raises(DiskError):
        calls[fault]()
    disk.faults.clear()
    with pytest.raises(DiskError):
        get(store, A, 0, 1)


@pytest.mark.parametrize("fault", ["pread", "pread_nowait"])
def test_a_read_error_is_reported_and_not_final(disk: FaultyDisk, fault: str) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    disk.faults[fault] = errno.EIO
    with pytest.raises(DiskError):
        store.read(A, 0, 1, wait=fault == "pread")
    disk.faults.clear()
    assert get(store, A, 0, 1) == b"x"


def test_cold_pages_give_none_without_wait(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    put(store, A, 8192, b"y")
    disk.is_cold = True
    assert store.read(A, 0, 1, wait=False) is None
    assert store.read(A, 0, 12_288, wait=False) is None
    pieces = store.read(A, 4096, 4096, wait=False)
    assert pieces is not None
    assert b"".join(pieces) == bytes(4096), "a hole is never cold"
    assert get(store, A, 0, 1) == b"x"


# --- flushing ---


def test_a_flush_covers_what_another_has_begun_and_not_ended(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    first = store.begin_flush(7)
    second = store.begin_flush(7)
    assert first is not None
    assert second is not None, "the first has not reached the disk yet"
    second.run()
    store.end_flush(second)
    disk.power_cut(random.Random(1))
    store = open_store(disk)
    trust(store, A)
    assert get(store, A, 0, 1) == b"x"


def test_a_write_during_a_flush_needs_another_one(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    job = store.begin_flush(None)
    assert job is not None
    job.run()
    put(store, A, 0, b"y")
    store.end_flush(job)
    assert store.begin_flush(7) is not None
    flush(store)
    assert store.begin_flush(None) is None


def test_a_layers_flush_leaves_other_layers_alone(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    put(store, B, 0, b"x", create=True)
    flush(store, 7)
    assert store.begin_flush(7) is None
    assert store.begin_flush(8) is not None


def test_a_small_flush_syncs_files_and_a_large_one_the_file_system(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    flush(store)
    for oid, few in ((A, True), *((oid, False) for oid in _MANY)):
        put(store, oid, 0, b"y", create=not few)
        if few:
            disk.calls.clear()
            flush(store)
            assert disk.calls == ["pwrite", "fdatasync"]
    disk.calls.clear()
    flush(store)
    assert "syncfs" in disk.calls
    assert "fdatasync" not in disk.calls
    disk.power_cut(random.Random(2))
    store = open_store(disk)
    for oid in _MANY:
        trust(store, oid)
        assert get(store, oid, 0, 2) == b"y\0"


def test_more_objects_than_may_be_open_are_written_and_kept(disk: FaultyDisk) -> None:
    store = open_store(disk, max_open=4)
    for value in (b"1", b"2"):
        for i, oid in enumerate(_MANY):
            put(store, oid, i, value, create=value == b"1")
            assert len(disk._fds) <= 4 * 2 + 6
    for i, oid in enumerate(_MANY):
        assert get(store, oid, i, 1) == b"2"
        assert len(disk._fds) <= 4 * 2 + 6
    flush(store)
    for oid in _MANY:
        get(store, oid, 0, 1)
        assert len(disk._fds) <= 4 + 4
    disk.power_cut(random.Random(3))
    store = open_store(disk, max_open=4)
    for i, oid in enumerate(_MANY):
        trust(store, oid)
        assert get(store, oid, i, 1) == b"2"


def test_evicting_unflushed_files_syncs_them_first(disk: FaultyDisk) -> None:
    store = open_store(disk, max_open=2)
    for oid in _MANY[:4]:
        put(store, oid, 0, b"x", create=True)
    disk.faults["fdatasync"] = errno.EIO
    store._marks.marked.update(_MANY)  # Marking would sync too.
    with pytest.raises(DiskError):
        _create(store, _MANY[4:])


def test_a_trim_drops_clean_marks_and_keeps_dirty_ones(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    flush(store)
    put(store, B, 0, b"x", create=True)
    store.trim_marks()
    assert not store.is_marked(A)
    assert store.is_marked(B)


def test_a_deleted_dirty_object_stays_marked_until_the_next_flush(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    flush(store)
    put(store, A, 0, b"y")
    store.delete(A)
    store.trim_marks()
    assert store.is_marked(A)
    flush(store)
    store.trim_marks()
    assert not store.is_marked(A)


# --- power ---


def test_a_power_cut_while_a_store_is_made_leaves_one_that_can_be_made() -> None:
    for seed in range(30):
        disk = FaultyDisk()
        disk.faults["rename"] = errno.EIO
        with pytest.raises(DiskError):
            open_store(disk)
        disk.faults.clear()
        disk.power_cut(random.Random(seed))
        store = open_store(disk)
        put(store, A, 0, b"x", create=True)
        store.close()


def test_a_damaged_dirty_log_makes_every_object_a_suspect(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, b"x", create=True)
    put(store, B, 0, b"x", create=True)
    flush(store)
    disk.kill()
    disk.rot("dirty.log", 5)
    store = open_store(disk)
    assert sorted(store.suspects()) == [A, B]
    disk.kill()
    assert sorted(open_store(disk).suspects()) == [A, B]


def test_a_lost_new_object_is_absent_not_zeros() -> None:
    for seed in range(20):
        disk = FaultyDisk()
        store = open_store(disk)
        put(store, A, 0, b"x", create=True)
        disk.power_cut(random.Random(seed))
        store = open_store(disk)
        with pytest.raises((ObjectNotFoundError, RecoveringError)):
            get(store, A, 0, 1)
