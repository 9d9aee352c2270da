"""Reading data directories without their daemons: damaged, torn, foreign and healthy ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_helpers import CLUSTER, copy, flush, get, put

from sheepfs.core.errors import CorruptError, SheepError, UsageError, WrongClusterError
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE, data_object, format_oid, make_layer
from storaged.store.format import META_OFFSET
from storaged.store.objects import ObjectStore
from storaged.store.offline import OfflineDirectory
from storaged.store.salvage import Salvage, Salvaged

LAYER = make_layer(4, 1, 3)
LATER = make_layer(5, 1, 3)
OID = data_object(LAYER, 12)
HEIR = data_object(LATER, 12)
DATA = bytes(range(1, 251)) * 400
"""A little over 24 blocks."""


@contextmanager
def store_at(path: Path, clean: bool = True) -> Iterator[ObjectStore]:
    store = ObjectStore.open(path, cluster=CLUSTER, create=True)
    try:
        yield store
    finally:
        store.close(clean=clean)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A cleanly stopped directory with one object."""
    path = tmp_path / "disk"
    with store_at(path) as store:
        store.set_node_id(7)
        store.set_token(3, 99)
        put(store, OID, 0, DATA, create=True, pg=1)
        flush(store)
    return path


def file_of(path: Path, oid: int = OID) -> Path:
    (found,) = path.glob(f"objects/*/*/{format_oid(oid)}")
    return found


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def salvage(*paths: Path, oid: int = OID) -> Salvaged:
    if len(paths) == 1:
        with OfflineDirectory.open(paths[0]) as one:
            return Salvage([one]).object(oid)
    with OfflineDirectory.open(paths[0]) as one, OfflineDirectory.open(paths[1]) as two:
        return Salvage([one, two]).object(oid)


def test_a_directory_tells_whose_it_is_and_how_it_was_left(place: Path) -> None:
    with OfflineDirectory.open(place) as directory:
        assert (directory.superblock.cluster, directory.superblock.node) == (CLUSTER, 7)
        assert directory.clean
        assert (directory.marked, directory.tokens) == (set(), {3: 99})
        assert directory.oids() == [OID]
        (found,) = directory.copies(OID)
        assert directory.verify(found) == []
    with store_at(place, clean=False) as store:
        put(store, OID, 0, b"x")
    with OfflineDirectory.open(place) as directory:
        assert not directory.clean
        assert directory.marked == {OID}


def test_looking_changes_nothing_not_even_a_time(place: Path) -> None:
    paths = [place, *place.rglob("*")]

    def state() -> dict[Path, tuple[int, ...]]:
        stats = {path: path.stat() for path in paths}
        return {
            path: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_atime_ns)
            for path, s in stats.items()
        }

    for path in paths:
        os.utime(path, (1e9, 1.1e9))  # Read before it was changed: the kernel would renew that.
    before = state()
    with OfflineDirectory.open(place) as directory:
        for oid in directory.oids():
            for found in directory.copies(oid):
                directory.verify(found)
    assert state() == before
    with store_at(place) as store:
        assert store.was_clean


def test_a_directory_in_use_is_refused_and_a_daemon_is_kept_away(place: Path) -> None:
    with store_at(place), pytest.raises(UsageError, match="a storage daemon runs there"):
        OfflineDirectory.open(place).__enter__()
    with OfflineDirectory.open(place), OfflineDirectory.open(place), pytest.raises(UsageError):
        ObjectStore.open(place)
    with store_at(place) as store:
        assert store.was_clean


def test_a_copy_without_a_lock_file_is_read_and_gets_none(place: Path) -> None:
    (place / "lock").unlink()
    with OfflineDirectory.open(place) as directory:
        assert directory.oids() == [OID]
    assert not (place / "lock").exists()


