"""One storage daemon: its parts, wired together, from start to clean stop.

Start: open the data directory, learn the cluster from etcd, listen, announce, follow the map.
Clean stop: withdraw (the leader votes this node out, so nobody waits for it), flush, close.
A disk error ends the daemon at once and uncleanly: its peers have the data (I5).
"""

from __future__ import annotations

import json
import logging
import socket as stdlib_socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from sheepfs import __version__
from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.errors import SheepError, UnreachableError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import ClusterConfig, RecoveryRecord, ScrubRecord
from sheepfs.core.wire import Buffer, Header, Op
from sheepfs.logs import fields, watch_slow
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd
from sheepfs.net.exporter import Exporter
from sheepfs.net.router import Router
from sheepfs.net.store import Store, parse_endpoints
from sheepfs.net.transport import TCP, Network
from storaged.control import Control
from storaged.leader import Leader
from storaged.leftovers import Leftovers
from storaged.membership import (
    REMOVED,
    Announcer,
    MapFollower,
    ensure_config,
    refuse_removed,
    register,
)
from storaged.metrics import node_metrics
from storaged.ping import ping
from storaged.reclaim import Reclaimer
from storaged.recovery import JoinedGroup, Recovery, encode_joined
from storaged.removal import Removal
from storaged.replica import Replica
from storaged.restored import EpochMemory, refuse_restored
from storaged.scrub import Scrubber
from storaged.server import ClientConnection, Server
from storaged.settings import Setting
from storaged.store.disk import Disk
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
START_RETRY_S = 1.0
CAPACITY_EVERY_S = 60.0
FAILURE_EVERY_S = 1.0
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    data_dir: Path
    etcd: str
    cluster: str
    listen: str
    advertise: str | None
    zone: str | None
    weight: float | None
    pg_count: int
    metrics: str | None = None
    """Where metrics are served (ADDR:PORT), if they are."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a daemon finds on its host; a simulation has its own."""

    network: Network = TCP
    etcd: Callable[[str], Store] = Etcd
    disk: Disk | None = None
    """In place of the file system of the data directory."""


