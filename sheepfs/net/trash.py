"""The trash: what is deleted and can be restored until its time is over.

Always holds:
- Whatever is in the trash is a root: none of its data goes before it is purged (I4).
- Purging asks, in the same transaction, for a look at what the family does not use any more.
- Who adds or removes a snapshot puts `vdi-names/<id>` again (or, on taking one, the VDI's record);
  who deletes a VDI makes both a condition. So the name of a deleted VDI is kept (`retired/`)
  exactly as long as it has snapshots, whatever happens at the same time.
Source: docs/snapshots.md, docs/etcd.md.
"""

from __future__ import annotations

import dataclasses

from sheepfs.core.errors import (
    ProtocolError,
    SnapshotExistsError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.kv import Put
from sheepfs.core.metadata import (
    LockRecord,
    NameRecord,
    RetiredRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
)
from sheepfs.core.names import (
    check_tag,
    check_vdi_name,
    snapshot_file,
    split_name,
)
from sheepfs.net.records import Change, Records, held_by


class TrashCatalog(Records):
    """Restoring and purging what was deleted."""

    async def restore(self, item: int, name: str | None = None) -> str:
        """Bring a VDI or a snapshot back, as it was when it was deleted.

        A snapshot of a VDI that is gone comes back as one of a deleted VDI: it can be read,
        cloned and deleted.

        Args:
            name: Another name than it had; for a snapshot `vm1@daily.raw`.

        Returns:
            Its name in the mount.

        Raises:
            VdiNotFoundError: nothing of that id is in the trash.
            VdiExistsError, SnapshotExistsError: the name is taken.
            UsageError: a bad name, or not one of the snapshot's VDI.
        """

        async def decide(change: Change) -> str:
            key = self._keys.trashed(item)
            found = await self._store.get(key)
            if found is None:
                raise VdiNotFoundError(f"there is nothing with id {item} in the trash")
            trashed = TrashRecord.decode(found.value)
            change.unchanged(key, found)
            change.delete(key)
            if trashed.tag:
                return await self._restore_snapshot(trashed, name, change)
            return await self._restore_vdi(trashed, name or trashed.name, change)

        return await self._commit(decide)

    async def purge(self, item: int | None = None, expired_only: bool = False) -> list[TrashRecord]:
        """Give up for good what is in the trash; its space comes back when nothing else uses it.

        Args:
            item: Only this one; default: all.
            expired_only: Only what has been kept for its time.

        Returns:
            What was purged.

        Raises:
            VdiNotFoundError: nothing of the id `item` is in the trash.
        """
        items = [record.id for record, _ in await self.trash()] if item is None else [item]
        purged = [await self._purge(each, expired_only) for each in items]
        if item is not None and purged == [None] and not expired_only:
            raise VdiNotFoundError(f"there is nothing with id {item} in the trash")
        return [record for record in purged if record is not None]

    async def _purge(self, item: int, expired_only: bool) -> TrashRecord | None:
        async def decide(change: Change) -> TrashRecord | None:
            key = self._keys.trashed(item)
            found = await self._store.get(key)
            if found is None:  # restored or purged by somebody else
                return None
            trashed = TrashRecord.decode(found.value)
            if expired_only and trashed.until > self._clock():
                return None
            change.unchanged(key, found)
            change.delete(key)
            change.changes.append(self.reclaim_put(trashed.family))
            return trashed

        return await self._commit(decide)

    def reclaim_put(self, family: int) -> Put:
        """Give the change that asks for a look at what a family does not use any more."""
        return Put(self._keys.reclaim_family(family), b"")

    # -- parts of changes -------------------------------------------------------------------

    async def _delete_vdi(
        self, name: str, record: VdiRecord, owner: str | None, keep_s: float, change: Change
    ) -> bool:
        """Add what a transaction needs that deletes a VDI, all but its record's own key.

        Returns:
            Whether snapshots keep its name.
        """
        keys = self._keys
        lock = await self._store.get(keys.lock(record.id))
        change.unchanged(keys.lock(record.id), lock)
        if lock is not None:
            if owner is None or LockRecord.decode(lock.value).owner != owner:
                raise held_by(name, lock)
            change.delete(lock.key)
        change.unchanged(keys.vdi_name(record.id), await self._store.get(keys.vdi_name(record.id)))
        snapshots, _ = await self._store.list(keys.snapshots_of(record.id))
        if snapshots:
            change.put(keys.retired_name(name), RetiredRecord(record.id))
        else:
            change.delete(keys.vdi_name(record.id))
        self._discard(record.id, name, "", record, keep_s, change)
        return bool(snapshots)

    def _discard(
        self,
        item: int,
        name: str,
        tag: str,
        record: VdiRecord | SnapshotRecord,
        keep_s: float,
        change: Change,
    ) -> None:
        """Put a record into the trash; with `keep_s` 0 give it up at once."""
        if keep_s <= 0:
            change.changes.append(self.reclaim_put(record.family))
            return
        now = self._clock()
        content = record.encode().decode()
        change.put(
            self._keys.trashed(item),
            TrashRecord(item, name, tag, record.family, now, now + keep_s, content),
        )

    async def _restore_vdi(self, trashed: TrashRecord, name: str, change: Change) -> str:
        keys = self._keys
        check_vdi_name(name)
        try:
            await self._take_name(name, change, trashed.id)
        except VdiExistsError as error:
            raise VdiExistsError(f"{error}; restore it under another name: --name NAME") from error
        record = VdiRecord.decode(trashed.record.encode())
        # A holder that deleted it and still lives is not its holder any more.
        back = dataclasses.replace(record, generation=record.generation + 1, changed=self._clock())
        named = await self._store.get(keys.vdi_name(trashed.id))
        change.unchanged(keys.vdi_name(trashed.id), named)
        if named is not None:
            change.delete(keys.retired_name(NameRecord.decode(named.value).name))
        change.put(keys.vdi(name), back)
        change.put(keys.vdi_name(trashed.id), NameRecord(name))
        return name

    async def _restore_snapshot(
        self, trashed: TrashRecord, wanted: str | None, change: Change
    ) -> str:
        keys = self._keys
        record = SnapshotRecord.decode(trashed.record.encode())
        if trashed.id != record.id:
            raise ProtocolError(f"trash item {trashed.id} holds snapshot {record.id}")
        named = await self._store.get(keys.vdi_name(record.vdi))
        vdi_name = trashed.name if named is None else NameRecord.decode(named.value).name
        wanted_name, tag = (vdi_name, trashed.tag) if wanted is None else split_name(wanted)
        if not tag:
            raise UsageError(f"{wanted!r} is no name of a snapshot: use VDI@TAG")
        check_vdi_name(wanted_name)
        check_tag(tag)
        if named is None:
            # Nobody has this VDI's name: the snapshot becomes one of a deleted VDI.
            try:
                await self._take_name(wanted_name, change)
            except VdiExistsError as error:
                raise VdiExistsError(
                    f"the VDI that this is a snapshot of is deleted, and its name is taken"
                    f" ({error}); restore it under a free one: --name NAME@{tag}"
                ) from error
            change.put(keys.retired_name(wanted_name), RetiredRecord(record.vdi))
        elif wanted_name != vdi_name:
            raise UsageError(
                f"it is a snapshot of {vdi_name!r}: restore it as {snapshot_file(vdi_name, tag)!r}"
            )
        key = keys.snapshot(record.vdi, tag)
        if await self._store.get(key) is not None:
            raise SnapshotExistsError(
                f"a snapshot {snapshot_file(vdi_name, tag)!r} exists;"
                " restore it under another tag: --name VDI@TAG"
            )
        change.unchanged(key, None)
        change.unchanged(keys.vdi_name(record.vdi), named)
        change.put(keys.vdi_name(record.vdi), NameRecord(wanted_name))
        change.put(key, record)
        return snapshot_file(wanted_name, tag)
