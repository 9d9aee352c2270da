"""Reading a cluster's records of VDIs, snapshots and trash; what all changes of them share.

Always holds:
- What cannot be read or shown as a file is left out of listings, with one line in the log.
- `vdi-names/<id>` gives the name of every VDI that lives or has snapshots.
- A name belongs to one VDI: in `vdis/` while it lives, in `retired/` while only snapshots live.
Source: docs/etcd.md.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import trio

from sheepfs.core.errors import (
    HeldElsewhereError,
    ProtocolError,
    SheepError,
    SnapshotNotFoundError,
    UnreachableError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    ClusterConfig,
    LockRecord,
    NameRecord,
    Record,
    RetiredRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
)
from sheepfs.core.names import check_tag, check_vdi_name, snapshot_file
from sheepfs.net.metadata_transfer import refuse_half_done
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

FIRST_ID = 2
"""Inode 1 is the mount's root, and layer 0 means a hole."""
FIRST_BACKOFF_S = 0.002
MAX_BACKOFF_S = 0.1
TRASH_KEEP_S = 3600
"""How long a deleted VDI or snapshot can be restored."""

COMMIT_PATIENCE_S = 30.0
"""How long a change whose outcome is unknown is tried again."""
COMMIT_RETRY_S = 0.2

_R = TypeVar("_R", bound=Record)
_T = TypeVar("_T")
VdiChange = Callable[[VdiRecord], VdiRecord]
SnapshotChange = Callable[[SnapshotRecord], SnapshotRecord]


class Snapshot(NamedTuple):
    """A snapshot as it was read."""

    vdi_name: str
    tag: str
    record: SnapshotRecord
    mod_revision: int

    @property
    def file(self) -> str:
        """Its name in the mount."""
        return snapshot_file(self.vdi_name, self.tag)


class Change:
    """A transaction in the making: what it was decided on, and what it changes."""

    def __init__(self) -> None:
        self.conditions: list[Unchanged] = []
        self.changes: list[Put | Delete] = []

    def unchanged(self, key: str, found: KeyValue | int | None) -> None:
        """Make it a condition that a key is as it was read (or has that mod_revision)."""
        if isinstance(found, KeyValue):
            found = found.mod_revision
        self.conditions.append(Unchanged(key, found or 0))

    def put(self, key: str, record: Record) -> None:
        """Put a record."""
        self.changes.append(Put(key, record.encode()))

    def delete(self, key: str) -> None:
        """Remove a key."""
        self.changes.append(Delete(key))


