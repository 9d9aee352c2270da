"""Real daemons' insides (store, replica, server, recovery) in this process, with a map set by hand.

No etcd and no leader: a test says what the next map is, as the leader would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import trio

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.errors import SheepError
from sheepfs.net.router import Router
from sheepfs.net.transport import TCP
from storaged.operations.replica import Replica
from storaged.recovery.recovery import JoinedGroup, Recovery
from storaged.server import Server
from storaged.store.objects import ObjectStore

PG_COUNT = 4


class StaticNode:
    """One daemon without membership."""

    def __init__(self, cluster: StaticCluster, node: int, path: Path) -> None:
        self.cluster = cluster
        self.node = node
        self.path = path
        self.incarnation = 0
        self.address = ""
        self.joined: list[JoinedGroup] = []
        self.disk_errors: list[SheepError] = []
        self.store: ObjectStore
        self.replica: Replica
        self.scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self._ended.set()

    async def start(self) -> None:
        """Run as a new incarnation, once the former one has closed its store."""
        await self._ended.wait()
        self._ended = trio.Event()
        self.incarnation += 1
        await self.cluster.nursery.start(self._run)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        self.store = ObjectStore.open(
            self.path, cluster=self.cluster.uuid, create=True, reserve_bytes=0
        )
        with trio.CancelScope() as self.scope:
            async with trio.open_nursery() as nursery:
                self.replica = Replica(
                    self.store, self.node, self.incarnation, nursery, self.disk_errors.append
                )
                self.router = Router(self.cluster.uuid, self.cluster.fetch, self.node)
                self.recovery = Recovery(self.replica, self.router, self._tell_joined)
                self.replica.puller = self.recovery
                handlers = {op: self.replica.handle for op in self.replica.handlers}
                self.server = Server(
                    self.cluster.uuid,
                    {**handlers, 2: lambda c, h, p: c.reply(h), 15: lambda c, h, p: c.reply(h)},
                    lambda: {"node": self.node, "incarnation": self.incarnation},
                )
                listener = await TCP.listen("127.0.0.1:0")
                self.address = f"127.0.0.1:{listener.port}"
                nursery.start_soon(self.replica.run)
                nursery.start_soon(self.router.run)
                nursery.start_soon(self.recovery.run)
                nursery.start_soon(self.server.serve, listener)
                task_status.started()
        self.store.close(clean=self.clean)
        self._ended.set()

    def take(self, cluster_map: ClusterMap) -> None:
        """See a new map."""
        self.replica.set_map(cluster_map)
        self.router.take_map(cluster_map)
        self.recovery.map_changed()
        self.server.publish(cluster_map)

    async def _tell_joined(self, groups: list[JoinedGroup]) -> None:
        self.joined = groups
        self.cluster.joined(self.node, groups)

    clean = True

    def stop(self) -> None:
        """Stop at once; connections break."""
        if self.scope is not None:
            self.scope.cancel()
            self.scope = None


class StaticCluster:
    """Some nodes and the map that the test decides on."""

    def __init__(self, path: Path, nursery: trio.Nursery, nodes: int, copies: int) -> None:
        self.uuid = uuid4().hex
        self.nursery = nursery
        self.copies = copies
        self.nodes = {n: StaticNode(self, n, path / f"n{n}") for n in range(1, nodes + 1)}
        self.map = ClusterMap(0, self.uuid)
        self.auto_join = True

    @property
    def running(self) -> int:
        """How many nodes run."""
        return sum(node.scope is not None for node in self.nodes.values())

    async def fetch(self) -> ClusterMap:
        """Give the newest map, as etcd would."""
        return self.map

    def publish(
        self,
        sync: list[int],
        joining: Sequence[int] | None = None,
        vanished: bool = False,
        away: Sequence[int] = (),
    ) -> None:
        """Make the next epoch: the same members for every group.

        Args:
            vanished: all members are down, and stay, as they are the last.
        """
        epoch = self.map.epoch + 1
        lost = max((g.lost for g in self.map.pools.get(self.copies, ())), default=0)
        if not vanished and self.map.epoch and not any(map(self._had_all, sync)):
            lost = epoch
        group = PlacementGroup(epoch, tuple(sync), tuple(joining or ()), tuple(away), lost)
        self._set(epoch, {self.copies: (group,) * PG_COUNT}, vanished)

    def _had_all(self, node: int) -> bool:
        """Whether a node is in the same run as in the map, and was level."""
        known = self.map.nodes.get(node)
        return (
            known is not None
            and known.incarnation == self.nodes[node].incarnation
            and node in self.map.pools[self.copies][0].sync
        )

    def joined(self, node: int, groups: list[JoinedGroup]) -> None:
        """Promote a node that caught up, as the leader would."""
        if not self.auto_join:
            return
        pgs = list(self.map.pools[self.copies])
        for report in groups:
            old = pgs[report.pg]
            if node in old.joining and old.changed == report.changed:
                pgs[report.pg] = dataclasses.replace(
                    old,
                    sync=(*old.sync, node),
                    joining=tuple(n for n in old.joining if n != node),
                )
        if tuple(pgs) != self.map.pools[self.copies]:
            self._set(self.map.epoch + 1, {self.copies: tuple(pgs)})

    def _set(
        self, epoch: int, pools: dict[int, tuple[PlacementGroup, ...]], vanished: bool = False
    ) -> None:
        members = {n for pgs in pools.values() for g in pgs for n in g.members}
        members = set() if vanished else members
        nodes = {
            n.node: Node(
                n.node,
                NodeState.ACTIVE if n.node in members else NodeState.DOWN,
                n.address,
                n.incarnation,
                "z",
                1.0,
            )
            for n in self.nodes.values()
        }
        self.map = ClusterMap(epoch, self.uuid, nodes, pools)
        for node in self.nodes.values():
            if node.scope is not None:
                node.take(self.map)


@asynccontextmanager
async def static_cluster(
    path: Path, nodes: int = 3, copies: int = 3
) -> AsyncIterator[tuple[StaticCluster, Router]]:
    """Run a cluster, and a client's router that is linked to all of it."""
    async with trio.open_nursery() as nursery:
        cluster = StaticCluster(path, nursery, nodes, copies)
        for node in cluster.nodes.values():
            await node.start()
        cluster.publish(list(cluster.nodes))
        router = Router(cluster.uuid, cluster.fetch)
        router.take_map(cluster.map)
        await nursery.start(router.run)
        with trio.fail_after(5):
            while len(router.links) < nodes:
                await trio.sleep(0.005)
        try:
            yield cluster, router
        finally:
            nursery.cancel_scope.cancel()