def test_what_is_no_data_directory_is_refused_with_a_reason(place: Path, tmp_path: Path) -> None:
    def refusal(path: Path, kind: type[SheepError]) -> str:
        with pytest.raises(kind) as caught, OfflineDirectory.open(path):
            pass
        return str(caught.value)

    assert "no directory" in refusal(tmp_path / "nowhere", UsageError)
    (tmp_path / "file").write_text("x")
    assert "not a directory" in refusal(tmp_path / "file", UsageError)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("x")
    assert "no data directory" in refusal(tmp_path / "home", WrongClusterError)
    superblock = place / "sheepfs.json"
    good = superblock.read_text()
    superblock.write_text(json.dumps(json.loads(good) | {"format": 9}))
    assert "format 9" in refusal(place, WrongClusterError)
    superblock.write_text(good.replace(CLUSTER, "d00f"))
    assert "checksum" in refusal(place, CorruptError)
    superblock.write_text(good[:40])
    assert "damaged" in refusal(place, CorruptError)


def test_a_lost_superblock_can_be_borrowed_from_another_node(place: Path, tmp_path: Path) -> None:
    other = twin(tmp_path, "other", DATA, 5)
    (place / "sheepfs.json").write_bytes((other / "sheepfs.json").read_bytes())
    assert salvage(place).content()[: len(DATA)] == DATA


def test_a_flipped_bit_is_found_and_only_its_block_is_lost(place: Path) -> None:
    change(file_of(place), 5 * BLOCK_SIZE + 1, b"\0")
    with OfflineDirectory.open(place) as directory:
        (found,) = directory.copies(OID)
        assert directory.verify(found) == [5]
    result = salvage(place)
    assert (result.lost, result.unverified) == ([5], [])
    expected = bytearray(DATA.ljust(OBJECT_SIZE, b"\0"))
    expected[5 * BLOCK_SIZE : 6 * BLOCK_SIZE] = bytes(BLOCK_SIZE)
    assert result.content() == expected


@pytest.mark.parametrize(
    ("offset", "problem"),
    [
        (META_OFFSET, "header's checksum"),
        (META_OFFSET + 24, "header's checksum"),
        (META_OFFSET + 4096 + 8, "table's checksum"),
    ],
)
def test_a_damaged_header_or_table_is_named_and_nothing_is_made_up(
    place: Path, offset: int, problem: str
) -> None:
    change(file_of(place), offset, b"\xff\xff")
    result = salvage(place)
    assert (result.version, result.blocks) == (0, {})
    (line,) = result.problems
    assert problem in line


@pytest.mark.parametrize("size", [0, 100, OBJECT_SIZE, META_OFFSET + 4096])
def test_a_file_that_was_cut_short_is_named(place: Path, size: int) -> None:
    os.truncate(file_of(place), size)
    (line,) = salvage(place).problems
    assert "ends before" in line


def test_an_object_file_of_another_format_or_name_is_no_copy(place: Path) -> None:
    other = data_object(LAYER, 13)
    path = file_of(place)
    path.rename(path.with_name(format_oid(other)))
    (path.parent / "notes.txt").write_text("x")
    with OfflineDirectory.open(place) as directory:
        assert directory.oids() == [other]
    (line,) = salvage(place, oid=other).problems
    assert "another object" in line


def test_lost_logs_make_all_suspect_and_are_told(place: Path) -> None:
    for name in ("dirty.log", "tokens.log"):
        (place / name).unlink()
    with OfflineDirectory.open(place) as directory:
        assert directory.marks_lost
        assert directory.tokens_lost
        (found,) = directory.copies(OID)
        assert found.suspect


def test_a_directory_that_cannot_be_listed_is_told(place: Path) -> None:
    (place / "objects" / "3" / "00ff").write_text("a file in place of a directory")
    with OfflineDirectory.open(place) as directory:
        assert list(directory.unlisted) == ["objects/3/00ff"]
        assert directory.oids() == [OID]


def test_inherited_blocks_are_read_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with store_at(path) as store:
        put(store, OID, 0, DATA, create=True, pg=OID % 4)
        flush(store)
        copy(store, OID, HEIR, 2 * BLOCK_SIZE, b"own" * 3000)
        flush(store)
        expected = get(store, HEIR)
    assert salvage(path, oid=HEIR).content() == expected
    with OfflineDirectory.open(path) as directory:
        (heir,) = directory.copies(HEIR)
        assert heir.sources is not None
        assert directory.verify(heir) == []
    change(file_of(path), 7 * BLOCK_SIZE, b"\0\0")
    change(file_of(path, HEIR), 3 * BLOCK_SIZE, b"\0\0")
    assert salvage(path, oid=HEIR).lost == [3, 7]
    file_of(path).unlink()
    own = {2, 4}
    lost = set(salvage(path, oid=HEIR).lost)
    assert lost.isdisjoint(own)
    assert {3, 7} < lost