class Records:
    """Records of one cluster, to be read.

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
            await refuse_half_done(self._store, self._keys)
            cluster = self._keys.root.split("/")[2]
            raise UsageError(
                f"there is no cluster called {cluster!r} in this etcd: "
                "start a storage daemon first (sheepfs-storaged DATA_DIR)"
            )
        return ClusterConfig.decode(found.value)

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

    async def snapshots(self, vdi: int | None = None) -> list[Snapshot]:
        """All snapshots (of one VDI), by the VDI's name and the tag; of deleted VDIs, too.

        What cannot be read or shown as a file is left out, with one line in the log.
        """
        keys = self._keys
        prefix = keys.snapshots if vdi is None else keys.snapshots_of(vdi)
        # Names are read last: they are there for as long as a snapshot is.
        found, _ = await self._store.list(prefix)
        names: dict[int, str] = {}
        if found and vdi is None:
            names = self._names((await self._store.list(keys.vdi_names))[0])
        elif found and vdi is not None:
            name = await self._store.get(keys.vdi_name(vdi))
            names = self._names([] if name is None else [name])
        snapshots = []
        for kv in found:
            try:
                owner, tag, record = decode_snapshot(keys, kv)
                if owner not in names:
                    raise ProtocolError(f"VDI {owner} has no name")
                snapshots.append(Snapshot(names[owner], tag, record, kv.mod_revision))
            except (UsageError, ProtocolError) as error:
                self._complain(kv.key, error)
        return sorted(snapshots, key=lambda snapshot: snapshot[:2])

    async def snapshot(self, vdi_name: str, tag: str) -> Snapshot:
        """Give one snapshot by the name of its VDI, which may be deleted, and its tag.

        Raises:
            SnapshotNotFoundError: there is none.
            ProtocolError: its record cannot be read by this version.
        """
        vdi = await self.id_of(vdi_name)
        found = None if vdi is None else await self._store.get(self._keys.snapshot(vdi, tag))
        if found is None:
            raise SnapshotNotFoundError(f"there is no snapshot {snapshot_file(vdi_name, tag)!r}")
        return Snapshot(vdi_name, tag, SnapshotRecord.decode(found.value), found.mod_revision)

    async def id_of(self, vdi_name: str) -> int | None:
        """Give the id of the VDI that has a name, or had it and still has snapshots."""
        found = await self._store.get(self._keys.vdi(vdi_name))
        if found is not None:
            return VdiRecord.decode(found.value).id
        found = await self._store.get(self._keys.retired_name(vdi_name))
        return None if found is None else RetiredRecord.decode(found.value).vdi

    async def locks(self) -> dict[int, LockRecord]:
        """Who holds which VDI, by VDI id."""
        found, _ = await self._store.list(self._keys.locks)
        return {lock.vdi: lock for lock, _ in self._readable(found, LockRecord)}

    async def trash(self) -> list[tuple[TrashRecord, int]]:
        """What is deleted and can still be restored, by time, as (record, mod_revision)."""
        found, _ = await self._store.list(self._keys.trash)
        items = self._readable(found, TrashRecord)
        return sorted(items, key=lambda item: (item[0].deleted, item[0].id))

    # -- parts of changes -------------------------------------------------------------------

    async def _commit(self, decide: Callable[[Change], Awaitable[_T]]) -> _T:
        """Let `decide` read and fill a transaction until one goes through (or is empty)."""
        backoff = Backoff()
        while True:
            change = Change()
            result = await decide(change)
            txn = Transaction(change.conditions, change.changes)
            if not change.changes or await self._store.commit(txn) is not None:
                return result
            await backoff.wait()

    async def commit_surely(
        self,
        decide: Callable[[Change], Awaitable[None]],
        is_done: Callable[[], Awaitable[bool]],
    ) -> None:
        """Make a change, and find out what became of it when etcd's answer gets lost.

        Args:
            decide: fills the transaction with what is to be done as of now, or raises.
            is_done: tells whether an earlier attempt has happened after all.
        """
        give_up = trio.current_time() + COMMIT_PATIENCE_S
        while True:
            try:
                await self._commit(decide)
                return
            except UnreachableError as error:
                if trio.current_time() > give_up:
                    raise
                log.info("not known yet whether it happened: %s", error)
                await trio.sleep(COMMIT_RETRY_S)
            try:
                if await is_done():
                    return
            except UnreachableError as error:
                log.debug("still not known: %s", error)

    async def _take_name(self, name: str, change: Change, vdi: int = 0) -> None:
        """Add the conditions that a name is free (VdiExistsError), or retired by `vdi` itself."""
        keys = self._keys
        if await self._store.get(keys.vdi(name)) is not None:
            raise VdiExistsError(f"a VDI {name!r} exists")
        change.unchanged(keys.vdi(name), None)
        retired = await self._store.get(keys.retired_name(name))
        if retired is not None and RetiredRecord.decode(retired.value).vdi != vdi:
            raise VdiExistsError(
                f"snapshots of the deleted VDI {name!r} still use its name: delete them"
                f" (sheepctl snapshot list {name}), or take another name"
            )
        change.unchanged(keys.retired_name(name), retired)

    async def _add_pool(self, copies: int, change: Change) -> None:
        """Ask for a pool if nobody did."""
        key = self._keys.pool(copies)
        if await self._store.get(key) is None:
            change.unchanged(key, None)
            change.changes.append(Put(key, b""))

    async def _next_id(self, what: str, change: Change, count: int = 1) -> int:
        """Take `count` ids after the last one; gives the first."""
        key = self._keys.counter(what)
        found = await self._store.get(key)
        try:
            first = FIRST_ID if found is None else max(int(found.value) + 1, FIRST_ID)
        except ValueError as error:
            value = b"" if found is None else found.value
            raise ProtocolError(f"etcd key {key} is {value!r}, not a number") from error
        change.unchanged(key, found)
        change.changes.append(Put(key, b"%d" % (first + count - 1)))
        return first

    def _names(self, found: list[KeyValue]) -> dict[int, str]:
        names = {}
        for kv in found:
            try:
                name = NameRecord.decode(kv.value).name
                check_vdi_name(name)
                names[int(kv.key.removeprefix(self._keys.vdi_names))] = name
            except (UsageError, ProtocolError) as error:
                self._complain(kv.key, error)
            except ValueError:
                self._complain(kv.key, ProtocolError("not the id of a VDI"))
        return names

    def _readable(self, found: list[KeyValue], kind: type[_R]) -> list[tuple[_R, int]]:
        records = []
        for kv in found:
            try:
                records.append((kind.decode(kv.value), kv.mod_revision))
            except ProtocolError as error:
                self._complain(kv.key, error)
        return records

    def _complain(self, key: str, error: SheepError) -> None:
        if key not in self._complained:
            self._complained.add(key)
            log.warning("etcd key %r is left out: %s", key, error)


def decode_snapshot(keys: Keys, kv: KeyValue) -> tuple[int, str, SnapshotRecord]:
    """Give (VDI id, tag, record) of a key below `snapshots/`.

    Raises:
        UsageError: the tag cannot be part of a file name.
        ProtocolError: this is no such record, or it stands where it does not belong.
    """
    owner, _, tag = kv.key.removeprefix(keys.snapshots).partition("/")
    check_tag(tag)
    record = SnapshotRecord.decode(kv.value)
    if str(record.vdi) != owner:
        raise ProtocolError(f"a snapshot of VDI {record.vdi} is kept as one of {owner}")
    return record.vdi, tag, record


def held_by(name: str, lock: KeyValue) -> HeldElsewhereError:
    """Give the error that says who holds a VDI."""
    try:
        owner = LockRecord.decode(lock.value).owner
    except ProtocolError:
        owner = "another version of sheepfs"
    return HeldElsewhereError(f"VDI {name!r} is attached by {owner}", owner)


class Backoff:
    """Pauses between attempts of a compare-and-swap: a crowd that collides spreads out."""

    def __init__(self) -> None:
        self._limit_s = FIRST_BACKOFF_S

    async def wait(self) -> None:
        """Wait a random while, on average longer each time."""
        await trio.sleep(random.uniform(0, self._limit_s))
        self._limit_s = min(2 * self._limit_s, MAX_BACKOFF_S)
