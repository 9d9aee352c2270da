"""Snapshots: their records in etcd. Making one is the holder's (`sheepfs.snapshots`).

Always holds:
- Snapshots belong to a VDI's id; they follow its name, and outlive it.
- As long as a deleted VDI has snapshots, `retired/<name>` and `vdi-names/<id>` keep its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from sheepfs.core.errors import (
    ProtectedError,
    ProtocolError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    UsageError,
    VdiNotFoundError,
)
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    NameRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
    check_tag,
)
from sheepfs.net.records import Backoff, Records
from sheepfs.net.vdi_catalog import TRASH_KEEP_S, changed_attributes

SnapshotChange = Callable[[SnapshotRecord], SnapshotRecord]


class Tagged(NamedTuple):
    """A snapshot as it is found: the name of its VDI, its tag, its record and its revision."""

    name: str
    tag: str
    record: SnapshotRecord
    revision: int


class SnapshotCatalog(Records):
    """Snapshots by VDI and tag."""

    async def snapshots(self, vdi: int | None = None) -> list[Tagged]:
        """All snapshots (of one VDI), by name and tag; what cannot be read is left out."""
        prefix = self._keys.snapshots if vdi is None else self._keys.snapshots_of(vdi)
        found, _ = await self._store.list(prefix)
        if not found:
            return []
        names = await self._names()
        tagged = []
        for kv, record in self._readable(found, SnapshotRecord):
            _, _, tag = kv.key.removeprefix(self._keys.snapshots).partition("/")
            name = names.get(record.vdi)
            try:
                check_tag(tag)
                if name is None:
                    raise ProtocolError(f"nothing names its VDI {record.vdi}")
            except (UsageError, ProtocolError) as error:
                self._complain(kv.key, error)
                continue
            tagged.append(Tagged(name, tag, record, kv.mod_revision))
        return sorted(tagged, key=lambda item: (item.name, item.tag))

    async def _names(self) -> dict[int, str]:
        found, _ = await self._store.list(self._keys.vdi_names)
        names = {}
        for kv, record in self._readable(found, NameRecord):
            number = kv.key.removeprefix(self._keys.vdi_names)
            if number.isdecimal():
                names[int(number)] = record.name
        return names

    async def vdi_id(self, name: str) -> int:
        """Give the id of a VDI, or of a deleted one that still has snapshots.

        Raises:
            VdiNotFoundError: there is neither.
        """
        found = await self._store.get(self._keys.vdi(name))
        if found is not None:
            return VdiRecord.decode(found.value).id
        kept = await self._store.get(self._keys.retired_name(name))
        if kept is None or not kept.value.isdigit():
            raise VdiNotFoundError(f"there is no VDI {name!r}")
        return int(kept.value)

    async def snapshot(self, name: str, tag: str) -> Tagged:
        """Give one snapshot of the VDI called `name`.

        Raises:
            VdiNotFoundError: there is no such VDI.
            SnapshotNotFoundError: it has no such snapshot.
        """
        vdi = await self.vdi_id(name)
        found = await self._store.get(self._keys.snapshot(vdi, tag))
        if found is None:
            raise SnapshotNotFoundError(f"{name!r} has no snapshot {tag!r}")
        return Tagged(name, tag, SnapshotRecord.decode(found.value), found.mod_revision)

    async def delete_snapshot(self, name: str, tag: str, keep_s: float = TRASH_KEEP_S) -> None:
        """Delete a snapshot; all others, clones and the VDI itself stay as they are.

        Args:
            keep_s: it can be restored for so long; 0: its space is given back at once.

        Raises:
            SnapshotNotFoundError, VdiNotFoundError: there is none.
            ProtectedError: it is protected.
        """
        backoff = Backoff()
        keys = self._keys
        while True:
            _, _, record, revision = await self.snapshot(name, tag)
            if record.protected:
                raise ProtectedError(
                    f"{name}@{tag} is protected: sheepctl snapshot unprotect allows to delete it"
                )
            key = keys.snapshot(record.vdi, tag)
            conditions = [Unchanged(key, revision)]
            changes: list[Put | Delete] = [Delete(key)]
            if keep_s > 0:
                now = self._clock()
                trash = TrashRecord(
                    record.id, name, tag, record.family, now, now + keep_s,
                    record.encode().decode(),
                )  # fmt: skip
                changes.append(Put(keys.trashed(record.id), trash.encode()))
            else:
                changes.append(Put(keys.reclaim_family(record.family), b""))
            await self._release_name(name, record.vdi, key, conditions, changes)
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return
            await backoff.wait()

    async def _release_name(
        self,
        name: str,
        vdi: int,
        key: str,
        conditions: list[Unchanged],
        changes: list[Put | Delete],
    ) -> None:
        """With the last snapshot of a deleted VDI its name is free."""
        keys = self._keys
        kept = await self._store.get(keys.retired_name(name))
        if kept is None:
            # Who deletes the VDI meanwhile must see that this snapshot is gone.
            conditions.append(Unchanged(keys.retired_name(name), 0))
            naming = await self._store.get(keys.vdi_name(vdi))
            if naming is not None:
                conditions.append(Unchanged(naming.key, naming.mod_revision))
                changes.append(Put(naming.key, naming.value))
            return
        conditions.append(Unchanged(kept.key, kept.mod_revision))
        others, _ = await self._store.list(keys.snapshots_of(vdi))
        if any(kv.key != key for kv in others):
            # Two that delete the last two at once must not both find the other one there.
            changes.append(Put(kept.key, kept.value))
        else:
            changes += [Delete(kept.key), Delete(keys.vdi_name(vdi))]

    async def rename_snapshot(self, name: str, tag: str, new_tag: str) -> None:
        """Give a snapshot another tag.

        Raises:
            SnapshotNotFoundError, VdiNotFoundError: there is none.
            SnapshotExistsError: the new tag is taken.
            UsageError: it is no good tag.
        """
        check_tag(new_tag)
        backoff = Backoff()
        while tag != new_tag:
            _, _, record, revision = await self.snapshot(name, tag)
            old, new = (self._keys.snapshot(record.vdi, t) for t in (tag, new_tag))
            if await self._store.get(new) is not None:
                raise SnapshotExistsError(f"{name!r} has a snapshot {new_tag!r}")
            txn = Transaction(
                [Unchanged(old, revision), Unchanged(new, 0)],
                [Delete(old), Put(new, record.encode())],
            )
            if await self._store.commit(txn) is not None:
                return
            await backoff.wait()

    async def update_snapshot(self, name: str, tag: str, change: SnapshotChange) -> SnapshotRecord:
        """Change a snapshot's record; `change` may be called more than once.

        Raises:
            SnapshotNotFoundError, VdiNotFoundError: there is none.
        """
        backoff = Backoff()
        while True:
            _, _, record, revision = await self.snapshot(name, tag)
            changed = change(record)
            key = self._keys.snapshot(record.vdi, tag)
            txn = Transaction([Unchanged(key, revision)], [Put(key, changed.encode())])
            if changed == record or await self._store.commit(txn) is not None:
                return changed
            await backoff.wait()

    async def set_snapshot_attribute(
        self, name: str, tag: str, attribute: str, value: str | None
    ) -> None:
        """Set what users keep with a snapshot; None removes it. Raises UsageError: too much."""
        await self.update_snapshot(
            name,
            tag,
            lambda r: dataclasses.replace(
                r, attributes=changed_attributes(r.attributes, attribute, value)
            ),
        )
