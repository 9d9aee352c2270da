"""The parts of a running daemon, and what passes between them: maps, reports, status."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import trio

from sheepfs import __version__
from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.errors import SheepError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import ClusterConfig, RecoveryRecord, ScrubRecord
from sheepfs.core.wire import Buffer, Header, Op
from sheepfs.net.catalog import Catalog
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.net.transport import Network
from storaged.control import Control
from storaged.membership.leader import Leader
from storaged.membership.membership import Announcer, MapFollower
from storaged.membership.ping import ping
from storaged.membership.restored import EpochMemory, refuse_restored, seen_by
from storaged.metrics import node_metrics
from storaged.operations.replica import Replica
from storaged.recovery.recovery import JoinedGroup, Recovery, encode_joined
from storaged.scrub.scrubber import Scrubber
from storaged.server import ClientConnection, Server
from storaged.settings import Setting
from storaged.space.leftovers import Leftovers
from storaged.space.reclaim import Reclaimer
from storaged.space.removal import Removal
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)


class Parts:
    """The parts of a running daemon and what passes between them."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        config: ClusterConfig,
        objects: ObjectStore,
        announcer: Announcer,
        network: Network,
        nursery: trio.Nursery,
        on_disk_error: Callable[[SheepError], None],
        on_removal: Callable[[], None],
    ) -> None:
        node = announcer.node
        self._on_removal = on_removal
        self._held_until = 0.0
        self.map_changed = trio.Event()
        self._objects = objects
        self._announcer = announcer
        self.replica = Replica(objects, node, announcer.incarnation, nursery, on_disk_error)
        self.follower = MapFollower(store, keys, config.cluster, self._on_map)
        self.epochs = EpochMemory(objects, on_disk_error)
        self.router = Router(config.cluster, self._no_map, node, network)
        self.router.on_map.append(lambda old, new: self._take(new))
        self.recovery_setting = Setting(store, keys.setting("recovery"), RecoveryRecord())
        self.replica.pacer.follow(lambda: self.recovery_setting.value)
        self.recovery = Recovery(self.replica, self.router, self._tell_joined)
        self.replica.puller = self.recovery

        async def ping_run(address: str, incarnation: int) -> bool:
            return await ping(address, incarnation, config.cluster, network)

        self.leader = Leader(
            store,
            keys,
            config,
            announcer,
            ping_run,
            self._take,
            out_after_s=lambda: self.recovery_setting.value.out_after_s,
            served=lambda: self.replica.map.epoch,
        )
        self.removal = Removal(self.replica, nursery)
        self.leftovers = Leftovers(self.replica, self.router)
        catalog = Catalog(store, keys)

        async def check_etcd() -> None:
            await refuse_restored(store, keys, objects, self.replica.map.epoch)

        self.reclaimer = Reclaimer(
            *(catalog, self.replica, self.removal, self.leader, self.router), check_etcd
        )
        scrubbing = Setting(store, keys.setting("scrub"), ScrubRecord())
        self.scrubber = Scrubber(self.replica, self.router, catalog, scrubbing)
        self.control = Control(
            self.leader, lambda: self.replica.map, self._take, self._status, self._holder
        )
        handlers: dict[int, Any] = {op: self.replica.handle for op in self.replica.handlers}
        handlers[Op.RECLAIM] = self.removal.handle
        handlers[Op.USAGE] = self.removal.usage
        handlers[Op.SCRUB] = self.scrubber.handle
        handlers[Op.TRAFFIC] = self._tell_traffic
        self.server = Server(config.cluster, {**handlers, **self.control.handlers}, self._greet)

    def is_serving(self) -> bool:
        """Tell whether the map still names this run as a member of anything."""
        known = self.replica.map.nodes.get(self._announcer.node)
        return (
            known is not None
            and known.incarnation == self._announcer.incarnation
            and known.state is not NodeState.DOWN
        )

    def _greet(self) -> dict[str, Any]:
        return {
            "node": self._announcer.node,
            "incarnation": self._announcer.incarnation,
            "epoch": self.replica.map.epoch,
            "seen": seen_by(self._objects, self.replica.map.epoch),
        }

    async def _no_map(self) -> ClusterMap | None:
        """The follower reads the map from etcd; the router need not."""
        return None

    def _take(self, cluster_map: ClusterMap) -> None:
        self.follower.take(cluster_map)

    def _on_map(self, cluster_map: ClusterMap) -> None:
        node = self._announcer.node
        if node in self.replica.map.nodes and node not in cluster_map.nodes:
            # Nodes that are only down stay in the map.
            self._on_removal()
        self._note_hold(cluster_map.nodes.get(node))
        self.replica.set_map(cluster_map)
        self.epochs.note(cluster_map.epoch)
        self.router.take_map(cluster_map)
        self.recovery.map_changed()
        self.server.publish(cluster_map)
        self.map_changed.set()
        self.map_changed = trio.Event()

    def _note_hold(self, me: Node | None) -> None:
        """Say why this node is not let in (I12)."""
        until = me.held_until if me is not None and me.state is NodeState.DOWN else 0.0
        if me is not None and until > me.down_since and until != self._held_until:
            log.warning(
                "this node came back %d times within a short time: it is held out of the cluster"
                " for %.0f s", me.returns, until - me.down_since,
            )  # fmt: skip
        self._held_until = until

    async def _tell_joined(self, groups: list[JoinedGroup]) -> None:
        """Tell the leader, whoever of us it is."""
        node, incarnation = self._announcer.node, self._announcer.incarnation
        if self.leader.is_leader:
            self.leader.joined(node, incarnation, groups)
            return
        body = encode_joined(node, incarnation, groups)
        for link in list(self.router.links.values()):
            try:
                await link.call(Op.JOINED, body, timeout_s=1)
                return
            except SheepError as error:
                log.debug("node %d does not take the report: %s", link.node, error)

    def _tell_traffic(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        record = self._announcer.record
        me = {"node": record.id, "incarnation": record.incarnation, "at": trio.current_time()}
        head = json.dumps({**me, **self.server.traffic.encode()})
        mounts = self.control.mounts.encoded()
        client.reply(header, head[:-1].encode() + b', "mounts": ' + mounts + b"}")

    def metrics(self) -> Iterator[str]:
        """Give this daemon's metrics in pieces (storaged.metrics)."""
        stalled = len(self.control.stalled_volumes())
        return node_metrics(self._status(), self.server.traffic, stalled, self.replica.map)

    def _holder(self, vdi: int) -> str:
        name = self.replica.holders.get(vdi, "")
        return name if name and self.server.is_present(name) else ""

    def _status(self) -> dict[str, Any]:
        usage = self._objects.usage()
        counters = self.replica.counters
        record = self._announcer.record
        progress = self.recovery.progress.status(trio.current_time())
        return {
            "node": record.id,
            "incarnation": record.incarnation,
            "address": record.address,
            "zone": record.zone,
            "weight": record.weight,
            "epoch": self.replica.map.epoch,
            "leader": self.leader.is_leader,
            "objects": usage.objects,
            "used": usage.used_by_objects,
            "total": usage.total,
            "free": usage.free,
            "quarantined": usage.quarantined,
            "corrupt_blocks": counters.corrupt_blocks,
            "repaired_blocks": counters.repaired_blocks,
            "restored_objects": counters.restored_objects,
            "laundered_objects": counters.laundered_objects,
            "pulled_objects": counters.pulled_objects,
            "pulled_bytes": counters.pulled_bytes,
            "suspects": len(self._objects.suspects()),
            "joining": progress["groups_left"],
            "recovery": progress,
            "scrub": self.scrubber.status(),
            "version": __version__,
            **self.server.statistics(),
        }
