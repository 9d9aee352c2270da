"""The record log, the dirty log and the tokens."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import CorruptError, DiskError, NoSpaceError
from storaged.store import dirtylog
from storaged.store.dirtylog import DirtyLog
from storaged.store.disk import Health, read_file
from storaged.store.recordlog import RecordLog
from storaged.store.tokens import TokenLog


@pytest.fixture
def disk() -> FaultyDisk:
    return _disk()


def _disk() -> FaultyDisk:
    disk = FaultyDisk()
    disk.mkdir("tmp")
    disk.fsync_dir("")
    return disk


def _log(disk: FaultyDisk) -> RecordLog:
    return RecordLog(disk, "log", b"TESTTEST", "<Q")


def test_records_are_read_back_in_order(disk: FaultyDisk) -> None:
    log = _log(disk)
    log.rewrite([(7,), (8,)])
    log.append([(9,)])
    log.append([(1,), (2,)])
    assert _log(disk).load() == ([(7,), (8,), (9,), (1,), (2,)], False)


def test_a_missing_or_foreign_log_is_damaged(disk: FaultyDisk) -> None:
    assert _log(disk).load() == ([], True)
    disk.close(disk.open("log", create=True))
    assert _log(disk).load() == ([], True)
    RecordLog(disk, "log", b"OTHEROTH", "<Q").rewrite([])
    assert _log(disk).load() == ([], True)


@given(st.lists(st.integers(1, 700), max_size=5), st.integers(0, 1 << 32))
def test_a_power_cut_in_an_append_loses_nothing_appended_before(
    batches: list[int], seed: int
) -> None:
    disk = _disk()
    log = _log(disk)
    log.rewrite([])
    for size in batches:
        log.append([(i,) for i in range(size)])
    durable = [(i,) for size in batches for i in range(size)]
    disk.faults["fdatasync"] = errno.EIO
    with pytest.raises(OSError, match="sync failed"):
        log.append([(i,) for i in range(600)])
    disk.faults.clear()
    disk.power_cut(random.Random(seed))
    records, damaged = _log(disk).load()
    assert not damaged
    assert records[: len(durable)] == durable


@pytest.mark.parametrize("record", [0, 1, 2, 3])
def test_rot_of_a_durable_record_is_damage(disk: FaultyDisk, record: int) -> None:
    log = _log(disk)
    log.rewrite([(1,), (2,)])
    log.append([(3,), (4,)])
    log.append([(5,)])
    disk.rot("log", 32 + 16 * record + 3)
    records, damaged = _log(disk).load()
    assert damaged
    assert len(records) == 4


def test_a_log_cut_short_is_damaged(disk: FaultyDisk) -> None:
    _log(disk).rewrite([(1,), (2,)])
    fd = disk.open("log")
    disk.truncate(fd, 32 + 16)
    assert _log(disk).load() == ([(1,)], True)


def _dirty(disk: FaultyDisk) -> DirtyLog:
    log = DirtyLog(disk, Health())
    log.reset(())
    return log


def test_marks_are_on_disk_when_mark_returns(disk: FaultyDisk) -> None:
    log = _dirty(disk)
    log.mark([5, 6])
    log.mark([6, 7])
    disk.power_cut(random.Random(1))
    assert DirtyLog(disk, Health()).load() == ({5, 6, 7}, False)


def test_marking_what_is_marked_costs_no_write(disk: FaultyDisk) -> None:
    log = _dirty(disk)
    log.mark([5])
    disk.calls.clear()
    log.mark([5])
    assert disk.calls == []


def test_trim_keeps_unclean_and_just_marked_objects(disk: FaultyDisk) -> None:
    log = _dirty(disk)
    log.mark([1, 2, 3])
    with log.lock:
        assert log.use(1)
        assert log.use(2)
        assert not log.use(9)
    log.trim(lambda: {1})
    assert log.marked == {1, 3}
    log.trim(lambda: {1})
    assert log.marked == {1}
    assert DirtyLog(disk, Health()).load() == ({1}, False)


def test_the_log_asks_for_a_trim_when_it_is_long(
    disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirtylog, "MAX_MARKS", 10)
    log = _dirty(disk)
    log.mark(range(10))
    assert not log.needs_trim
    log.mark([10])
    assert log.needs_trim
    log.trim(lambda: set(range(11)))
    assert not log.needs_trim, "a hot set larger than the bound must not be trimmed all the time"
    log.mark(range(11, 23))
    assert log.needs_trim


def test_a_full_disk_refuses_marks_and_keeps_the_log(disk: FaultyDisk) -> None:
    log = _dirty(disk)
    log.mark([1])
    disk.faults["pwrite"] = errno.ENOSPC
    with pytest.raises(NoSpaceError):
        log.mark([2])
    log.trim(set)  # No space for the shorter log: the long one stays.
    disk.faults.clear()
    assert 2 not in log.marked
    log.mark([3])
    assert DirtyLog(disk, Health()).load()[0] >= {3}


def test_a_failed_sync_of_the_dirty_log_is_final(disk: FaultyDisk) -> None:
    log = _dirty(disk)
    disk.faults["fdatasync"] = errno.ENOSPC
    with pytest.raises(DiskError):
        log.mark([1])
    disk.faults.clear()
    with pytest.raises(DiskError):
        log.mark([2])


def _tokens(disk: FaultyDisk) -> TokenLog:
    log = TokenLog(disk, Health())
    log.load()
    return log


def test_tokens_only_grow_and_survive_a_power_cut(disk: FaultyDisk) -> None:
    TokenLog(disk, Health()).create()
    log = _tokens(disk)
    log.set(1, 10)
    log.set(1, 9)
    log.set(2, 3)
    disk.power_cut(random.Random(3))
    assert _tokens(disk).all() == {1: 10, 2: 3}


def test_the_token_log_is_compacted(disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.store.tokens._SLACK", 10)
    TokenLog(disk, Health()).create()
    log = _tokens(disk)
    for token in range(1, 100):
        log.set(1, token)
    assert len(read_file(disk, "tokens.log")) < 20 * 24
    assert _tokens(disk).all() == {1: 99}


def test_a_damaged_token_log_is_refused(disk: FaultyDisk) -> None:
    TokenLog(disk, Health()).create()
    log = _tokens(disk)
    log.set(1, 10)
    log.set(2, 10)
    disk.rot("tokens.log", 33)
    with pytest.raises(CorruptError):
        _tokens(disk)
