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
from functools import partial

import trio

from sheepfs.core.errors import SnapshotExistsError, UnreachableError
from sheepfs.core.geometry import copies_of
from sheepfs.core.kv import Put, Unchanged
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.core.names import check_tag, check_vdi_name
from sheepfs.layers.commits import ABANDON_S, Changes, Commits, attachment_of
from sheepfs.net.catalog import Change
from sheepfs.net.groups import plain_errors
from sheepfs.net.store import LeaseGoneError
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.capture import Captured, copy_maps
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)


class Snapshots(Commits):
    """What one mount does to make VDIs of VDIs."""

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
            attachment = attachment_of(volume)
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
            attachment = attachment_of(volume)
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
            attachment = attachment_of(volume)
            old = volume.record
            source = SnapshotRecord(
                0, old.id, captured.size, copies_of(captured.layer), captured.map, old.family,
                captured.maps, old.parent, captured.allocated, mode=old.mode, uid=old.uid,
                gid=old.gid, attributes=old.attributes,
            )  # fmt: skip
            record = await self._new_vdi(source, captured.map, old.parent, 0, attachment.generation)

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
        attachment = attachment_of(volume)
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
        attachment = attachment_of(target)
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

    @asynccontextmanager
    async def taking_over(self, target: Volume) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Let a VDI that is held here take over what other maps name; reclaim waits meanwhile.

        Gives what is to be called once the map is stored: it raises LeaseGoneError if reclaim may
        not have waited for all of that.
        """
        layer = target.record.map
        async with self._sharing:
            lease = (await self._lease()).lease
            await self._catalog.begin_sharing(layer, lease)
            try:
                yield partial(self._catalog.end_sharing, layer)
            finally:
                with trio.move_on_after(ABANDON_S, shield=True):
                    try:
                        await self._catalog.end_sharing(layer)
                    except LeaseGoneError:
                        pass  # It has ended.
                    except UnreachableError as error:
                        log.info("reclaim waits until our lease ends: %s", error)

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
        record = await self._new_vdi(source, target, source.id, time.time(), 0)
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
