"""The cluster as one mount sees it: all VDIs and snapshots, and the volumes it has open.

Implements `sheepfs.backend.Namespace` on etcd (records, attach) and the storage daemons (data).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import trio

from sheepfs.accounts import Account, Accounts
from sheepfs.backend import Attributes, Capacity, OpenVolume
from sheepfs.core.errors import (
    ReadOnlyError,
    SheepError,
    UnreachableError,
    UsageError,
    VdiNotFoundError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import RequestRecord, SnapshotRecord
from sheepfs.core.wire import Op
from sheepfs.holding.holding import Holding
from sheepfs.holding.requests import Progress, ignore_progress
from sheepfs.holding.work import HolderWork
from sheepfs.layers.rewriting import Rewriting
from sheepfs.layers.sharing import copy_range
from sheepfs.layers.snapshots import Snapshots
from sheepfs.listing import Named
from sheepfs.mount_metrics import mount_metrics
from sheepfs.names import DEFAULT_COPIES, Names
from sheepfs.net.catalog import Catalog
from sheepfs.net.link import next_request
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.volume.frozen import FrozenVolume, snapshot_attributes
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
CAPACITY_TIMEOUT_S = 1.0
STALL_REPORT_S = 1.0


class Cluster(Names):
    """All VDIs of a cluster, for one mount."""

    def __init__(
        self, store: Store, keys: Keys, catalog: Catalog, router: Router, owner: str,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        super().__init__(store, keys, catalog)
        self.router = router
        self._nursery = nursery
        self._accounts = Accounts()
        self._tending = trio.CancelScope()
        self._tended = trio.Event()
        self._tended.set()
        self.holding = Holding(
            store, keys, catalog, router, owner, nursery, self._open_vdis, self._listing.forget
        )
        self.snapshots = Snapshots(store, keys, catalog, router, self.holding.lease)
        self.rewriting = Rewriting(store, keys, catalog, router, self.holding.lease)
        self._work = HolderWork(store, keys, self.holding, self.snapshots, self.rewriting)

    def _open_vdis(self) -> list[Volume]:
        return [volume for volume in self._volumes.values() if isinstance(volume, Volume)]

    # -- volumes ----------------------------------------------------------------------------

    async def open(self, vdi: int) -> Volume | FrozenVolume:
        """Open for one more file handle; all handles of this mount share the volume."""
        volume = self._volumes.get(vdi)
        if volume is None:
            item = await self._find(vdi)
            await self._wait_pool(item.record.copies)
            volume = self._volumes.setdefault(vdi, self._make(item))
        volume.handles += 1
        return volume

    async def _find(self, item: int) -> Named:
        """Find a VDI or snapshot by its id as it is now, not as it was listed."""
        try:
            name, record, _ = await self.catalog.find(item)
        except VdiNotFoundError:
            return await self._listing.by_id(item)
        return Named(name, record, name)

    def _make(self, item: Named) -> Volume | FrozenVolume:
        volume = self._make_volume(item)
        volume.traffic = self._accounts.open(item.record.id, item.name, self._volumes)
        return volume

    def _make_volume(self, item: Named) -> Volume | FrozenVolume:
        if isinstance(item.record, SnapshotRecord):
            frozen = FrozenVolume(item.name, item.record, self.router, self._nursery)
            frozen.on_idle = self._forget_volume
            return frozen
        volume = Volume(item.name, item.record, self.router, self.holding, self._nursery)
        volume.on_idle = self._forget_volume
        return volume

    @asynccontextmanager
    async def opened(self, vdi: int) -> AsyncIterator[Volume | FrozenVolume]:
        """Open for as long as the block runs."""
        volume = await self.open(vdi)
        try:
            yield volume
        finally:
            with trio.CancelScope(shield=True):
                await volume.close()

    def _forget_volume(self, volume: Volume | FrozenVolume) -> None:
        self._volumes.pop(volume.record.id, None)
        self._accounts.renamed(volume.record.id, volume.name)
        self._listing.forget()

    async def _wait_pool(self, copies: int) -> None:
        with trio.move_on_after(START_TIMEOUT_S):
            while copies not in self.router.map.pools:
                await self.router.wait_map()
            return
        raise UnreachableError(
            f"no storage daemon has made the pool of {copies} copies: are daemons running?"
        )

    async def tend(self, work: Callable[[Cluster], Awaitable[None]]) -> None:
        """Do what nobody waits for, until `close`."""
        self._tended = trio.Event()
        try:
            with self._tending:
                await work(self)
        finally:
            self._tended.set()

    async def close(self) -> None:
        """Flush and detach everything."""
        # First of all: whoever opens a volume after this would not see it closed.
        self._tending.cancel()
        await self._tended.wait()
        for volume in list(self._volumes.values()):
            try:
                await volume.detach()
            except SheepError as error:
                log.error("VDI %s: %s", volume.name, error)
        await self.holding.end()

    # -- snapshots and shares ---------------------------------------------------------------

    async def snapshot(self, vdi: int, tag: str) -> Attributes:
        """Keep a VDI as it is now; if another mount holds it, that one is asked to."""
        item = await self._find(vdi)
        if isinstance(item.record, SnapshotRecord):
            raise UsageError(f"{item.name} is a snapshot itself")
        await self._at_holder(vdi, "snapshot", tag=tag)
        made = await self.catalog.snapshot(item.name, tag)
        return snapshot_attributes(made.file, made.record)

    async def clone(self, vdi: int, name: str) -> Attributes:
        """Make a new VDI that begins as a VDI, or a snapshot, is now."""
        item = await self._find(vdi)
        if isinstance(item.record, SnapshotRecord):
            await self.snapshots.clone_snapshot(item.record, name)
        else:
            await self._at_holder(vdi, "clone", name=name)
        self._listing.forget()
        record, _ = await self.catalog.vdi(name)
        return self._attributes(Named(name, record, name))

    async def resize(self, vdi: int, size: int) -> None:
        """Grow or cut a VDI, wherever it is held."""
        await self._at_holder(vdi, "resize", size=str(size))

    async def flatten(self, vdi: int, told: Progress = ignore_progress) -> None:
        """Cut a clone loose from its origin, wherever it is held."""
        await self._at_holder(vdi, "flatten", told)

    async def change_copies(self, vdi: int, copies: int, told: Progress = ignore_progress) -> None:
        """Keep another number of replicas, wherever the VDI is held."""
        await self.catalog.want_pool(copies)
        await self._wait_pool(copies)
        await self._at_holder(vdi, "copies", told, copies=str(copies))

    async def rollback(self, vdi: int, snapshot: SnapshotRecord) -> None:
        """Make a VDI as one of its family's snapshots is. Raises HeldElsewhereError."""
        async with self._opened_vdi(vdi) as volume:
            await self.snapshots.rollback(volume, snapshot)
        self._listing.forget()

    @asynccontextmanager
    async def _opened_vdi(self, vdi: int) -> AsyncIterator[Volume]:
        async with self.opened(vdi) as volume:
            if not isinstance(volume, Volume):
                raise ReadOnlyError(f"{volume.name} is a snapshot: it cannot be changed")
            yield volume

    async def _at_holder(
        self, vdi: int, what: str, told: Progress = ignore_progress, **arguments: str
    ) -> None:
        """Do something as the VDI's holder, or have its holder do it (`sheepfs.holding.work`)."""
        async with self._opened_vdi(vdi) as volume:
            await self._work.do(volume, what, arguments, told)
        self._listing.forget()

    async def serve_request(self, vdi: int, request: RequestRecord, told: Progress) -> bool:
        """Do what another asks of the holder; False: the VDI is not held here."""
        volume = self._volumes.get(vdi)
        if not isinstance(volume, Volume):
            return False
        before = volume.size
        if not await self._work.serve(volume, request, told):
            return False
        if volume.size != before:
            self._changed(vdi)
        self._listing.forget()
        return True

    async def copy_range(
        self, source: OpenVolume, source_offset: int, target: OpenVolume, target_offset: int,
        length: int,
    ) -> int:  # fmt: skip
        """Make a range of `target` equal to one of `source`; see the protocol."""
        return await copy_range(self, source, source_offset, target, target_offset, length)

    async def freeze(self, vdi: int) -> None:
        """Let everything that a VDI's map names belong to frozen layers, wherever it is held."""
        await self._at_holder(vdi, "freeze")

    async def sweep(self, vdi: int) -> None:
        """Remove what dead holders left in a VDI's open layer, wherever it is held now."""
        await self._at_holder(vdi, "sweep")

    async def check_exists(self, item: int) -> None:
        """Make sure that a VDI or snapshot is still there, if only in the trash.

        Raises:
            VdiNotFoundError: it is gone for good.
        """
        self._listing.forget()
        try:
            await self._listing.by_id(item)
        except VdiNotFoundError:
            if await self.store.get(self.keys.trashed(item)) is None:
                raise

    async def follow(self) -> None:
        """Let open volumes see at once what others changed in their records."""
        async with self.store.watch(self.keys.vdis) as hints:
            async for _ in hints:
                self._listing.forget()
                try:
                    for volume in self._open_vdis():
                        if volume.attachment is None:
                            name, record, _ = await self.catalog.find(volume.record.id)
                            self._take_record(volume, name, record)
                except SheepError as error:
                    log.debug("records cannot be read: %s", error)

    # -- the cluster ------------------------------------------------------------------------

    async def capacity(self) -> Capacity:
        """Bytes that VDIs of three copies can still take, for `df`."""
        total = free = 0

        async def ask(node: int) -> None:
            nonlocal total, free
            link = self.router.link(node)
            if link is None:
                return
            try:
                status = await link.call_json(Op.STATUS, timeout_s=CAPACITY_TIMEOUT_S)
                total += int(status["total"])
                free += int(status["free"])
            except (SheepError, KeyError, TypeError, ValueError) as error:
                log.info("node %d tells no capacity: %s", node, error)

        async with trio.open_nursery() as nursery:
            for node in self.router.map.nodes:
                nursery.start_soon(ask, node)
        copies = max(1, min(DEFAULT_COPIES, len(self.router.map.nodes)))
        return Capacity(total // copies, free // copies)

    def accounts(self) -> Iterator[Account]:
        """What was done with each VDI and snapshot through this mount."""
        for item, name, traffic in self._accounts.rows():
            volume = self._volumes.get(item)
            stalled = isinstance(volume, Volume) and bool(volume.stalled)
            yield Account(item, volume.name if volume else name, traffic, stalled)

    def metrics(self) -> Iterator[str]:
        """Give the mount's metrics in pieces."""
        held = sum(volume.attachment is not None for volume in self._open_vdis())
        router = self.router
        return mount_metrics(self.accounts(), router.map.epoch, len(router.links), held)

    async def report_stalls(self) -> None:
        """Show stalled volumes in every daemon's status (I12)."""
        shown: list[str] = []
        while True:
            await trio.sleep(STALL_REPORT_S)
            stalled = [f"{v.name}: {v.stalled}" for v in self._volumes.values() if v.stalled]
            if stalled != shown:
                shown = stalled
                body = json.dumps({"stalled": stalled}).encode()
                for link in list(self.router.links.values()):
                    link.request(Op.REPORT, next_request(), lambda *_: None, body)
