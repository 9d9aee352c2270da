"""The VDIs of a cluster: their records in etcd, and every change of them but attaching.

Always holds:
- A change is one transaction on the revisions that were read (I9); a lost race reads again.
- `vdis/<name>` and `vdi-names/<id>` change together: a VDI is found by either, whatever its name.
- Ids come from `counters/…` in the transaction that uses them, so no id is given out twice (I4).
- A deleted VDI leaves `trash/<layer>` behind: its objects are found and freed later.
Source: docs/etcd.md.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from sheepfs.core.errors import (
    HeldElsewhereError,
    ProtocolError,
    SheepError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    ClusterConfig,
    Keys,
    LayerRecord,
    LockRecord,
    NameRecord,
    Record,
    TrashRecord,
    VdiRecord,
    check_copies,
    check_vdi_name,
    check_vdi_size,
)
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

FIRST_ID = 2
"""Inode 1 is the mount's root, and layer 0 means a hole."""
FIRST_BACKOFF_S = 0.002
MAX_BACKOFF_S = 0.1

_R = TypeVar("_R", bound=Record)
VdiChange = Callable[[VdiRecord], VdiRecord]


class Catalog:
    """Records of the VDIs of one cluster.

    Every method raises UnreachableError when etcd does not answer; a change may then have been
    made all the same, so the caller looks again before it repeats one.

    Args:
        clock: Gives the time in seconds since 1970 for the records' times.
    """

    def __init__(self, store: Store, keys: Keys, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._complained: set[str] = set()

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
        return {lock.vdi: lock for lock in self._readable(found, LockRecord)}

    async def trash(self) -> list[TrashRecord]:
        """Layers of deleted VDIs whose objects are still to be freed."""
        found, _ = await self._store.list(self._keys.trash)
        return self._readable(found, TrashRecord)

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
            if await self._store.get(keys.vdi(name)) is not None:
                raise VdiExistsError(f"a VDI {name!r} exists")
            pool = await self._store.get(keys.pool(copies))
            vdi, last_vdi = await self._next_id("vdi")
            layer, last_layer = await self._next_id("layer")
            record = VdiRecord(
                vdi, size, copies, layer, mode=mode, uid=uid, gid=gid,
                created=now, modified=now, changed=now,
            )  # fmt: skip
            conditions = [Unchanged(keys.vdi(name), 0), last_vdi, last_layer]
            changes: list[Put | Delete] = [
                Put(keys.vdi(name), record.encode()),
                Put(keys.vdi_name(vdi), NameRecord(name).encode()),
                Put(keys.layer(layer), LayerRecord(vdi, now).encode()),
                Put(last_vdi.key, b"%d" % vdi),
                Put(last_layer.key, b"%d" % layer),
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
            conditions = [Unchanged(keys.vdi(old), revision)]
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
                await self._trash(new, gone, None, conditions, changes)
            renamed = dataclasses.replace(record, changed=self._clock())
            changes.append(Put(keys.vdi(new), renamed.encode()))
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return
            await backoff.wait()

    async def delete(self, name: str, owner: str | None = None) -> VdiRecord:
        """Delete a VDI; its objects are freed later, by who works off `trash`.

        Args:
            owner: Delete it also when this owner holds it, and end its lock.

        Raises:
            VdiNotFoundError: no VDI has that name.
            HeldElsewhereError: another mount holds it.
        """
        backoff = Backoff()
        while True:
            record, revision = await self.vdi(name)
            conditions = [Unchanged(self._keys.vdi(name), revision)]
            changes: list[Put | Delete] = [Delete(self._keys.vdi(name))]
            await self._trash(name, record, owner, conditions, changes)
            if await self._store.commit(Transaction(conditions, changes)) is not None:
                return record
            await backoff.wait()

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

    async def forget_trash(self, layer: int) -> None:
        """Say that no object of a deleted layer is left."""
        changes = [Delete(self._keys.trashed(layer)), Delete(self._keys.layer(layer))]
        await self._store.commit(Transaction([], changes))

    # -- parts ------------------------------------------------------------------------------

    async def _trash(
        self,
        name: str,
        record: VdiRecord,
        owner: str | None,
        conditions: list[Unchanged],
        changes: list[Put | Delete],
    ) -> None:
        """Add what a transaction needs that deletes a VDI, all but its record's own key."""
        keys = self._keys
        lock = await self._store.get(keys.lock(record.id))
        if lock is None:
            conditions.append(Unchanged(keys.lock(record.id), 0))
        else:
            if owner is None or LockRecord.decode(lock.value).owner != owner:
                raise held_by(name, lock)
            conditions.append(Unchanged(lock.key, lock.mod_revision))
            changes.append(Delete(lock.key))
        trash = TrashRecord(
            record.layer, record.id, record.copies, record.size, record.maps, self._clock()
        )
        changes.append(Delete(keys.vdi_name(record.id)))
        changes.append(Put(keys.trashed(record.layer), trash.encode()))

    async def _next_id(self, what: str) -> tuple[int, Unchanged]:
        """Give the id after the last one, and the condition under which it is free."""
        key = self._keys.counter(what)
        found = await self._store.get(key)
        if found is None:
            return FIRST_ID, Unchanged(key, 0)
        try:
            return max(int(found.value) + 1, FIRST_ID), Unchanged(key, found.mod_revision)
        except ValueError as error:
            raise ProtocolError(f"etcd key {key} is {found.value!r}, not a number") from error

    def _readable(self, found: list[KeyValue], kind: type[_R]) -> list[_R]:
        records = []
        for kv in found:
            try:
                records.append(kind.decode(kv.value))
            except ProtocolError as error:
                self._complain(kv.key, error)
        return records

    def _complain(self, key: str, error: SheepError) -> None:
        if key not in self._complained:
            self._complained.add(key)
            log.warning("etcd key %r is left out: %s", key, error)


def held_by(name: str, lock: KeyValue) -> HeldElsewhereError:
    """Give the error that says who holds a VDI."""
    try:
        owner = LockRecord.decode(lock.value).owner
    except ProtocolError:
        owner = "another version of sheepfs"
    return HeldElsewhereError(f"VDI {name!r} is attached by {owner}")


class Backoff:
    """Pauses between attempts of a compare-and-swap: a crowd that collides spreads out."""

    def __init__(self) -> None:
        self._limit_s = FIRST_BACKOFF_S

    async def wait(self) -> None:
        """Wait a random while, on average longer each time."""
        await trio.sleep(random.uniform(0, self._limit_s))
        self._limit_s = min(2 * self._limit_s, MAX_BACKOFF_S)
