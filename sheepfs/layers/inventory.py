"""What the nodes have and what maps name: the two sides of every question about space.

Always holds:
- Nothing is changed. Objects come and go while they are counted: the answer is of no one moment.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from sheepfs.core.clustermap import NodeState
from sheepfs.core.errors import SheepError, UnreachableError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    MAP_ENTRIES_PER_BLOCK,
    OBJECT_SIZE,
    data_object,
    layer_of,
    map_object,
)
from sheepfs.core.wire import USAGE, Op
from sheepfs.net.catalog import Roots
from sheepfs.net.router import Router
from sheepfs.replication.objects import ObjectReader
from sheepfs.volume.vdimap import PAGES_PER_OBJECT, VdiMap

CALL_TIMEOUT_S = 30.0
PAGES_AT_ONCE = 64
_PAGE = struct.Struct(f"<{MAP_ENTRIES_PER_BLOCK}Q")
_LAYER = struct.Struct("<Q")


class Replica(NamedTuple):
    """One node's copy of an object. Bytes in its own file, and bytes that are no holes."""

    node: int
    own: int
    data: int
    version: int


@dataclass
class Inventory:
    """What nodes have: object id -> its replicas; and the nodes that could not be asked."""

    replicas: dict[int, list[Replica]] = field(default_factory=lambda: defaultdict(list))
    unanswered: dict[int, str] = field(default_factory=dict)


async def take_inventory(router: Router, layers: Collection[int] = ()) -> Inventory:
    """Ask all nodes what they have (of some layers)."""
    found = Inventory()
    wanted = b"".join(_LAYER.pack(layer) for layer in layers)

    async def ask(node: int) -> None:
        cursor = 0
        try:
            while True:
                link = router.link(node)
                if link is None:
                    raise UnreachableError("no connection")
                _, body = await link.call(Op.USAGE, wanted, oid=cursor, timeout_s=CALL_TIMEOUT_S)
                for oid, version, own, data in USAGE.iter_unpack(body):
                    replica = Replica(node, own * BLOCK_SIZE, data * BLOCK_SIZE, version)
                    found.replicas[oid].append(replica)
                    cursor = oid
                if not body:
                    return
        except SheepError as error:
            found.unanswered[node] = str(error)

    async with trio.open_nursery() as nursery:
        for node in router.map.nodes.values():
            if node.state is NodeState.DOWN:
                found.unanswered[node.id] = "it is down"
            else:
                nursery.start_soon(ask, node.id)
    return found


async def stored_entries(
    reader: ObjectReader, map_layer: int, maps: int
) -> AsyncIterator[tuple[int, int]]:
    """Yield (index, owning layer) of all entries of a stored map, in order.

    Args:
        map_layer: layer id of its map objects.
        maps: bit i is set when map object i exists.

    Raises:
        SheepError: no replica can give a map object.
    """
    for number in range(maps.bit_length()):
        if not maps >> number & 1:
            continue
        oid = map_object(map_layer, number)
        stored = int.from_bytes(await reader.extents(oid), "little")
        page = 0
        while stored >> page:
            if not stored >> page & 1:
                page += 1
                continue
            count = 1
            while count < PAGES_AT_ONCE and stored >> page + count & 1:
                count += 1
            data = await reader.fetch(oid, page * BLOCK_SIZE, count * BLOCK_SIZE)
            base = (number * PAGES_PER_OBJECT + page) * MAP_ENTRIES_PER_BLOCK
            for i in range(count):
                entries = _PAGE.unpack_from(data, i * BLOCK_SIZE)
                for entry, layer in enumerate(entries):
                    if layer:
                        yield base + i * MAP_ENTRIES_PER_BLOCK + entry, layer
            page += count


class Space(NamedTuple):
    """What a VDI or snapshot takes, in bytes of one copy.

    Attributes:
        allocated: data that it can read, holes left out.
        exclusive: what its deletion would give back: nothing else of its family names it.
        shared: the rest of `allocated`.
    """

    allocated: int
    exclusive: int

    @property
    def shared(self) -> int:
        """Data that others of the family have too."""
        return max(0, self.allocated - self.exclusive)


async def space_of(router: Router, roots: Roots, map_layer: int) -> Space:
    """Count the space of the VDI or snapshot whose map is stored under `map_layer`.

    Raises:
        SheepError: a map of the family cannot be read.
    """
    reader = ObjectReader(router, 0)
    named: dict[int, int] = defaultdict(int)
    mine: set[int] = set()
    for root in roots.maps:
        async for index, layer in stored_entries(reader, root.map, root.maps):
            oid = data_object(layer, index)
            named[oid] += 1
            if root.map == map_layer:
                mine.add(oid)
    found = await take_inventory(router, roots.layers)
    allocated = exclusive = 0
    for oid in mine:
        replicas = found.replicas.get(oid)
        if replicas:
            allocated += max(replica.data for replica in replicas)
            if named[oid] == 1:
                exclusive += max(replica.own for replica in replicas)
    return Space(allocated, exclusive)


async def data_of(router: Router, vdi_map: VdiMap) -> int:
    """Give the bytes of data in the objects that a loaded map names."""
    named = {
        data_object(layer, number * MAP_ENTRIES_PER_BLOCK + entry)
        for number, page in vdi_map.pages.items()
        if any(page)
        for entry, layer in enumerate(page)
        if layer
    }
    layers = {layer_of(oid) for oid in named}
    found = (await take_inventory(router, layers)).replicas if layers else {}
    # What no node tells of may be full.
    return sum(
        max(replica.data for replica in found[oid]) if oid in found else OBJECT_SIZE
        for oid in named
    )
