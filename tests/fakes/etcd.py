"""An etcd in memory on trio's clock: passes tests/net/test_etcd_conformance.py like the real one.

server = FakeServer()
one, other = server.client(), server.client()     # each a sheepfs.net.store.Store
one.partition()                                   # its calls raise UnreachableError
one.lose_next_reply()                             # its next commit happens, yet seems lost
older = server.save(); ...; server.restore(older) # as from a snapshot
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import NamedTuple

import trio

from sheepfs.core.errors import UnreachableError, UsageError
from sheepfs.core.kv import KeyValue, Put, Transaction
from sheepfs.net.history import RevisionGuard, base_of
from sheepfs.net.store import Hints, LeaseGoneError, hint_channel

MAX_OPERATIONS = 128
FIRST_LEASE = 0x7000


class Saved(NamedTuple):
    """What a snapshot has: the leases, too, which begin anew when it is restored."""

    revision: int
    keys: dict[str, KeyValue]
    leases: dict[int, int]


class FakeServer:
    """Keys, revisions and leases, shared by all clients."""

    def __init__(self) -> None:
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self._leases: dict[int, tuple[int, float]] = {}
        self._ids = count(FIRST_LEASE)
        self._listeners: list[Callable[[], None]] = []

    def client(self) -> FakeEtcd:
        """Give another client of this server."""
        return FakeEtcd(self)

    def commit(self, txn: Transaction) -> int | None:
        self.expire()
        touched = [change.key for change in txn.changes]
        if len(set(touched)) < len(touched):
            raise UsageError("etcd refuses the request: duplicate key given in txn request")
        if max(len(touched), len(txn.conditions)) > MAX_OPERATIONS:
            raise UsageError("etcd refuses the request: too many operations in txn request")
        for condition in txn.conditions:
            found = self.keys.get(condition.key)
            if (found.mod_revision if found else 0) != condition.mod_revision:
                return None
        for change in txn.changes:
            if isinstance(change, Put) and change.lease and change.lease not in self._leases:
                raise LeaseGoneError("etcd: requested lease not found")
        changes = [c for c in txn.changes if isinstance(c, Put) or c.key in self.keys]
        self.revision += bool(changes)
        for change in changes:
            old = self.keys.pop(change.key, None)
            if isinstance(change, Put):
                created = old.create_revision if old else self.revision
                self.keys[change.key] = KeyValue(
                    change.key, bytes(change.value), created, self.revision, change.lease
                )
        if changes:
            self._notify()
        return self.revision

    def grant(self, ttl_s: int) -> int:
        lease = next(self._ids)
        self._leases[lease] = (ttl_s, trio.current_time() + ttl_s)
        self._notify()  # who sleeps until the next lease ends has to look again
        return lease

    def keep_alive(self, lease: int) -> bool:
        self.expire()
        if lease not in self._leases:
            return False
        ttl_s, _ = self._leases[lease]
        self._leases[lease] = (ttl_s, trio.current_time() + ttl_s)
        return True

    def revoke(self, lease: int) -> None:
        """End a lease now; a test may call it behind its holder's back."""
        if self._leases.pop(lease, None) is None:
            return
        gone = [key for key, kv in self.keys.items() if kv.lease == lease]
        for key in gone:
            del self.keys[key]
        if gone:
            self.revision += 1
            self._notify()

    def expire(self) -> None:
        """End the leases whose time is over."""
        now = trio.current_time()
        for lease, (_, end) in list(self._leases.items()):
            if end <= now:
                self.revoke(lease)

    def next_expiry(self) -> float:
        """When the next lease ends, by trio's clock."""
        return min((end for _, end in self._leases.values()), default=float("inf"))

    def save(self) -> Saved:
        """Take a snapshot."""
        self.expire()
        leases = {lease: ttl_s for lease, (ttl_s, _) in self._leases.items()}
        return Saved(self.revision, dict(self.keys), leases)

    def restore(self, saved: Saved, bump: int = 0) -> None:
        """Go back to a snapshot, `bump` revisions later than it (`--bump-revision`)."""
        now = trio.current_time()
        self.revision = saved.revision + bump
        self.keys = dict(saved.keys)
        self._leases = {lease: (ttl_s, now + ttl_s) for lease, ttl_s in saved.leases.items()}
        self._notify()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` at each change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _notify(self) -> None:
        for listener in list(self._listeners):
            listener()


class FakeEtcd:
    """A client of a `FakeServer` (of its own, unless one is given)."""

    def __init__(self, server: FakeServer | None = None, deadline_s: float = 5.0) -> None:
        self.server = server or FakeServer()
        self.deadline_s = deadline_s
        self.calls = 0
        """Calls made so far, for tests that count round trips."""
        self._guard = RevisionGuard("etcd (fake)")
        self._fencing = ""
        self._is_partitioned = False
        self._is_silent = False
        self._is_watching = True
        self._loses_reply = False
        self._fails_commit = False
        self._healed: list[Callable[[], None]] = []

    def partition(self, silent: bool = False) -> None:
        """Cut this client off: calls are refused, or (`silent`) fail at the deadline only."""
        self._is_partitioned, self._is_silent = True, silent

    def heal(self) -> None:
        """End the partition; its watches give a hint."""
        self._is_partitioned = False
        self.watch_again()

    def lose_watches(self) -> None:
        """Let watches miss what happens, as after a compaction, until `watch_again`."""
        self._is_watching = False

    def watch_again(self) -> None:
        """Make the watches anew; each gives a hint."""
        self._is_watching = True
        for hint in list(self._healed):
            hint()

    def lose_next_reply(self) -> None:
        """Make the next commit happen and raise UnreachableError all the same."""
        self._loses_reply = True

    def fail_next_commit(self) -> None:
        """Make the next commit raise UnreachableError and not happen."""
        self._fails_commit = True

    def trust(self, key: str) -> None:
        self._fencing = key

    async def get(self, key: str) -> KeyValue | None:
        await self._call()
        return self.server.keys.get(key)

    async def list(self, prefix: str) -> tuple[list[KeyValue], int]:
        await self._call()
        found = [kv for key, kv in self.server.keys.items() if key.startswith(prefix)]
        found.sort(key=lambda kv: kv.key.encode(errors="surrogateescape"))
        return found, self.server.revision

    async def commit(self, txn: Transaction) -> int | None:
        await self._call()
        if self._fails_commit:
            self._fails_commit = False
            raise UnreachableError("etcd (fake) does not answer; the change may have been made")
        revision = self.server.commit(txn)
        if self._loses_reply:
            self._loses_reply = False
            raise UnreachableError("etcd (fake) does not answer; the change may have been made")
        self._guard.note(self.server.revision, self._guard.known)
        return revision

    async def grant(self, ttl_s: int) -> int:
        await self._call()
        return self.server.grant(ttl_s)

    async def keep_alive(self, lease: int) -> bool:
        await self._call()
        return self.server.keep_alive(lease)

    async def revoke(self, lease: int) -> None:
        await self._call()
        self.server.revoke(lease)

    def watch(self, prefix: str, poll_s: float = 5.0) -> AbstractAsyncContextManager[Hints]:
        return hint_channel(poll_s, lambda hint: self._watch(prefix, hint))

    async def _watch(self, prefix: str, hint: Callable[[], None]) -> None:
        def now() -> dict[str, KeyValue]:
            return {k: v for k, v in self.server.keys.items() if k.startswith(prefix)}

        changed = trio.Event()
        seen = now()

        def look() -> None:
            nonlocal seen
            changed.set()
            is_blind = self._is_partitioned or not self._is_watching
            if not is_blind and seen != (seen := now()):
                hint()

        hint()
        stop_listening = self.server.listen(look)
        self._healed.append(hint)
        try:
            while True:
                with trio.move_on_at(self.server.next_expiry()):
                    await changed.wait()
                changed = trio.Event()
                self.server.expire()
        finally:
            stop_listening()
            self._healed.remove(hint)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _call(self) -> None:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self._is_partitioned:
            if self._is_silent:
                await trio.sleep(self.deadline_s)
            raise UnreachableError("etcd (fake) does not answer (partitioned)")
        self.server.expire()
        # As the read over a new connection: nothing is changed in a server that went back.
        found = self.server.keys.get(self._fencing)
        base = base_of([found] if found else [])
        self._guard.look(base, self.server.revision, self._guard.known)
