"""A small HTTP server for a program's metrics: `/metrics` for Prometheus, `/healthz` for probes.

Always holds:
- What strangers send costs little: a request is a few KiB and comes within seconds, so many are
  answered a second, and the text is made at most once a second, whoever asks.
- Making the text gives way to other tasks after each piece, so that I/O never waits for it.
- Whoever is new gets in: of too many connections the oldest is ended.
- Nothing that happens here ends the program.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import h11
import trio

from sheepfs.core.exposition import CONTENT_TYPE, family
from sheepfs.net.groups import plain_errors
from sheepfs.net.transport import Listener, Transport

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
MAX_REQUEST_BYTES = 8 << 10
REQUEST_TIMEOUT_S = 10.0
"""From a request's first byte to its last; the same for the client to take the answer."""
IDLE_TIMEOUT_S = 120.0
"""Prometheus keeps its connection between scrapes."""
KEEP_TEXT_S = 1.0
PAUSE_S = 0.02
"""Between two answers, to whomever."""

Pieces = Callable[[], Iterable[str]]
"""Gives the metrics, piece by piece; other tasks run between two pieces."""


class _Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "text/plain"
    keep: bool = True
    """Whether the connection may have another request."""


class Exporter:
    """Serves what `pieces` gives."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._text = b""
        self._made_at = float("-inf")
        self._making = trio.Lock()
        self._turn = trio.Lock()
        self._open: dict[trio.CancelScope, None] = {}

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    async def serve(self, listener: Listener) -> None:
        """Accept connections until cancelled."""
        await listener.serve(self._serve_one)

    async def text(self) -> bytes:
        """Give the metrics as they were within the last second."""
        async with self._making:
            if trio.current_time() >= self._made_at + KEEP_TEXT_S:
                made = []
                for piece in chain(self._pieces(), _process_metrics()):
                    made.append(piece)
                    await trio.lowlevel.checkpoint()
                self._text = "".join(made).encode(errors="replace")
                self._made_at = trio.current_time()
            return self._text

    async def _serve_one(self, transport: Transport) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            next(iter(self._open)).cancel()
        scope = trio.CancelScope()
        self._open[scope] = None
        try:
            with scope, plain_errors():
                await self._converse(transport)
        except (OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            pass  # The client went away.
        except Exception:
            log.exception("metrics for %s", transport.peer)
        finally:
            del self._open[scope]
            transport.close()

    async def _converse(self, transport: Transport) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
        while True:
            try:
                request = await _receive(transport, http)
                if request is None:
                    return
                answer = await self._answer(request, is_whole=_is_whole(http))
            except h11.RemoteProtocolError as error:
                if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                    return
                request = None
                answer = _Answer(error.error_status_hint, f"{error}\n".encode(), keep=False)
            with trio.move_on_after(REQUEST_TIMEOUT_S) as deadline:
                await _send(transport, http, request, answer)
            if deadline.cancelled_caught or http.our_state is not h11.DONE:
                return
            with suppress(h11.LocalProtocolError):
                http.start_next_cycle()
                continue
            return

    async def _answer(self, request: h11.Request, *, is_whole: bool) -> _Answer:
        async with self._turn:
            await trio.sleep(PAUSE_S)
        path = request.target.partition(b"?")[0]
        if not is_whole:
            return _Answer(413, b"no request has a body here\n", keep=False)
        if request.method not in (b"GET", b"HEAD"):
            return _Answer(405, b"only GET and HEAD\n")
        if path == b"/metrics":
            return _Answer(200, await self.text(), CONTENT_TYPE)
        if path == b"/healthz":
            return _Answer(200, b"ok\n")
        return _Answer(404, b"there are /metrics and /healthz\n")


async def _receive(transport: Transport, http: h11.Connection) -> h11.Request | None:
    """Give the next request, or None when there is none (any more, or in time).

    Raises:
        h11.RemoteProtocolError: what came is no HTTP, or too long.
    """
    # A first request must come as soon as any other one.
    deadline = trio.CancelScope(deadline=trio.current_time() + IDLE_TIMEOUT_S)
    buffer = bytearray(MAX_REQUEST_BYTES)
    with deadline:
        while True:
            event = http.next_event()
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:
                return None
            size = await _read(transport, buffer)
            http.receive_data(bytes(buffer[:size]))
            deadline.deadline = min(deadline.deadline, trio.current_time() + REQUEST_TIMEOUT_S)
    return None


def _is_whole(http: h11.Connection) -> bool:
    """Tell whether a request ends with its headers."""
    return isinstance(http.next_event(), h11.EndOfMessage)


async def _read(transport: Transport, buffer: bytearray) -> int:
    while True:
        try:
            return transport.read(memoryview(buffer))
        except BlockingIOError:
            await transport.wait_readable()


async def _send(
    transport: Transport, http: h11.Connection, request: h11.Request | None, answer: _Answer
) -> None:
    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(answer.body))),
        *([] if answer.keep else [("connection", "close")]),
    ]
    data = http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    if request is None or request.method != b"HEAD":
        data += http.send(h11.Data(data=answer.body)) or b""
    data += http.send(h11.EndOfMessage()) or b""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[transport.write((rest,)) :]
        except BlockingIOError:
            await transport.wait_writable()


def _process_metrics() -> Iterator[str]:
    """Give some of what Prometheus' own clients say of a process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield from family(
        "process_cpu_seconds_total", "counter", "CPU time of this process.",
        [("", used.ru_utime + used.ru_stime)],
    )  # fmt: skip
    yield from family(
        "process_resident_memory_max_bytes", "gauge", "Most memory that this process had so far.",
        [("", used.ru_maxrss * 1024)],
    )  # fmt: skip
