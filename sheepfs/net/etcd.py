"""The metadata store on etcd: the only module that knows etcd3, grpc and protobuf.

Always holds:
- Every call ends within the deadline, also when etcd is missing or silent.
- A transaction is sent once: after it left, a failure means "outcome unknown", never a retry.
- Nothing is connected, and no thread runs, before the first call: the process may fork until then.
- An etcd that went back (`sheepfs.net.history`) is noticed before anything is changed in it: it
  was restarted, so that a watch broke, and the first request over a new connection is a read.
  Where no watch runs, the first reply of any kind tells.
Concurrency: calls run in trio's worker threads (which never keep the process alive); a cancelled
call is abandoned and ends by its deadline; a cancelled `commit` may still happen.
Source: etcd v3 API, rpc.proto (https://etcd.io/docs/v3.4/learning/api/).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

import trio

from sheepfs.core.errors import SheepError, UnreachableError, UsageError
from sheepfs.core.kv import KeyValue, Put, Transaction
from sheepfs.logs import Complaint
from sheepfs.net.etcd_watch import WatchStream, reason_of
from sheepfs.net.history import RevisionGuard, WentBackError, base_of
from sheepfs.net.store import (
    Hints,
    LeaseGoneError,
    LeaseKeeper,
    Store,
    hint_channel,
    parse_endpoints,
)

# etcd3's generated code is of 2019: current protobuf loads it in the pure Python implementation
# only, and warns. Both are matters of this import alone, so the environment is put back after it.
_VARIABLE = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
_before = os.environ.get(_VARIABLE)
os.environ[_VARIABLE] = "python"
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*pkg_resources.*")
        import etcd3
        import grpc
        from etcd3 import etcdrpc
finally:
    if _before is None:
        del os.environ[_VARIABLE]
    else:
        os.environ[_VARIABLE] = _before

__all__ = ["Etcd", "Hints", "LeaseGoneError", "LeaseKeeper", "Store", "parse_endpoints"]

log = logging.getLogger(__name__)

DEADLINE_S = 5.0
ATTEMPTS = 2
"""Times that each member is tried: a broken connection shows at the first."""
PAUSE_S = 0.2
PAGE_KEYS = 1000
"""Keys of one Range request: bounds the size of a reply and the time to decode it."""
MAX_REPLY = 64 << 20
"""Bytes; etcd's values are at most 1.5 MiB, and a page of records is about 1 MiB."""
MAX_BACKOFF_S = 3.0

_GRPC_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # http_proxy of the environment is not meant for etcd
    ("grpc.max_receive_message_length", MAX_REPLY),
    # A watch over a silently dead connection ends after 13 s; etcd refuses pings faster than 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.use_local_subchannel_pool", 1),
]
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
_NEEDS_LEADER = (("hasleader", "true"),)

_T = TypeVar("_T")


class _Member:
    """One etcd member; its channel is made at the first use. Used from worker threads."""

    def __init__(self, host: str, port: int, guard: RevisionGuard) -> None:
        self.name = f"{host}:{port}"
        self.fencing = b"\0"
        """The key that is read first over a new connection."""
        self._guard = guard
        self._host = host
        self._port = port
        self._client: Any = None
        self._is_connected = False
        self._lock = threading.Lock()

    def connect(self, timeout_s: float) -> Any:
        """Give an etcd3 client whose member answered a read.

        Raises grpc.RpcError, ValueError, and WentBackError if etcd forgot what it had answered.

        The read shows that the member is there and has a quorum before a transaction, which is
        sent only once, goes to it.
        """
        with self._lock:
            if self._client is None:
                self._client = etcd3.client(
                    host=self._host, port=self._port, grpc_options=_GRPC_OPTIONS
                )
                self._is_connected = False
            elif self._is_connected:
                return self._client
            client = self._client
        try:
            self.look(client, timeout_s)
        except grpc.RpcError:
            self.forget(client)
            raise
        with self._lock:
            self._is_connected = self._client is client
        return client

    def look(self, client: Any, timeout_s: float) -> None:
        """Read the latest state. Raises grpc.RpcError, WentBackError."""
        known = self._guard.known
        reply = client.kvstub.Range(etcdrpc.RangeRequest(key=self.fencing), timeout_s)
        self._guard.look(base_of(reply.kvs), reply.header.revision, known)

    def forget(self, client: Any = None) -> None:
        """Connect afresh next time (if `client` is still in use here); its calls go on.

        A failed channel would wait out its backoff before it looks whether etcd is back.
        """
        with self._lock:
            if client is None or self._client is client:
                self._client = None

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None


