"""What of a family may go: pure bookkeeping over maps and inventories.

Always holds:
- Only objects of frozen layers are ever called dead: nobody writes to these, and references to
  them are only copied from live maps or removed (docs/snapshots.md).
- A map object is live while a record names its layer as a map.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from xxhash import xxh3_128_digest

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import BLOCK_SIZE, MAP_ENTRIES_PER_BLOCK, MAX_LAYER
from sheepfs.core.wire import Buffer

_PAGE = struct.Struct(f"<{MAP_ENTRIES_PER_BLOCK}Q")


class Live:
    """The references of all maps of a family: layer -> indexes of live data objects."""

    def __init__(self) -> None:
        self.indexes: dict[int, set[int]] = {}
        self._seen: set[tuple[int, bytes]] = set()

    def add_page(self, number: int, page: Buffer) -> None:
        """Take page `number` (512 entries) of some map; equal pages cost only their hash.

        Raises:
            ProtocolError: it is no page, or holds a layer that cannot be.
        """
        if len(page) != BLOCK_SIZE:
            raise ProtocolError(f"a map page of {len(page)} bytes")
        key = (number, xxh3_128_digest(page))
        if key in self._seen:
            return
        self._seen.add(key)
        base = number * MAP_ENTRIES_PER_BLOCK
        for entry, layer in enumerate(_PAGE.unpack(page)):
            if layer:
                if layer > MAX_LAYER:
                    raise ProtocolError("a map page holds a layer that cannot be")
                self.indexes.setdefault(layer, set()).add(base + entry)


class Order(NamedTuple):
    """What every node is told of one frozen layer: keep these, remove the rest."""

    layer: int
    live: list[tuple[int, int]]
    """Index ranges [start, end) of data objects that are in use."""
    keep_maps: bool


@dataclass(frozen=True)
class Family:
    """What etcd says of a family, at one revision.

    Attributes:
        layers: all that were born and not forgotten.
        open: `layer` and `next` of every VDI (also of those in the trash).
        maps: layer ids under which maps are stored that a record names.
        building: layers whose map is being made.
    """

    layers: Set[int]
    open: Set[int]
    maps: Set[int]
    building: Set[int] = field(default_factory=frozenset)


def orders(family: Family, live: Mapping[int, Set[int]]) -> list[Order]:
    """Give what may be done now; layers that take writes or are being made are left alone."""
    return [
        Order(layer, ranges(live.get(layer, ())), layer in family.maps)
        for layer in sorted(family.layers)
        if layer not in family.open and layer not in family.building
    ]


def is_forgettable(order: Order) -> bool:
    """Tell whether a layer is of no use to anyone once its objects are gone."""
    return not order.live and not order.keep_maps


def ranges(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Give sorted half-open ranges that cover exactly `indexes`."""
    return list(_ranges(sorted(indexes)))


def _ranges(indexes: list[int]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for index in indexes:
        if index != end:
            if end >= 0:
                yield start, end
            start = index
        end = index + 1
    if end >= 0:
        yield start, end


class LiveIndexes:
    """Index ranges, to be looked in."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [start for start, _ in self._ranges]
        self._ends = list(accumulate((end for _, end in self._ranges), max))

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._starts, index) - 1
        return place >= 0 and index < self._ends[place]
