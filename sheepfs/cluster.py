"""The cluster as one mount sees it: all VDIs and snapshots, and the volumes it has open.

Implements `sheepfs.backend.Namespace` on etcd (records, attach) and the storage daemons (data).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import trio

from sheepfs.accounts import Account, Accounts
from sheepfs.backend import Attributes, Capacity, OnChange, OpenVolume
from sheepfs.core.errors import (
    ReadOnlyError,
    SheepError,
    UnreachableError,
    UsageError,
    VdiNotFoundError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import RequestRecord, SnapshotRecord, VdiRecord
from sheepfs.core.names import split_name
from sheepfs.core.wire import Op
from sheepfs.holding.holding import Holding
from sheepfs.holding.requests import Progress, delete_vdi, ignore_progress
from sheepfs.holding.work import HolderWork
from sheepfs.layers.rewriting import Rewriting
from sheepfs.layers.sharing import copy_range
from sheepfs.layers.snapshots import Snapshots
from sheepfs.listing import Listing, Named
from sheepfs.mount_metrics import mount_metrics
from sheepfs.net.catalog import Catalog
from sheepfs.net.link import next_request
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.volume.frozen import FrozenVolume, snapshot_attributes
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

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
        self.on_change: list[OnChange] = []
        self.catalog = catalog
        self.router = router
        self.store = store
        self.keys = keys
        self._nursery = nursery
        self._volumes: dict[int, Volume | FrozenVolume] = {}
        self._accounts = Accounts()
        self._tending = trio.CancelScope()
        self._tended = trio.Event()
        self._tended.set()
        self._listing = Listing(catalog, self._take_list)
        self.holding = Holding(
            store, keys, catalog, router, owner, nursery, self._open_vdis, self._listing.forget
        )
        self.snapshots = Snapshots(store, keys, catalog, router, self.holding.lease)
        self.rewriting = Rewriting(store, keys, catalog, router, self.holding.lease)
        self._work = HolderWork(store, keys, self.holding, self.snapshots, self.rewriting)

    def _open_vdis(self) -> list[Volume]:
        return [volume for volume in self._volumes.values() if isinstance(volume, Volume)]

    # -- names ------------------------------------------------------------------------------

    def _take_list(self, found: list[Named]) -> None:
        """Let open volumes know what others changed."""
        for item in found:
            volume = self._volumes.get(item.record.id)
            if isinstance(volume, Volume) and isinstance(item.record, VdiRecord):
                self._take_record(volume, item.name, item.record)
            elif isinstance(volume, FrozenVolume) and isinstance(item.record, SnapshotRecord):
                volume.refresh(item.name, item.record)

    def _take_record(self, volume: Volume, name: str, record: VdiRecord) -> None:
        before = volume.attributes()
        volume.refresh(name, record)
        if volume.attributes() != before:
            self._changed(record.id)

    def _changed(self, vdi: int) -> None:
        for listener in self.on_change:
            listener(vdi)

    def _attributes(self, item: Named) -> Attributes:
        volume = self._volumes.get(item.record.id)
        if volume is not None:
            return volume.attributes()
        record = item.record
        if isinstance(record, SnapshotRecord):
            return snapshot_attributes(item.name, record)
        return Attributes(
            record.id, item.name, record.size, record.allocated, record.mode, record.uid,
            record.gid, record.modified, record.changed, False, record.family,
        )  # fmt: skip

    async def list(self) -> Sequence[Attributes]:
        """All VDIs and snapshots by name."""
        return [self._attributes(item) for _, item in sorted((await self._listing.names()).items())]

    async def lookup(self, name: str) -> Attributes:
        """Attributes by name. Raises VdiNotFoundError."""
        return self._attributes(await self._listing.by_name(name))

    async def get(self, vdi: int) -> Attributes:
        """Attributes by id. Raises VdiNotFoundError."""
        if volume := self._volumes.get(vdi):
            return volume.attributes()
        return self._attributes(await self._listing.by_id(vdi))

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        """Make an empty VDI of three copies. Raises VdiExistsError, UsageError."""
        record = await self.catalog.create(name, 0, DEFAULT_COPIES, mode, uid, gid)
        self._listing.forget()
        return self._attributes(Named(name, record, name))

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename a VDI, or change the tag of a snapshot; see `sheepfs.backend.Namespace`."""
        vdi, tag = split_name(old)
        new_vdi, new_tag = split_name(new)
        if not tag and not new_tag:
            await self.catalog.rename(old, new, replace)
        elif not tag or not new_tag or vdi != new_vdi:
            raise UsageError(f"{old} to {new}: of a snapshot's name only the tag can be changed")
        elif tag != new_tag:
            if replace:
                with_tag = (await self._listing.names()).get(new)
                if with_tag is not None:
                    await self.catalog.delete_snapshot(vdi, new_tag)
            await self.catalog.rename_snapshot(vdi, tag, new_tag)
        self._listing.forget()

    async def delete(self, name: str) -> None:
        """Delete a VDI or snapshot. Raises HeldElsewhereError while any mount holds it."""
        vdi, tag = split_name(name)
        if tag:
            await self.catalog.delete_snapshot(vdi, tag)
        else:
            await delete_vdi(self.store, self.keys, self.catalog, name)
        self._listing.forget()

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        """Change mode, owner and times in etcd."""
        item = await self._listing.by_id(vdi)
        if isinstance(item.record, SnapshotRecord):
            if modified is not None or (mode is not None and mode & 0o222):
                raise ReadOnlyError(f"{item.name} is a snapshot: it cannot be changed")
            await self.catalog.update_snapshot(
                item.record.vdi,
                item.tag,
                lambda r: dataclasses.replace(
                    r,
                    mode=r.mode if mode is None else mode,
                    uid=r.uid if uid is None else uid,
                    gid=r.gid if gid is None else gid,
                ),
            )
        else:
            await self.catalog.update(
                vdi,
                lambda r: dataclasses.replace(
                    r,
                    mode=r.mode if mode is None else mode,
                    uid=r.uid if uid is None else uid,
                    gid=r.gid if gid is None else gid,
                    modified=r.modified if modified is None else modified,
                    changed=time.time(),
                ),
            )
        volume = self._volumes.get(vdi)
        if isinstance(volume, Volume) and modified is not None:
            volume.set_modified(modified)
        self._listing.forget()
        return self._attributes(await self._listing.by_id(vdi))

    async def get_user_attributes(self, vdi: int) -> dict[str, str]:
        """Give what users keep with a VDI or snapshot."""
        return dict((await self._listing.by_id(vdi)).record.attributes)

    async def set_user_attribute(self, vdi: int, name: str, value: str | None) -> None:
        """Set one of these; None removes it."""
        item = await self._listing.by_id(vdi)
        await self.catalog.set_attribute(item.name if item.tag else vdi, name, value)
        self._listing.forget()

    def names_changed(self) -> None:
        """A record was changed past this object: read again before the next answer."""
        self._listing.forget()

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