def test_unreadable_sources_of_an_overlay_leave_no_copy(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with store_at(path) as store:
        put(store, OID, 0, DATA, create=True, pg=OID % 4)
        flush(store)
        copy(store, OID, HEIR, 0, b"own")
        flush(store)
    change(file_of(path, HEIR), META_OFFSET + 600, b"\xff\xff")
    result = salvage(path, oid=HEIR)
    assert result.version == 0
    assert "sources" in result.problems[0]


# -- several directories --------------------------------------------------------------------


def twin(tmp_path: Path, name: str, data: bytes, version: int, clean: bool = True) -> Path:
    path = tmp_path / name
    with store_at(path, clean) as store:
        store.mark([OID])
        store.write(OID, 0, data, version, create=True, pool=3, pg=1)
        flush(store)
    return path


def test_each_block_is_taken_from_a_copy_that_has_it(tmp_path: Path) -> None:
    one, two = (twin(tmp_path, name, DATA, 5) for name in ("one", "two"))
    change(file_of(one), 0, b"\xee")
    change(file_of(one), 4 * BLOCK_SIZE, b"\xee")
    change(file_of(two), 5 * BLOCK_SIZE, b"\xee")
    result = salvage(one, two)
    assert result.lost == []
    assert result.content() == DATA.ljust(OBJECT_SIZE, b"\0")
    change(file_of(two), 4 * BLOCK_SIZE, b"\xdd")
    assert salvage(one, two).lost == [4]


def test_the_newest_copy_wins_and_an_older_one_gives_only_equal_blocks(tmp_path: Path) -> None:
    new = bytearray(DATA)
    new[BLOCK_SIZE : 2 * BLOCK_SIZE] = b"n" * BLOCK_SIZE
    one, two = twin(tmp_path, "one", DATA, 5), twin(tmp_path, "two", bytes(new), 6)
    assert salvage(one, two).content()[: len(new)] == new
    change(file_of(two), 0, b"\xee" * 3 * BLOCK_SIZE)
    result = salvage(one, two)
    assert result.lost == [1]  # Of the others the old bytes are the same as the new ones.
    assert result.content()[:BLOCK_SIZE] == DATA[:BLOCK_SIZE]
    change(file_of(two), META_OFFSET + 4096, b"\xff" * 8)
    result = salvage(one, two)
    assert result.outdated
    assert result.content()[: len(DATA)] == DATA


def test_a_copy_without_header_still_gives_blocks_that_match(tmp_path: Path) -> None:
    one, two = (twin(tmp_path, name, DATA, 5) for name in ("one", "two"))
    change(file_of(one), META_OFFSET, b"\0" * 512)
    change(file_of(two), 3 * BLOCK_SIZE, b"\xee")
    result = salvage(one, two)
    assert (result.lost, result.outdated) == ([], False)
    assert result.content()[: len(DATA)] == DATA


def test_what_was_written_after_the_last_flush_is_given_and_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with store_at(path, clean=False) as store:
        store.mark([OID])
        store.write(OID, 0, DATA, 5, create=True, pool=3, pg=1)
        flush(store)
        store.write(OID, 2 * BLOCK_SIZE, b"later", 6)
        expected = get(store, OID)
    result = salvage(path)
    assert (result.version, result.lost, result.unverified) == (5, [], [2])
    assert result.content() == expected
    clean = twin(tmp_path, "clean", DATA, 5)
    result = salvage(path, clean)
    assert result.unverified == []
    assert result.content()[: len(DATA)] == DATA


def test_directories_of_different_clusters_are_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    ObjectStore.open(other, cluster="d00f", create=True).close()
    with pytest.raises(UsageError, match="different clusters"):
        salvage(place, other)
