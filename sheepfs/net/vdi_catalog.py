"""The VDIs of a cluster: their records in etcd, and every change of them but attaching.

Always holds:
- A change is one transaction on the revisions that were read (I9); a lost race reads again.
- `vdis/<name>` and `vdi-names/<id>` change together: a VDI is found by either, whatever its name.
- Ids come from `counters/…` in the transaction that uses them, so no id is given out twice (I4).
- A name that snapshots of a deleted VDI still go by (`retired/<name>`) is not given to another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sheepfs.core.errors import (
    ProtocolError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import make_layer
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    ClusterConfig,
    LayerRecord,
    LockRecord,
    NameRecord,
    TrashRecord,
    VdiRecord,
    check_attributes,
    check_copies,
    check_vdi_name,
    check_vdi_size,
)
from sheepfs.net.records import Backoff, Records, held_by

VdiChange = Callable[[VdiRecord], VdiRecord]

TRASH_KEEP_S = 3600.0
"""How long what was deleted can be restored."""


class VdiCatalog(Records):
    """VDIs by name and id."""

    async def config(self) -> ClusterConfig:
        """Read what is fixed for the cluster. Raises UsageError when there is no such cluster."""
        found = await self._store.get(self._keys.config)
        if found is None:
            cluster = self._keys.root.split("/")[2]
            raise UsageError(
                f"there is no cluster called {cluster!r} in this etcd: "
                "start a storage daemon first (sheepfs-storaged DATA_DIR)"
            )
        return ClusterConfig.decode(found.value)

    # -- reading ----------------------------------------------------------------------------

    async def vdis(self) -> list[tuple[str, VdiRecord, int]]:
        """All VDIs by name, as (name, record, mod_revision).

        What cannot be shown as a file (a hostile name, a record of a newer format) is left out,
        with one line in the log.
        """
        found, _ = await self._store.list(self._keys.vdis)
        vdis = []
        for kv in found:
            name = kv.key.removeprefix(self._keys.vdis)
            try:
                check_vdi_name(name)
                vdis.append((name, VdiRecord.decode(kv.value), kv.mod_revision))
            except (UsageError, ProtocolError) as error:
                self._complain(kv.key, error)
        return vdis

    async def vdi(self, name: str) -> tuple[VdiRecord, int]:
        """Give a VDI's record and its mod_revision.

        Raises:
            VdiNotFoundError: no VDI has that name.
            ProtocolError: its record cannot be read by this version.
        """
        found = await self._store.get(self._keys.vdi(name))
        if found is None:
            raise VdiNotFoundError(f"there is no VDI {name!r}")
        return VdiRecord.decode(found.value), found.mod_revision

    async def find(self, which: str | int) -> tuple[str, VdiRecord, int]:
        """Give (name, record, mod_revision) of a VDI by its name or its id.

        Raises:
            VdiNotFoundError: no VDI has that name or id.
        """
        if isinstance(which, str):
            return (which, *await self.vdi(which))
        missed = ""
        while True:
            found = await self._store.get(self._keys.vdi_name(which))
            name = "" if found is None else NameRecord.decode(found.value).name
            # The same wrong name twice is not a rename that came in between.
            if not name or name == missed:
                raise VdiNotFoundError(f"there is no VDI with id {which}")
            try:
                record, revision = await self.vdi(name)
            except VdiNotFoundError:
                missed = name
                continue
            if record.id == which:
                return name, record, revision
            missed = name

    async def locks(self) -> dict[int, LockRecord]:
        """Who holds which VDI, by VDI id."""
        found, _ = await self._store.list(self._keys.locks)
        return {lock.vdi: lock for _, lock in self._readable(found, LockRecord)}

    # -- changing ---------------------------------------------------------------------------

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
            VdiExistsError: the name is taken.
            UsageError: a bad name, size or number of copies.
        """
        check_vdi_name(name)
        check_vdi_size(size)
        check_copies(copies)
        keys, now = self._keys, self._clock()
        backoff = Backoff()
        while True:
            await self.check_free(name)
            pool = await self._store.get(keys.pool(copies))
            vdi, last_vdi = await self._next_id("vdi")
            serial, last_layer = await self._next_id("layer")
            layer = make_layer(serial, serial, copies)
            record = VdiRecord(
                vdi, size, copies, layer, layer, layer, mode=mode, uid=uid, gid=gid,
                created=now, modified=now, changed=now,
            )  # fmt: skip
            conditions = [
                Unchanged(keys.vdi(name), 0),
                Unchanged(keys.retired_name(name), 0),
                last_vdi,
                last_layer,
            ]
            changes: list[Put | Delete] = [
                Put(keys.vdi(name), record.encode()),
                Put(keys.vdi_name(vdi), NameRecord(name).encode()),
                Put(keys.layer(layer), LayerRecord(vdi, layer, now).encode()),
                Put(last_vdi.key, b"%d" % vdi),
                Put(last_layer.key, b"%d" % serial),
            ]
            if pool is None:
                conditions.append(Unchanged(keys.pool(copies), 0))
                changes.append(Put(keys.pool(copies), b""))
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return record
            await backoff.wait()

    async def rename(self, old: str, new: str, replace: bool = False) -> None:
        """Give a VDI another name, attached or not; its id stays.

        Args:
            replace: Delete the VDI that has the new name.

        Raises:
            VdiNotFoundError: there is no `old`.
            VdiExistsError: `new` is taken and `replace` is false.
            HeldElsewhereError: the VDI to be replaced is attached.
            UsageError: `new` is no good name.
        """
        check_vdi_name(new)
        keys = self._keys
        backoff = Backoff()
        while True:
            record, revision = await self.vdi(old)
            if old == new:
                return
            target = await self._store.get(keys.vdi(new))
            if await self._store.get(keys.retired_name(new)) is not None:
                raise retired(new)
            conditions = [
                Unchanged(keys.vdi(old), revision),
                Unchanged(keys.retired_name(new), 0),
            ]
            changes: list[Put | Delete] = [
                Delete(keys.vdi(old)),
                Put(keys.vdi_name(record.id), NameRecord(new).encode()),
            ]
            if target is None:
                conditions.append(Unchanged(keys.vdi(new), 0))
            elif not replace:
                raise VdiExistsError(f"a VDI {new!r} exists")
            else:
                conditions.append(Unchanged(keys.vdi(new), target.mod_revision))
                gone = VdiRecord.decode(target.value)
                if await self._has_snapshots(gone.id):
                    raise VdiExistsError(
                        f"{new!r} has snapshots, which keep its name: delete them first"
                    )
                await self._throw_away(new, gone, None, TRASH_KEEP_S, conditions, changes)
            renamed = dataclasses.replace(record, changed=self._clock())
            changes.append(Put(keys.vdi(new), renamed.encode()))
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return
            await backoff.wait()

    async def delete(
        self, name: str, owner: str | None = None, keep_s: float = TRASH_KEEP_S
    ) -> VdiRecord:
        """Delete a VDI; its snapshots stay, and keep its name.

        Args:
            owner: Delete it also when this owner holds it, and end its lock.
            keep_s: it can be restored for so long; 0: its space is given back at once.

        Raises:
            VdiNotFoundError: no VDI has that name.
            HeldElsewhereError: another mount holds it.
        """
        backoff = Backoff()
        while True:
            record, revision = await self.vdi(name)
            conditions = [Unchanged(self._keys.vdi(name), revision)]
            changes: list[Put | Delete] = [Delete(self._keys.vdi(name))]
            await self._throw_away(name, record, owner, keep_s, conditions, changes)
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return record
            await backoff.wait()

    async def set_vdi_attribute(self, which: str | int, attribute: str, value: str | None) -> None:
        """Set what users keep with a VDI; None removes it. Raises UsageError: too much."""
        await self.update(
            which,
            lambda r: dataclasses.replace(
                r, attributes=changed_attributes(r.attributes, attribute, value)
            ),
        )

    async def update(self, which: str | int, change: VdiChange) -> VdiRecord:
        """Change a VDI's record; `change` may be called more than once. Gives the new record.

        Raises:
            VdiNotFoundError: no VDI has that name or id.
        """
        backoff = Backoff()
        while True:
            name, record, revision = await self.find(which)
            changed = change(record)
            key = self._keys.vdi(name)
            txn = Transaction([Unchanged(key, revision)], [Put(key, changed.encode())])
            if changed == record or await self._store.commit(txn) is not None:
                return changed
            await backoff.wait()

    # -- parts ------------------------------------------------------------------------------

    async def check_free(self, name: str) -> None:
        """Raise VdiExistsError if a VDI, or a deleted one's snapshots, have the name."""
        if await self._store.get(self._keys.vdi(name)) is not None:
            raise VdiExistsError(f"a VDI {name!r} exists")
        if await self._store.get(self._keys.retired_name(name)) is not None:
            raise retired(name)

    async def _has_snapshots(self, vdi: int) -> bool:
        found, _ = await self._store.list(self._keys.snapshots_of(vdi))
        return bool(found)

    async def _throw_away(
        self,
        name: str,
        record: VdiRecord,
        owner: str | None,
        keep_s: float,
        conditions: list[Unchanged],
        changes: list[Put | Delete],
    ) -> None:
        """Add what a transaction needs that deletes a VDI, all but its record's own key.

        A snapshot made meanwhile changes the VDI's record, on which the transaction depends.
        """
        keys = self._keys
        lock = await self._store.get(keys.lock(record.id))
        if lock is None:
            conditions.append(Unchanged(keys.lock(record.id), 0))
        else:
            if owner is None or LockRecord.decode(lock.value).owner != owner:
                raise held_by(name, lock)
            conditions.append(Unchanged(lock.key, lock.mod_revision))
            changes.append(Delete(lock.key))
        # Whoever deletes or restores a snapshot of it touches this key.
        naming = await self._store.get(keys.vdi_name(record.id))
        conditions.append(
            Unchanged(keys.vdi_name(record.id), 0 if naming is None else naming.mod_revision)
        )
        if await self._has_snapshots(record.id):
            changes.append(Put(keys.retired_name(name), b"%d" % record.id))
        else:
            changes.append(Delete(keys.vdi_name(record.id)))
        if keep_s > 0:
            now = self._clock()
            trash = TrashRecord(
                record.id, name, "", record.family, now, now + keep_s, record.encode().decode()
            )
            changes.append(Put(keys.trashed(record.id), trash.encode()))
        else:
            changes.append(Put(keys.reclaim_family(record.family), b""))


def changed_attributes(attributes: dict[str, str], name: str, value: str | None) -> dict[str, str]:
    """Give attributes with one set, or removed if None. Raises UsageError."""
    changed = {k: v for k, v in attributes.items() if k != name}
    if value is not None:
        changed[name] = value
        check_attributes(changed)
    return changed


def retired(name: str) -> VdiExistsError:
    """Give the error about a name that snapshots of a deleted VDI still go by."""
    return VdiExistsError(
        f"snapshots of a deleted VDI still use the name {name!r}: "
        "restore it (sheepctl trash list), or delete them (sheepctl snapshot list)"
    )
