"""What every part of the catalog needs: reading records, ids, compare-and-swap."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from sheepfs.core.errors import HeldElsewhereError, ProtocolError, SheepError, UnreachableError
from sheepfs.core.geometry import MAX_SERIAL, make_layer, tag_of
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import Keys, LayerRecord, LockRecord, Record
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

FIRST_ID = 2
"""Inode 1 is the mount's root, and layer 0 means a hole."""
FIRST_BACKOFF_S = 0.002
MAX_BACKOFF_S = 0.1
COMMIT_PATIENCE_S = 30.0

R = TypeVar("R", bound=Record)
Changes = tuple[list[Unchanged], list[Put | Delete]]


class Records:
    """Records of one cluster.

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

    async def new_vdi_id(self) -> int:
        """Take an id for a VDI or snapshot: no other gets it."""
        backoff = Backoff()
        while True:
            number, unchanged = await self._next_id("vdi")
            txn = Transaction([unchanged], [Put(unchanged.key, b"%d" % number)])
            if await self._store.commit(txn) is not None:
                return number
            await backoff.wait()

    async def begin_layers(
        self, vdi: int, family: int, copies: int, count: int, lease: int
    ) -> list[int]:
        """Give birth to layers of a family; reclaim leaves them alone while `lease` lives.

        Args:
            vdi: id of the VDI (or snapshot to be) that they are for.

        Raises:
            LeaseGoneError: the lease has ended.
        """
        backoff = Backoff()
        now = self._clock()
        while True:
            serial, unchanged = await self._next_id("layer")
            if serial + count > MAX_SERIAL:
                raise ProtocolError("the cluster has used up its layer ids")
            layers = [make_layer(serial + i, tag_of(family), copies) for i in range(count)]
            changes: list[Put | Delete] = [Put(unchanged.key, b"%d" % (serial + count - 1))]
            for layer in layers:
                birth = LayerRecord(vdi, family, now).encode()
                changes.append(Put(self._keys.layer(layer), birth))
                changes.append(Put(self._keys.building_layer(layer), b"", lease))
            if await self._store.commit(Transaction([unchanged], changes)) is not None:
                return layers
            await backoff.wait()

    async def commit(
        self,
        attempt: Callable[[], Awaitable[Changes]],
        is_done: Callable[[], Awaitable[bool]],
    ) -> None:
        """Make changes in one transaction; find out what happened when an answer gets lost.

        Args:
            attempt: gives conditions and changes as of now, or raises.
            is_done: tells whether an earlier attempt has happened after all.
        """
        backoff = Backoff()
        give_up = trio.current_time() + COMMIT_PATIENCE_S
        unsure = False
        while True:
            try:
                if unsure and await is_done():
                    return
                conditions, changes = await attempt()
                if await self._store.commit(Transaction(conditions, changes)) is not None:
                    return
            except UnreachableError:
                unsure = True
                if trio.current_time() > give_up:
                    raise
            await backoff.wait()

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

    def _readable(self, found: list[KeyValue], kind: type[R]) -> list[tuple[KeyValue, R]]:
        records = []
        for kv in found:
            try:
                records.append((kv, kind.decode(kv.value)))
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
