"""What others ask of a VDI's holder, by keys in etcd, and the holder's answers.

Always holds:
- A request hangs on the lease of who asks: it goes when that one dies, done or not.
- The holder answers by replacing the request with its outcome; it never does one twice.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import trio

from sheepfs.core.errors import (
    HeldElsewhereError,
    ProtocolError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import RequestRecord
from sheepfs.net.attach import LEVELLING
from sheepfs.net.catalog import TRASH_KEEP_S, Catalog
from sheepfs.net.groups import plain_errors
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

DONE = "done"
ERROR = "error: "
ANSWER_TIMEOUT_S = 30.0
RELEASE_S = 2.0
GIVE_WAY = "give way"
WAY_TIMEOUT_S = 5.0
WAY_LEASE_S = 15
"""The request outlives whoever waits for its answer."""
PROGRESS_S = 1.0

Progress = Callable[[int, int], None]
"""Told (objects done, objects in all)."""
Handler = Callable[[int, RequestRecord, Progress], Awaitable[bool]]
"""`await handler(vdi, request, told)`: True when done; False: the VDI is not held here."""


class RefusedByHolderError(SheepError):
    """The holder could not do it; its reason is the message."""


def ignore_progress(done: int, total: int) -> None:
    """For what does not take long."""


async def ask(
    store: Store,
    keys: Keys,
    vdi: int,
    what: str,
    arguments: Mapping[str, str],
    lease: int,
    told: Progress = ignore_progress,
) -> None:
    """Have a VDI's holder do something.

    Args:
        told: how far the holder is, of what takes long.

    Raises:
        RefusedByHolderError: it could not.
        RetryableError: nobody holds the VDI any more.
        UnreachableError: the holder does not answer, or etcd does not.
    """
    key = keys.request(vdi, secrets.token_hex(8))
    record = RequestRecord(what, dict(arguments))
    async with store.watch(key) as hints:
        put = Transaction([Unchanged(key, 0)], [Put(key, record.encode(), lease)])
        if await store.commit(put) is None:
            raise RetryableError("the request was there already")
        try:
            before = -1
            with trio.move_on_after(ANSWER_TIMEOUT_S) as deadline:
                while True:
                    await hints.receive()
                    found = await store.get(key)
                    if found is None:
                        raise RetryableError("the lease in etcd ended before the holder answered")
                    request = RequestRecord.decode(found.value)
                    if request.done != before:
                        before = request.done
                        told(request.done, request.total)
                        deadline.deadline = trio.current_time() + ANSWER_TIMEOUT_S
                    if request.outcome == DONE:
                        return
                    if request.outcome:
                        raise RefusedByHolderError(request.outcome.removeprefix(ERROR))
                    if await store.get(keys.lock(vdi)) is None:
                        raise RetryableError("the holder let the VDI go before it answered")
            raise UnreachableError(
                f"the mount that holds VDI {vdi} did not answer within {ANSWER_TIMEOUT_S:g} s"
            )
        finally:
            with trio.move_on_after(RELEASE_S, shield=True):
                try:
                    await store.commit(Transaction([], [Delete(key)]))
                except SheepError as error:
                    log.info("request %s stays until our lease ends: %s", key, error)


async def make_way(store: Store, keys: Keys, vdi: int) -> bool:
    """Ask who only levels a VDI to let it go; False: it is held for longer by now, or no answer.

    Raises: UnreachableError.
    """
    lease = await store.grant(WAY_LEASE_S)
    try:
        with trio.move_on_after(WAY_TIMEOUT_S):
            await ask(store, keys, vdi, GIVE_WAY, {}, lease)
            return True
    except RefusedByHolderError as error:
        log.info("VDI %d: %s", vdi, error)
    except UnreachableError:
        raise
    except RetryableError:
        return await store.get(keys.lock(vdi)) is None
    finally:
        with trio.move_on_after(RELEASE_S, shield=True), suppress(SheepError):
            await store.revoke(lease)
    return False


async def delete_vdi(
    store: Store, keys: Keys, catalog: Catalog, name: str, keep_s: float = TRASH_KEEP_S
) -> None:
    """Delete a VDI, also one that a mount is just levelling.

    Raises: HeldElsewhereError, VdiNotFoundError.
    """
    try:
        await catalog.delete(name, keep_s=keep_s)
    except HeldElsewhereError as error:
        record, _ = await catalog.vdi(name)
        if not error.owner.endswith(LEVELLING) or not await make_way(store, keys, record.id):
            raise
        await catalog.delete(name, keep_s=keep_s)


async def serve(store: Store, keys: Keys, handler: Handler) -> None:
    """Answer requests for the VDIs that are held here, until cancelled."""
    await _Answers(store, keys, handler).run()


class _Answers:
    """The requests that are being answered here, each in a task of its own."""

    def __init__(self, store: Store, keys: Keys, handler: Handler) -> None:
        self._store = store
        self._keys = keys
        self._handler = handler
        self._busy: set[str] = set()

    async def run(self) -> None:
        async with (
            trio.open_nursery() as nursery,
            self._store.watch(self._keys.requests) as hints,
        ):
            async for _ in hints:
                try:
                    found, _revision = await self._store.list(self._keys.requests)
                except UnreachableError as error:
                    log.debug("requests cannot be read: %s", error)
                    continue
                for kv in found:
                    self._take(nursery, kv)

    def _take(self, nursery: trio.Nursery, kv: KeyValue) -> None:
        vdi, _, number = kv.key.removeprefix(self._keys.requests).partition("/")
        try:
            request = RequestRecord.decode(kv.value)
        except ProtocolError as error:
            log.warning("request %s: %s", kv.key, error)
            return
        if vdi.isdecimal() and number and not request.outcome and kv.key not in self._busy:
            self._busy.add(kv.key)
            nursery.start_soon(self._answer, kv.key, int(vdi), request)

    async def _answer(self, key: str, vdi: int, request: RequestRecord) -> None:
        latest = request

        def told(done: int, total: int) -> None:
            nonlocal latest
            latest = dataclasses.replace(request, done=done, total=total)

        try:
            try:
                with plain_errors():
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._show_progress, key, request, lambda: latest)
                        held = await self._handler(vdi, request, told)
                        nursery.cancel_scope.cancel()
                if not held:
                    return
                outcome = DONE
            except SheepError as error:
                log.warning("VDI %d: %s asked by another: %s", vdi, request.what, error)
                outcome = ERROR + str(error)
            await self._put(key, dataclasses.replace(latest, outcome=outcome))
        except SheepError as error:
            log.warning("request %s: %s", key, error)
        finally:
            self._busy.discard(key)

    async def _show_progress(
        self, key: str, shown: RequestRecord, latest: Callable[[], RequestRecord]
    ) -> None:
        while True:
            await trio.sleep(PROGRESS_S)
            if latest() != shown:
                shown = latest()
                with suppress(UnreachableError):
                    await self._put(key, shown)

    async def _put(self, key: str, request: RequestRecord) -> None:
        found = await self._store.get(key)
        if found is not None:
            # The lease stays that of who asks.
            unchanged = Unchanged(key, found.mod_revision)
            put = Put(key, request.encode(), found.lease)
            await self._store.commit(Transaction([unchanged], [put]))
