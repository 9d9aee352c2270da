"""The cluster as one mount sees it: all VDIs, and the volumes it has open.

Implements `sheepfs.backend.Namespace` on etcd (records, attach) and the storage daemons (data).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from sheepfs.backend import Attributes, Capacity
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import (
    FencedError,
    SheepError,
    UnreachableError,
    VdiNotFoundError,
)
from sheepfs.core.metadata import Keys, VdiRecord
from sheepfs.core.wire import Op
from sheepfs.net.attach import Attachment, attach, detach, reclaim_after_lease_loss, save
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.groups import plain_errors
from sheepfs.net.link import Link, next_request
from sheepfs.net.router import Router
from sheepfs.net.store import LeaseKeeper, Store
from sheepfs.volume import Volume

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
LIST_FRESH_S = 1.0
START_TIMEOUT_S = 10.0
CAPACITY_TIMEOUT_S = 1.0
DEFAULT_COPIES = 3
STALL_REPORT_S = 1.0


class Cluster:
    """All VDIs of a cluster, for one mount."""

    def __init__(
        self, store: Store, keys: Keys, catalog: Catalog, router: Router, owner: str,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self._store = store
        self._keys = keys
        self._catalog = catalog
        self._router = router
        self._owner = owner
        self._nursery = nursery
        self._volumes: dict[int, Volume] = {}
        self._listed: dict[str, VdiRecord] = {}
        self._names: dict[int, str] = {}
        self._listed_at = float("-inf")
        self._listing = trio.Lock()
        self._keeper: LeaseKeeper | None = None
        self._keeper_lock = trio.Lock()

    # -- names ------------------------------------------------------------------------------

    async def _fresh_list(self) -> dict[str, VdiRecord]:
        """All records, at most a second old; one reading for all who ask at the same time."""
        async with self._listing:
            if trio.current_time() - self._listed_at > LIST_FRESH_S:
                asked_at = trio.current_time()
                found = await self._catalog.vdis()
                self._listed = {name: record for name, record, _ in found}
                self._names = {record.id: name for name, record in self._listed.items()}
                self._listed_at = asked_at
                for name, record in self._listed.items():
                    if volume := self._volumes.get(record.id):
                        volume.refresh(name, record)
            return self._listed

    def _stale(self) -> None:
        self._listed_at = float("-inf")

    def _attributes(self, name: str, record: VdiRecord) -> Attributes:
        volume = self._volumes.get(record.id)
        if volume is not None:
            return volume.attributes()
        return Attributes(
            record.id, name, record.size, record.allocated, record.mode, record.uid, record.gid,
            record.modified, record.changed,
        )  # fmt: skip

    async def list(self) -> Sequence[Attributes]:
        """All VDIs by name."""
        return [self._attributes(n, r) for n, r in sorted((await self._fresh_list()).items())]

    async def lookup(self, name: str) -> Attributes:
        """Attributes by name. Raises VdiNotFoundError."""
        record = (await self._fresh_list()).get(name)
        if record is None:
            raise VdiNotFoundError(f"there is no VDI {name!r}")
        return self._attributes(name, record)

    async def get(self, vdi: int) -> Attributes:
        """Attributes by id. Raises VdiNotFoundError."""
        if volume := self._volumes.get(vdi):
            return volume.attributes()
        name, record = await self._by_id(vdi)
        return self._attributes(name, record)

    async def _by_id(self, vdi: int) -> tuple[str, VdiRecord]:
        listed = await self._fresh_list()
        name = self._names.get(vdi)
        if name is None:
            raise VdiNotFoundError(f"there is no VDI with id {vdi}")
        return name, listed[name]

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        """Make an empty VDI of three copies. Raises VdiExistsError, UsageError."""
        record = await self._catalog.create(name, 0, DEFAULT_COPIES, mode, uid, gid)
        self._stale()
        return self._attributes(name, record)

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename; an existing `new` goes to the trash if `replace`, else VdiExistsError."""
        await self._catalog.rename(old, new, replace)
        self._stale()

    async def delete(self, name: str) -> None:
        """Delete. Raises HeldElsewhereError while any mount holds it."""
        await self._catalog.delete(name)
        self._stale()

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        """Change mode, owner and times in etcd."""
        name, _ = await self._by_id(vdi)

        def change(record: VdiRecord) -> VdiRecord:
            return dataclasses.replace(
                record,
                mode=record.mode if mode is None else mode,
                uid=record.uid if uid is None else uid,
                gid=record.gid if gid is None else gid,
                modified=record.modified if modified is None else modified,
                changed=time.time(),
            )

        record = await self._catalog.update(name, change)
        self._stale()
        if volume := self._volumes.get(vdi):
            volume.refresh(name, record)
            if modified is not None:
                volume.set_modified(modified)
        return self._attributes(name, record)

    # -- volumes ----------------------------------------------------------------------------

    async def open(self, vdi: int) -> Volume:
        """Open for one more file handle; all handles of this mount share the volume."""
        volume = self._volumes.get(vdi)
        if volume is None:
            name, record = await self._by_id(vdi)
            await self._wait_pool(record.copies)
            volume = self._volumes.setdefault(
                vdi, Volume(name, record, self._router, self, self._nursery)
            )
        volume.handles += 1
        volume.on_idle = self._forget_volume
        return volume

    def _forget_volume(self, volume: Volume) -> None:
        self._volumes.pop(volume.record.id, None)
        self._stale()

    async def _wait_pool(self, copies: int) -> None:
        with trio.move_on_after(START_TIMEOUT_S):
            while copies not in self._router.map.pools:
                await self._router.wait_map()
            return
        raise UnreachableError(
            f"no storage daemon has made the pool of {copies} copies: are daemons running?"
        )

    async def attach(self, vdi: int) -> Attachment:
        """Become the holder of a VDI (for Volume). Raises HeldElsewhereError."""
        keeper = await self._lease()
        attachment = await attach(self._store, self._keys, vdi, self._owner, keeper, self._fence)
        self._stale()
        return attachment

    async def _fence(self, vdi: int, token: int) -> None:
        await fence_everywhere(self._router, vdi, token)

    async def is_held(self, vdi: int) -> bool:
        """Tell whether any mount holds the VDI."""
        return await self._store.get(self._keys.lock(vdi)) is not None

    async def save(self, attachment: Attachment, record: VdiRecord) -> None:
        """Keep a held VDI's size and usage in etcd."""
        await save(
            attachment,
            lambda r: dataclasses.replace(
                r, size=record.size, maps=record.maps, allocated=record.allocated,
                modified=record.modified,
            ),
        )  # fmt: skip
        self._stale()

    async def detach(self, attachment: Attachment, record: VdiRecord, *, clean: bool) -> None:
        """Let a VDI go."""
        try:
            await detach(
                attachment,
                lambda r: dataclasses.replace(
                    r,
                    size=record.size,
                    maps=record.maps,
                    allocated=record.allocated,
                    modified=record.modified,
                ),
                clean=clean,
            )
        except FencedError as error:
            log.warning("VDI %d: %s", record.id, error)
        self._stale()

    async def _lease(self) -> LeaseKeeper:
        """One lease for all VDIs that this mount holds."""
        async with self._keeper_lock:
            if self._keeper is None or self._keeper.lost.is_set():
                keeper = LeaseKeeper(self._store, LEASE_TTL_S)
                await self._nursery.start(keeper.run)
                self._nursery.start_soon(self._watch_lease, keeper)
                self._keeper = keeper
            return self._keeper

    async def _watch_lease(self, keeper: LeaseKeeper) -> None:
        """After an etcd outage our lease may be gone: hold on to what nobody took meanwhile."""
        await keeper.lost.wait()
        held = [v for v in self._volumes.values() if v.attachment is not None]
        if not held:
            return
        log.warning("the lease in etcd has ended; taking %d VDIs back", len(held))
        new = await self._lease()
        for volume in held:
            if volume.attachment is None:
                continue
            try:
                await reclaim_after_lease_loss(volume.attachment, new)
            except SheepError as error:
                log.error("VDI %s: %s", volume.name, error)
            if volume.attachment is not None and volume.attachment.lost.is_set():
                volume.fence("another mount took it over")

    async def close(self) -> None:
        """Flush and detach everything."""
        for volume in list(self._volumes.values()):
            try:
                await volume.detach()
            except SheepError as error:
                log.error("VDI %s: %s", volume.name, error)
        if self._keeper is not None and not self._keeper.lost.is_set():
            await self._store.revoke(self._keeper.lease)

    # -- the cluster ------------------------------------------------------------------------

    async def capacity(self) -> Capacity:
        """Bytes that VDIs of three copies can still take, for `df`."""
        total = free = 0

        async def ask(node: int) -> None:
            nonlocal total, free
            link = self._router.link(node)
            if link is None:
                return
            try:
                status = await link.call_json(Op.STATUS, timeout_s=CAPACITY_TIMEOUT_S)
                total += int(status["total"])
                free += int(status["free"])
            except (SheepError, KeyError, TypeError, ValueError) as error:
                log.info("node %d tells no capacity: %s", node, error)

        async with trio.open_nursery() as nursery:
            for node in self._router.map.nodes:
                nursery.start_soon(ask, node)
        copies = max(1, min(DEFAULT_COPIES, len(self._router.map.nodes)))
        return Capacity(total // copies, free // copies)

    async def report_stalls(self) -> None:
        """Show stalled volumes in every daemon's status (I12)."""
        shown: list[str] = []
        while True:
            await trio.sleep(STALL_REPORT_S)
            stalled = [f"{v.name}: {v.stalled}" for v in self._volumes.values() if v.stalled]
            if stalled != shown:
                shown = stalled
                body = json.dumps({"stalled": stalled}).encode()
                for link in list(self._router.links.values()):
                    link.request(Op.REPORT, next_request(), lambda *_: None, body)


async def fetch_map(store: Store, keys: Keys) -> ClusterMap | None:
    """Read the cluster map from etcd."""
    found = await store.get(keys.map)
    return None if found is None else ClusterMap.decode(found.value)


@asynccontextmanager
async def connect(etcd: str, cluster: str, owner: str) -> AsyncIterator[Cluster]:
    """Connect to a cluster for as long as the block runs.

    Args:
        etcd: `HOST:PORT[,HOST:PORT]`.
        owner: names this mount in messages to others.

    Raises:
        UnreachableError: etcd does not answer, or no storage daemon is up.
        UsageError: there is no such cluster.
    """
    keys = Keys(cluster)
    store = Etcd(etcd)
    try:
        catalog = Catalog(store, keys)
        config = await catalog.config()
        router = Router(config.cluster, lambda: fetch_map(store, keys))
        first = await fetch_map(store, keys)
        if first is not None:
            router.take_map(first)
        with plain_errors():
            async with trio.open_nursery() as nursery:
                await nursery.start(router.run)
                await _wait_for_a_node(router)
                me = Cluster(store, keys, catalog, router, owner, nursery)
                nursery.start_soon(me.report_stalls)
                try:
                    yield me
                finally:
                    with trio.CancelScope(shield=True):
                        await me.close()
                    nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()


async def _wait_for_a_node(router: Router) -> None:
    linked = trio.Event()

    def on_link(link: Link) -> None:
        linked.set()

    router.on_link.append(on_link)
    try:
        with trio.move_on_after(START_TIMEOUT_S):
            if not router.links:
                await linked.wait()
            return
    finally:
        router.on_link.remove(on_link)
    known = ", ".join(f"{n.id} at {n.address}" for n in router.map.nodes.values())
    raise UnreachableError(
        "no storage daemon can be reached; "
        + (f"the cluster has nodes {known}" if known else "the cluster has no nodes yet")
        + ": start sheepfs-storaged on them"
    )
