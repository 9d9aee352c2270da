"""Giving back the space of what nobody names any more; driven by the leader.

Always holds:
- Only layers are touched that were frozen before the first map was read, and only what no root's
  map was seen to name (`LayerCatalog.read_maps`; docs/snapshots.md says why that needs no lock).
- Of a map that may be changing, or whose replicas may differ, what any of them names counts.
- A map that cannot be read stops the family's reclaim: what it names is not known.
- Nothing is freed by an etcd that was restored from older data: it names too little.
- `reclaim/<family>` stays until every node that the map knows has done its part: one that is down
  cannot bring deleted objects back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

import trio

from sheepfs.core.clustermap import NodeState
from sheepfs.core.errors import ProtocolError, SheepError, UnreachableError
from sheepfs.core.wire import FLAG_KEEP_MAPS, RANGE, Op
from sheepfs.logs import Complaint
from sheepfs.net.catalog import Catalog, RootMap
from sheepfs.net.link import Link
from sheepfs.net.router import Router
from storaged.control import Leading
from storaged.logic.reclaim import Family, Live, Order, is_forgettable, orders
from storaged.operations.replica import Replica
from storaged.scrub.mapreading import MapReading
from storaged.space.removal import Outcome, Removal

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
ALL_EVERY_S = 3600.0
"""How often every family is looked at without being asked."""
CALL_TIMEOUT_S = 60.0


class Reclaimer:
    """Purges the trash when it is due, and has every node remove what is dead.

    Args:
        check_etcd: raises SheepError if etcd knows less than this node (membership/restored.py).
    """

    def __init__(
        self,
        catalog: Catalog,
        replica: Replica,
        removal: Removal,
        leader: Leading,
        router: Router,
        check_etcd: Callable[[], Awaitable[None]],
    ) -> None:
        self._check_etcd = check_etcd
        self._catalog = catalog
        self._replica = replica
        self._removal = removal
        self._leader = leader
        self._router = router
        self._maps = MapReading(replica, router)
        self._building: dict[int, int] = {}
        """Layers seen while their map was being made -> their family."""
        self._all_at = trio.current_time() + ALL_EVERY_S

    async def run(self) -> None:
        """While leading, look for what is to be done."""
        complaint = Complaint()
        async with self._catalog.watch_reclaim(LOOK_EVERY_S) as hints:
            async for _ in hints:
                if self._leader.is_leader:
                    try:
                        await self._look()
                    except UnreachableError as error:
                        log.debug("reclaim waits: %s", error)
                    except SheepError as error:
                        if complaint.due():
                            log.warning("reclaim waits: %s", error)

    async def _look(self) -> None:
        await self._catalog.purge(expired_only=True)
        await self._notice_abandoned()
        if trio.current_time() >= self._all_at:
            self._all_at = trio.current_time() + ALL_EVERY_S
            for family in await self._catalog.all_roots():
                await self._catalog.want_reclaim(family)
        wanted = await self._catalog.reclaim_wanted()
        if wanted:
            await self._check_etcd()
        for family, revision in wanted:
            if not self._leader.is_leader:
                return
            try:
                if await self.reclaim(family):
                    await self._catalog.reclaim_done(family, revision)
            except SheepError as error:
                log.warning("reclaim of family %#x waits: %s", family, error)

    async def _notice_abandoned(self) -> None:
        """Whoever dies while it makes a map leaves map objects that nobody asks to remove."""
        now = await self._catalog.layers_building()
        gone = {layer: self._building[layer] for layer in self._building.keys() - now.keys()}
        self._building = now
        for family in set(gone.values()):
            roots = await self._catalog.roots(family)
            used = roots.open | {root.map for root in roots.maps}
            if any(layer not in used for layer, own in gone.items() if own == family):
                await self._catalog.want_reclaim(family)

    async def reclaim(self, family: int) -> bool:
        """Remove what no map of a family names; tells whether every node has done it.

        Raises:
            SheepError: a map cannot be read, or a node does not answer. What was not removed
                stays for the next time.
        """
        live = Live()

        async def read(root: RootMap) -> None:
            async for number, page in self._maps.pages(root.map, root.maps, root.settled):
                live.add_page(number, page)

        roots = await self._catalog.read_maps(family, read)
        named = {root.map for root in roots.maps}
        seen = Family(set(roots.layers), roots.open, named, roots.building)
        complete = True
        for order in orders(seen, live.indexes):
            outcome = await self._tell_all(order)
            if outcome is None:
                complete = False
                continue
            if outcome.removed:
                log.info("layer %#x: removed %d replicas", order.layer, outcome.removed)
            if outcome.left == 0 and is_forgettable(order):
                await self._catalog.forget_layer(order.layer)
        return complete

    async def _tell_all(self, order: Order) -> Outcome | None:
        """Have every node carry out an order; None when some node could not be told."""
        removed = left = 0
        away = False
        for node in list(self._router.map.nodes.values()):
            if node.id == self._replica.node:
                outcome = Outcome(
                    *await self._removal.remove(order.layer, order.live, order.keep_maps)
                )
            elif node.state is NodeState.DOWN:
                away = True
                continue
            else:
                link = self._router.link(node.id)
                if link is None:
                    raise UnreachableError(f"node {node.id} cannot be reached")
                outcome = await _tell(link, order)
            removed += outcome.removed
            left += outcome.left
        return None if away else Outcome(removed, left)


async def _tell(link: Link, order: Order) -> Outcome:
    body = b"".join(RANGE.pack(*live) for live in order.live)
    flags = FLAG_KEEP_MAPS if order.keep_maps else 0
    _, answer = await link.call(
        Op.RECLAIM, body, flags=flags, version=order.layer, timeout_s=CALL_TIMEOUT_S
    )
    try:
        told = json.loads(answer)
        return Outcome(int(told["removed"]), int(told["left"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"node {link.node} answered RECLAIM badly: {answer!r}") from error
