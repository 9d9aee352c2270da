"""The metadata store as its users see it, and the keeper of a lease.

`sheepfs.net.etcd.Etcd` and the fake of the tests are such a `Store` and pass the same conformance
tests (tests/net/test_etcd_conformance.py).

Always holds:
- Watches only hint (I9): a decision is a transaction, and every hint means "list again".
- A lease that cannot be renewed is not yet lost: only the store says that it is gone (I10).
- A store that forgot what it had answered (restored from older data) counts as away.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

import trio

from sheepfs.core.errors import RetryableError, UnreachableError, UsageError
from sheepfs.core.kv import KeyValue, Transaction
from sheepfs.logs import Complaint

log = logging.getLogger(__name__)

Hints = trio.MemoryReceiveChannel[None]
"""`await hints.receive()` or `async for _ in hints`: something may have changed, list again."""

RETRY_S = 1.0
"""Pause between attempts while the store does not answer."""


class LeaseGoneError(RetryableError):
    """A transaction needed a lease that has ended; nothing was changed."""


class Store(Protocol):
    """Keys with revisions, transactions, leases and watches; all errors are SheepError.

    Every method but `watch` raises UnreachableError within the deadline when the store does not
    answer, and `sheepfs.net.history.WentBackError`, which is one, from when it was seen to have
    gone back to an older state until it is vouched for; watches give hints by time then.
    """

    def trust(self, key: str) -> None:
        """Name the record of `fencing` that vouches for a store that went back.

        To be called before anything else. Without it such a store is never used again.
        """
        ...

    async def get(self, key: str) -> KeyValue | None:
        """Read one key, linearizably; None when it is not there."""
        ...

    async def list(self, prefix: str) -> tuple[list[KeyValue], int]:
        """Read all keys that start with `prefix`, by key, and the revision of this snapshot."""
        ...

    async def commit(self, txn: Transaction) -> int | None:
        """Do a transaction.

        Returns:
            The store's revision after it, or None when a condition did not hold.

        Raises:
            UnreachableError: no answer came. The transaction **may still have happened, or may
                yet happen**: the caller reads again before it decides anything.
            LeaseGoneError: a lease that a `Put` names has ended; nothing was changed.
            UsageError: the store refuses the transaction as such (a key put twice, too large).
        """
        ...

    async def grant(self, ttl_s: int) -> int:
        """Make a lease that ends `ttl_s` seconds after its last renewal; gives its id."""
        ...

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease; False: it has ended, and its keys are gone for good."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and remove its keys; no error if it has ended already."""
        ...

    def watch(self, prefix: str, poll_s: float = 5.0) -> AbstractAsyncContextManager[Hints]:
        """Give hints about changes below `prefix`.

        Hints are coalesced: any number of changes before `receive` is one hint. One comes at the
        start, after each reconnect, and every `poll_s` seconds whatever happens. It never ends
        by itself.
        """
        ...

    async def aclose(self) -> None:
        """End; calls under way raise UnreachableError. Again is fine."""
        ...


def parse_endpoints(text: str) -> list[tuple[str, int]]:
    """Split "HOST:PORT[,HOST:PORT]" ("[::1]:2379" for IPv6). Raises UsageError."""
    endpoints = []
    for part in text.split(","):
        host, colon, port = part.strip().rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise UsageError(f"etcd address {part.strip()!r}: use HOST:PORT[,HOST:PORT]")
        endpoints.append((host, int(port)))
    return endpoints


@asynccontextmanager
async def hint_channel(
    poll_s: float, feed: Callable[[Callable[[], None]], Awaitable[None]]
) -> AsyncIterator[Hints]:
    """Run `feed(hint)` beside the block; give the coalesced hints, and one every `poll_s`."""
    sender, hints = trio.open_memory_channel[None](1)

    def hint() -> None:
        # One is waiting already, the reader closed its end, or the watch is over.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            sender.send_nowait(None)

    async def poll() -> None:
        while True:
            hint()
            await trio.sleep(poll_s)

    failure: Exception | None = None
    async with trio.open_nursery() as nursery, sender, hints:
        nursery.start_soon(poll)
        nursery.start_soon(feed, hint)
        try:
            yield hints
        except Exception as error:  # of the caller's block: it must not come out as a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class LeaseKeeper:
    """One lease, renewed at a third of its time to live until it is revoked or gone.

    `async with trio.open_nursery() as n: await n.start(keeper.run)` has a lease on return. When
    the lease is gone, `lost` is set and `run` returns: the owner decides what that means (I10)
    and starts another keeper if it wants to go on.
    """

    def __init__(self, store: Store, ttl_s: int = 10) -> None:
        self.lost = trio.Event()
        """Set once the store said that the lease has ended, or `revoke` ended it."""
        self.ttl_s = ttl_s
        self._store = store
        self._lease = 0
        self._renewed = 0.0

    @property
    def lease(self) -> int:
        """Id of the lease; 0 before `run` has granted it."""
        return self._lease

    @property
    def is_certain(self) -> bool:
        """Whether the lease cannot have ended yet, by this machine's monotonic clock.

        Counted from the moment the last answered renewal was *sent*: the store counts from later.
        """
        return (
            self._lease != 0
            and not self.lost.is_set()
            and trio.current_time() < self._renewed + self.ttl_s
        )

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Grant the lease (trying until the store answers), report its id, keep it alive."""
        complaint = Complaint()
        while not self.lost.is_set():
            sent = trio.current_time()
            try:
                if not self._lease:
                    self._lease = await self._store.grant(self.ttl_s)
                    task_status.started(self._lease)
                elif not await self._store.keep_alive(self._lease):
                    if not self.lost.is_set():
                        log.warning("lease %x has ended: it was not renewed in time", self._lease)
                    self.lost.set()
                    return
            except UnreachableError as error:
                if complaint.due():
                    log.warning("lease not renewed, trying on: %s", error)
                await trio.sleep(min(RETRY_S, self.ttl_s / 3))
                continue
            self._renewed = sent
            complaint.end()
            with trio.move_on_after(self.ttl_s / 3):
                await self.lost.wait()

    async def revoke(self) -> None:
        """End the lease now and stop renewing it (clean stop).

        Raises:
            UnreachableError: the store does not answer; the lease ends by itself after `ttl_s`.
        """
        self.lost.set()
        if self._lease:
            await self._store.revoke(self._lease)