class Daemon:
    """A storage daemon that runs until `stop` or a disk error."""

    def __init__(self, options: Options, machine: Machine | None = None) -> None:
        self._options = options
        self._machine = machine or Machine()
        self._stop = trio.Event()
        self._disk_error: SheepError | None = None
        self._is_removed = False

    def stop(self) -> None:
        """Begin a clean stop."""
        self._stop.set()

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serve until stopped.

        Args:
            ready: called once with a line that says where the node serves.

        Raises:
            SheepError: it could not start, or the disk failed.
        """
        options = self._options
        keys = Keys(options.cluster)
        store = self._machine.etcd(options.etcd)
        store.trust(keys.fencing)
        try:
            known = ObjectStore.cluster_of(options.data_dir, self._machine.disk)
            config = await self._config(store, keys, known)
            objects = ObjectStore.open(
                options.data_dir, cluster=config.cluster, create=True, disk=self._machine.disk
            )
            try:
                await refuse_restored(store, keys, objects)
                node = await register(store, keys, objects.uuid, objects.node_id)
                if objects.node_id is None:
                    objects.set_node_id(node)
                await refuse_removed(store, keys, node)
                await self._serve(store, keys, config, objects, node, ready)
            finally:
                objects.close(clean=self._disk_error is None)
        finally:
            with trio.CancelScope(shield=True):
                await store.aclose()
        if self._disk_error is not None:
            raise self._disk_error
        if self._is_removed:
            raise UsageError(f"node {node} {REMOVED}")

    async def _config(self, store: Store, keys: Keys, known: str) -> ClusterConfig:
        """Wait for etcd: after a power cut all machines start at once."""
        complained = False
        while True:
            try:
                return await ensure_config(store, keys, self._options.pg_count, known)
            except UnreachableError as error:
                if not complained:
                    log.warning("waiting for etcd: %s", error)
                    complained = True
                await trio.sleep(START_RETRY_S)

    async def _serve(
        self,
        store: Store,
        keys: Keys,
        config: ClusterConfig,
        objects: ObjectStore,
        node: int,
        ready: Callable[[str], None],
    ) -> None:
        options = self._options
        network = self._machine.network
        listener = await network.listen(options.listen)
        address = options.advertise or _own_address(options.listen, options.etcd, listener.port)
        weight = _capacity(objects) if options.weight is None else options.weight
        zone = options.zone or stdlib_socket.gethostname()
        metrics = await TCP.listen(options.metrics) if options.metrics else None
        announcer = Announcer(store, keys, node, address, zone, weight)
        async with trio.open_nursery() as nursery:
            parts = _Parts(
                *(store, keys, config, objects, announcer, network, nursery),
                *(self._fail, self._removed),
            )
            nursery.start_soon(parts.server.serve, listener)
            nursery.start_soon(parts.replica.run)
            nursery.start_soon(parts.epochs.run)
            parts.replica.incarnation = await nursery.start(announcer.run)
            nursery.start_soon(parts.router.run)
            nursery.start_soon(parts.recovery.run)
            nursery.start_soon(parts.recovery_setting.run)
            nursery.start_soon(parts.follower.run)
            nursery.start_soon(parts.leader.run)
            nursery.start_soon(parts.reclaimer.run)
            nursery.start_soon(parts.leftovers.run)
            if options.weight is None:
                nursery.start_soon(_follow_capacity, objects, announcer)
            nursery.start_soon(parts.scrubber.run)
            nursery.start_soon(_watch_disk, objects, self._fail)
            nursery.start_soon(watch_slow, lambda: [(f"node {node}", parts.server.traffic)])
            if metrics is not None:
                log.info("metrics are served at port %d", metrics.port)
                nursery.start_soon(Exporter(parts.metrics).serve, metrics)
            ready(
                f"node {node} of cluster {options.cluster} serves {options.data_dir} at {address}"
            )
            await self._stop.wait()
            if self._disk_error is None:
                await self._leave(parts, announcer)
            nursery.cancel_scope.cancel()

    async def _leave(self, parts: _Parts, announcer: Announcer) -> None:
        """Serve on until the leader has voted this node out, so that no write waits for it."""
        log.info("stopping: leaving the cluster")
        await announcer.withdraw()
        with trio.move_on_after(STOP_GRACE_S):
            while parts.is_serving() and len(parts.replica.map.nodes) > 1:
                await parts.map_changed.wait()

    def _fail(self, error: SheepError) -> None:
        if self._disk_error is None:
            log.critical(
                "the disk failed, leaving the cluster for good: %s", error,
                extra=fields(event="disk-failed", directory=self._options.data_dir),
            )  # fmt: skip
            self._disk_error = error
            self._stop.set()

    def _removed(self) -> None:
        log.warning("leaving: this node was removed from the cluster")
        self._is_removed = True
        self._stop.set()


class _Parts:
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


def _capacity(objects: ObjectStore) -> float:
    """Give the weight of a node whose operator says nothing else: its disk's size in GiB."""
    return max(0.01, objects.usage().total / GIB)


async def _follow_capacity(objects: ObjectStore, announcer: Announcer) -> None:
    """Announce another weight when the file system has grown; the leader ignores small changes."""
    while True:
        await trio.sleep(CAPACITY_EVERY_S)
        with suppress(SheepError):  # A failed disk ends the daemon by itself.
            announcer.change_weight(_capacity(objects))


async def _watch_disk(objects: ObjectStore, fail: Callable[[SheepError], None]) -> None:
    """Tell of a disk that failed in the background, where no client's request met it (I5).

    Who catches up, for one, tries again whatever the error was.
    """
    while True:
        await trio.sleep(FAILURE_EVERY_S)
        if objects.failure is not None:
            fail(objects.failure)
            return


def _own_address(listen_at: str, etcd: str, port: int) -> str:
    """Give the address at which others reach a daemon that listens everywhere.

    The one that the route to etcd leaves from; connecting a datagram socket sends nothing.
    """
    host = listen_at.rpartition(":")[0].strip("[]")
    if host in ("", "0.0.0.0", "::"):
        target = parse_endpoints(etcd)[0]
        try:
            family = stdlib_socket.getaddrinfo(*target, type=stdlib_socket.SOCK_DGRAM)[0]
            with stdlib_socket.socket(family[0], stdlib_socket.SOCK_DGRAM) as sock:
                sock.connect(family[4])
                host = sock.getsockname()[0]
        except OSError:
            host = stdlib_socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
