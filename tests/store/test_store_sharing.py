"""Copies that share blocks: what they hold, and what happens when what they share goes."""

from __future__ import annotations

import itertools
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from store_helpers import copy, flush, get, level, open_store, put, trust

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import CorruptError, ObjectNotFoundError, RetryableError
from sheepfs.core.geometry import data_object, make_layer, map_object
from sheepfs.core.wire import Buffer
from storaged.store.format import Sources
from storaged.store.objects import ObjectStore

_LAYERS = [make_layer(serial, 5, 3) for serial in range(1, 6)]
A, B, C, D, E = (data_object(layer, 0) for layer in _LAYERS)
_DATA = random.Random(5).randbytes(64 << 10)
_BLOCK = 4096


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def store(disk: FaultyDisk) -> ObjectStore:
    return open_store(disk, reserve_bytes=0)


def _allocated(store: ObjectStore, oid: int) -> int:
    entry = store.get(oid)
    assert entry is not None
    return entry.info().allocated


def _file(oid: int, pg: int = A % 4) -> str:
    return f"objects/3/{pg:04x}/{oid:016x}"


def test_a_copy_takes_space_for_what_is_written_to_it_only(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 5000, b"new")
    expected = _DATA[:5000] + b"new" + _DATA[5003:]
    assert get(store, B, 0, len(_DATA)) == expected
    assert get(store, A, 0, len(_DATA)) == _DATA
    assert _allocated(store, B) == _BLOCK
    assert store.usage().used_by_objects == len(_DATA) + _BLOCK
    assert store.layout(B).layers == (_LAYERS[0],)
    assert store.dependents(A) == [B]
    assert store.verify(B) == []


def test_map_objects_are_copied_too(store: ObjectStore) -> None:
    base, oid = (map_object(layer, 3) for layer in _LAYERS[:2])
    put(store, base, 0, _DATA, create=True)
    copy(store, base, oid)
    assert get(store, oid, 0, len(_DATA)) == _DATA
    assert store.dependents(base) == [oid]


def test_a_copy_of_a_copy_names_the_real_holders(store: ObjectStore) -> None:
    put(store, A, 0, _DATA[:12_288], create=True)
    copy(store, A, B, 0, b"b" * _BLOCK)
    copy(store, B, C, _BLOCK, b"c" * _BLOCK)
    layout = store.layout(C)
    holders = [layout.layers[source - 1] if source else 0 for source in layout.sources[:4]]
    assert holders == [_LAYERS[1], 0, _LAYERS[0], 0]
    assert get(store, C, 0, 12_288) == b"b" * _BLOCK + b"c" * _BLOCK + _DATA[8192:12_288]


def test_a_write_to_a_base_leaves_its_copies_as_they_are(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B)
    copy(store, B, C)
    put(store, A, 100, b"changed")
    store.punch(A, 8192, 8192, 77)
    for oid in (B, C):
        assert get(store, oid, 0, len(_DATA)) == _DATA
        assert _allocated(store, oid) == 3 * _BLOCK
    put(store, A, 0, b"void", create=True)
    store.delete(A)
    assert get(store, C, 0, len(_DATA)) == _DATA
    assert store.dependents(A) == []
    assert store.layout(C).sources == bytes(1024)


def test_unshared_copies_let_their_base_go_at_no_cost(disk: FaultyDisk, store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    flush(store)
    store.trim_marks()
    with pytest.raises(RetryableError):
        store.unshare(B, A)
    store.mark([B])
    store.unshare(B, A)
    assert store.dependents(A) == []
    disk.calls.clear()
    store.delete(A)
    assert disk.calls == ["unlink"]
    assert get(store, B, 0, len(_DATA)) == b"x" + _DATA[1:]


@pytest.mark.parametrize("seed", range(20))
def test_a_flush_of_a_copy_covers_what_it_inherits(seed: int) -> None:
    disk = FaultyDisk()
    store = open_store(disk)
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    flush(store, _LAYERS[1])
    disk.power_cut(random.Random(seed))
    store = open_store(disk)
    trust(store, B)
    assert get(store, B, 0, len(_DATA)) == b"x" + _DATA[1:]


@pytest.mark.parametrize("seed", range(30))
def test_a_block_that_became_own_is_old_or_new_after_a_power_cut(seed: int) -> None:
    disk = FaultyDisk()
    store = open_store(disk)
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B)
    flush(store)
    put(store, B, 0, b"n" * _BLOCK)
    job = store.begin_flush(None)  # Its header is written, and the power goes before its sync.
    assert job is not None
    disk.power_cut(random.Random(seed))
    store = open_store(disk)
    store.launder(B, 1)
    assert get(store, B, 0, len(_DATA)) in (_DATA, b"n" * _BLOCK + _DATA[_BLOCK:])


