"""What threads and the loop do at the same moment, with the moment chosen by the test."""

from __future__ import annotations

import random
from collections.abc import Callable

from store_helpers import copy, flush, get, open_store, put

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import RetryableError
from sheepfs.core.geometry import data_object, make_layer
from storaged.store.catalog import Catalog
from storaged.store.disk import Health
from storaged.store.entry import SUSPECT, StoredObject
from storaged.store.format import META_OFFSET
from storaged.store.objects import ObjectStore

_DATA = random.Random(6).randbytes(64 << 10)
A, B, *OTHERS = (data_object(make_layer(serial, 5, 3), 0) for serial in range(1, 40))


class InterruptedDisk(FaultyDisk):
    """Calls `meanwhile` once, within the next call of the method `moment`.

    A header that is read at that moment is torn, as by a write in another thread.
    """

    moment = ""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None

    def _interrupt(self, moment: str) -> bool:
        if self.moment != moment:
            return False
        self.moment = ""
        self.meanwhile()
        return True

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        data: bytes = super().pread(fd, length, offset)
        if offset == META_OFFSET and self._interrupt("pread"):
            return bytes(512) + data[512:]
        return data

    def fdatasync(self, fd: int, /) -> None:
        super().fdatasync(fd)
        self._interrupt("fdatasync")


def _read_others(store: ObjectStore) -> None:
    """Open so many objects that whatever may be closed is closed."""
    for _ in range(3):
        for oid in OTHERS:
            get(store, oid, 0, 4096)


def _opened(disk: FaultyDisk) -> ObjectStore:
    store = open_store(disk, reserve_bytes=0, max_open=4)
    put(store, A, 0, _DATA, create=True)
    for oid in OTHERS:
        put(store, oid, 0, _DATA[:4096], create=True)
    flush(store)
    return store


def test_an_object_that_was_being_made_when_looked_at_is_not_called_damaged() -> None:
    catalog = Catalog(Health())
    entry = StoredObject(A, 3, 0, state=SUSPECT)
    catalog.add(entry)
    assert isinstance(catalog.refusal(A), RetryableError)
    entry.state = 0
    assert isinstance(catalog.refusal(A), RetryableError)


def test_a_header_read_while_another_thread_writes_it_is_not_called_damaged() -> None:
    disk = InterruptedDisk()
    store = _opened(disk)
    _read_others(store)
    assert not store.is_open(A)
    disk.meanwhile = lambda: get(store, A, 0, 4096)
    disk.moment = "pread"
    assert get(store, A, 0, len(_DATA)) == _DATA
    assert not disk.moment
    assert store.suspects() == []


def test_an_heir_stays_open_while_it_gets_its_own_copy_whatever_is_flushed() -> None:
    disk = InterruptedDisk()
    store = _opened(disk)
    copy(store, A, B)
    flush(store)

    def flush_and_close() -> None:
        flush(store)
        _read_others(store)
        get(store, B, 0, 4096)

    disk.meanwhile = flush_and_close
    store.mark([B])
    disk.moment = "fdatasync"
    store.unshare(B, A)
    assert not disk.moment
    store.delete(A)
    flush(store)
    assert get(store, B, 0, len(_DATA)) == _DATA
    _read_others(store)
    assert get(store, B, 0, len(_DATA)) == _DATA
    assert store.verify(B) == []
