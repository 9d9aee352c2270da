"""Giving back the space of deleted layers: the leader asks every node, then forgets the layer.

Always holds:
- A layer is forgotten only when every node that the map knows has removed its objects; a node
  that is down keeps the entry in the trash, so that it cannot bring deleted objects back.
- Layer ids are never reused: removing a layer's objects twice harms nobody.
"""

from __future__ import annotations

import logging

import trio
import trio.lowlevel

from sheepfs.core.clustermap import NodeState
from sheepfs.core.errors import SheepError, UnreachableError
from sheepfs.core.wire import Buffer, Header, Op
from sheepfs.net.catalog import Catalog
from sheepfs.net.router import Router
from storaged.control import Leading
from storaged.replica import Client, Replica

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
        """RECLAIM: remove this node's objects of the layer in `version`."""
        if self._nursery is None:
            raise UnreachableError("this node has just started")
        self._nursery.start_soon(self._handle, client, header)

    async def _handle(self, client: Client, header: Header) -> None:
        try:
            await self.remove_layer(header.version)
        except SheepError as error:
            client.reply(header, str(error).encode(), error.status)
        else:
            client.reply(header)

    async def remove_layer(self, layer: int) -> None:
        """Remove all objects of a layer from this node, durably."""
        store = self._replica.store
        removed = 0
        for oid in store.of_layer(layer):
            if not self._replica.is_held(oid):
                store.delete(oid)
                removed += 1
                if removed % BATCH == 0:
                    await trio.lowlevel.checkpoint()
        if removed:
            await self._replica.flush_store(None)
            log.info("removed %d objects of deleted layer %d", removed, layer)
        if store.of_layer(layer):
            raise UnreachableError(f"objects of layer {layer} are busy; try again")
