"""Giving back the space of deleted layers: the leader asks every node, then forgets the layer.

Always holds:
- A layer is forgotten only when every node that the map knows has removed its objects; a node
  that is down keeps the entry in the trash, so that it cannot bring deleted objects back.
- Layer ids are never reused: removing a layer's objects twice harms nobody.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import trio
import trio.lowlevel

from sheepfs.core.clustermap import NodeState
from sheepfs.core.errors import SheepError, UnreachableError, UsageError
from sheepfs.core.geometry import index_of, is_map_object
from sheepfs.core.wire import FLAG_KEEP_MAPS, RANGE, Buffer, Header, Op
from sheepfs.net.catalog import Catalog
from sheepfs.net.router import Router
from storaged.control import Leading
from storaged.replica import Replica
from storaged.requests import Client

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
CALL_TIMEOUT_S = 60.0
BATCH = 64
"""Objects removed between two looks at the other tasks."""


class Reclaimer:
    """Removes deleted layers' objects; the leader's one also drives the others."""

    def __init__(self, catalog: Catalog, replica: Replica, leader: Leading, router: Router) -> None:
        self._catalog = catalog
        self._replica = replica
        self._leader = leader
        self._router = router
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """While leading, empty the trash."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await trio.sleep(LOOK_EVERY_S)
                if self._leader.is_leader:
                    try:
                        for entry in await self._catalog.trash():
                            await self._reclaim(entry.layer)
                    except UnreachableError as error:
                        log.debug("the trash waits: %s", error)
                    except SheepError as error:
                        log.warning("the trash waits: %s", error)

    async def _reclaim(self, layer: int) -> None:
        nodes = self._router.map.nodes.values()
        away = [node.id for node in nodes if node.state is NodeState.DOWN]
        for node in nodes:
            if node.id == self._replica.node:
                await self.remove_layer(layer)
            elif node.id not in away:
                link = self._router.link(node.id)
                if link is None:
                    raise UnreachableError(f"node {node.id} cannot be reached")
                await link.call(Op.RECLAIM, b"", version=layer, timeout_s=CALL_TIMEOUT_S)
        if not away:
            await self._catalog.forget_trash(layer)
            log.info("layer %d is gone from every node", layer)

    def handle(self, client: Client, header: Header, payload: Buffer) -> None:
        """RECLAIM: remove this node's dead objects of the layer in `version`."""
        if self._nursery is None:
            raise UnreachableError("this node has just started")
        if len(payload) % RANGE.size:
            raise UsageError("the live indexes are no list of ranges")
        live = list(RANGE.iter_unpack(bytes(payload)))
        self._nursery.start_soon(self._handle, client, header, live)

    async def _handle(self, client: Client, header: Header, live: list[tuple[int, int]]) -> None:
        keep_maps = bool(header.flags & FLAG_KEEP_MAPS)
        try:
            left, removed = await self.remove_layer(header.version, live, keep_maps)
        except SheepError as error:
            self._replica.fail(client, header, error)
        else:
            client.reply(header, json.dumps({"left": left, "removed": removed}).encode())

    async def remove_layer(
        self, layer: int, live: Sequence[tuple[int, int]] = (), keep_maps: bool = False
    ) -> tuple[int, int]:
        """Remove a frozen layer's dead objects from this node, durably.

        Args:
            live: index ranges [start, end) of data objects that are in use.
            keep_maps: the layer's map objects are in use.

        Returns:
            How many objects of the layer are left here, busy ones included, and how many went.

        Raises:
            NoSpaceError, DiskError: as `ObjectStore.delete`.

        Durability: on return. Cancellation: what went is gone, the rest is there; ask again.
        """
        replica, store = self._replica, self._replica.store
        in_use = LiveIndexes(live)
        removed = 0
        for oid in store.of_layer(layer):
            if keep_maps if is_map_object(oid) else index_of(oid) in in_use:
                continue
            if store.dependents(oid):
                await replica.free(oid)
            if not replica.is_held(oid):
                store.delete(oid)
                removed += 1
                if removed % BATCH == 0:
                    await trio.lowlevel.checkpoint()
        # Also when nothing went now: whoever was asked before may not have come to it.
        await replica.flush_store(None)
        left = len(store.of_layer(layer))
        if removed:
            log.info("removed %d objects of layer %#x, %d are left", removed, layer, left)
        return left, removed


class LiveIndexes:
    """Index ranges, to be looked in."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [start for start, _ in self._ranges]
        self._ends = list(accumulate((end for _, end in self._ranges), max))

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._starts, index) - 1
        return place >= 0 and index < self._ends[place]
