"""A read-only view of one stored map: a snapshot, or a VDI as it was last flushed.

Always holds:
- Missing is never zeros (I3): only the map, and the bitmap of its map objects, make a hole.
- Memory is bounded whatever the size: map pages are taken run by run and forgotten.
- `changes` may name a range that is equal, and leaves out none that differs: two blocks count as
  equal when their 64-bit checksums are.

A snapshot's objects are frozen. Of a VDI, objects of its open layer change below the reader while
somebody writes: who needs one moment takes a snapshot first.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    MAP_ENTRIES_PER_BLOCK,
    MAP_ENTRIES_PER_OBJECT,
    MAX_LAYER,
    OBJECT_SIZE,
    data_object,
    describe_oid,
    map_object,
    object_count,
    split,
)
from sheepfs.pipeline import gather

IN_FLIGHT = 8
"""Objects asked for at the same time."""
_PAGES_PER_RUN = 16
_RUN_SIZE = _PAGES_PER_RUN * BLOCK_SIZE
_RUN_ENTRIES = _PAGES_PER_RUN * MAP_ENTRIES_PER_BLOCK
"""Map entries read at once: 64 KiB, the map of 32 GiB."""
_RUNS_KEPT = 16
_EMPTY_RUN = array("Q", bytes(_RUN_SIZE))
_ZERO_SUMS = array("Q", bytes(8 * BLOCKS_PER_OBJECT))
_Place = TypeVar("_Place")


class Objects(Protocol):
    """Reads objects from any member that has them (sheepfs.replication.objects.ObjectReader)."""

    async def fetch(self, oid: int, offset: int, length: int) -> bytes:
        """Read; raises SheepError when no member has a good copy."""
        ...

    async def extents(self, oid: int) -> bytes:
        """Give the 128-byte bitmap of the object's blocks that may hold data."""
        ...

    async def sums(self, oid: int) -> bytes:
        """Give the checksums of the object's 1,024 blocks, u64 little-endian; 0 is zeros."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """A range [start, end) in bytes that may differ; it reads as zeros when not `is_data`."""

    start: int
    end: int
    is_data: bool


class Image:
    """Reads what one map names.

    Args:
        objects: where objects are read.
        size: bytes of the image.
        map_layer: the layer id under which its map objects are stored.
        maps: bit i is set when map object i exists.
    """

    def __init__(self, objects: Objects, size: int, map_layer: int, maps: int) -> None:
        self.size = size
        self._objects = objects
        self._map_layer = map_layer
        self._maps = maps
        self._runs: OrderedDict[int, array[int]] = OrderedDict()
        self._map_extents: tuple[int, int] = (-1, 0)

    # -- bytes ------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Read up to the end of the image.

        Raises:
            SheepError: no member can give an object.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        pieces = list(split(offset, length))
        if len(pieces) == 1:
            return await self._read_piece(pieces[0])
        parts = []
        for first in range(0, len(pieces), IN_FLIGHT):
            batch = await gather(self._read_piece, pieces[first : first + IN_FLIGHT])
            parts += [data for _, data in batch]
        return b"".join(parts)

    async def _read_piece(self, piece: tuple[int, int, int]) -> bytes:
        index, within, length = piece
        layer = await self.owner(index)
        if not layer:
            return bytes(length)
        return await self._objects.fetch(data_object(layer, index), within, length)

    # -- data and holes ---------------------------------------------------------------------

    async def extents(self) -> AsyncGenerator[tuple[int, int], None]:
        """Give the ranges [start, end) in bytes that may hold data, in order and not touching."""
        open_start = open_end = 0
        async with aclosing(_batches(self._owned())) as batches:
            async for batch in batches:
                for (index, _), bitmap in await gather(self._extents_of, batch):
                    for first, stop in _bit_runs(bitmap):
                        start, end = self._clamp(index, first, stop)
                        if start >= end:
                            continue
                        if start != open_end:
                            if open_end > open_start:
                                yield open_start, open_end
                            open_start = start
                        open_end = end
        if open_end > open_start:
            yield open_start, open_end

    async def _extents_of(self, place: tuple[int, int]) -> int:
        index, layer = place
        oid = data_object(layer, index)
        return _bitmap(oid, await self._objects.extents(oid))

    async def _owned(self) -> AsyncGenerator[tuple[int, int], None]:
        """Give (index, owner) of all objects that the map names, in order."""
        end = object_count(self.size)
        for base in range(0, end, MAP_ENTRIES_PER_OBJECT):
            if not self._has_map(base):
                continue
            for first in range(base, min(base + MAP_ENTRIES_PER_OBJECT, end), _RUN_ENTRIES):
                run = await self._run(first // _RUN_ENTRIES)
                if run is _EMPTY_RUN:
                    continue
                for i in range(min(_RUN_ENTRIES, end - first)):
                    if run[i]:
                        yield first + i, run[i]

    # -- changes ----------------------------------------------------------------------------

    async def changes(self, older: Image) -> AsyncGenerator[Change, None]:
        """Give the ranges that may differ from `older`, in order, up to this image's size.

        Beyond its end `older` counts as zeros. Objects that both maps name are equal without
        being asked for; of others the checksums are compared, no data is read.
        """
        pending: Change | None = None
        async with aclosing(_batches(self._differing(older))) as batches:
            async for batch in batches:
                for (index, _, _), (new, old) in await gather(self._sums_of_both, batch):
                    for first, stop, is_data in _differences(new, old):
                        start, end = self._clamp(index, first, stop)
                        if start >= end:
                            continue
                        if pending and pending.end == start and pending.is_data == is_data:
                            start = pending.start
                        elif pending:
                            yield pending
                        pending = Change(start, end, is_data)
        if pending:
            yield pending

    async def is_same_map(self, other: Image) -> bool:
        """Tell whether both maps name the same objects, as before the first write to either."""
        if self.size != other.size:
            return False
        async with aclosing(self._differing(other)) as places:
            async for _ in places:
                return False
        return True

    async def _differing(self, older: Image) -> AsyncGenerator[tuple[int, int, int], None]:
        """Give (index, owner here, owner in `older`) where the two maps differ, in order."""
        end = object_count(self.size)
        older_end = object_count(older.size)
        for base in range(0, end, MAP_ENTRIES_PER_OBJECT):
            if not (self._has_map(base) or older._has_map(base)):
                continue
            for first in range(base, min(base + MAP_ENTRIES_PER_OBJECT, end), _RUN_ENTRIES):
                new = await self._run(first // _RUN_ENTRIES)
                old = _EMPTY_RUN
                if first < older_end:
                    old = await older._run(first // _RUN_ENTRIES)
                if new == old:
                    continue
                for i in range(min(_RUN_ENTRIES, end - first)):
                    if new[i] != old[i]:
                        yield first + i, new[i], old[i]

    async def _sums_of_both(self, place: tuple[int, int, int]) -> tuple[array[int], array[int]]:
        index, new, old = place
        return await self._sums(new, index), await self._sums(old, index)

    async def _sums(self, layer: int, index: int) -> array[int]:
        if not layer:
            return _ZERO_SUMS
        oid = data_object(layer, index)
        sums = _numbers(await self._objects.sums(oid))
        if len(sums) != BLOCKS_PER_OBJECT:
            raise ProtocolError(f"{describe_oid(oid)}: {len(sums)} checksums")
        return sums

    def _clamp(self, index: int, first: int, stop: int) -> tuple[int, int]:
        """Blocks [first, stop) of an object as bytes of the image, cut at its size."""
        base = index * OBJECT_SIZE
        return base + first * BLOCK_SIZE, min(base + stop * BLOCK_SIZE, self.size)

    # -- the map ----------------------------------------------------------------------------

    def _has_map(self, index: int) -> bool:
        return bool(self._maps >> index // MAP_ENTRIES_PER_OBJECT & 1)

    async def owner(self, index: int) -> int:
        """Give the layer that owns object `index`; 0: it is a hole. Raises SheepError."""
        if not self._has_map(index):
            return 0
        return (await self._run(index // _RUN_ENTRIES))[index % _RUN_ENTRIES]

    async def _run(self, number: int) -> array[int]:
        """Give the map entries of a run; `_EMPTY_RUN` itself when it holds nothing."""
        run = self._runs.get(number)
        if run is None:
            run = await self._load_run(number)
            self._runs[number] = run
            if len(self._runs) > _RUNS_KEPT:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(number)
        return run

    async def _load_run(self, number: int) -> array[int]:
        map_index, within = divmod(number * _RUN_ENTRIES, MAP_ENTRIES_PER_OBJECT)
        if not self._maps >> map_index & 1:
            return _EMPTY_RUN
        page = within // MAP_ENTRIES_PER_BLOCK
        oid = map_object(self._map_layer, map_index)
        if self._map_extents[0] != map_index:
            self._map_extents = map_index, _bitmap(oid, await self._objects.extents(oid))
        if not self._map_extents[1] >> page & (1 << _PAGES_PER_RUN) - 1:
            return _EMPTY_RUN
        run = _numbers(await self._objects.fetch(oid, page * BLOCK_SIZE, _RUN_SIZE))
        if len(run) != _RUN_ENTRIES or max(run) > MAX_LAYER:
            raise ProtocolError(f"{describe_oid(oid)} holds a layer that cannot be")
        return run if any(run) else _EMPTY_RUN


def _numbers(data: bytes) -> array[int]:
    if len(data) % 8:
        raise ProtocolError(f"{len(data)} bytes instead of 64-bit numbers")
    numbers = array("Q", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bitmap(oid: int, data: bytes) -> int:
    if len(data) != BLOCKS_PER_OBJECT // 8:
        raise ProtocolError(f"{describe_oid(oid)}: a bitmap of {len(data)} bytes")
    return int.from_bytes(data, "little")


def _bit_runs(bitmap: int) -> Iterator[tuple[int, int]]:
    """Give the runs [first, stop) of set bits."""
    position = 0
    while bitmap:
        zeros = (bitmap & -bitmap).bit_length() - 1
        bitmap >>= zeros
        ones = (~bitmap & bitmap + 1).bit_length() - 1
        bitmap >>= ones
        yield position + zeros, position + zeros + ones
        position += zeros + ones


def _differences(new: array[int], old: array[int]) -> Iterator[tuple[int, int, bool]]:
    """Give the runs [first, stop) of blocks whose checksums differ, and whether they hold data."""
    first = 0
    while first < BLOCKS_PER_OBJECT:
        if new[first] == old[first]:
            first += 1
            continue
        is_data = new[first] != 0
        stop = first + 1
        while stop < BLOCKS_PER_OBJECT and new[stop] != old[stop] and (new[stop] != 0) == is_data:
            stop += 1
        yield first, stop, is_data
        first = stop


async def _batches(places: AsyncGenerator[_Place]) -> AsyncGenerator[list[_Place]]:
    batch: list[_Place] = []
    async with aclosing(places):
        async for place in places:
            batch.append(place)
            if len(batch) == IN_FLIGHT:
                yield batch
                batch = []
    if batch:
        yield batch
