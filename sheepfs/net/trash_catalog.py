"""What was deleted and can still be restored.

Always holds:
- All data of what is in the trash is kept: it is a root of its family (docs/snapshots.md).
- Purging removes the entry and asks for reclaim in one transaction; nothing comes back after it.
"""

from __future__ import annotations

import dataclasses

from sheepfs.core.errors import (
    SnapshotExistsError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    NameRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
    check_vdi_name,
)
from sheepfs.net.records import Backoff, Changes, Records
from sheepfs.net.vdi_catalog import TRASH_KEEP_S, retired

__all__ = ["TRASH_KEEP_S", "TrashCatalog"]


class TrashCatalog(Records):
    """Deleted VDIs and snapshots, by their ids."""

    async def trash(self) -> list[tuple[TrashRecord, int]]:
        """Everything in the trash with its mod_revision, the oldest first."""
        found, _ = await self._store.list(self._keys.trash)
        items = [(record, kv.mod_revision) for kv, record in self._readable(found, TrashRecord)]
        return sorted(items, key=lambda item: (item[0].deleted, item[0].id))

    async def _trashed(self, item: int) -> tuple[TrashRecord, int]:
        found = await self._store.get(self._keys.trashed(item))
        if found is None:
            raise VdiNotFoundError(f"there is nothing with id {item} in the trash")
        return TrashRecord.decode(found.value), found.mod_revision

    async def restore(self, item: int, name: str | None = None) -> tuple[str, str]:
        """Bring a deleted VDI or snapshot back; gives its VDI's name and its tag.

        Args:
            name: another name for the VDI; the tag for a snapshot.

        Raises:
            VdiNotFoundError: it is not in the trash (any more).
            VdiExistsError: the name is taken.
            UsageError: a snapshot's VDI is in the trash too, or gone for good.
        """
        backoff = Backoff()
        while True:
            trash, revision = await self._trashed(item)
            key = self._keys.trashed(item)
            if trash.tag:
                result, (conditions, changes) = await self._snapshot_back(trash, name)
            else:
                result, (conditions, changes) = await self._vdi_back(trash, name)
            txn = Transaction([Unchanged(key, revision), *conditions], [Delete(key), *changes])
            if await self._store.commit(txn) is not None:
                return result
            await backoff.wait()

    async def _vdi_back(
        self, trash: TrashRecord, name: str | None
    ) -> tuple[tuple[str, str], Changes]:
        keys = self._keys
        record = VdiRecord.decode(trash.record.encode())
        kept_name = await self._store.get(keys.vdi_name(record.id))
        # Its snapshots may have kept the name, in whose place the VDI stands again.
        own = NameRecord.decode(kept_name.value).name if kept_name is not None else ""
        wanted = name or own or trash.name
        check_vdi_name(wanted)
        if await self._store.get(keys.vdi(wanted)) is not None:
            raise VdiExistsError(f"a VDI {wanted!r} exists: restore it under another name")
        conditions = [Unchanged(keys.vdi(wanted), 0)]
        changes: list[Put | Delete] = [
            Put(keys.vdi(wanted), dataclasses.replace(record, changed=self._clock()).encode()),
            Put(keys.vdi_name(record.id), NameRecord(wanted).encode()),
        ]
        if own:
            kept = await self._store.get(keys.retired_name(own))
            if kept is not None:
                conditions.append(Unchanged(kept.key, kept.mod_revision))
                changes.append(Delete(kept.key))
        if wanted != own:
            if await self._store.get(keys.retired_name(wanted)) is not None:
                raise retired(wanted)
            conditions.append(Unchanged(keys.retired_name(wanted), 0))
        return (wanted, ""), (conditions, changes)

    async def _snapshot_back(
        self, trash: TrashRecord, tag: str | None
    ) -> tuple[tuple[str, str], Changes]:
        keys = self._keys
        record = SnapshotRecord.decode(trash.record.encode())
        wanted = tag or trash.tag
        kept_name = await self._store.get(keys.vdi_name(record.vdi))
        if kept_name is None:
            raise UsageError(
                f"the VDI of {trash.name}@{trash.tag} is deleted: restore it first"
                f" (sheepctl trash list shows it while that is possible)"
            )
        key = keys.snapshot(record.vdi, wanted)
        if await self._store.get(key) is not None:
            raise SnapshotExistsError(
                f"{trash.name} has a snapshot {wanted!r}: restore it under another tag"
            )
        return (NameRecord.decode(kept_name.value).name, wanted), (
            [Unchanged(key, 0), Unchanged(kept_name.key, kept_name.mod_revision)],
            # What deletes the VDI meanwhile depends on its name's key, too.
            [Put(key, record.encode()), Put(kept_name.key, kept_name.value)],
        )

    async def purge(self, item: int | None = None, *, expired_only: bool = False) -> int:
        """Give back the space of one thing in the trash, or of all; tells how many there were.

        Raises:
            VdiNotFoundError: `item` is not in the trash (any more).
        """
        items = await self.trash() if item is None else [await self._trashed(item)]
        purged = 0
        for record, revision in items:
            if expired_only and record.until > self._clock():
                continue
            key = self._keys.trashed(record.id)
            txn = Transaction(
                [Unchanged(key, revision)],
                [Delete(key), Put(self._keys.reclaim_family(record.family), b"")],
            )
            # If it changed, somebody restored or purged it.
            purged += await self._store.commit(txn) is not None
        return purged
