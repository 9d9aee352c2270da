"""The map of a VDI or snapshot as data directories have it.

Always holds: an entry is given only if it can be one of this map (its layer is of the map's family
tag); a page that is lost, or cannot be one, is named as a range of indexes, never taken for holes.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from sheepfs.core.clustermap import MAX_COPIES
from sheepfs.core.geometry import (
    BLOCKS_PER_OBJECT,
    MAP_ENTRIES_PER_BLOCK,
    MAP_ENTRIES_PER_OBJECT,
    MAX_LAYER,
    copies_of,
    index_of,
    is_map_object,
    layer_of,
    map_object,
    tag_of,
)
from storaged.store.salvage import Salvage


@dataclass(slots=True)
class StoredMap:
    """A map, read.

    Attributes:
        layer: id under which its map objects are stored.
        numbers: of the map objects that are there.
        pages: page number -> owning layer of each of its 512 indexes; pages of holes are left out.
        lost: ranges [start, end) of object indexes of which it is not known who owns them.
        unverified: the same for pages that look sound and may not be the newest: they match no
            checksum, or a newer copy is unreadable.
        version: the newest of its objects.
        changed: when their files were changed last, in seconds since 1970.
        problems: what is wrong with damaged copies, one line for each.
    """

    layer: int
    numbers: list[int] = field(default_factory=list)
    pages: dict[int, array[int]] = field(default_factory=dict)
    lost: list[tuple[int, int]] = field(default_factory=list)
    unverified: list[tuple[int, int]] = field(default_factory=list)
    version: int = 0
    changed: float = 0.0
    problems: list[str] = field(default_factory=list)

    def entries(self) -> Iterator[tuple[int, int]]:
        """Give (object index, owning layer) of all that is no hole, in order."""
        for number, page in sorted(self.pages.items()):
            for entry, layer in enumerate(page):
                if layer:
                    yield number * MAP_ENTRIES_PER_BLOCK + entry, layer

    @property
    def end(self) -> int:
        """One more than the highest index that an object is named for; 0: there is none."""
        if not self.pages:
            return 0
        number = max(self.pages)
        page = self.pages[number]
        last = max(entry for entry, layer in enumerate(page) if layer)
        return number * MAP_ENTRIES_PER_BLOCK + last + 1


def map_layers(salvage: Salvage) -> dict[int, list[int]]:
    """Give the layers that have map objects -> the numbers of these, in order."""
    found: dict[int, list[int]] = {}
    for oid in salvage.oids():
        if is_map_object(oid):
            found.setdefault(layer_of(oid), []).append(index_of(oid))
    return found


def read_map(salvage: Salvage, layer: int, numbers: list[int], expected: int = 0) -> StoredMap:
    """Read a map.

    Args:
        numbers: of its map objects that are there.
        expected: bit i is set when map object i should be there.
    """
    result = StoredMap(layer, numbers)
    for number in range(expected.bit_length()):
        if expected >> number & 1 and number not in numbers:
            first = number * MAP_ENTRIES_PER_OBJECT
            result.lost.append((first, first + MAP_ENTRIES_PER_OBJECT))
    for number in numbers:
        _read_object(salvage, number, result)
    result.lost.sort()
    return result


def _read_object(salvage: Salvage, number: int, result: StoredMap) -> None:
    found = salvage.object(map_object(result.layer, number))
    result.version = max(result.version, found.version)
    result.changed = max(result.changed, found.changed)
    result.problems += found.problems
    first = number * BLOCKS_PER_OBJECT
    if not found.version:
        result.lost.append(_indexes(first, first + BLOCKS_PER_OBJECT))
        return
    if found.outdated:
        result.unverified.append(_indexes(first, first + BLOCKS_PER_OBJECT))
    lost = set(found.lost)
    for block, data in found.blocks.items():
        page = _parse(data, result.layer)
        if page is None:
            lost.add(block)
            continue
        if block in found.unverified:
            result.unverified.append(_indexes(first + block, first + block + 1))
        if any(page):
            result.pages[first + block] = page
    result.lost += [_indexes(first + block, first + block + 1) for block in sorted(lost)]


def _parse(data: memoryview, map_layer: int) -> array[int] | None:
    page = array("Q", bytes(data))
    if sys.byteorder == "big":
        page.byteswap()
    for layer in {*page} - {0}:
        if (
            layer > MAX_LAYER
            or tag_of(layer) != tag_of(map_layer)
            or not 1 <= copies_of(layer) <= MAX_COPIES
        ):
            return None
    return page


def _indexes(first_page: int, end_page: int) -> tuple[int, int]:
    return first_page * MAP_ENTRIES_PER_BLOCK, end_page * MAP_ENTRIES_PER_BLOCK
