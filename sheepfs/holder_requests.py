"""What others ask of a VDI's holder, by keys in etcd, and the holder's answers.

Always holds:
- A request hangs on the lease of who asks: it goes when that one dies, done or not.
- The holder answers by replacing the request with its outcome; it never does one twice.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping

import trio

from sheepfs.core.errors import ProtocolError, RetryableError, SheepError, UnreachableError
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import Keys, RequestRecord
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

DONE = "done"
ERROR = "error: "
ANSWER_TIMEOUT_S = 30.0
RELEASE_S = 2.0

Handler = Callable[[int, RequestRecord], Awaitable[bool]]
"""`await handler(vdi, request)`: True when it was done; False: the VDI is not held here."""


class RefusedByHolderError(SheepError):
    """The holder could not do it; its reason is the message."""


async def ask(
    store: Store, keys: Keys, vdi: int, what: str, arguments: Mapping[str, str], lease: int
) -> None:
    """Have a VDI's holder do something.

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
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                while True:
                    await hints.receive()
                    found = await store.get(key)
                    if found is None:
                        raise RetryableError("the lease in etcd ended before the holder answered")
                    outcome = RequestRecord.decode(found.value).outcome
                    if outcome == DONE:
                        return
                    if outcome:
                        raise RefusedByHolderError(outcome.removeprefix(ERROR))
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


async def serve(store: Store, keys: Keys, handler: Handler) -> None:
    """Answer requests for the VDIs that are held here, until cancelled."""
    busy: set[str] = set()

    async def answer(key: str, revision: int, vdi: int, request: RequestRecord) -> None:
        try:
            try:
                if not await handler(vdi, request):
                    return
                outcome = DONE
            except SheepError as error:
                log.warning("VDI %d: %s asked by another: %s", vdi, request.what, error)
                outcome = ERROR + str(error)
            answered = RequestRecord(request.what, request.arguments, outcome)
            found = await store.get(key)
            if found is not None:
                # The lease stays that of who asks.
                await store.commit(
                    Transaction(
                        [Unchanged(key, found.mod_revision)],
                        [Put(key, answered.encode(), found.lease)],
                    )
                )
        except SheepError as error:
            log.warning("request %s: %s", key, error)
        finally:
            busy.discard(key)

    async with trio.open_nursery() as nursery, store.watch(keys.requests) as hints:
        async for _ in hints:
            try:
                found, _revision = await store.list(keys.requests)
            except UnreachableError as error:
                log.debug("requests cannot be read: %s", error)
                continue
            for kv in found:
                vdi, _, number = kv.key.removeprefix(keys.requests).partition("/")
                try:
                    request = RequestRecord.decode(kv.value)
                except ProtocolError as error:
                    log.warning("request %s: %s", kv.key, error)
                    continue
                if vdi.isdecimal() and number and not request.outcome and kv.key not in busy:
                    busy.add(kv.key)
                    nursery.start_soon(answer, kv.key, kv.mod_revision, int(vdi), request)
