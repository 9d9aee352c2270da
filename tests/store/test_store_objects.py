"""ObjectStore on a real file system: what it keeps, refuses and gives back."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_helpers import CLUSTER, apply, flush, get, level, put

from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    RecoveringError,
    RetryableError,
    UsageError,
    WrongClusterError,
)
from sheepfs.core.geometry import OBJECT_SIZE, data_object
from storaged.store.objects import ObjectStore
from storaged.store.patch import PatchBuilder

_DATA = random.Random(5).randbytes(1 << 20)
A = data_object(7, 0)
B = data_object(8, 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = _open(tmp_path, create=True)
    yield store
    store.close(clean=False)


def _open(path: Path, *, cluster: str = CLUSTER, create: bool = False) -> ObjectStore:
    return ObjectStore.open(path, cluster=cluster, create=create, reserve_bytes=0)


def _file(path: Path, oid: int, pg: int) -> Path:
    return path / "objects" / "3" / f"{pg:04x}" / f"{oid:016x}"


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


# --- reading and writing ---


@pytest.mark.parametrize("offset", [0, 1, 511, 4095, 4096, 5000, 12_288])
@pytest.mark.parametrize("length", [1, 512, 4096, 4097, 10_000, 65_536])
def test_a_write_of_any_alignment_is_read_back(
    store: ObjectStore, offset: int, length: int
) -> None:
    put(store, A, 0, _DATA[:100_000], create=True)
    put(store, A, offset, _DATA[-length:])
    expected = bytearray(_DATA[:100_000])
    expected[offset : offset + length] = _DATA[-length:]
    assert get(store, A, 0, 110_000) == bytes(expected) + bytes(10_000)
    assert get(store, A, offset, length) == _DATA[-length:]


def test_reads_of_any_alignment_give_exactly_the_range(store: ObjectStore) -> None:
    put(store, A, 8192, _DATA[:20_000], create=True)
    whole = bytes(8192) + _DATA[:20_000] + bytes(20_000)
    for offset in (0, 1, 4096, 8191, 8192, 10_000, 28_190):
        for length in (1, 4095, 4096, 9_000, 19_000):
            assert get(store, A, offset, length) == whole[offset : offset + length]


def test_a_cold_object_gives_none_in_the_loop_and_data_in_a_thread(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, _DATA[:4096], create=True)
    store.close()
    store = _open(tmp_path)
    assert store.read(A, 0, 4096, wait=False) is None
    assert get(store, A, 0, 4096) == _DATA[:4096]
    pieces = store.read(A, 0, 4096, wait=False)
    assert pieces is not None
    assert b"".join(pieces) == _DATA[:4096]
    store.close()


def test_create_voids_what_the_object_held(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    put(store, A, 5000, b"new", create=True)
    assert get(store, A) == bytes(5000) + b"new" + bytes(OBJECT_SIZE - 5003)
    assert store.usage().used_by_objects == 4096


def test_create_without_data_makes_an_object_of_zeros(store: ObjectStore) -> None:
    version = put(store, A, create=True)
    assert get(store, A) == bytes(OBJECT_SIZE)
    assert store.list(3, A % 4) == [(A, version, 0, False, False, 0)]


def test_create_in_another_group_moves_the_object(store: ObjectStore, tmp_path: Path) -> None:
    put(store, A, 0, b"old", create=True, pg=1)
    put(store, A, 0, b"new", create=True, pg=2)
    assert store.list(3, 1) == []
    assert [info.oid for info in store.list(3, 2)] == [A]
    assert not _file(tmp_path, A, 1).exists()


def test_writing_to_an_absent_object_is_refused(store: ObjectStore) -> None:
    store.mark([A])
    for call in (
        lambda: store.write(A, 0, b"x", 1),
        lambda: store.punch(A, 0, 1, 1),
        lambda: store.read(A, 0, 1, wait=True),
        lambda: store.sums(A),
        lambda: store.launder(A, 1),
    ):
        with pytest.raises(ObjectNotFoundError):
            call()
    assert store.get(A) is None


def test_writing_to_an_unmarked_object_is_refused(store: ObjectStore) -> None:
    with pytest.raises(RetryableError):
        store.write(A, 0, b"x", 1, create=True, pool=3, pg=0)
    assert store.get(A) is None
    put(store, A, 0, b"x", create=True)
    flush(store)
    store.trim_marks()
    assert not store.is_marked(A)
    with pytest.raises(RetryableError):
        store.write(A, 0, b"y", 2)
    with pytest.raises(RetryableError):
        store.punch(A, 0, 1, 2)
    assert get(store, A, 0, 1) == b"x"


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 0), (OBJECT_SIZE - 1, 2), (5, -3)])
def test_ranges_outside_an_object_are_refused(store: ObjectStore, offset: int, length: int) -> None:
    put(store, A, 0, b"x", create=True)
    with pytest.raises(UsageError):
        store.read(A, offset, length, wait=True)
    with pytest.raises(UsageError):
        store.punch(A, offset, length, 9)
    if length >= 0:
        with pytest.raises(UsageError):
            store.write(A, offset, bytes(length), 9)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (100, 50), (100, 8000), (4096, 8192), (0, OBJECT_SIZE), (5000, 100_000)],
)
def test_a_punched_range_reads_as_zeros(store: ObjectStore, offset: int, length: int) -> None:
    put(store, A, 0, _DATA[:50_000], create=True)
    store.punch(A, offset, length, 77)
    expected = bytearray(_DATA[:50_000] + bytes(OBJECT_SIZE - 50_000))
    expected[offset : offset + length] = bytes(length)
    assert get(store, A) == expected
    assert store.verify(A) == []
    entry = store.get(A)
    assert entry is not None
    assert entry.version == 77


def test_punching_gives_space_back(store: ObjectStore, tmp_path: Path) -> None:
    put(store, A, 0, _DATA, create=True)
    flush(store)
    before = _file(tmp_path, A, A % 4).stat().st_blocks
    store.punch(A, 0, 1 << 20, 9)
    assert store.usage().used_by_objects == 0
    assert _file(tmp_path, A, A % 4).stat().st_blocks < before - 1900


def test_zeros_take_no_space(store: ObjectStore, tmp_path: Path) -> None:
    put(store, A, 0, bytes(1 << 20), create=True)
    assert store.extents(A) == bytes(128)
    assert _file(tmp_path, A, A % 4).stat().st_blocks < 100
    put(store, A, 0, _DATA[:8192])
    put(store, A, 100, bytes(8092))
    assert store.extents(A)[0] == 1
    put(store, A, 0, bytes(8192))
    assert store.extents(A) == bytes(128)
    assert get(store, A) == bytes(OBJECT_SIZE)


def test_extents_name_the_blocks_that_hold_data(store: ObjectStore) -> None:
    put(store, A, 3 * 4096, _DATA[:8192], create=True)
    put(store, A, OBJECT_SIZE - 1, b"x")
    bits = int.from_bytes(store.extents(A), "little")
    assert [i for i in range(1024) if bits >> i & 1] == [3, 4, 1023]


def test_delete_removes_the_object_and_twice_is_no_error(store: ObjectStore) -> None:
    put(store, A, 0, _DATA, create=True)
    store.delete(A)
    store.delete(A)
    assert store.get(A) is None
    assert store.usage()[2:] == (0, 0, 0)
    put(store, A, 0, b"again", create=True)
    assert get(store, A, 0, 6) == b"again\0"


# --- whole objects ---


def test_a_levelled_object_is_the_same(store: ObjectStore) -> None:
    put(store, A, 9000, _DATA[:300_000], create=True)
    version = put(store, A, OBJECT_SIZE - 10, b"0123456789")
    put(store, B, 4096, _DATA[:300_000], create=True, pg=2)
    level(store, A, B, version, pg=2)
    assert get(store, B) == get(store, A)
    assert store.sums(B) == store.sums(A)
    assert store.verify(B) == []
    assert store.list(3, 2) == [store.list(3, A % 4)[0]._replace(oid=B)]


def test_a_patch_of_an_unmarked_object_changes_nothing(store: ObjectStore) -> None:
    put(store, A, 0, _DATA[:8192], create=True)
    put(store, B, 0, _DATA[4096:8192], create=True)
    digests = store.digests(A)
    found = store.difference(B, digests)
    builder = PatchBuilder(digests)
    builder.add(found.encode())
    patch = builder.patch(9, 0)
    flush(store)
    store.trim_marks()
    with pytest.raises(RetryableError):
        apply(store, A, patch, pg=A % 4)
    assert get(store, A, 0, 8192) == _DATA[:8192]
    store.mark([A])
    apply(store, A, patch, pg=A % 4)
    assert get(store, A) == get(store, B)


def test_a_few_bytes_written_to_an_object_that_came_from_a_peer_are_read(
    store: ObjectStore,
) -> None:
    put(store, A, create=True)
    level(store, A, B, 3, pg=1)
    put(store, B, 0, b"x")
    assert get(store, B, 0, 2) == b"x\0"


def test_quarantine_moves_the_file_away_and_keeps_it(store: ObjectStore, tmp_path: Path) -> None:
    store.mark([A])
    for _ in range(2):
        store.write(A, 0, _DATA[:4096], 1, create=True, pool=3, pg=0)
        store.quarantine(A)
    assert store.get(A) is None
    files = list((tmp_path / "quarantine").iterdir())
    assert [f.read_bytes()[:4096] for f in files] == [_DATA[:4096]] * 2
    assert store.usage().quarantined == 2


# --- damage ---


def test_a_flipped_byte_is_found_and_named(store: ObjectStore, tmp_path: Path) -> None:
    put(store, A, 0, _DATA[:40_960], create=True)
    flush(store)
    _flip(_file(tmp_path, A, A % 4), 5000)
    for wait in (True, False):
        with pytest.raises(CorruptError) as caught:
            store.read(A, 0, 40_960, wait=wait)
        assert caught.value.blocks == (1,)
    assert get(store, A, 8192, 4096) == _DATA[8192:12_288]
    assert store.verify(A) == [1]
    with pytest.raises(CorruptError):
        put(store, A, 5000, b"a part of the bad block")
    with pytest.raises(CorruptError):
        store.punch(A, 5000, 10, 9)
    with pytest.raises(CorruptError):
        store.difference(A, bytes(8192))
    put(store, A, 4096, _DATA[4096:8192])
    assert get(store, A, 0, 40_960) == _DATA[:40_960]


def test_a_hole_where_data_should_be_is_damage(store: ObjectStore, tmp_path: Path) -> None:
    put(store, A, 0, _DATA[:8192], create=True)
    flush(store)
    os.truncate(_file(tmp_path, A, A % 4), 4096)
    with pytest.raises(CorruptError) as caught:
        get(store, A, 0, 8192)
    assert caught.value.blocks == (1,)


@pytest.mark.parametrize("position", [OBJECT_SIZE + 8, OBJECT_SIZE + 4096])
@pytest.mark.parametrize("clean", [True, False])
def test_a_damaged_header_or_table_is_corrupt_not_gone(
    tmp_path: Path, position: int, clean: bool
) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, _DATA[:8192], create=True)
    flush(store)
    store.trim_marks()
    store.close(clean)
    _flip(_file(tmp_path, A, A % 4), position)
    store = _open(tmp_path)
    with pytest.raises(CorruptError) as caught:
        get(store, A, 0, 1)
    assert len(caught.value.blocks) == 1024
    assert store.suspects() == [A]
    assert store.list(3, A % 4)[0].suspect
    store.launder(A, 3)
    assert get(store, A, 0, 8192) == _DATA[:8192]
    store.close()


def test_a_file_that_vanished_is_not_found(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, _DATA[:8192], create=True)
    store.close()
    _file(tmp_path, A, A % 4).unlink()
    store = _open(tmp_path)
    with pytest.raises(ObjectNotFoundError):
        get(store, A, 0, 1)
    assert store.list(3, A % 4) == []
    store.close()


def test_a_swapped_file_is_a_suspect(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"old", create=True)
    flush(store)
    path = _file(tmp_path, A, A % 4)
    old = path.read_bytes()
    put(store, A, 0, b"new")
    store.close()
    path.write_bytes(old)
    store = _open(tmp_path)
    with pytest.raises(RecoveringError):
        get(store, A, 0, 3)
    assert store.suspects() == [A]
    store.close()


# --- stop and start ---


def test_a_clean_stop_keeps_everything(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    assert store.was_clean
    put(store, A, 100, _DATA, create=True)
    put(store, B, 0, b"b", create=True)
    store.set_node_id(12)
    store.set_token(3, 99)
    uuid = store.uuid
    infos = [store.list(3, pg) for pg in range(4)]
    store.close()
    store = _open(tmp_path)
    assert store.was_clean
    assert (store.node_id, store.uuid, store.tokens()) == (12, uuid, {3: 99})
    assert [store.list(3, pg) for pg in range(4)] == infos
    assert store.suspects() == []
    assert not store.is_marked(A)
    assert get(store, A, 100, 1 << 20) == _DATA
    assert store.usage().used_by_objects == sum(i.allocated for pg in infos for i in pg)
    with pytest.raises(UsageError):
        store.set_node_id(13)
    store.close()


def test_after_a_kill_the_marked_objects_are_suspects(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"clean", create=True)
    flush(store)
    store.trim_marks()
    put(store, B, 0, b"flushed", create=True)
    flush(store)
    version = store.get(B).version  # type: ignore[union-attr]
    put(store, B, 0, b"dirty!!")
    store.close(clean=False)
    store = _open(tmp_path)
    assert not store.was_clean
    assert store.suspects() == [B]
    assert store.list(3, B % 4) == [(B, version, 0, True, False, 4096)]
    assert get(store, A, 0, 5) == b"clean"
    for call in (
        lambda: get(store, B, 0, 1),
        lambda: put(store, B, 0, b"x"),
        lambda: store.punch(B, 0, 1, 9),
        lambda: store.difference(B, bytes(8192)),
        lambda: store.layout(B),
        lambda: store.extents(B),
    ):
        with pytest.raises(RecoveringError):
            call()
    assert store.verify(B) == [0]
    store.close()


def test_suspects_stay_suspects_through_any_stop(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"dirty", create=True)
    for clean in (False, True, False, True):
        store.close(clean)
        store = _open(tmp_path)
        assert store.suspects() == [A]
        store.trim_marks()
    store.close()


def test_a_laundered_suspect_holds_what_the_disk_has(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, _DATA[:20_000], create=True)
    flush(store)
    version = store.get(A).version  # type: ignore[union-attr]
    put(store, A, 4096, b"not flushed")
    store.close(clean=False)
    store = _open(tmp_path)
    store.launder(A, 6)
    assert get(store, A, 4096, 11) == b"not flushed"
    assert store.list(3, A % 4)[0][:4] == (A, version, 6, False)
    store.trim_marks()
    store.close(clean=False)
    store = _open(tmp_path)
    assert store.suspects() == []
    assert store.list(3, A % 4)[0][:4] == (A, version, 6, False)
    store.close()


def test_a_suspect_without_a_header_has_version_zero(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"data", create=True)
    store.close(clean=False)
    os.truncate(_file(tmp_path, A, A % 4), 4096)
    store = _open(tmp_path)
    assert store.list(3, A % 4)[0][:4] == (A, 0, 0, True)
    store.launder(A, 1)
    assert get(store, A, 0, 5) == b"data\0"
    store.close()


def test_suspects_are_resolved_by_patch_create_and_launder(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    oids = [data_object(1, i) for i in range(3)]
    for oid in oids:
        put(store, oid, 0, b"data", create=True)
    flush(store)
    store.close(clean=False)
    store = _open(tmp_path)
    assert sorted(store.suspects()) == oids
    put(store, A, 0, b"peer", create=True)
    level(store, A, oids[0], 9)
    put(store, oids[1], 0, b"new", create=True)
    store.launder(oids[2], 3)
    assert store.suspects() == []
    assert [get(store, oid, 0, 4) for oid in oids] == [b"peer", b"new\0", b"data"]
    store.close()


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    _open(tmp_path, create=True).close()
    (tmp_path / "tmp" / "junk").write_bytes(b"x")
    (tmp_path / "objects" / "notes.txt").write_bytes(b"not ours")
    (tmp_path / "index").write_bytes(b"garbage")
    store = _open(tmp_path)
    assert not store.was_clean
    assert list((tmp_path / "tmp").iterdir()) == []
    assert (tmp_path / "objects" / "notes.txt").exists()
    store.close()


def test_a_duplicate_of_an_object_goes_to_quarantine(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"old", create=True, pg=1)
    flush(store)
    old = _file(tmp_path, A, 1).read_bytes()
    put(store, A, 0, b"new", create=True, pg=2)
    flush(store)
    store.trim_marks()
    store.close(clean=False)
    _file(tmp_path, A, 1).write_bytes(old)
    store = _open(tmp_path)
    assert get(store, A, 0, 3) == b"new"
    assert store.usage().quarantined == 1
    store.close()


# --- whose directory ---


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WrongClusterError, match="thesis"):
        _open(tmp_path, create=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_is_no_store_is_refused_without_create(tmp_path: Path) -> None:
    with pytest.raises(WrongClusterError):
        _open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_clusters_or_nodes_directory_is_refused(tmp_path: Path) -> None:
    _open(tmp_path, create=True).close()
    with pytest.raises(WrongClusterError, match="decaf"):
        _open(tmp_path, cluster="decaf")
    with pytest.raises(WrongClusterError):
        ObjectStore.open(tmp_path, node_uuid="somebody")
    _open(tmp_path, cluster="").close()


def test_a_store_without_its_superblock_is_not_made_anew(tmp_path: Path) -> None:
    store = _open(tmp_path, create=True)
    put(store, A, 0, b"precious", create=True)
    store.close()
    (tmp_path / "sheepfs.json").unlink()
    with pytest.raises(WrongClusterError):
        _open(tmp_path, create=True)


def test_a_half_made_store_is_made_anew(tmp_path: Path) -> None:
    _open(tmp_path, create=True).close()
    (tmp_path / "sheepfs.json").unlink()
    (tmp_path / "index").unlink()
    _open(tmp_path, create=True).close()


def test_another_format_or_damaged_superblock_is_refused(tmp_path: Path) -> None:
    _open(tmp_path, create=True).close()
    path = tmp_path / "sheepfs.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 2', '"format": 3'))
    with pytest.raises(WrongClusterError, match="format 3"):
        _open(tmp_path)
    path.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(WrongClusterError, match="never released"):
        _open(tmp_path)
    path.write_text(text.replace('"node": null', '"node": 5'))
    with pytest.raises(CorruptError):
        _open(tmp_path)
    path.write_text("{}")
    with pytest.raises(CorruptError):
        _open(tmp_path)


def test_two_daemons_cannot_share_a_directory(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in use"):
        _open(tmp_path)


# --- threads ---


def test_threads_read_and_compare_beside_a_writer(store: ObjectStore) -> None:
    """Each content is one repeated byte, and version n holds byte n % 251."""
    store.mark([A])
    store.write(A, 0, bytes([1]) * 65_536, 1, create=True, pool=3, pg=0)
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = [0]

    def work(compare: bool) -> None:
        try:
            while not stop.is_set():
                try:
                    if compare:
                        found = store.difference(A, bytes(8192))
                        assert set(b"".join(found.blocks)) == {found.version % 251}
                    else:
                        get(store, A, 4096, 20_000)
                except RetryableError:
                    continue
                rounds[0] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(compare,)) for compare in (True, False)]
    for thread in threads:
        thread.start()
    version = 1
    while not errors and (version < 300 or (rounds[0] < 20 and version < 100_000)):
        version += 1
        store.write(A, 0, bytes([version % 251 or 1]) * 65_536, version - (version % 251 == 0))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert rounds[0] >= 20
