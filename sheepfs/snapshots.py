"""Snapshots, clones and rollback, by the mount (or tool) that holds the VDI.

Always holds:
- A layer whose map is being made is `building/…` under our lease, and the transaction that makes
  it known demands that key: reclaim never takes what becomes visible.
- Each operation becomes visible in one transaction; before it, nothing of it can be seen.
Source: docs/snapshots.md.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from sheepfs.callbacks import completion
from sheepfs.capture import Captured, Commit, copy_maps
from sheepfs.core.errors import (
    SheepError,
    SnapshotExistsError,
    UnreachableError,
    VdiExistsError,
)
from sheepfs.core.geometry import copies_of
from sheepfs.core.kv import Delete, Put, Unchanged
from sheepfs.core.metadata import (
    Keys,
    NameRecord,
    SnapshotRecord,
    VdiRecord,
    check_copies,
    check_tag,
    check_vdi_name,
)
from sheepfs.flusher import store_pages
from sheepfs.holder_requests import Progress
from sheepfs.net.attach import Attachment, Extra, commit, nothing_more
from sheepfs.net.catalog import Catalog, Change
from sheepfs.net.groups import plain_errors
from sheepfs.net.records import COMMIT_PATIENCE_S, COMMIT_RETRY_S
from sheepfs.net.router import Router
from sheepfs.net.store import LeaseKeeper, Store
from sheepfs.replication import Replicator
from sheepfs.vdimap import VdiMap, format_page
from sheepfs.volume import Volume

log = logging.getLogger(__name__)

ABANDON_S = 2.0
Changes = tuple[list[Unchanged], list[Put | Delete]]


class Snapshots:
    """What one mount does to make VDIs of VDIs.

    Args:
        lease: gives the mount's lease in etcd.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        catalog: Catalog,
        router: Router,
        lease: Callable[[], Awaitable[LeaseKeeper]],
    ) -> None:
        self._store = store
        self._keys = keys
        self._catalog = catalog
        self._router = router
        self._lease = lease

    # -- of a VDI that is held ----------------------------------------------------------------

    async def snapshot(self, volume: Volume, tag: str) -> SnapshotRecord:
        """Keep the VDI as it is now under a tag.

        Raises:
            SnapshotExistsError: the VDI has a snapshot of that tag.
            HeldElsewhereError: another mount holds the VDI.
            UsageError: a bad tag.
        """
        check_tag(tag)
        key = self._keys.snapshot(volume.record.id, tag)
        if await self._store.get(key) is not None:
            raise SnapshotExistsError(f"{volume.name} has a snapshot {tag!r} already")
        made: list[SnapshotRecord] = []

        async def publish(captured: Captured) -> None:
            attachment = _held(volume)
            old = volume.record
            ident = await self._catalog.new_id()
            record = SnapshotRecord(
                ident, old.id, captured.size, copies_of(captured.layer), captured.map, old.family,
                captured.maps, old.parent, captured.allocated, time.time(), uid=old.uid,
                gid=old.gid, attributes=old.attributes,
            )  # fmt: skip

            async def extra() -> Changes:
                if await self._store.get(key) is not None:
                    raise SnapshotExistsError(f"{volume.name} has a snapshot {tag!r} already")
                conditions, changes = await self._built(captured.map)
                return [*conditions, Unchanged(key, 0)], [*changes, Put(key, record.encode())]

            async def is_done() -> bool:
                found = await self._store.get(key)
                return found is not None and SnapshotRecord.decode(found.value).id == ident

            await self._commit(
                attachment,
                lambda r: dataclasses.replace(
                    r, layer=captured.layer, next=0, parent=ident, size=captured.size,
                    maps=captured.maps | r.maps, allocated=captured.allocated,
                ),
                extra,
                is_done,
            )  # fmt: skip
            volume.committed(attachment.record)
            made.append(record)

        await self._capture(volume, publish)
        return made[0]

    async def freeze(self, volume: Volume) -> None:
        """Make everything the VDI's map names belong to frozen layers, so that it can be shared.

        Raises: HeldElsewhereError, SheepError.
        """

        async def publish(captured: Captured) -> None:
            attachment = _held(volume)
            await self._commit(
                attachment, lambda r: dataclasses.replace(r, layer=captured.layer, next=0)
            )
            volume.committed(attachment.record)

        await self._capture(volume, publish, copy_map=False)

    async def clone(self, volume: Volume, name: str) -> VdiRecord:
        """Make a new VDI that begins as this one is now.

        Raises:
            VdiExistsError: the name is taken.
            HeldElsewhereError: another mount holds the VDI.
        """
        check_vdi_name(name)
        await self._check_free(name)
        made: list[VdiRecord] = []

        async def publish(captured: Captured) -> None:
            attachment = _held(volume)
            old = volume.record
            source = SnapshotRecord(
                0, old.id, captured.size, copies_of(captured.layer), captured.map, old.family,
                captured.maps, old.parent, captured.allocated, mode=old.mode, uid=old.uid,
                gid=old.gid, attributes=old.attributes,
            )  # fmt: skip
            record = await self._new_vdi(source, captured.map, old.parent, 0)

            await self._commit(
                attachment,
                lambda r: dataclasses.replace(r, layer=captured.layer, next=0),
                lambda: self._appearing(name, record),
                lambda: self._appeared(name, record),
            )
            volume.committed(attachment.record)
            made.append(record)

        await self._capture(volume, publish)
        return made[0]

    async def rollback(self, volume: Volume, snapshot: SnapshotRecord) -> None:
        """Make the VDI as the snapshot is; what was written since is gone.

        Raises: HeldElsewhereError, SheepError.
        """
        await volume.attach()
        attachment = _held(volume)
        record = volume.record
        target, layer = await self._catalog.begin_layers(
            record.id, record.family, copies_of(snapshot.map), 2, (await self._lease()).lease
        )

        async def publish(replicator: Replicator) -> VdiRecord:
            await copy_maps(replicator, snapshot.map, target, snapshot.maps)
            await replicator.unflushed.make_durable()

            async def extra() -> Changes:
                conditions, changes = await self._built(target)
                more, others = await self._built(layer)
                wanted = self._keys.reclaim_family(record.family)
                # Deleted while its map was copied, reclaim may have taken what only it named.
                kept = await self._catalog.still_kept(snapshot)
                return [*conditions, *more, kept], [*changes, *others, Put(wanted, b"")]

            await self._commit(
                attachment,
                lambda r: dataclasses.replace(
                    r, layer=layer, next=0, map=target, maps=snapshot.maps, size=snapshot.size,
                    copies=snapshot.copies, allocated=snapshot.allocated, parent=snapshot.id,
                    modified=time.time(),
                ),
                extra,
            )  # fmt: skip
            return attachment.record

        async with self._abandoning([target, layer]):
            await volume.replace_map(publish)

    async def join_family(self, target: Volume, source: VdiRecord | SnapshotRecord) -> None:
        """Let an empty VDI that is held here belong to another's family, to share its objects."""
        attachment = _held(target)
        old = target.record
        (layer,) = await self._catalog.begin_layers(
            old.id, source.family, source.copies, 1, (await self._lease()).lease
        )

        async def publish(replicator: Replicator) -> VdiRecord:
            async def extra() -> Changes:
                conditions, changes = await self._built(layer)
                return conditions, [*changes, Put(self._keys.reclaim_family(old.family), b"")]

            await self._commit(
                attachment,
                lambda r: dataclasses.replace(
                    r, layer=layer, next=0, map=layer, maps=0, family=source.family,
                    copies=source.copies, allocated=0, parent=source.id,
                ),
                extra,
            )  # fmt: skip
            return attachment.record

        await target.replace_map(publish)

    async def flatten(self, volume: Volume, progress: Progress) -> None:
        """Give the VDI layers of its own for all that it has of what it was cloned from.

        Raises: HeldElsewhereError, SheepError.
        """
        await volume.borrow()
        own = await self._catalog.layers_of(volume.record.id)
        await volume.rewrite(lambda layer: layer not in own, progress)
        await completion(volume.flush)
        await self._commit(_held(volume), lambda r: dataclasses.replace(r, parent=0))
        volume.committed(_held(volume).record)

    async def change_copies(self, volume: Volume, copies: int, progress: Progress) -> None:
        """Keep another number of replicas of a VDI: all its data is written anew.

        Snapshots stay as they are. When it is interrupted, the VDI is as it was or partly of the
        new number, and works; to be called again.

        Raises: HeldElsewhereError, SheepError.
        """
        check_copies(copies)
        await volume.borrow()

        async def publish(captured: Captured) -> None:
            await self._commit(
                _held(volume),
                lambda r: dataclasses.replace(r, layer=captured.layer, next=0, copies=copies),
            )
            volume.committed(_held(volume).record)

        await self._capture(volume, publish, copy_map=False, copies=copies)
        await volume.rewrite(lambda layer: copies_of(layer) != copies, progress)
        if copies_of(volume.record.map) != copies:
            await self._move_map(volume, copies)

    async def _move_map(self, volume: Volume, copies: int) -> None:
        """Write the map to map objects of another pool."""
        await completion(volume.flush)
        record = volume.record
        (target,) = await self._catalog.begin_layers(
            record.id, record.family, copies, 1, (await self._lease()).lease
        )

        async def publish(replicator: Replicator) -> VdiRecord:
            vdi_map = await volume.load_map()
            pages = {
                number: format_page(page) for number, page in vdi_map.pages.items() if any(page)
            }
            moved = VdiMap(0, vdi_map.load_range)
            await store_pages(replicator, target, moved, pages)
            await replicator.unflushed.make_durable()

            async def extra() -> Changes:
                conditions, changes = await self._built(target)
                return conditions, [*changes, Put(self._keys.reclaim_family(record.family), b"")]

            await self._commit(
                _held(volume),
                lambda r: dataclasses.replace(r, map=target, maps=moved.existing),
                extra,
            )
            return _held(volume).record

        await volume.replace_map(publish)

    # -- of a snapshot ------------------------------------------------------------------------

    async def clone_snapshot(self, source: SnapshotRecord, name: str) -> VdiRecord:
        """Make a new VDI that begins as the snapshot.

        Raises:
            VdiExistsError: the name is taken.
            SheepError: no replica can give the snapshot's map; etcd does not answer.
        """
        check_vdi_name(name)
        await self._check_free(name)
        lease = (await self._lease()).lease
        (target,) = await self._catalog.begin_layers(
            source.vdi, source.family, copies_of(source.map), 1, lease
        )
        record = await self._new_vdi(source, target, source.id, time.time())
        building = await self._catalog.building(target)
        async with self._abandoning([target, record.layer]):
            await self._copy_snapshot_map(source, target, record.id, building.mod_revision)

            async def decide(change: Change) -> None:
                conditions, changes = await self._appearing(name, record)
                change.conditions += [*conditions, await self._catalog.still_kept(source)]
                change.changes += changes

            await self._catalog.commit_surely(decide, lambda: self._appeared(name, record))
        return record

    async def _copy_snapshot_map(
        self, source: SnapshotRecord, target: int, vdi: int, token: int
    ) -> None:
        """Copy a map for a VDI that was never attached: any token passes."""
        with plain_errors():
            async with trio.open_nursery() as nursery:
                replicator = Replicator(self._router, nursery, vdi, token, 0)
                nursery.start_soon(replicator.run)
                try:
                    await copy_maps(replicator, source.map, target, source.maps)
                    await replicator.unflushed.make_durable()
                finally:
                    replicator.close()
                    nursery.cancel_scope.cancel()

    # -- parts --------------------------------------------------------------------------------

    async def _capture(
        self, volume: Volume, publish: Commit, *, copy_map: bool = True, copies: int = 0
    ) -> None:
        made: list[int] = []

        async def begin(open_layer: int) -> tuple[int, int]:
            upcoming, target = await self._begin(volume, open_layer, copy_map, copies)
            made.append(target)
            return upcoming, target

        async with self._abandoning(made):
            await volume.capture(begin, publish)

    @asynccontextmanager
    async def _abandoning(self, layers: list[int]) -> AsyncIterator[None]:
        """When the block fails, have what was made for these layers removed."""
        try:
            yield
        except BaseException:
            with trio.move_on_after(ABANDON_S, shield=True):
                for layer in filter(None, layers):
                    try:
                        await self._catalog.abandon(layer)
                    except UnreachableError as error:
                        log.info("layer %#x goes with our lease: %s", layer, error)
            raise

    async def _begin(
        self, volume: Volume, open_layer: int, copy_map: bool, copies: int
    ) -> tuple[int, int]:
        """Give the next open layer, in the VDI's record already, and one for the map's copy."""
        attachment, record = _held(volume), volume.record
        lease = (await self._lease()).lease
        (upcoming,) = await self._catalog.begin_layers(
            record.id, record.family, copies or record.copies, 1, lease
        )
        target = 0
        if copy_map:
            (target,) = await self._catalog.begin_layers(
                record.id, record.family, copies_of(record.map), 1, lease
            )
        await self._commit(
            attachment,
            lambda r: dataclasses.replace(r, layer=open_layer, next=upcoming),
            lambda: self._built(upcoming),
        )
        volume.committed(attachment.record)
        return upcoming, target

    async def _built(self, layer: int) -> Changes:
        """Give what makes a layer no longer one that is being built (LeaseGoneError)."""
        unchanged, delete = self._catalog.built(await self._catalog.building(layer))
        return [unchanged], [delete]

    async def _new_vdi(
        self, source: SnapshotRecord, map_layer: int, parent: int, modified: float
    ) -> VdiRecord:
        ident = await self._catalog.new_id()
        (layer,) = await self._catalog.begin_layers(
            ident, source.family, source.copies, 1, (await self._lease()).lease
        )
        now = time.time()
        return VdiRecord(
            ident, source.size, source.copies, layer, map_layer, source.family, parent=parent,
            mode=source.mode | 0o200, uid=source.uid, gid=source.gid, created=now,
            modified=modified or now, changed=now, maps=source.maps, allocated=source.allocated,
            attributes=source.attributes,
        )  # fmt: skip

    async def _check_free(self, name: str) -> None:
        if await self._store.get(self._keys.vdi(name)) is not None:
            raise VdiExistsError(f"a VDI {name!r} exists")
        if await self._store.get(self._keys.retired_name(name)) is not None:
            raise VdiExistsError(f"snapshots of a deleted VDI still use the name {name!r}")

    async def _appearing(self, name: str, record: VdiRecord) -> Changes:
        """Give what makes a new VDI visible."""
        await self._check_free(name)
        keys = self._keys
        conditions, changes = await self._built(record.map)
        more, others = await self._built(record.layer)
        return (
            [
                *conditions,
                *more,
                Unchanged(keys.vdi(name), 0),
                Unchanged(keys.retired_name(name), 0),
            ],
            [
                *changes,
                *others,
                Put(keys.vdi(name), record.encode()),
                Put(keys.vdi_name(record.id), NameRecord(name).encode()),
            ],
        )

    async def _appeared(self, name: str, record: VdiRecord) -> bool:
        found = await self._store.get(self._keys.vdi(name))
        return found is not None and VdiRecord.decode(found.value).id == record.id

    async def _commit(
        self,
        attachment: Attachment,
        change: Callable[[VdiRecord], VdiRecord],
        extra: Extra = nothing_more,
        is_done: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Commit; when etcd's answer gets lost, find out and try again.

        Args:
            is_done: tells whether it has happened; None: doing it again does no harm.
        """
        give_up = trio.current_time() + COMMIT_PATIENCE_S
        while True:
            try:
                await commit(attachment, change, extra)
                return
            except UnreachableError:
                if trio.current_time() > give_up:
                    raise
                await trio.sleep(COMMIT_RETRY_S)
            try:
                if is_done is not None and await is_done():
                    return
            except UnreachableError as error:
                log.info("VDI %d: not known yet whether it happened: %s", attachment.vdi, error)


def _held(volume: Volume) -> Attachment:
    if volume.attachment is None:
        raise SheepError(f"{volume.name} was let go meanwhile")
    return volume.attachment
