"""The VDIs of a cluster: their records in etcd, and every change of them but attaching.

Always holds:
- A change is one transaction on the revisions that were read (I9); a lost race reads again.
- `vdis/<name>` and `vdi-names/<id>` change together: a VDI is found by either, whatever its name.
- Ids come from `counters/…` in the transaction that uses them, so no id is given out twice (I4).
- A deleted VDI is in the trash, or `reclaim/<family>` asks for its objects to be freed.
Source: docs/etcd.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sheepfs.core.errors import VdiExistsError
from sheepfs.core.metadata import (
    LayerRecord,
    NameRecord,
    SnapshotRecord,
    VdiRecord,
)
from sheepfs.core.names import (
    check_attributes,
    check_copies,
    check_vdi_name,
    check_vdi_size,
    split_name,
)
from sheepfs.net.layers import LayerCatalog, RootMap, Roots
from sheepfs.net.records import (
    TRASH_KEEP_S,
    Backoff,
    Change,
    Snapshot,
    VdiChange,
    held_by,
)
from sheepfs.net.snapshots import SnapshotCatalog

__all__ = [
    "TRASH_KEEP_S", "Backoff", "Catalog", "Change", "RootMap", "Roots", "Snapshot", "VdiChange",
    "held_by",
]  # fmt: skip


class Catalog(SnapshotCatalog, LayerCatalog):
    """Records of one cluster: VDIs here, snapshots, trash and layers in modules of their own."""

    async def create(
        self,
        name: str,
        size: int,
        copies: int = 3,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
    ) -> VdiRecord:
        """Make an empty VDI of `size` bytes, and ask for its pool if it is the first of it.

        Raises:
            VdiExistsError: the name is taken, or kept for snapshots of a deleted VDI.
            UsageError: a bad name, size or number of copies.
        """
        check_vdi_name(name)
        check_vdi_size(size)
        check_copies(copies)
        keys, now = self._keys, self._clock()

        async def decide(change: Change) -> VdiRecord:
            await self._take_name(name, change)
            vdi = await self._next_id("vdi", change)
            (layer,) = await self._new_layers(None, copies, 1, change)
            record = VdiRecord(
                vdi, size, copies, layer, map=layer, family=layer, mode=mode, uid=uid, gid=gid,
                created=now, modified=now, changed=now,
            )  # fmt: skip
            change.put(keys.vdi(name), record)
            change.put(keys.vdi_name(vdi), NameRecord(name))
            change.put(keys.layer(layer), LayerRecord(vdi, layer, now))
            await self._add_pool(copies, change)
            return record

        return await self._commit(decide)

    async def rename(
        self, old: str, new: str, replace: bool = False, keep_s: float = TRASH_KEEP_S
    ) -> None:
        """Give a VDI another name, attached or not; its id and its snapshots stay.

        Args:
            replace: Delete the VDI that has the new name.
            keep_s: How long a VDI that is replaced can be restored.

        Raises:
            VdiNotFoundError: there is no `old`.
            VdiExistsError: `new` is taken and `replace` is false, or snapshots keep that name.
            HeldElsewhereError: the VDI to be replaced is attached.
            UsageError: `new` is no good name.
        """
        check_vdi_name(new)
        keys = self._keys

        async def decide(change: Change) -> None:
            record, revision = await self.vdi(old)
            if old == new:
                return
            target = await self._store.get(keys.vdi(new))
            if target is None or not replace:
                await self._take_name(new, change)
            else:
                change.unchanged(keys.vdi(new), target)
                gone = VdiRecord.decode(target.value)
                if await self._delete_vdi(new, gone, None, keep_s, change):
                    raise VdiExistsError(
                        f"VDI {new!r} has snapshots, which keep its name: delete them or rename"
                        " it before it is replaced"
                    )
            change.unchanged(keys.vdi(old), revision)
            change.delete(keys.vdi(old))
            change.put(keys.vdi(new), dataclasses.replace(record, changed=self._clock()))
            change.put(keys.vdi_name(record.id), NameRecord(new))

        await self._commit(decide)

    async def delete(
        self, name: str, owner: str | None = None, keep_s: float = TRASH_KEEP_S
    ) -> VdiRecord:
        """Put a VDI into the trash. Its snapshots stay, and keep its name while there are any.

        Args:
            owner: Delete it also when this owner holds it, and end its lock.
            keep_s: How long it can be restored; 0: not at all, its space is freed now.

        Raises:
            VdiNotFoundError: no VDI has that name.
            HeldElsewhereError: another mount holds it.
        """
        key = self._keys.vdi(name)

        async def decide(change: Change) -> VdiRecord:
            record, revision = await self.vdi(name)
            change.unchanged(key, revision)
            change.delete(key)
            await self._delete_vdi(name, record, owner, keep_s, change)
            return record

        return await self._commit(decide)

    async def update(self, which: str | int, edit: VdiChange) -> VdiRecord:
        """Change a VDI's record; `edit` may be called more than once. Gives the new record.

        Raises:
            VdiNotFoundError: no VDI has that name or id.
        """

        async def decide(change: Change) -> VdiRecord:
            name, record, revision = await self.find(which)
            key = self._keys.vdi(name)
            changed = edit(record)
            if changed != record:
                change.unchanged(key, revision)
                change.put(key, changed)
            return changed

        return await self._commit(decide)

    async def set_attribute(
        self, which: str | int, name: str, value: str | None
    ) -> VdiRecord | SnapshotRecord:
        """Keep a text of the user's with a VDI or a snapshot; None removes it (set_attributes)."""
        return await self.set_attributes(which, {name: value})

    async def set_attributes(
        self, which: str | int, texts: Mapping[str, str | None]
    ) -> VdiRecord | SnapshotRecord:
        """Keep texts of the user's with a VDI or a snapshot, all or none; None removes one.

        Args:
            which: A VDI's name or id, or a snapshot's file name (`vm1@daily.raw`).

        Raises:
            VdiNotFoundError, SnapshotNotFoundError: there is no such thing.
            UsageError: a name is none, or all attributes together become too large.
        """

        def edited(old: dict[str, str]) -> dict[str, str]:
            result = {name: text for name, text in {**old, **texts}.items() if text is not None}
            check_attributes(result)
            return result

        vdi_name, tag = split_name(which) if isinstance(which, str) else ("", "")
        if not tag:
            return await self.update(
                which, lambda r: dataclasses.replace(r, attributes=edited(r.attributes))
            )
        vdi = (await self.snapshot(vdi_name, tag)).record.vdi
        return await self.update_snapshot(
            vdi, tag, lambda r: dataclasses.replace(r, attributes=edited(r.attributes))
        )
