"""Reading maps as a storage daemon: from its own store, or from a peer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

import trio

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.errors import (
    ObjectNotFoundError,
    ProtocolError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    MAP_ENTRIES_PER_BLOCK,
    MAP_ENTRIES_PER_OBJECT,
    MAP_ENTRY_SIZE,
    describe_oid,
    index_of,
    is_map_object,
    layer_of,
    map_object,
    pg_of,
    pool_of,
)
from sheepfs.core.wire import Op
from storaged.operations.replica import Replica, as_buffer
from storaged.recovery.pulling import Peers
from storaged.store.format import blocks_in

log = logging.getLogger(__name__)

PAGES_PER_OBJECT = MAP_ENTRIES_PER_OBJECT // MAP_ENTRIES_PER_BLOCK
CALL_TIMEOUT_S = 10.0
PAGES_AT_ONCE = 64


class MapReading:
    """Reads the map objects of any VDI or snapshot."""

    def __init__(self, replica: Replica, peers: Peers) -> None:
        self._replica = replica
        self._peers = peers

    async def pages(self, layer: int, maps: int, settled: bool) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (page number, 4 KiB) for all pages that are not empty.

        Args:
            layer: layer id under which the map is stored.
            maps: bit i is set when map object i exists.
            settled: all replicas are equal: one is read. Else every sync member's page is given.

        Raises:
            SheepError: a map object cannot be read from any, or from every, sync member.
        """
        for index in range(maps.bit_length()):
            if not maps >> index & 1:
                continue
            oid = map_object(layer, index)
            sync = self._group(oid)[1].sync
            for nodes in [sync] if settled else [(node,) for node in sync]:
                async for number, page in self._pages_of(oid, nodes):
                    yield index * PAGES_PER_OBJECT + number, page

    async def names(self, layer: int, maps: int, oid: int, settled: bool) -> bool:
        """Tell whether a map names an object: a data object, or a map object of its own.

        Args:
            layer, maps, settled: as for `pages`; if not settled, every sync member must say so.

        Raises:
            SheepError: it cannot be read from any, or from every, sync member.
        """
        index = index_of(oid)
        if is_map_object(oid):
            return layer_of(oid) == layer and bool(maps >> index & 1)
        number, entry = divmod(index, MAP_ENTRIES_PER_OBJECT)
        if not maps >> number & 1:
            return False
        where = map_object(layer, number)
        sync = self._group(where)[1].sync
        for nodes in [sync] if settled else [(node,) for node in sync]:
            data = await self._ask(nodes, where, Op.READ, entry * MAP_ENTRY_SIZE, MAP_ENTRY_SIZE)
            if int.from_bytes(data, "little") != layer_of(oid):
                return False
        return True

    async def _pages_of(self, oid: int, nodes: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        stored = blocks_in(await self._ask(nodes, oid, Op.EXTENTS, 0, 0))
        for first, count in _runs(stored):
            data = await self._ask(nodes, oid, Op.READ, first * BLOCK_SIZE, count * BLOCK_SIZE)
            if len(data) != count * BLOCK_SIZE:
                raise ProtocolError(f"{describe_oid(oid)}: {len(data)} bytes of {count} pages")
            for i in range(count):
                yield first + i, data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]

    def _group(self, oid: int) -> tuple[int, PlacementGroup]:
        groups = self._peers.map.pools.get(pool_of(oid), ())
        if not groups:
            raise UnreachableError(f"there is no pool of {pool_of(oid)} copies")
        pg = pg_of(oid, len(groups))
        return pg, groups[pg]

    async def _ask(self, nodes: Sequence[int], oid: int, op: int, offset: int, span: int) -> bytes:
        """Ask one node after the other until one answers."""
        pg, _ = self._group(oid)
        problem: SheepError = ObjectNotFoundError(f"{describe_oid(oid)}: no member can be asked")
        for node in nodes:
            try:
                if node == self._replica.node:
                    await self._replica.trust(oid, pool_of(oid), pg)
                    return await self._read_here(oid, op, offset, span)
                link = self._peers.link(node)
                if link is None:
                    raise UnreachableError(f"node {node} cannot be reached")
                _, body = await link.call(
                    op,
                    oid=oid,
                    pool=pool_of(oid),
                    pg=pg,
                    epoch=self._peers.map.epoch,
                    offset=offset,
                    span=span,
                    timeout_s=CALL_TIMEOUT_S,
                )
                return body
            except SheepError as error:
                problem = error
        raise problem

    async def _read_here(self, oid: int, op: int, offset: int, span: int) -> bytes:
        store = self._replica.store
        if op == Op.EXTENTS:
            return await trio.to_thread.run_sync(store.extents, oid)
        found = await trio.to_thread.run_sync(lambda: store.read(oid, offset, span, wait=True))
        return bytes(as_buffer(found or b""))


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Give (first, count) of runs of neighbouring blocks, none longer than `PAGES_AT_ONCE`."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and sum(runs[-1]) == block and runs[-1][1] < PAGES_AT_ONCE:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