@pytest.mark.parametrize("seed", range(30))
def test_a_base_may_be_deleted_and_the_power_go(seed: int) -> None:
    disk = FaultyDisk()
    store = open_store(disk)
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    flush(store)
    store.delete(A)
    disk.power_cut(random.Random(seed))
    store = open_store(disk)
    store.launder(B, 1)
    assert get(store, B, 0, len(_DATA)) == b"x" + _DATA[1:]


def test_a_header_on_disk_names_no_base_that_is_gone(disk: FaultyDisk, store: ObjectStore) -> None:
    put(store, A, 0, b"a", create=True)
    copy(store, A, B, 0, b"b")
    store.delete(A)
    disk.kill()
    store = open_store(disk)
    store.launder(B, 1)
    assert get(store, B, 0, 1) == b"b"


@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_block_that_an_heir_names_stays_its_holders_own_after_a_crash(
    disk: FaultyDisk, store: ObjectStore, is_flushed: bool
) -> None:
    put(store, A, 0, b"a" * _BLOCK, create=True)
    copy(store, A, B)
    if is_flushed:
        flush(store)
    put(store, B, 0, b"b" * _BLOCK)
    assert not store.can_be_copied(B)
    copy(store, B, C)
    assert store.can_be_copied(B)
    disk.kill()
    store = open_store(disk)
    for oid in store.suspects():
        store.launder(oid, 1)
    assert get(store, B, 0, 1) == get(store, C, 0, 1) == b"b"
    store.delete(A)
    assert get(store, C, 0, 1) == b"b"


def test_blocks_of_a_base_that_vanished_are_damaged_never_zeros(
    disk: FaultyDisk, store: ObjectStore
) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    put(store, C, 0, b"x" + _DATA[1:], create=True)
    store.close()
    disk.unlink(_file(A))
    store = open_store(disk)
    with pytest.raises(CorruptError) as caught:
        get(store, B)
    assert caught.value.blocks == tuple(range(1, 16))
    assert get(store, B, 0, 1) == b"x"
    assert store.verify(B) == list(range(1, 16))
    level(store, C, B, 9)
    assert get(store, B, 0, len(_DATA)) == b"x" + _DATA[1:]
    assert _allocated(store, B) == len(_DATA)
    flush(store)
    assert store.verify(B) == []


def test_laundering_a_copy_whose_base_vanished_invents_nothing(
    disk: FaultyDisk, store: ObjectStore
) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    flush(store)
    disk.kill()
    disk.unlink(_file(A))
    store = open_store(disk)
    store.launder(B, 1)
    assert get(store, B, 0, _BLOCK) == b"x" + _DATA[1:_BLOCK]
    with pytest.raises(CorruptError):
        get(store, B, _BLOCK, _BLOCK)


def test_a_copy_whose_sources_are_lost_is_not_laundered(
    disk: FaultyDisk, store: ObjectStore
) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    flush(store)
    disk.kill()
    disk.rot(_file(B), (4 << 20) + 600)
    store = open_store(disk)
    with pytest.raises(CorruptError):
        store.launder(B, 1)
    put(store, C, 0, _DATA, create=True)
    level(store, C, B, 9)
    assert get(store, B, 0, len(_DATA)) == _DATA


def test_a_copy_with_a_damaged_table_keeps_its_blocks_when_the_base_goes(
    disk: FaultyDisk, store: ObjectStore
) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    store.close()
    disk.rot(_file(B), (4 << 20) + 5000)
    store = open_store(disk)
    with pytest.raises(CorruptError):
        get(store, B)
    store.delete(A)
    flush(store)
    store.trim_marks()
    disk.kill()
    store = open_store(disk)
    with pytest.raises(CorruptError):
        get(store, B)
    put(store, C, 0, b"x" + _DATA[1:], create=True)
    assert level(store, C, B, 9).size == 0, "all that it inherited is still there"


