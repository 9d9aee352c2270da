from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core import geometry
from sheepfs.core.geometry import (
    MAX_LAYER,
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    data_object,
    describe_oid,
    format_oid,
    index_of,
    is_map_object,
    layer_of,
    map_object,
    object_count,
    pg_of,
    split,
)

layers = st.integers(0, MAX_LAYER)
indexes = st.integers(0, 2**28 - 1)


@given(layers, indexes)
def test_an_object_id_gives_back_its_parts(layer: int, index: int) -> None:
    for make, is_map in ((data_object, False), (map_object, True)):
        oid = make(layer, index)
        assert 0 <= oid < 2**64
        assert (is_map_object(oid), layer_of(oid), index_of(oid)) == (is_map, layer, index)


def test_object_ids_are_pinned() -> None:
    """They name files on disk: a change needs a new format of the store."""
    assert format_oid(data_object(7, 12)) == "000000007000000c"
    assert format_oid(map_object(7, 12)) == "800000007000000c"
    assert describe_oid(map_object(7, 12)) == "map layer 7 index 12"


def test_groups_of_objects_are_pinned() -> None:
    """They tell where data lies: a change loses every object from sight."""
    assert [pg_of(data_object(1, i), 256) for i in range(6)] == [193, 122, 52, 237, 167, 96]
    assert pg_of(map_object(1, 0), 256) == 193


@given(st.integers(0, 2**64 - 1), st.integers(1, 10_000))
def test_a_group_is_within_the_pool(oid: int, pg_count: int) -> None:
    assert 0 <= pg_of(oid, pg_count) < pg_count


@given(layers)
def test_neighbouring_objects_spread_over_groups(layer: int) -> None:
    load = Counter(pg_of(data_object(layer, index), 256) for index in range(256 * 40))
    assert len(load) == 256
    assert max(load.values()) < 60


@given(st.integers(0, MAX_VDI_SIZE), st.integers(0, 5 * OBJECT_SIZE))
def test_the_pieces_of_a_range_are_the_range(offset: int, length: int) -> None:
    position = offset
    for index, within, piece in split(offset, length):
        assert index * OBJECT_SIZE + within == position
        assert 0 < piece <= OBJECT_SIZE - within
        position += piece
    assert position == offset + length


def test_an_empty_range_has_no_pieces() -> None:
    assert list(split(12345, 0)) == []


@given(st.integers(0, MAX_VDI_SIZE))
def test_objects_cover_the_size_and_not_one_more(size: int) -> None:
    count = object_count(size)
    assert (count - 1) * OBJECT_SIZE < size <= count * OBJECT_SIZE or size == count == 0


def test_units_fit_each_other() -> None:
    assert geometry.BLOCKS_PER_OBJECT * geometry.BLOCK_SIZE == OBJECT_SIZE
    assert geometry.MAP_ENTRIES_PER_OBJECT * geometry.MAP_ENTRY_SIZE == OBJECT_SIZE
    assert object_count(MAX_VDI_SIZE) == 2**28
