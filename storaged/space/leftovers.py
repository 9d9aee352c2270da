"""Giving back the space of groups that have moved to other nodes.

Always holds:
- A copy is deleted only when every member of its group has just told that it has the same or a
  newer version, and this node is neither a member nor expected back (I4).
- What a member lacks, or has only an older version or a damaged copy of, goes to quarantine: it may
  be the only good one.
- Only groups that are whole are looked at; while one lacks copies, this node's may yet be needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import trio
import trio.lowlevel

from sheepfs.core.clustermap import ClusterMap, NodeState, PlacementGroup
from sheepfs.core.errors import ProtocolError, SheepError, UnreachableError
from sheepfs.core.geometry import describe_oid, layer_of, serial_of
from sheepfs.core.wire import Op
from storaged.operations.replica import Replica
from storaged.recovery.pulling import Peers
from storaged.space.removal import SLICE_S

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
CALL_TIMEOUT_S = 10.0
BATCH = 16
"""Objects removed between two looks at the other tasks, at most (see SLICE_S)."""


def is_settled(cluster_map: ClusterMap, copies: int, group: PlacementGroup) -> bool:
    """Tell whether a group has all its copies, on nodes that are up."""
    up = {n.id for n in cluster_map.nodes.values() if n.state is not NodeState.DOWN}
    places = sum(1 for n in cluster_map.nodes.values() if n.id in up and n.weight > 0)
    return (
        not (group.joining or group.away)
        and up.issuperset(group.sync)
        and len(group.sync) >= max(1, min(copies, places))
    )


class Leftovers:
    """Removes what this node still has of groups that it has left."""

    def __init__(self, replica: Replica, peers: Peers) -> None:
        self._replica = replica
        self._peers = peers

    async def run(self) -> None:
        """Look now and then, whenever the map has changed or something was left."""
        seen = 0
        while True:
            await trio.sleep(LOOK_EVERY_S)
            epoch = self._replica.map.epoch
            if epoch != seen and await self.look():
                seen = epoch

    async def look(self) -> bool:
        """Remove what may go; tells whether nothing is left that must wait."""
        cluster_map = self._replica.map
        done = True
        for copies, pg in list(self._left(cluster_map)):
            group = cluster_map.pools[copies][pg]
            if not is_settled(cluster_map, copies, group):
                done = False
                continue
            try:
                await self._clear(copies, pg, group)
            except SheepError as error:
                done = False
                log.debug("what is left of group %d of pool %d stays: %s", pg, copies, error)
        return done

    def _left(self, cluster_map: ClusterMap) -> Iterator[tuple[int, int]]:
        me = cluster_map.nodes.get(self._replica.node)
        if me is None or me.incarnation != self._replica.incarnation:
            return  # The map speaks of a former run.
        for copies, groups in cluster_map.pools.items():
            for pg in range(len(groups)):
                if self._has_left(copies, pg) and self._replica.store.list(copies, pg, len(groups)):
                    yield copies, pg

    def _has_left(self, copies: int, pg: int) -> bool:
        group = self._replica.map.pools[copies][pg]
        return self._replica.node not in (*group.members, *group.away)

    async def _clear(self, copies: int, pg: int, group: PlacementGroup) -> None:
        replica, store = self._replica, self._replica.store
        theirs = [await self._versions(node, copies, pg) for node in group.sync]
        ours = store.list(copies, pg, len(replica.map.pools[copies]))
        # Copies before what they are made of: then nothing has to be given to heirs.
        ours = sorted(ours, key=lambda own: serial_of(layer_of(own.oid)), reverse=True)
        removed = quarantined = 0
        since = trio.current_time()
        for count, own in enumerate(ours, 1):
            if store.dependents(own.oid):
                await replica.free(own.oid)
                since = trio.current_time()
            if replica.map.pools[copies][pg] != group or not self._has_left(copies, pg):
                raise UnreachableError("the group changed meanwhile")
            now = store.get(own.oid)
            if now is None or replica.is_held(own.oid):
                continue
            if all(versions.get(own.oid, -1) >= now.version for versions in theirs):
                store.delete(own.oid)
                removed += 1
            else:
                log.warning(
                    "%s: this old copy may be the only one; quarantined", describe_oid(own.oid)
                )
                store.quarantine(own.oid)
                quarantined += 1
            if count % BATCH == 0 or trio.current_time() - since > SLICE_S:
                await trio.lowlevel.checkpoint()
                since = trio.current_time()
        log.info(
            "group %d of pool %d has moved away: %d objects removed, %d quarantined",
            pg, copies, removed, quarantined,
        )  # fmt: skip

    async def _versions(self, node: int, copies: int, pg: int) -> Mapping[int, int]:
        """Give object -> version of what a member has; one suspect or damaged does not count."""
        link = self._peers.link(node)
        if link is None:
            raise UnreachableError(f"node {node} cannot be reached")
        rows = await link.call_json(
            Op.LIST, pool=copies, pg=pg, epoch=self._replica.map.epoch, timeout_s=CALL_TIMEOUT_S
        )
        try:
            return {int(oid): int(version) for oid, version, _, suspect, *_ in rows if not suspect}
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"node {node} sent a bad list: {error}") from error
