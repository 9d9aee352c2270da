"""What may go, against the plain definition: an object is dead when no map names it."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import BLOCK_SIZE, MAP_ENTRIES_PER_BLOCK
from storaged.logic.reclaim import Family, Live, LiveIndexes, is_forgettable, orders, ranges

entries = st.dictionaries(st.integers(0, 3 * MAP_ENTRIES_PER_BLOCK - 1), st.integers(1, 6))


def pages(named: dict[int, int]) -> dict[int, bytes]:
    words = [0] * (3 * MAP_ENTRIES_PER_BLOCK)
    for index, layer in named.items():
        words[index] = layer
    raw = struct.pack(f"<{len(words)}Q", *words)
    return {i: raw[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(3)}


@given(st.lists(entries, max_size=4), st.sets(st.integers(1, 6)), st.sets(st.integers(1, 6)))
def test_what_no_map_names_is_removed_from_frozen_layers_only(
    maps: list[dict[int, int]], opened: set[int], building: set[int]
) -> None:
    live = Live()
    for named in maps:
        for number, page in pages(named).items():
            live.add_page(number, page)
    family = Family(frozenset(range(1, 7)), opened, frozenset({2}), building)
    told = {order.layer: order for order in orders(family, live.indexes)}
    assert set(told) == set(range(1, 7)) - opened - building
    for layer, order in told.items():
        kept = {index for start, end in order.live for index in range(start, end)}
        assert kept == {i for named in maps for i, owner in named.items() if owner == layer}
        assert order.keep_maps == (layer == 2)
        assert is_forgettable(order) == (not kept and layer != 2)


@given(st.sets(st.integers(0, 60)))
def test_ranges_cover_exactly_and_do_not_touch(indexes: set[int]) -> None:
    found = ranges(indexes)
    assert {i for start, end in found for i in range(start, end)} == indexes
    assert all(a[1] < b[0] for a, b in pairwise(found))


def test_a_page_that_cannot_be_is_refused() -> None:
    live = Live()
    with pytest.raises(ProtocolError):
        live.add_page(0, bytes(BLOCK_SIZE - 8))
    with pytest.raises(ProtocolError):
        live.add_page(0, struct.pack("<Q", 1 << 40) + bytes(BLOCK_SIZE - 8))


def test_live_indexes_are_found_in_ranges_of_any_order() -> None:
    ranges = [(7, 9), (1, 3), (1, 2), (0, 6), (20, 20)]
    live = LiveIndexes(ranges)
    for index in range(25):
        assert (index in live) == any(start <= index < end for start, end in ranges)
    assert 3 not in LiveIndexes([])
