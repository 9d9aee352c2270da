from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core import geometry
from sheepfs.core.geometry import (
    MAX_LAYER,
    MAX_SERIAL,
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    copies_of,
    data_object,
    describe_oid,
    format_oid,
    index_of,
    is_map_object,
    layer_of,
    make_layer,
    map_object,
    object_count,
    pg_of,
    pool_of,
    serial_of,
    split,
    tag_of,
)

layers = st.integers(0, MAX_LAYER)
indexes = st.integers(0, 2**28 - 1)
serials = st.integers(1, MAX_SERIAL)
tags = st.integers(0, 63)
copies = st.integers(1, 5)


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
    assert describe_oid(map_object(7, 12)) == "map layer 0x7 index 12"


def test_groups_of_objects_are_pinned() -> None:
    """They tell where data lies: a change loses every object from sight."""
    layer = make_layer(5, 1, 3)
    assert [pg_of(data_object(layer, i), 256) for i in range(6)] == [10, 195, 125, 54, 240, 169]
    assert pg_of(map_object(layer, 0), 256) == 10


@given(serials, tags, copies, serials, indexes)
def test_a_family_shares_its_groups(s1: int, tag: int, count: int, s2: int, index: int) -> None:
    first, second = make_layer(s1, tag, count), make_layer(s2, tag, count)
    assert (serial_of(first), tag_of(first), copies_of(first)) == (s1, tag, count)
    for make in (data_object, map_object):
        assert pool_of(make(first, index)) == count
        assert pg_of(make(first, index), 256) == pg_of(make(second, index), 256)


def test_families_spread_over_groups() -> None:
    """The first object of every disk is the hottest one."""
    layers = [make_layer(9, tag, 3) for tag in range(64)]
    assert len({pg_of(data_object(layer, 0), 256) for layer in layers}) > 50


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
