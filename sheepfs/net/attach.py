"""Exclusive attach: one holder per VDI (I6), by a leased lock, a generation and a token.

Always holds:
- The lock key and the record's generation change in one transaction; a lock is ours exactly when
  it carries our generation, whatever revision an answer that got lost has given it.
- `attach` returns only after the fence refused every older token on the storage nodes.
- The token is the revision of the transaction that attached (on the base that an import sets), so
  it only grows; taking the lock back after a lost lease keeps it, since nobody else attached in
  between.
- A holder without etcd stays holder until etcd says that somebody else is (I10).
Source: docs/etcd.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from sheepfs.core.errors import (
    FencedError,
    ProtocolError,
    RetryableError,
    UnreachableError,
    VdiNotFoundError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import LockRecord, VdiRecord
from sheepfs.net.catalog import Backoff, Catalog, VdiChange, held_by
from sheepfs.net.store import RETRY_S, LeaseGoneError, LeaseKeeper, Store
from sheepfs.net.tokens import read_floor

log = logging.getLogger(__name__)

Fence = Callable[[int, int], Awaitable[None]]
"""`await fence(vdi, token)`: every storage node that may serve refuses older tokens, durably."""

Extra = Callable[[], Awaitable[tuple[list[Unchanged], list[Put | Delete]]]]

RELEASE_S = 5.0
LEVELLING = ":levelling"
"""How the owner ends of who only levels a VDI, and gives way to whoever wants it."""


@dataclass(eq=False)
class Attachment:
    """What it takes to be, and to stay, the holder of a VDI."""

    vdi: int
    token: int
    """Fencing number: goes with every write."""
    generation: int
    record: VdiRecord
    """As last read or written here."""
    was_clean: bool
    """False: the holder before went without a clean detach, replicas may differ (I2)."""
    owner: str
    store: Store = field(repr=False)
    keys: Keys = field(repr=False)
    lost: trio.Event = field(default_factory=trio.Event, repr=False)
    """Set when somebody else took the VDI over, or deleted it: for good."""
    changing: trio.Lock = field(default_factory=trio.Lock, repr=False)
    """Held by save, detach and reclaim: of one holder, one at a time."""

    def lock_put(self, lease: int) -> Put:
        """The change that puts our lock."""
        lock = LockRecord(self.vdi, self.generation, self.owner, self.token)
        return Put(self.keys.lock(self.vdi), lock.encode(), lease)

    def owns(self, lock: KeyValue) -> bool:
        """Tell whether a lock is ours."""
        try:
            return LockRecord.decode(lock.value).generation == self.generation
        except ProtocolError:
            return False


async def attach(
    store: Store, keys: Keys, which: str | int, owner: str, lease: LeaseKeeper, fence: Fence
) -> Attachment:
    """Become the one holder of a VDI.

    A lock that this owner put with this very lease is taken again: it was left by an attach or
    detach whose answer got lost.

    Args:
        which: Name or id of the VDI.
        owner: `host:pid:mountpoint`, for messages.
        fence: Tells every storage node; awaited after the lock is ours and before the return.

    Cancellation: the lock is given back (within a few seconds), as when `fence` fails.

    Raises:
        HeldElsewhereError: another mount holds it; the message names it.
        VdiNotFoundError: there is no such VDI.
        UnreachableError: etcd does not answer.
        LeaseGoneError: `lease` has ended.
        SheepError: what `fence` raised.
    """
    catalog = Catalog(store, keys)
    backoff = Backoff()
    while True:
        if lease.lost.is_set() or not lease.lease:
            raise LeaseGoneError("attaching needs a lease in etcd; it has ended")
        name, record, revision = await catalog.find(which)
        lock = await store.get(keys.lock(record.id))
        if lock is not None and not _is_left_over(lock, owner, lease):
            raise held_by(name, lock)
        floor = await read_floor(store, keys)
        generation = floor.generation_after(record.generation)
        mine = dataclasses.replace(record, generation=generation, clean=False)
        held = Attachment(record.id, 0, generation, mine, record.clean, owner, store, keys)
        txn = Transaction(
            [
                Unchanged(keys.vdi(name), revision),
                Unchanged(keys.lock(record.id), 0 if lock is None else lock.mod_revision),
                floor.unchanged,
            ],
            [Put(keys.vdi(name), mine.encode()), held.lock_put(lease.lease)],
        )
        try:
            revision_now = await store.commit(txn)
            if revision_now is not None:
                held.token = floor.token(revision_now)
                await fence(record.id, held.token)
                if record.next:
                    await _go_on_with_next(held)
                if await _is_locked(held) and not lease.lost.is_set():
                    return held
        except LeaseGoneError:
            raise
        except BaseException:
            # Also when the commit's outcome is unknown: a lock under a living lease would keep
            # everybody out of a VDI that nobody has attached.
            with trio.move_on_after(RELEASE_S, shield=True):
                await _give_back(held)
            raise
        await backoff.wait()


async def _is_locked(held: Attachment) -> bool:
    """Tell whether the lock is still there: who fenced for long may have lost it meanwhile.

    Of a VDI without any data the nodes are asked for nothing: nobody else would tell.
    """
    ours = await _read_ours(held)
    return ours is not None and ours[3] is not None


async def _go_on_with_next(held: Attachment) -> None:
    """Freeze `layer`: a snapshot that did not come to its end left `next`, which has the writes.

    Only behind the fence: reclaim takes what no stored map names of a frozen layer, and until
    then the former holder may still store its map.
    """
    await _change(
        held,
        lambda r: dataclasses.replace(r, layer=r.next or r.layer, next=0),
        release=False,
        extra=_reclaim_of(held),
    )


def _reclaim_of(held: Attachment) -> Extra:
    async def reclaim() -> tuple[list[Unchanged], list[Put | Delete]]:
        return [], [Put(held.keys.reclaim_family(held.record.family), b"")]

    return reclaim


async def save(attachment: Attachment, change: VdiChange) -> VdiRecord:
    """Change the record of a VDI that is held; `change` may be called more than once.

    Raises:
        FencedError: somebody else took it over (`lost` is set).
        RetryableError: our lease has ended and the lock is not back yet; or etcd does not answer.
    """
    return await _change(attachment, change, release=False)


async def commit(attachment: Attachment, change: VdiChange, extra: Extra) -> VdiRecord:
    """Change the record of a VDI that is held, and other keys, in one transaction.

    Args:
        extra: awaited before each attempt; gives further conditions and changes, or raises.

    Raises:
        FencedError: somebody else took it over (`lost` is set).
        RetryableError: our lease has ended, or etcd does not answer (it may have happened).
        SheepError: what `extra` raised.
    """
    return await _change(attachment, change, release=False, extra=extra)


async def detach(
    attachment: Attachment, change: VdiChange, clean: bool = True, reclaim: bool = False
) -> None:
    """Put the record's last change and let the VDI go, in one transaction.

    May be called again when it failed with a RetryableError; once it succeeded, again is fine.

    Args:
        clean: Everything is flushed, and all replicas agree.
        reclaim: Ask for a look at what the family does not use any more.

    Raises:
        FencedError: somebody else took it over before (`lost` is set).
        UnreachableError: etcd does not answer.
    """
    await _change(
        attachment,
        lambda r: dataclasses.replace(change(r), clean=clean),
        release=True,
        extra=_reclaim_of(attachment) if reclaim else nothing_more,
    )


async def reclaim_after_lease_loss(attachment: Attachment, lease: LeaseKeeper) -> None:
    """Put our lock again, with the same token, or set `lost` if somebody attached meanwhile.

    To be called when our lease has ended and `lease` is a new one; while etcd does not answer it
    goes on trying.

    Raises:
        LeaseGoneError: the new lease has ended, too: to be called again with the next one.
    """
    async with attachment.changing:
        backoff = Backoff()
        while not attachment.lost.is_set():
            if lease.lost.is_set():
                raise LeaseGoneError(f"VDI {attachment.vdi}: the new lease has ended, too")
            try:
                if await _reclaim_once(attachment, lease):
                    return
            except UnreachableError as error:
                log.info("VDI %d: lock not put again yet: %s", attachment.vdi, error)
                await trio.sleep(RETRY_S)
            await backoff.wait()


async def _reclaim_once(attachment: Attachment, lease: LeaseKeeper) -> bool:
    ours = await _read_ours(attachment)
    if ours is None:
        return True
    name, record, revision, lock = ours
    if lock is not None and lock.lease == lease.lease:
        return True
    conditions = [
        Unchanged(attachment.keys.vdi(name), revision),
        Unchanged(attachment.keys.lock(attachment.vdi), 0 if lock is None else lock.mod_revision),
    ]
    txn = Transaction(conditions, [attachment.lock_put(lease.lease)])
    if await attachment.store.commit(txn) is None:
        return False
    attachment.record = record
    log.info("VDI %r: lock put again after the lease had ended", name)
    return True


async def nothing_more() -> tuple[list[Unchanged], list[Put | Delete]]:
    """Give no further conditions and changes."""
    return [], []


async def _change(
    attachment: Attachment, change: VdiChange, release: bool, extra: Extra = nothing_more
) -> VdiRecord:
    async with attachment.changing:
        backoff = Backoff()
        while True:
            ours = await _read_ours(attachment)
            if ours is None:
                raise FencedError(f"VDI {attachment.vdi} was taken over by another holder")
            name, record, revision, lock = ours
            if lock is None and not release:
                raise LeaseGoneError(f"the lock on VDI {name!r} ended with its lease")
            changed = change(record)
            more_conditions, more_changes = await extra()
            # Who attaches or unlocks by force changes the record, so its revision guards the
            # generation as well.
            conditions = [
                Unchanged(attachment.keys.vdi(name), revision),
                Unchanged(
                    attachment.keys.lock(attachment.vdi), 0 if lock is None else lock.mod_revision
                ),
            ]
            changes: list[Put | Delete] = [Put(attachment.keys.vdi(name), changed.encode())]
            if release and lock is not None:
                changes.append(Delete(lock.key))
            conditions += more_conditions
            changes += more_changes
            if await attachment.store.commit(Transaction(conditions, changes)) is not None:
                attachment.record = changed
                return changed
            await backoff.wait()


async def _read_ours(
    attachment: Attachment,
) -> tuple[str, VdiRecord, int, KeyValue | None] | None:
    """Read record and lock; None, and `lost` is set, when they are not ours any more."""
    if attachment.lost.is_set():
        return None
    catalog = Catalog(attachment.store, attachment.keys)
    try:
        name, record, revision = await catalog.find(attachment.vdi)
    except VdiNotFoundError as error:
        if await attachment.store.get(attachment.keys.config) is None:
            # An etcd that lost its data is no other than one that does not answer (I10).
            raise UnreachableError("the cluster is not in etcd: was etcd's data lost?") from error
        attachment.lost.set()
        return None
    lock = await attachment.store.get(attachment.keys.lock(attachment.vdi))
    if record.generation != attachment.generation or (lock and not attachment.owns(lock)):
        attachment.lost.set()
        return None
    return name, record, revision, lock


def _is_left_over(lock: KeyValue, owner: str, lease: LeaseKeeper) -> bool:
    try:
        found = LockRecord.decode(lock.value).owner
        return lock.lease == lease.lease and _mount(found) == _mount(owner)
    except ProtocolError:
        return False


def _mount(owner: str) -> str:
    return owner.removesuffix(LEVELLING)


async def _give_back(held: Attachment) -> None:
    """Undo an attach under which nothing was written, or keep it from happening yet."""
    try:
        await detach(held, lambda record: record, clean=held.was_clean)
    except RetryableError as error:
        log.warning("VDI %d may stay locked by us until it is attached: %s", held.vdi, error)
        return
    except FencedError:
        pass
    else:
        return
    # Not attached by us (any more). A commit whose answer we did not get may still be under way:
    # its condition fails once the record has another revision.
    try:
        name, record, revision = await Catalog(held.store, held.keys).find(held.vdi)
        if record.generation < held.generation:
            key = held.keys.vdi(name)
            await held.store.commit(
                Transaction([Unchanged(key, revision)], [Put(key, record.encode())])
            )
    except (UnreachableError, VdiNotFoundError) as error:
        log.info("VDI %d after an attach that failed: %s", held.vdi, error)
