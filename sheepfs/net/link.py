"""Requests to one node: what was asked is remembered by number until it is answered.

Always holds:
- Every request is answered exactly once: by the reply, or by `None` when the link is lost.
- A request number is used once on a link and only grows (the daemon refuses anything else).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any, Protocol
from uuid import uuid4

import trio

from sheepfs.core.errors import ProtocolError, Status, UnreachableError, error_for
from sheepfs.core.seen import Seen
from sheepfs.core.wire import REPLY, Buffer, Header, Op, acknowledged
from sheepfs.net.connection import Connection, Greeting, connect
from sheepfs.net.groups import plain_errors

Answer = Callable[["Link", Header | None, memoryview | None], None]
"""Called with the reply, or with None when the link was lost before it came."""

_numbers = count(1)
"""Request numbers: one sequence for the process, so that one number can name one write on all
its links."""


class Change(Protocol):
    """A change sent to several nodes at once (sheepfs.replication.changes)."""

    def answer(self, link: Link, header: Header | None, payload: memoryview | None) -> None:
        """Take a node's reply, or None when the link was lost before it came."""
        ...

    def accepted(self, request: int) -> None:
        """A node accepted the change; `request` is the number under which it was sent."""
        ...


_ACKS = Op.ACKS | REPLY
_NUMBER = struct.Struct("<I")


def next_request() -> int:
    """Give a request number (u32; a link that would wrap is replaced long before)."""
    return next(_numbers) & 0xFFFFFFFF


class Link:
    """A live connection to one incarnation of one node."""

    def __init__(self, connection: Connection, greeting: Greeting) -> None:
        self.connection = connection
        self.node: int = greeting["node"]
        self.incarnation: int = greeting["incarnation"]
        self.seen: Seen = greeting["seen"]
        """What the daemon had seen when it greeted."""
        self.session = connection.session
        self.pending: dict[int, Answer] = {}
        self.changes: dict[int, Change] = {}
        """Changes sent and not answered, by number: their acknowledgements come in bulk."""
        self.lost = False
        self.on_map: Callable[[Buffer], None] | None = None

    async def run(self) -> None:
        """Serve the link until it is lost; then every pending request is answered with None."""
        try:
            with plain_errors():
                await self._run()
        finally:
            self.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            with suppress(OSError, trio.ClosedResourceError, trio.BrokenResourceError):
                await self.connection.receive(self._handle)
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        # The reader sees the same break; it is the one that ends the link.
        with suppress(OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            await self.connection.run_writer()

    def _handle(self, header: Header, payload: memoryview) -> None:
        if header.op == _ACKS:
            if len(payload) % 4:
                raise ProtocolError("acknowledgements that are no list of numbers")
            changes = self.changes
            for (number,) in _NUMBER.iter_unpack(payload):
                if change := changes.pop(number, None):
                    change.accepted(number)
                elif answer := self.pending.pop(number, None):
                    answer(self, acknowledged(number), payload[:0])
            return
        request = header.request
        answer = self.pending.pop(request, None)
        if answer is not None:
            answer(self, header, payload)
        elif change := self.changes.pop(request, None):
            change.answer(self, header, payload)
        elif header.op == Op.MAP | REPLY and self.on_map:
            self.on_map(bytes(payload))

    def close(self) -> None:
        """End the link; pending requests are answered with None."""
        if not self.lost:
            self.lost = True
            self.connection.close()
            pending, self.pending = self.pending, {}
            changes, self.changes = self.changes, {}
            for answer in pending.values():
                answer(self, None, None)
            for change in changes.values():
                change.answer(self, None, None)

    def request(
        self, op: int, request: int, answer: Answer, payload: Buffer = b"", **fields: int
    ) -> None:
        """Send a request; `answer` is called exactly once."""
        if self.lost:
            answer(self, None, None)
            return
        self.pending[request] = answer
        self.connection.send(op, request, payload, **fields)

    async def call(
        self, op: int, payload: Buffer = b"", *, timeout_s: float = math.inf, **fields: int
    ) -> tuple[Header, bytes]:
        """Send a request and wait for its reply.

        Raises:
            UnreachableError: the link was lost, or no answer in time.
            SheepError: what the reply's status stands for.
        """
        task = trio.lowlevel.current_task()
        number = next_request()
        result: list[tuple[Header | None, bytes]] = []
        waiting = True

        def answer(link: Link, header: Header | None, body: memoryview | None) -> None:
            result.append((header, b"" if body is None else bytes(body)))
            if waiting:
                trio.lowlevel.reschedule(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self.pending.pop(number, None)
            return trio.lowlevel.Abort.SUCCEEDED

        with trio.move_on_after(timeout_s):
            waiting = False
            self.request(op, number, answer, payload, **fields)
            waiting = True
            if not result:
                await trio.lowlevel.wait_task_rescheduled(abort)
        if not result:
            raise UnreachableError(f"node {self.node} did not answer within {timeout_s:g} s")
        header, body = result[0]
        if header is None:
            raise UnreachableError(f"the connection to node {self.node} was lost")
        if header.status == Status.IO_ERROR:
            # It leaves, and is soon as one that does not answer. It is not the caller's own disk:
            # a daemon that is asked to learn from it must not leave, too.
            raise UnreachableError(f"node {self.node} leaves: {describe(body)}")
        if header.status != Status.OK:
            raise with_version(error_for(header.status, describe(body)), header)
        return header, body

    async def call_json(self, op: int, content: Any = None, **fields: Any) -> Any:
        """Like `call`, with JSON both ways."""
        payload = b"" if content is None else json.dumps(content).encode()
        _, body = await self.call(op, payload, **fields)
        try:
            return json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"node {self.node} answered with bad JSON: {error}") from error


def with_version(error: Exception, header: Header) -> Exception:
    """Keep the replica's version on a StaleObjectError."""
    if hasattr(error, "version"):
        error.version = header.version
    return error


def describe(body: bytes) -> str:
    """Give an error reply's text for people."""
    return body.decode(errors="replace")[:500] or "no details given"


@asynccontextmanager
async def connect_node(
    address: str, cluster_uuid: str, *, timeout_s: float = 2.0, client: str | None = None
) -> AsyncIterator[Link]:
    """Connect to one daemon for as long as the block runs (for tools and tests)."""
    connection, greeting = await connect(
        address, cluster_uuid, client or uuid4().hex, timeout_s=timeout_s
    )
    link = Link(connection, greeting)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            try:
                yield link
            finally:
                nursery.cancel_scope.cancel()