def test_a_bad_block_of_a_base_is_bad_in_its_copies(disk: FaultyDisk, store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B)
    flush(store)
    disk.rot(_file(A), 5000)
    for wait in (True, False):
        with pytest.raises(CorruptError) as caught:
            store.read(B, 0, len(_DATA), wait=wait)
        assert caught.value.blocks == (1,)
    store.delete(A)
    with pytest.raises(CorruptError):
        get(store, B)
    assert store.verify(B) == [1]


def test_inherited_blocks_are_read_from_the_page_cache(disk: FaultyDisk) -> None:
    store = open_store(disk)
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x" * _BLOCK)
    for offset, length in ((0, _BLOCK), (_BLOCK, _BLOCK), (100, 20_000)):
        assert store.read(B, offset, length, wait=False) is not None
    store.close()
    store = open_store(disk)
    get(store, B, 0, _BLOCK)
    assert store.read(B, 0, _BLOCK, wait=False) is not None
    assert store.read(B, _BLOCK, _BLOCK, wait=False) is None, "the base is not open"


def test_quarantined_copies_are_whole(disk: FaultyDisk, store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    copy(store, B, C)
    store.quarantine(B)
    store.delete(A)
    assert get(store, C, 0, len(_DATA)) == b"x" + _DATA[1:]
    name = next(n for n in disk.listdir("quarantine") if n.startswith(f"{B:016x}"))
    assert disk.pread(disk.open(f"quarantine/{name}"), 65_536, 0) == b"x" + _DATA[1:]


@pytest.mark.parametrize("clean", [True, False])
def test_who_inherits_is_known_after_a_restart(disk: FaultyDisk, clean: bool) -> None:
    store = open_store(disk)
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"x")
    copy(store, B, C, 8192, b"y")
    flush(store)
    store.close(clean)
    store = open_store(disk)
    for oid in store.suspects():
        trust(store, oid)
    assert sorted(store.dependents(A)) == [B, C]
    assert store.dependents(B) == [C]
    store.delete(A)
    store.delete(B)
    assert get(store, C, 0, len(_DATA)) == b"x" + _DATA[1:8192] + b"y" + _DATA[8193:]


def test_a_copy_needs_a_good_base(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFoundError):
        copy(store, A, B)
    assert store.get(B) is None


def test_a_thousand_copies_read_like_one(disk: FaultyDisk) -> None:
    store = open_store(disk, reserve_bytes=0)
    chain = [data_object(make_layer(serial, 5, 3), 0) for serial in range(1, 1001)]
    content = bytearray(_DATA * 20)
    put(store, chain[0], 0, bytes(content), create=True)
    for i, (base, oid) in enumerate(itertools.pairwise(chain)):
        offset = i * _BLOCK % len(content)
        content[offset : offset + 4] = i.to_bytes(4, "little")
        copy(store, base, oid, offset, i.to_bytes(4, "little"))
    last = chain[-1]
    assert get(store, last, 0, len(content)) == content
    assert len(store.layout(last).layers) <= 255
    flush(store)
    store.close()
    store = open_store(disk)
    assert get(store, last, 0, len(content)) == content
    disk.calls.clear()
    for offset in range(0, len(content), _BLOCK):
        data = store.read(last, offset, _BLOCK, wait=False)
        if data is None:  # The base is not open yet, or not any more.
            get(store, last, offset, _BLOCK)
            data = store.read(last, offset, _BLOCK, wait=False)
    disk.calls.clear()
    for offset in range(0, len(content), _BLOCK):
        assert store.read(last, offset, _BLOCK, wait=False) is not None
    assert len(disk.calls) <= 2 * len(content) // _BLOCK, "own file, then at once the holder's"


