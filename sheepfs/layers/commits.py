"""What all changes that make layers have in common: ids, transactions, and cleaning up.

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

from sheepfs.core.errors import (
    SheepError,
    UnreachableError,
    VdiExistsError,
)
from sheepfs.core.geometry import copies_of
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Unchanged
from sheepfs.core.metadata import NameRecord, SnapshotRecord, VdiRecord
from sheepfs.net.attach import Attachment, Extra, commit, nothing_more
from sheepfs.net.catalog import Catalog
from sheepfs.net.records import COMMIT_PATIENCE_S, COMMIT_RETRY_S
from sheepfs.net.router import Router
from sheepfs.net.store import LeaseKeeper, Store
from sheepfs.volume.capture import Commit
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

ABANDON_S = 2.0
Changes = tuple[list[Unchanged], list[Put | Delete]]


class Commits:
    """Parts of `Snapshots` and `Rewriting`, for one mount.

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
        self._sharing = trio.Lock()
        """One VDI at a time takes over what others name: a map has one key to say so."""

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
        attachment, record = attachment_of(volume), volume.record
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
        self, source: SnapshotRecord, map_layer: int, parent: int, modified: float, generation: int
    ) -> VdiRecord:
        """Give the record of a VDI to be made.

        Args:
            generation: of the attach under which its map was made; its own changes are later ones.
        """
        ident = await self._catalog.new_id()
        (layer,) = await self._catalog.begin_layers(
            ident, source.family, source.copies, 1, (await self._lease()).lease
        )
        now = time.time()
        return VdiRecord(
            ident, source.size, source.copies, layer, map_layer, source.family, parent=parent,
            mode=source.mode | 0o200, uid=source.uid, gid=source.gid, created=now,
            modified=modified or now, changed=now, maps=source.maps, allocated=source.allocated,
            attributes=source.attributes, generation=generation,
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


def attachment_of(volume: Volume) -> Attachment:
    if volume.attachment is None:
        raise SheepError(f"{volume.name} was let go meanwhile")
    return volume.attachment