class Etcd:
    """A `Store` on one etcd cluster. Build it anywhere; call it in trio.

    Args:
        endpoints: "HOST:PORT[,HOST:PORT...]"; any member will do, the next is tried on failure.
        deadline_s: Seconds after which a call fails with UnreachableError.
    """

    def __init__(self, endpoints: str, deadline_s: float = DEADLINE_S) -> None:
        self.endpoints = endpoints
        self.deadline_s = deadline_s
        self._guard = guard = RevisionGuard(f"etcd at {endpoints}")
        self._members = [_Member(host, port, guard) for host, port in parse_endpoints(endpoints)]
        self._current = 0
        self._is_closed = False
        # Renewing a lease never queues behind calls that wait for their deadline.
        self._calls = trio.CapacityLimiter(16)
        self._leases = trio.CapacityLimiter(8)
        self._watches = trio.CapacityLimiter(math.inf)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; later calls raise trio.ClosedResourceError."""
        self._is_closed = True
        for member in self._members:
            member.close()
        await trio.lowlevel.checkpoint()

    def trust(self, key: str) -> None:
        """Name the record that vouches for an etcd that went back (see Store)."""
        for member in self._members:
            member.fencing = _key(key)

    async def get(self, key: str) -> KeyValue | None:
        """Read one key, linearizably (see Store)."""

        def call(client: Any, timeout_s: float) -> KeyValue | None:
            reply = self._linear(
                client.kvstub.Range, etcdrpc.RangeRequest(key=_key(key)), timeout_s
            )
            return _key_value(reply.kvs[0]) if reply.kvs else None

        return await self._run(call)

    async def list(self, prefix: str) -> tuple[list[KeyValue], int]:
        """Read all keys below `prefix` in one snapshot (see Store)."""

        def call(client: Any, timeout_s: float) -> tuple[list[KeyValue], int]:
            until = time.monotonic() + timeout_s
            start, end = _range(prefix)
            found: list[KeyValue] = []
            revision = 0
            while True:
                request = etcdrpc.RangeRequest(
                    key=start, range_end=end, limit=PAGE_KEYS, revision=revision
                )
                left_s = max(until - time.monotonic(), 0)
                reply = self._linear(client.kvstub.Range, request, left_s)
                revision = revision or reply.header.revision
                found += map(_key_value, reply.kvs)
                if not reply.more:
                    return found, revision
                start = reply.kvs[-1].key + b"\0"

        return await self._run(call)

    async def commit(self, txn: Transaction) -> int | None:
        """Do a transaction; UnreachableError means that its outcome is unknown (see Store)."""
        request = etcdrpc.TxnRequest()
        for condition in txn.conditions:
            request.compare.add(
                key=_key(condition.key),
                target=etcdrpc.Compare.MOD,
                result=etcdrpc.Compare.EQUAL,
                mod_revision=condition.mod_revision,
            )
        for change in txn.changes:
            operation = request.success.add()
            if isinstance(change, Put):
                operation.request_put.key = _key(change.key)
                operation.request_put.value = change.value
                operation.request_put.lease = change.lease
            else:
                operation.request_delete_range.key = _key(change.key)

        def call(client: Any, timeout_s: float) -> int | None:
            reply = self._linear(client.kvstub.Txn, request, timeout_s)
            return int(reply.header.revision) if reply.succeeded else None

        return await self._run(call, send_once=True)

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; etcd may lengthen a very short one (see Store)."""

        def call(client: Any, timeout_s: float) -> int:
            request = etcdrpc.LeaseGrantRequest(TTL=ttl_s)
            return int(self._linear(client.leasestub.LeaseGrant, request, timeout_s).ID)

        return await self._run(call, limiter=self._leases)

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease; False when it is gone for good (see Store)."""

        def call(client: Any, timeout_s: float) -> bool:
            known = self._guard.known
            requests = iter([etcdrpc.LeaseKeepAliveRequest(ID=lease)])
            replies = client.leasestub.LeaseKeepAlive(requests, timeout_s, metadata=_NEEDS_LEADER)
            for reply in replies:
                replies.cancel()
                if reply.header.revision < known.revision:
                    # Of a renewal it is this member's own, which may just be behind.
                    self._members[self._current].look(client, timeout_s)
                else:
                    self._guard.note(reply.header.revision, known)
                return bool(reply.TTL > 0)
            raise UnreachableError("etcd ended the renewal without an answer")

        return await self._run(call, limiter=self._leases)

    async def revoke(self, lease: int) -> None:
        """End a lease (see Store)."""

        def call(client: Any, timeout_s: float) -> None:
            try:
                client.leasestub.LeaseRevoke(etcdrpc.LeaseRevokeRequest(ID=lease), timeout_s)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise

        await self._run(call, limiter=self._leases)

    def watch(self, prefix: str, poll_s: float = 5.0) -> AbstractAsyncContextManager[Hints]:
        """Give hints about changes below `prefix` (see Store)."""
        return hint_channel(poll_s, lambda hint: self._watch(prefix, hint))

    async def _watch(self, prefix: str, hint: Callable[[], None]) -> None:
        start, end = _range(prefix)
        request = etcdrpc.WatchRequest(
            create_request=etcdrpc.WatchCreateRequest(key=start, range_end=end)
        )
        backoff_s = PAUSE_S
        complaint = Complaint()
        while not self._is_closed:
            number = self._current
            member = self._members[number]

            def open_stream(requests: Iterator[Any], member: _Member = member) -> Any:
                channel = member.connect(self.deadline_s).channel
                return etcdrpc.WatchStub(channel).Watch(requests, metadata=_NEEDS_LEADER)

            stream = WatchStream(open_stream, request, hint)
            try:
                await trio.to_thread.run_sync(
                    stream.run, abandon_on_cancel=True, limiter=self._watches
                )
            except WentBackError as error:
                stream.failure = str(error)
            finally:
                stream.stop()
            member.forget()
            self._leave(number)
            if complaint.due():
                log.info(
                    "watch of %s on etcd at %s broke, connecting again: %s",
                    prefix, member.name, stream.failure,
                )  # fmt: skip
            if stream.was_created:
                backoff_s = PAUSE_S
            await trio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    def _linear(self, send: Callable[[Any, float], Any], request: Any, timeout_s: float) -> Any:
        """Send what etcd answers at its latest state. Raises grpc.RpcError, WentBackError."""
        known = self._guard.known
        reply = send(request, timeout_s)
        self._guard.note(reply.header.revision, known)
        return reply

    def _leave(self, number: int) -> None:
        """Let the next call go to the next member, unless another call moved on already."""
        if self._current == number:
            self._current = (number + 1) % len(self._members)

    async def _run(
        self,
        call: Callable[[Any, float], _T],
        send_once: bool = False,
        limiter: trio.CapacityLimiter | None = None,
    ) -> _T:
        """Run `call(client, timeout_s)` in a thread, trying the members in turn."""
        if self._guard.went_back:
            if not self._guard.may_look():
                self._guard.check()
            # The first read over a new connection tells whether it is vouched for.
            for member in self._members:
                member.forget()
        until = time.monotonic() + self.deadline_s
        # The thread ends by itself at the deadline; this one covers the queue for a thread, and
        # leaves the thread a moment to say why.
        with trio.move_on_after(self.deadline_s + 0.5):
            return await trio.to_thread.run_sync(
                self._try_members,
                call,
                until,
                send_once,
                abandon_on_cancel=True,
                limiter=limiter or self._calls,
            )
        raise self._unreachable("too many calls wait for it")

    def _try_members(self, call: Callable[[Any, float], _T], until: float, send_once: bool) -> _T:
        reason = "no time left"
        for left in range(ATTEMPTS * len(self._members), 0, -1):
            if self._is_closed:
                raise trio.ClosedResourceError("this Etcd was closed")
            number = self._current
            member = self._members[number]
            was_sent = False
            try:
                client = member.connect(max(until - time.monotonic(), 0) / left)
                was_sent = True
                left_s = max(until - time.monotonic(), 0)
                return call(client, left_s if send_once else left_s / left)
            except grpc.RpcError as error:
                reason = f"{member.name}: {reason_of(error)}"
                if was_sent:
                    _raise_refusal(error)
                    member.forget(client)
                self._leave(number)
                if was_sent and send_once:
                    raise self._unreachable(reason, "; the change may have been made") from error
                if self._current == 0 and left > 1:
                    time.sleep(min(PAUSE_S, max(until - time.monotonic(), 0)))
            except ValueError as error:
                if self._is_closed:  # grpc says so when aclose() came in between
                    raise trio.ClosedResourceError("this Etcd was closed") from error
                raise
        raise self._unreachable(reason)

    def _unreachable(self, reason: str, consequence: str = "") -> SheepError:
        return UnreachableError(
            f"etcd at {self.endpoints} does not answer ({reason}){consequence}. "
            "Check that etcd runs and that the address is right"
        )


def _raise_refusal(error: grpc.RpcError) -> None:
    """Raise what an answer of etcd means that no other member would give differently."""
    details = reason_of(error)
    if error.code() == grpc.StatusCode.NOT_FOUND and "lease" in details:
        raise LeaseGoneError(f"etcd: {details}") from error
    if error.code() in _REFUSED:
        raise UsageError(f"etcd refuses the request: {details}") from error


def _key(key: str) -> bytes:
    # Keys that others made need not be UTF-8: they come and go as surrogates.
    return key.encode(errors="surrogateescape")


def _range(prefix: str) -> tuple[bytes, bytes]:
    """First key of a prefix, and the first key after all of it (`b"\\0"` means no end)."""
    start = _key(prefix)
    stem = start.rstrip(b"\xff")
    return start or b"\0", stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(
        kv.key.decode(errors="surrogateescape"),
        kv.value,
        kv.create_revision,
        kv.mod_revision,
        kv.lease,
    )
