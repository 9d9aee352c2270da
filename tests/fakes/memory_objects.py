"""Objects in memory for `sheepfs.layers.image`: what an ObjectReader gives, and what was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import trio
from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import ObjectNotFoundError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    MAP_ENTRIES_PER_OBJECT,
    MAP_ENTRY_SIZE,
    OBJECT_SIZE,
    data_object,
    describe_oid,
    is_map_object,
    map_object,
)
from sheepfs.layers.image import Image

_ZERO_BLOCK = bytes(BLOCK_SIZE)


class MemoryObjects:
    """Objects by id; only blocks that hold data are kept."""

    def __init__(self) -> None:
        self.objects: dict[int, dict[int, bytes]] = {}
        self.asked: Counter[str] = Counter()

    def put(self, oid: int, offset: int, data: bytes) -> None:
        """Store bytes in an object; both ends at 4 KiB borders."""
        blocks = self.objects.setdefault(oid, {})
        for start in range(0, len(data), BLOCK_SIZE):
            block = data[start : start + BLOCK_SIZE]
            if any(block):
                blocks[(offset + start) // BLOCK_SIZE] = block

    def image(self, size: int, map_layer: int, owners: Mapping[int, int]) -> Image:
        """Store a map that names the given owners (index -> layer), and open it."""
        maps = 0
        for index, layer in owners.items():
            number, entry = divmod(index, MAP_ENTRIES_PER_OBJECT)
            maps |= 1 << number
            blocks = self.objects.setdefault(map_object(map_layer, number), {})
            page, within = divmod(entry * MAP_ENTRY_SIZE, BLOCK_SIZE)
            block = bytearray(blocks.get(page, _ZERO_BLOCK))
            block[within : within + MAP_ENTRY_SIZE] = layer.to_bytes(MAP_ENTRY_SIZE, "little")
            blocks[page] = bytes(block)
        return Image(self, size, map_layer, maps)

    def fill(self, layer: int, index: int, first: int, data: bytes) -> None:
        """Store blocks from number `first` on in a data object."""
        self.put(data_object(layer, index), first * BLOCK_SIZE, data)

    async def _find(self, what: str, oid: int) -> dict[int, bytes]:
        self.asked[f"{what} {'map' if is_map_object(oid) else 'data'}"] += 1
        await trio.lowlevel.checkpoint()
        if oid not in self.objects:
            raise ObjectNotFoundError(f"no {describe_oid(oid)}")
        return self.objects[oid]

    async def fetch(self, oid: int, offset: int, length: int) -> bytes:
        blocks = await self._find("fetch", oid)
        first, last = offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)
        data = b"".join(blocks.get(i, _ZERO_BLOCK) for i in range(first, last))
        start = offset - first * BLOCK_SIZE
        return data[start : start + length]

    async def extents(self, oid: int) -> bytes:
        blocks = await self._find("extents", oid)
        return sum(1 << i for i in blocks).to_bytes(OBJECT_SIZE // BLOCK_SIZE // 8, "little")

    async def sums(self, oid: int) -> bytes:
        blocks = await self._find("sums", oid)
        return b"".join(
            (xxh3_64_intdigest(blocks[i]) if i in blocks else 0).to_bytes(8, "little")
            for i in range(OBJECT_SIZE // BLOCK_SIZE)
        )
