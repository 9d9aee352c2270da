"""Changes of snapshots' records. Taking one is the business of the VDI's holder.

Always holds: a snapshot that goes puts `vdi-names/<id>` again; why, says sheepfs/net/trash.py.
Source: docs/snapshots.md.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress

from sheepfs.core.errors import (
    ProtocolError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotProtectedError,
)
from sheepfs.core.kv import Unchanged
from sheepfs.core.metadata import NameRecord, SnapshotRecord
from sheepfs.core.names import check_tag, snapshot_file
from sheepfs.net.records import TRASH_KEEP_S, Change, SnapshotChange
from sheepfs.net.trash import TrashCatalog


class SnapshotCatalog(TrashCatalog):
    """Deleting, renaming and changing snapshots."""

    async def delete_snapshot(
        self, vdi_name: str, tag: str, keep_s: float = TRASH_KEEP_S
    ) -> SnapshotRecord:
        """Put a snapshot into the trash. The last one of a deleted VDI sets its name free.

        Args:
            keep_s: How long it can be restored; 0: not at all.

        Raises:
            SnapshotNotFoundError: there is none.
            SnapshotProtectedError: it is protected.
        """
        keys = self._keys

        async def decide(change: Change) -> SnapshotRecord:
            _, _, record, revision = await self.snapshot(vdi_name, tag)
            if record.protected:
                file = snapshot_file(vdi_name, tag)
                raise SnapshotProtectedError(
                    f"snapshot {file!r} is protected: sheepctl snapshot unprotect {file}"
                )
            named = await self._store.get(keys.vdi_name(record.vdi))
            # The VDI may have been renamed since its snapshot was found by name.
            name = vdi_name if named is None else NameRecord.decode(named.value).name
            retired = await self._store.get(keys.retired_name(name))
            all_of_it, _ = await self._store.list(keys.snapshots_of(record.vdi))
            key = keys.snapshot(record.vdi, tag)
            change.unchanged(key, revision)
            change.unchanged(keys.vdi_name(record.vdi), named)
            change.unchanged(keys.retired_name(name), retired)
            change.delete(key)
            if retired is not None and [kv.key for kv in all_of_it] == [key]:
                change.delete(keys.vdi_name(record.vdi))
                change.delete(keys.retired_name(name))
            else:
                change.put(keys.vdi_name(record.vdi), NameRecord(name))
            self._discard(record.id, name, tag, record, keep_s, change)
            return record

        return await self._commit(decide)

    async def rename_snapshot(self, vdi_name: str, tag: str, new_tag: str) -> None:
        """Give a snapshot another tag; its id stays.

        Raises:
            SnapshotNotFoundError: there is none.
            SnapshotExistsError: the new tag is taken.
            UsageError: the new tag is no good name.
        """
        check_tag(new_tag)
        keys = self._keys

        async def decide(change: Change) -> None:
            _, _, record, revision = await self.snapshot(vdi_name, tag)
            if tag == new_tag:
                return
            old, new = keys.snapshot(record.vdi, tag), keys.snapshot(record.vdi, new_tag)
            if await self._store.get(new) is not None:
                raise SnapshotExistsError(f"a snapshot {snapshot_file(vdi_name, new_tag)!r} exists")
            change.unchanged(old, revision)
            change.unchanged(new, None)
            change.delete(old)
            change.put(new, record)

        await self._commit(decide)

    async def protect(self, vdi_name: str, tag: str, protected: bool) -> SnapshotRecord:
        """Forbid, or allow again, to delete a snapshot. Raises SnapshotNotFoundError."""
        record = (await self.snapshot(vdi_name, tag)).record
        return await self.update_snapshot(
            record.vdi, tag, lambda r: dataclasses.replace(r, protected=protected)
        )

    async def update_snapshot(self, vdi: int, tag: str, edit: SnapshotChange) -> SnapshotRecord:
        """Change a snapshot's record; `edit` may be called more than once. Gives the new record.

        Raises:
            SnapshotNotFoundError: the VDI of that id has no such snapshot.
        """
        key = self._keys.snapshot(vdi, tag)

        async def decide(change: Change) -> SnapshotRecord:
            found = await self._store.get(key)
            if found is None:
                raise SnapshotNotFoundError(f"VDI {vdi} has no snapshot {tag!r}")
            record = SnapshotRecord.decode(found.value)
            changed = edit(record)
            if changed != record:
                change.unchanged(key, found)
                change.put(key, changed)
            return changed

        return await self._commit(decide)

    async def still_kept(self, record: SnapshotRecord) -> Unchanged:
        """Give the condition under which all that a snapshot's map names is still there.

        For who makes something of a copy of that map: with this in the transaction that puts its
        record, reclaim has seen the snapshot or the new record at every moment. A snapshot that is
        purged never comes back, so one look at the end is enough.

        Raises:
            SnapshotNotFoundError: it was purged, and what it named may be gone.
        """
        for _ in range(2):  # it may be restored between the two reads
            found, _ = await self._store.list(self._keys.snapshots_of(record.vdi))
            for kv in found:
                with suppress(ProtocolError):  # another one, of a newer format
                    if SnapshotRecord.decode(kv.value).id == record.id:
                        return Unchanged(kv.key, kv.mod_revision)
            trashed = await self._store.get(self._keys.trashed(record.id))
            if trashed is not None:
                return Unchanged(trashed.key, trashed.mod_revision)
        raise SnapshotNotFoundError("the snapshot was deleted for good meanwhile")
