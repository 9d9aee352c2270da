"""One storage daemon, from start to clean stop.

Start: open the data directory, learn the cluster from etcd, listen, announce, follow the map.
Clean stop: withdraw (the leader votes this node out, so nobody waits for it), flush, close.
A disk error ends the daemon at once and uncleanly: its peers have the data (I5).
"""

from __future__ import annotations

import logging
import socket as stdlib_socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from sheepfs.core.errors import SheepError, UnreachableError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import ClusterConfig
from sheepfs.logs import fields, watch_slow
from sheepfs.net.etcd import Etcd
from sheepfs.net.exporter import Exporter
from sheepfs.net.store import Store, parse_endpoints
from sheepfs.net.transport import TCP, Network
from storaged.membership.membership import (
    REMOVED,
    Announcer,
    ensure_config,
    refuse_removed,
    register,
)
from storaged.membership.restored import refuse_restored
from storaged.store.disk import Disk
from storaged.store.objects import ObjectStore
from storaged.wiring import Parts

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
            parts = Parts(
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

    async def _leave(self, parts: Parts, announcer: Announcer) -> None:
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
