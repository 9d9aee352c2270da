"""A node's membership: its id, the sign that it is alive, and the cluster map it follows.

Always holds:
- A node id belongs to one data directory (its uuid) for ever; ids are never reused.
- The incarnation is the id of the first lease of this run: unique, and the same until the process
  ends. When a lease is lost while the process lives on, it announces itself with a new lease and
  the *same* incarnation. If nobody voted it out meanwhile it missed nothing, since no write is
  acknowledged without a member that the map names (I7); if somebody did, the map says so, and the
  leader lets it in as `joining` only. So an outage of etcd that outlasts the leases costs nothing.
- Listen first, then announce: whoever is announced and refuses connections is voted out.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, UnreachableError, UsageError, WrongClusterError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    AliveRecord,
    ClusterConfig,
    NodeRecord,
    NodeWish,
)
from sheepfs.logs import Complaint
from sheepfs.net.history import WentBackError
from sheepfs.net.metadata_transfer import refuse_half_done
from sheepfs.net.store import RETRY_S, LeaseGoneError, LeaseKeeper, Store

log = logging.getLogger(__name__)

ALIVE_TTL_S = 5
WITHDRAW_S = 2.0
"""How long a clean stop waits for etcd; the lease ends by itself anyway."""


async def ensure_config(
    store: Store, keys: Keys, pg_count: int = 256, known: str = ""
) -> ClusterConfig:
    """Give the cluster's fixed facts; the first daemon of a cluster makes them.

    Args:
        pg_count: placement groups of each pool, if the cluster has yet to be made.
        known: the cluster that the data directory belongs to, if it is not new.

    Raises:
        UnreachableError: etcd does not answer; calling again is safe.
        WrongClusterError: the data directory's cluster is not in etcd (any more).
        UsageError: an import of the cluster has not come to its end.
        ProtocolError: what etcd holds is no config of a format that this version knows.
    """
    while True:
        found = await store.get(keys.config)
        if found is not None:
            return ClusterConfig.decode(found.value)
        await refuse_half_done(store, keys)
        if known:
            raise WrongClusterError(
                f"this data directory is of cluster {known}, which is not in this etcd. Is this"
                " the right etcd and cluster name? If etcd's data was lost, bring it back with"
                " sheepctl metadata import"
            )
        config = ClusterConfig(uuid.uuid4().hex, pg_count, time.time())
        conditions = [Unchanged(keys.config, 0), Unchanged(keys.importing, 0)]
        created = Transaction(conditions, [Put(keys.config, config.encode())])
        if await store.commit(created) is not None:
            log.info("made cluster %s with %d placement groups a pool", config.cluster, pg_count)


async def register(store: Store, keys: Keys, store_uuid: str, node: int | None) -> int:
    """Give the node id of the data directory `store_uuid`; a new directory gets a new id.

    Args:
        node: the id that the data directory knows, None if it never got one.

    Raises:
        WrongClusterError: the id is another data directory's, or unknown to this cluster.
        UnreachableError: etcd does not answer; calling again is safe and wastes no id.
    """
    if node is not None:
        found = await store.get(keys.node(node))
        if found is None:
            raise WrongClusterError(
                f"this data directory is node {node}, which this cluster does not know. "
                "Was etcd's data lost or restored from an older backup?"
            )
        if NodeRecord.decode(found.value).uuid != store_uuid:
            raise WrongClusterError(
                f"node {node} is another data directory; this one may be a copy of it"
            )
        return node
    counter = keys.counter("node")
    while True:
        # A registration whose reply, or whose note in the data directory, was lost is found again.
        known, _ = await store.list(keys.nodes)
        for record in (NodeRecord.decode(kv.value) for kv in known):
            if record.uuid == store_uuid:
                return record.id
        last = await store.get(counter)
        new = (int(last.value) if last else 0) + 1
        record = NodeRecord(new, store_uuid, time.time())
        conditions = [
            Unchanged(counter, last.mod_revision if last else 0),
            Unchanged(keys.node(new), 0),
        ]
        changes = [Put(counter, str(new).encode()), Put(keys.node(new), record.encode())]
        if await store.commit(Transaction(conditions, changes)) is not None:
            log.info("registered as node %d", new)
            return new


REMOVED = (
    "was removed from the cluster by an operator, which has all its data on other nodes. It never"
    " comes back as this node: to use the disk again, start with an empty data directory"
)


async def refuse_removed(store: Store, keys: Keys, node: int) -> None:
    """Let no node start that operators removed, unless a placement group still needs its data.

    Raises:
        UsageError: it was removed.
        UnreachableError: etcd does not answer; calling again is safe.
    """
    found = await store.get(keys.wish(node))
    if found is None or not NodeWish.decode(found.value).removed:
        return
    current = await store.get(keys.map)
    if current is None or node not in ClusterMap.decode(current.value).nodes:
        raise UsageError(f"node {node} {REMOVED}")


class Announcer:
    """Keeps `alive/<node>` in etcd for as long as the daemon runs.

    Args:
        address: host:port at which others reach this daemon; it listens there already.
        zone: failure domain.
        weight: share of data relative to other nodes.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        node: int,
        address: str,
        zone: str,
        weight: float,
        ttl_s: int = ALIVE_TTL_S,
    ) -> None:
        self.node = node
        self.incarnation = 0
        """Number of this run; 0 before the first lease."""
        self.address = address
        self._store = store
        self._key = keys.alive_node(node)
        self._zone = zone
        self._weight = weight
        self._ttl_s = ttl_s
        self._keeper: LeaseKeeper | None = None
        self._again = trio.Event()
        self._withdrawn = trio.Event()

    @property
    def lease(self) -> int:
        """The lease that says that this daemon is alive; 0 while there is none."""
        keeper = self._keeper
        return 0 if keeper is None or keeper.lost.is_set() else keeper.lease

    @property
    def record(self) -> AliveRecord:
        """What is announced."""
        return AliveRecord(self.node, self.incarnation, self.address, self._zone, self._weight)

    def change_weight(self, weight: float) -> None:
        """Announce another weight."""
        if weight != self._weight:
            self._weight = weight
            self._again.set()

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce until `withdraw`; reports the incarnation once the first one has it."""
        while not self._withdrawn.is_set():
            keeper = LeaseKeeper(self._store, self._ttl_s)
            async with trio.open_nursery() as nursery:
                lease = await nursery.start(keeper.run)
                if not self.incarnation:
                    self.incarnation = lease
                    task_status.started(lease)
                self._keeper = keeper
                nursery.start_soon(self._announce, lease)
                await keeper.lost.wait()
                nursery.cancel_scope.cancel()

    async def _announce(self, lease: int) -> None:
        """Put the record now and whenever it changes."""
        complaint = Complaint()
        while True:
            self._again = trio.Event()
            try:
                put = Put(self._key, self.record.encode(), lease)
                await self._store.commit(Transaction([], [put]))
            except LeaseGoneError:
                # The keeper finds out by itself within a third of the lease.
                await trio.sleep(RETRY_S)
            except UnreachableError as error:
                if complaint.due():
                    log.warning("cannot announce this node, trying on: %s", error)
                await trio.sleep(RETRY_S)
            else:
                await self._again.wait()

    async def withdraw(self) -> None:
        """Say that this daemon stops, so that the leader acts at once; `run` returns."""
        self._withdrawn.set()
        keeper = self._keeper
        if keeper is not None:
            with trio.move_on_after(WITHDRAW_S), suppress(UnreachableError):
                await keeper.revoke()


def refuse_older_map(found: int, known: int) -> None:
    """Raise WentBackError if the map in etcd is older than one that was known before it was read.

    A map is in etcd before anybody serves by it.
    """
    if found < known:
        raise WentBackError(
            f"the cluster map in etcd has epoch {found}, this daemon serves by {known}: etcd was"
            " restored from older data. Bring newer data back, or stop all storage daemons, accept"
            " what there is with: sheepctl metadata accept, and start daemons and mounts anew"
        )


class MapFollower:
    """Follows the cluster map: each epoch is published once, older ones never.

    Args:
        cluster: unique id of the cluster; a map of another one is refused.
        on_map: called with each newer map.
    """

    def __init__(
        self, store: Store, keys: Keys, cluster: str, on_map: Callable[[ClusterMap], None]
    ) -> None:
        self.map = ClusterMap(0, cluster)
        self._store = store
        self._key = keys.map
        self._on_map = on_map

    def take(self, cluster_map: ClusterMap) -> bool:
        """Take a map, wherever it came from; tells whether it was newer."""
        if cluster_map.cluster != self.map.cluster:
            log.error("refused a cluster map of another cluster (%s)", cluster_map.cluster)
            return False
        if cluster_map.epoch <= self.map.epoch:
            return False
        self.map = cluster_map
        self._on_map(cluster_map)
        return True

    async def run(self) -> None:
        """Follow `map` in etcd until cancelled. A watch only hints: the map is always read."""
        complaint = Complaint()
        async with self._store.watch(self._key) as hints:
            async for _ in hints:
                try:
                    await self.refresh()
                except (UnreachableError, ProtocolError) as error:
                    if complaint.due():
                        log.warning("cannot read the cluster map, trying on: %s", error)

    async def refresh(self) -> None:
        """Read the map now.

        Raises:
            UnreachableError: etcd does not answer, or went back to an older map.
            ProtocolError: the map is of a format that this version does not know.
        """
        epoch = self.map.epoch
        found = await self._store.get(self._key)
        if found is not None:
            cluster_map = ClusterMap.decode(found.value)
            refuse_older_map(cluster_map.epoch, epoch)
            self.take(cluster_map)