def test_what_a_peer_shares_is_shared_here(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    copy(store, A, B, 0, b"b")
    copy(store, B, C, 8192, b"c")
    wanted = store.layout(C)
    put(store, E, 0, get(store, C, 0, len(_DATA)), create=True)
    store.mark([D])
    store.inherit(D, store.compose(D, wanted, {A, B}), pool=3, pg=A % 4)
    entry = store.get(D)
    assert entry is not None
    assert (entry.version, entry.suspect, entry.info().allocated) == (0, True, 0)
    assert level(store, E, D, 9, pg=A % 4).size == _BLOCK
    assert get(store, D, 0, len(_DATA)) == get(store, C, 0, len(_DATA))
    assert _allocated(store, D) == _BLOCK


def test_nothing_is_inherited_from_an_object_that_is_not_level(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    found = store.compose(B, Sources(b"\1" * 1024, (_LAYERS[0],)), set())
    assert found.overlay is None
    assert found.table == bytes(8192)


# --- dying half-way ---


class _Killed(BaseException):
    """The process ended."""


class DyingDisk(FaultyDisk):
    """Ends the process at the call after `calls_left` more that change something."""

    calls_left = 1 << 40

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise _Killed

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        self._count()
        return int(super().pwrite(fd, data, offset))

    def punch(self, fd: int, offset: int, length: int, /) -> None:
        self._count()
        super().punch(fd, offset, length)

    def fdatasync(self, fd: int, /) -> None:
        self._count()
        super().fdatasync(fd)

    def fsync_dir(self, path: str) -> None:
        self._count()
        super().fsync_dir(path)

    def unlink(self, path: str) -> None:
        self._count()
        super().unlink(path)


def _reclaim_all(store: ObjectStore) -> None:
    put(store, B, 8192, b"later" * 1000)
    flush(store)
    store.mark([C])
    store.unshare(C, A)
    store.delete(A)
    flush(store)
    store.delete(B)
    flush(store)


@pytest.mark.parametrize("power", [True, False])
def test_whenever_the_process_dies_copies_stay_whole(power: bool) -> None:
    def prepared() -> tuple[DyingDisk, ObjectStore]:
        disk = DyingDisk()
        store = open_store(disk, reserve_bytes=0)
        put(store, A, 0, _DATA, create=True)
        copy(store, A, B, 0, b"b")
        copy(store, B, C, 5000, b"c")
        flush(store)
        return disk, store

    disk, store = prepared()
    disk.calls_left = 1 << 20
    _reclaim_all(store)
    total = (1 << 20) - disk.calls_left
    old_b = b"b" + _DATA[1:]
    new_b = old_b[:8192] + b"later" * 1000 + old_b[8192 + 5000 :]
    whole_c = old_b[:5000] + b"c" + old_b[5001:]
    assert total > 20
    for count in range(total + 1):
        disk, store = prepared()
        disk.calls_left = count
        with suppress(_Killed):
            _reclaim_all(store)
        disk.calls_left = 1 << 40
        if power:
            disk.power_cut(random.Random(count))
        else:
            disk.kill()
        store = open_store(disk, reserve_bytes=0)
        for oid in store.suspects():
            store.launder(oid, 1)
        assert get(store, C, 0, len(_DATA)) == whole_c
        if store.get(A) is not None:
            assert get(store, A, 0, len(_DATA)) == _DATA
        if store.get(B) is not None:
            found = get(store, B, 0, len(_DATA))
            for at in range(0, len(_DATA), 512):
                assert found[at : at + 512] in (old_b[at : at + 512], new_b[at : at + 512])
        _reclaim_all(store) if store.get(B) else store.delete(A)
        assert get(store, C, 0, len(_DATA)) == whole_c


def test_threads_unshare_beside_readers_and_flushes(tmp_path: Path) -> None:
    store = ObjectStore.open(tmp_path, cluster="c", create=True, reserve_bytes=0)
    stop = threading.Event()
    errors: list[BaseException] = []

    def read(oid: int) -> None:
        while not stop.is_set():
            try:
                assert get(store, oid, 0, len(_DATA)) == _DATA
            except RetryableError:
                continue
            except BaseException as error:
                errors.append(error)
                return

    def unshare(oid: int, base: int) -> None:
        store.mark([oid])
        store.unshare(oid, base)

    oids = [data_object(make_layer(serial, 5, 3), 0) for serial in range(1, 12)]
    put(store, oids[0], 0, _DATA, create=True)
    for base, oid in itertools.pairwise(oids):
        copy(store, base, oid)
    readers = [threading.Thread(target=read, args=(oid,)) for oid in oids[-3:]]
    for thread in readers:
        thread.start()
    for base in oids[:-3]:
        workers = [
            threading.Thread(target=unshare, args=(oid, base)) for oid in store.dependents(base)
        ]
        for thread in workers:
            thread.start()
        flush(store)
        for thread in workers:
            thread.join()
        store.delete(base)
        copy(store, oids[-1], oids[-2])
    stop.set()
    for thread in readers:
        thread.join()
    assert errors == []
    for oid in oids[-3:]:
        assert store.verify(oid) == []
    store.close()
