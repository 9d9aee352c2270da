"""The map of a VDI and seeking in it, each against a naive model."""

from __future__ import annotations

import struct

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    MAP_ENTRIES_PER_BLOCK,
    MAP_ENTRIES_PER_OBJECT,
    OBJECT_SIZE,
    data_object,
    index_of,
)
from sheepfs.volume.holes import seek
from sheepfs.volume.vdimap import PAGES_PER_OBJECT, VdiMap

LAYER = 7
INDEXES = (0, 1, 511, 512, 513, 16 * 512 - 1, 16 * 512, MAP_ENTRIES_PER_OBJECT - 1,
           MAP_ENTRIES_PER_OBJECT, MAP_ENTRIES_PER_OBJECT + 5)  # fmt: skip


class Cluster:
    """The stored map objects of one VDI."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.existing = 0

    def store(self, pages: dict[int, bytes]) -> None:
        self.pages.update(pages)
        for number in pages:
            self.existing |= 1 << number * MAP_ENTRIES_PER_BLOCK // MAP_ENTRIES_PER_OBJECT

    async def load(self, map_index: int, offset: int, length: int) -> bytes:
        assert self.existing >> map_index & 1
        await trio.lowlevel.checkpoint()
        first = (map_index * MAP_ENTRIES_PER_OBJECT * 8 + offset) // BLOCK_SIZE
        count = length // BLOCK_SIZE
        return b"".join(self.pages.get(first + i, bytes(BLOCK_SIZE)) for i in range(count))

    def look(self, vdi_map: VdiMap) -> None:
        """Tell a map which pages are stored."""
        for map_index in range(self.existing.bit_length()):
            if self.existing >> map_index & 1:
                base = map_index * PAGES_PER_OBJECT
                filled = [n - base for n in self.pages if base <= n < base + PAGES_PER_OBJECT]
                vdi_map.take_empty(map_index, sum(1 << n for n in filled))

    def named(self) -> set[int]:
        return {
            number * MAP_ENTRIES_PER_BLOCK + entry
            for number, page in self.pages.items()
            for entry, layer in enumerate(struct.unpack("<512Q", page))
            if layer
        }


async def owner(vdi_map: VdiMap, index: int) -> int:
    if vdi_map.get(index) is None:
        await vdi_map.load(index)
    layer = vdi_map.get(index)
    assert layer is not None
    return layer


Steps = st.lists(
    st.tuples(
        st.sampled_from(
            ("create", "created", "failed", "discard", "flush", "fail", "reopen", "reopen and look")
        ),
        st.sampled_from(INDEXES),
    ),
    max_size=40,
)


@given(Steps)
@settings(max_examples=60, deadline=None)
def test_the_map_is_what_was_made_and_stored_is_only_what_is_complete(
    steps: list[tuple[str, int]],
) -> None:
    async def run() -> None:
        cluster = Cluster()
        vdi_map = VdiMap(0, cluster.load)
        owned: set[int] = set()
        creating: set[int] = set()
        for step, index in steps:
            layer = await owner(vdi_map, index)
            assert (layer == LAYER) == (index in owned | creating)
            if step == "create" and not layer:
                vdi_map.begin_create(index, LAYER)
                creating.add(index)
            elif step in ("created", "failed") and index in creating:
                vdi_map.end_create(index, step == "created")
                creating.remove(index)
                if step == "created":
                    owned.add(index)
            elif step == "discard" and index in owned:
                vdi_map.discard(index)
                owned.remove(index)
            elif step == "flush":
                cluster.store(vdi_map.take_dirty())
                vdi_map.existing = cluster.existing
                assert not vdi_map.is_dirty
                assert cluster.named() == owned
            elif step == "fail":
                vdi_map.give_back(set(vdi_map.take_dirty()))
            elif step in ("reopen", "reopen and look"):
                owned = cluster.named()
                creating.clear()
                vdi_map = VdiMap(cluster.existing, cluster.load)
                if step == "reopen and look":
                    cluster.look(vdi_map)
        cluster.store(vdi_map.take_dirty())
        assert cluster.named() == owned

    trio.run(run)


@given(
    st.sets(st.sampled_from(INDEXES)), st.booleans(), st.sampled_from(INDEXES),
    st.sampled_from(INDEXES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_skipping_holes_never_skips_what_is_owned(
    owned: set[int], loaded: bool, start: int, end: int
) -> None:
    async def run() -> None:
        cluster = Cluster()
        vdi_map = VdiMap(0, cluster.load)
        for index in owned:
            await owner(vdi_map, index)
            vdi_map.begin_create(index, LAYER)
            vdi_map.end_create(index, created=True)
        cluster.store(vdi_map.take_dirty())
        if not loaded:
            vdi_map = VdiMap(cluster.existing, cluster.load)
        found = vdi_map.skip_holes(start, end)
        expected = min((i for i in owned if start <= i < end), default=end)
        while found < end and vdi_map.get(found) is None:
            await vdi_map.load(found)
            found = vdi_map.skip_holes(found, end)
        assert found == (expected if start < end else end)

    trio.run(run)


async def test_a_page_that_names_an_impossible_layer_is_refused() -> None:
    cluster = Cluster()
    cluster.store({0: b"\xff" * BLOCK_SIZE})
    try:
        await VdiMap(1, cluster.load).load(0)
    except ProtocolError:
        return
    raise AssertionError("it was taken")


async def test_of_two_loads_at_once_the_later_does_not_undo_changes() -> None:
    cluster = Cluster()
    cluster.store({0: bytes(BLOCK_SIZE)})
    vdi_map = VdiMap(1, cluster.load)

    async def change() -> None:
        await vdi_map.load(0)
        if not vdi_map.get(3):
            vdi_map.begin_create(3, LAYER)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(change)
    assert vdi_map.get(3) == LAYER


@given(
    st.dictionaries(st.integers(0, 3), st.sets(st.sampled_from((0, 1, 5, 1022, 1023))), max_size=4),
    st.integers(1, 4 * OBJECT_SIZE),
    st.integers(0, 4 * OBJECT_SIZE),
)
@settings(max_examples=150, deadline=None)
def test_seek_finds_what_the_bytes_say(blocks: dict[int, set[int]], size: int, offset: int) -> None:
    async def extents(oid: int) -> bytes:
        return sum(1 << block for block in blocks[index_of(oid)]).to_bytes(128, "little")

    async def run() -> None:
        vdi_map = VdiMap(0, Cluster().load)
        await vdi_map.load(0)
        for index in blocks:
            vdi_map.begin_create(index, LAYER)
            vdi_map.end_create(index, created=True)
        data = {index * 1024 + block for index, found in blocks.items() for block in found}
        inside = range(offset // BLOCK_SIZE, -(-size // BLOCK_SIZE)) if offset < size else range(0)
        first_data = next((max(b * BLOCK_SIZE, offset) for b in inside if b in data), None)
        first_hole = next((max(b * BLOCK_SIZE, offset) for b in inside if b not in data), None)
        assert await seek(vdi_map, extents, size, offset, data=True) == first_data
        assert await seek(vdi_map, extents, size, offset, data=False) == first_hole

    trio.run(run)


async def test_seek_takes_an_object_that_is_being_made_for_a_hole() -> None:
    async def extents(oid: int) -> bytes:
        raise AssertionError(f"nobody has {oid:x} yet")

    vdi_map = VdiMap(0, Cluster().load)
    await vdi_map.load(0)
    vdi_map.begin_create(0, LAYER)
    assert data_object(LAYER, 0)
    assert await seek(vdi_map, extents, OBJECT_SIZE, 0, data=True) is None
    assert await seek(vdi_map, extents, OBJECT_SIZE, 9, data=False) == 9
