"""`ObjectStore.check`: damage to data, holes, headers and tables, and no false alarms."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from store_helpers import copy, flush, open_store, put

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import CorruptError, ObjectNotFoundError, RecoveringError
from sheepfs.core.geometry import data_object, make_layer
from storaged.store.disk import FileDisk
from storaged.store.format import META_OFFSET, META_SIZE
from storaged.store.objects import ObjectStore

A = data_object(make_layer(2, 2, 3), 0)
B = data_object(make_layer(3, 2, 3), 0)
BLOCK = 4096


def stored(disk: FaultyDisk, *, reopened: bool) -> ObjectStore:
    """Give a store with one flushed object of four blocks."""
    store = open_store(disk)
    put(store, A, 0, b"a" * 4 * BLOCK, create=True, pg=0)
    flush(store)
    if reopened:
        store.close()
        store = open_store(disk)
    return store


def path_of(oid: int) -> str:
    return f"objects/3/0000/{oid:016x}"


def spoil(disk: FaultyDisk, offset: int, oid: int = A) -> None:
    fd = disk.open(path_of(oid))
    byte = disk.pread(fd, 1, offset).ljust(1, b"\0")
    disk.pwrite(fd, bytes([byte[0] ^ 1]), offset)
    disk.close(fd)


@pytest.mark.parametrize("reopened", [False, True])
def test_a_good_object_is_good_and_its_data_is_counted(reopened: bool) -> None:
    store = stored(FaultyDisk(), reopened=reopened)
    found = store.check(A)
    assert (found.is_good, found.read_bytes) == (True, 4 * BLOCK + META_SIZE)


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(("offset", "block"), [(2 * BLOCK + 5, 2), (700 * BLOCK, 700)])
def test_a_flipped_bit_is_found_in_data_and_in_holes(
    reopened: bool, offset: int, block: int
) -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=reopened)
    spoil(disk, offset)
    found = store.check(A)
    assert (found.blocks, found.is_header_bad) == ((block,), False)


@pytest.mark.parametrize("offset", [META_OFFSET + 20, META_OFFSET + BLOCK + 3])
def test_a_damaged_header_or_table_is_found_while_the_object_is_open(offset: int) -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=False)
    spoil(disk, offset)
    found = store.check(A)
    assert (found.blocks, found.is_header_bad) == ((), True)
    assert store.verify(A) == []


@pytest.mark.parametrize("offset", [META_OFFSET + 20, META_OFFSET + BLOCK + 3])
def test_a_damaged_header_or_table_makes_a_closed_object_a_damaged_one(offset: int) -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=True)
    spoil(disk, offset)
    with pytest.raises(CorruptError):
        store.check(A)
    entry = store.get(A)
    assert entry is not None
    assert entry.suspect


def test_an_older_header_than_the_store_knows_makes_a_suspect() -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=False)
    fd = disk.open(path_of(A))
    former = disk.pread(fd, META_SIZE, META_OFFSET)
    put(store, A, 0, b"b" * BLOCK)
    flush(store)
    store.close()
    store = open_store(disk)
    disk.pwrite(fd, former, META_OFFSET)
    with pytest.raises(RecoveringError):
        store.check(A)


def test_checking_leaves_open_what_is_open_and_closed_what_is_closed() -> None:
    store = stored(FaultyDisk(), reopened=True)
    assert store.check(A).is_good
    assert not store.is_open(A)
    store.sums(A)
    assert store.check(A).is_good
    assert store.is_open(A)


def test_what_is_written_and_not_flushed_is_good() -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=False)
    put(store, A, 0, b"b" * BLOCK)
    spoil(disk, META_OFFSET + 20)
    assert store.check(A).is_good, "the flush is about to write a header anyway"
    flush(store)
    assert store.check(A).is_good


def test_an_inherited_block_is_checked_where_it_lies() -> None:
    disk = FaultyDisk()
    store = stored(disk, reopened=False)
    copy(store, A, B, 0, b"b" * BLOCK)
    flush(store)
    assert store.check(B).is_good
    spoil(disk, BLOCK + 1)
    assert store.check(A).blocks == store.check(B).blocks == (1,)


def test_what_is_not_there_cannot_be_checked() -> None:
    store = stored(FaultyDisk(), reopened=False)
    with pytest.raises(ObjectNotFoundError):
        store.check(B)


def test_writes_and_flushes_beside_a_check_are_no_damage(tmp_path: Path) -> None:
    store = ObjectStore.open(tmp_path, create=True, reserve_bytes=0, disk=FileDisk(tmp_path))
    put(store, A, 0, b"a" * 64 * BLOCK, create=True, pg=0)
    done = threading.Event()
    wrong = []

    def check() -> None:
        while not done.is_set():
            found = store.check(A)
            if not found.is_good:
                wrong.append(found)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(150):
        put(store, A, turn % 60 * BLOCK, bytes([turn]) * 3 * BLOCK)
        if turn % 10 == 0:
            flush(store)
    done.set()
    for thread in threads:
        thread.join()
    store.close()
    assert wrong == []
