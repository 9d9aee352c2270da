"""SEEK_DATA and SEEK_HOLE over a VDI's map and its objects' blocks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sheepfs.core.geometry import (
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    OBJECT_SIZE,
    data_object,
    object_count,
)
from sheepfs.volume.vdimap import VdiMap

Extents = Callable[[int], Awaitable[bytes]]
"""Object id -> the 128-byte bitmap of its blocks that may hold data."""


async def seek(
    vdi_map: VdiMap, extents_of: Extents, size: int, offset: int, *, data: bool
) -> int | None:
    """Give the first offset in [`offset`, `size`) that is data (or a hole), None if there is none.

    Blocks of 4 KiB decide; a block that is stored but all zeros may count as either. An object
    that is being created is a hole still.

    Raises:
        SheepError: a map page or an object cannot be read.
    """
    if offset >= size:
        return None
    index = offset // OBJECT_SIZE
    end = object_count(size)
    while index < end:
        if data:
            index = vdi_map.skip_holes(index, end)
            if index == end:
                break
        start = max(offset, index * OBJECT_SIZE)
        layer = vdi_map.get(index)
        if layer is None:
            await vdi_map.load(index)
            continue
        if not layer or index in vdi_map.creating:
            if not data:
                return start
            index += 1
            continue
        extents = int.from_bytes(await extents_of(data_object(layer, index)), "little")
        found = _first_block(extents, (start % OBJECT_SIZE) // BLOCK_SIZE, data=data)
        if found is not None:
            place = max(start, index * OBJECT_SIZE + found * BLOCK_SIZE)
            return place if place < size else None
        index += 1
    return None


def _first_block(extents: int, first: int, *, data: bool) -> int | None:
    """Give the first block >= `first` whose bit is set (data) or clear."""
    if not data:
        extents = ~extents & (1 << BLOCKS_PER_OBJECT) - 1
    rest = extents >> first
    return first + (rest & -rest).bit_length() - 1 if rest else None
