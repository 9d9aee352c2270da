"""One connection between a client (or a daemon) and a storage daemon: frames in, frames out.

Always holds:
- One reader (the task in `run`) and one writer task for each connection; no task per request.
- A frame is checked (length before allocation, then checksum) before anybody looks inside it.
- What `send` was given goes out in that order, and in one system call for all that is queued.
- The payload given to the handler is a view into the receive buffer: valid during the call only.
Source: docs/wire.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

import trio
from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import ProtocolError, UnreachableError, WrongClusterError, error_for
from sheepfs.core.seen import Seen
from sheepfs.core.wire import (
    HEADER_SIZE,
    MAX_FRAME,
    MAX_HELLO,
    REPLY,
    VERSION,
    Buffer,
    Header,
    Op,
    decode,
    encode,
    encode_reply,
    frame_length,
)
from sheepfs.net.transport import TCP, Network, Transport

Handler = Callable[[Header, memoryview], None]

_FIRST_BUFFER = 8 << 10
_BATCH_BUFFER = 512 << 10
"""The receive buffer starts small (pings come and go) and doubles up to this as reads fill it."""
_MAX_IOVECS = 512
_FAIR_TURNS = 8
"""Reads in a row before other tasks get their turn."""


class Connection:
    """Frames over one stream; `session` seeds the checksums once both sides greeted."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.session = 0
        self.frame_limit = MAX_HELLO
        self.queued_bytes = 0
        """Bytes held for the peer: replies not yet sent, requests not yet answered."""
        self.received_bytes = 0
        """In all; as long as it grows, the peer is not silent."""
        self.pause_above_bytes = 1 << 62
        """Stop reading while more is held: bounds the memory that a peer can take."""
        self.closed = False
        self.handling = False
        """Frames that came together are being handled; what is queued goes out behind them."""
        self.received_ns = 0
        """When the frames that are being handled were there (`perf_counter_ns`)."""
        self.on_handled: Callable[[], None] | None = None
        """Called when all of them are handled."""
        self.on_output: Callable[[], None] = self.wake_writer
        """Called when output is queued: by default the writer task sends it."""
        self._read = transport.read
        self._write = transport.write
        self._buffer = bytearray(_FIRST_BUFFER)
        self._start = 0
        self._end = 0
        self._out: list[Buffer] = []
        self._announced = False
        """`on_output` was called and nothing was sent since."""
        self._wake = trio.Event()
        self._drained = trio.Event()

    def send(self, op: int, request: int, payload: Buffer = b"", **fields: int) -> None:
        """Queue a frame (see `wire.encode` for the fields); never blocks."""
        self.send_frame(encode(self.session, op, request, payload, **fields), payload)

    def send_frame(self, header: bytes, payload: Buffer = b"") -> None:
        """Queue an encoded header and its payload, which must not change until it is sent."""
        self._out.append(header)
        if payload:
            self._out.append(payload)
        self.queued_bytes += HEADER_SIZE + len(payload)
        if not self.handling and not self._announced:
            self._announced = True
            self.on_output()

    def reply(self, op: int, request: int, payload: Buffer = b"") -> None:
        """Queue the reply "OK" to request number `request` of operation `op`."""
        self.send_frame(encode_reply(self.session, op, request, payload), payload)

    def hold(self, size_bytes: int) -> None:
        """Count memory held for the peer besides queued frames; negative when it is let go."""
        self.queued_bytes += size_bytes
        if size_bytes < 0:
            self._drained.set()

    async def _drain(self, limit_bytes: int) -> None:
        while self.queued_bytes > limit_bytes and not self.closed:
            self._drained = trio.Event()
            await self._drained.wait()

    def wake_writer(self) -> None:
        """Have the writer task send what is queued."""
        self._wake.set()

    async def flush(self) -> None:
        """Send what is queued, where no writer task runs."""
        while not self.transmit():
            await self.transport.wait_writable()

    async def run_writer(self) -> None:
        """Send what is queued until the connection fails or the task is cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self.flush()

    def transmit(self) -> bool:
        """Send of the queue what is taken at once; tells whether that was all.

        Raises OSError: the connection broke.
        """
        out = self._out
        self._announced = False
        try:
            while out:
                vector = out[:_MAX_IOVECS]
                sent = self._write(vector)
                self.queued_bytes -= sent
                if sent == sum(map(len, vector)):
                    del out[: len(vector)]
                    continue
                done = 0
                while done < len(vector) and sent >= len(vector[done]):
                    sent -= len(vector[done])
                    done += 1
                if sent:
                    out[done] = memoryview(vector[done])[sent:]
                del out[:done]
        except BlockingIOError:
            return False
        finally:
            if self.queued_bytes <= self.pause_above_bytes:
                self._drained.set()
        return True

    async def receive(self, handle: Handler, *, one: bool = False) -> None:
        """Read frames and give each to `handle` until the peer closes (or after `one`).

        What the handlers queue on this connection goes out in one call when all frames that
        came together are handled.

        Raises:
            ProtocolError: the peer sent something else than frames of this session.
            OSError: the connection broke.
        """
        turns = 0
        while True:
            self.handling = True
            self.received_ns = perf_counter_ns()
            try:
                paused = self._handle_frames(handle, one)
                if self.on_handled:
                    self.on_handled()
            finally:
                self.handling = False
            if self._out and not one and not self.transmit():
                self.wake_writer()
            if one and paused:
                return
            if paused:
                await self._drain(self.pause_above_bytes // 2)
                continue
            if self._start == self._end:
                self._start = self._end = 0
            elif self._end == len(self._buffer):
                self._make_room(HEADER_SIZE)
            try:
                with memoryview(self._buffer) as whole, whole[self._end :] as space:
                    received = self._read(space)
            except BlockingIOError:
                turns = 0
                await self.transport.wait_readable()
                continue
            if not received:
                if self._end > self._start:
                    raise ProtocolError("the peer closed in the middle of a frame")
                return
            self._end += received
            self.received_bytes += received
            if self._end == len(self._buffer) < _BATCH_BUFFER:
                self._grow(2 * len(self._buffer))
            turns += 1
            if turns >= _FAIR_TURNS:
                turns = 0
                await trio.lowlevel.checkpoint()

    def _handle_frames(self, handle: Handler, one: bool) -> bool:
        """Handle the whole frames in the buffer; True if stopped early (`one`, or to drain)."""
        whole = memoryview(self._buffer)
        while self._end - self._start >= HEADER_SIZE:
            length = frame_length(self._buffer, self._start, self.frame_limit)
            if self._end - self._start < length:
                self._make_room(length)
                break
            header, payload = decode(self.session, whole[self._start : self._start + length])
            self._start += length
            handle(header, payload)
            if one or self.queued_bytes > self.pause_above_bytes:
                return True
        return False

    def _make_room(self, length: int) -> None:
        """Make sure that a frame of `length` (already checked) fits behind `_start`."""
        if self._start + length <= len(self._buffer):
            return
        have = self._end - self._start
        if length > len(self._buffer):
            self._grow(min(MAX_FRAME, max(length, 2 * len(self._buffer))))
        else:
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have

    def _grow(self, size: int) -> None:
        have = self._end - self._start
        grown = bytearray(size)
        grown[:have] = memoryview(self._buffer)[self._start : self._end]
        self._buffer = grown
        self._start, self._end = 0, have

    def close(self) -> None:
        """Close the stream at once; the reader and writer tasks end with an error."""
        # Whoever still refers to the connection must not keep its buffers.
        self._buffer = bytearray()
        self._start = self._end = 0
        self._out.clear()
        self.closed = True
        self._drained.set()
        self._wake.set()
        self.transport.close()


class Greeting(dict[str, Any]):
    """The JSON object of a HELLO frame."""

    @classmethod
    def parse(cls, payload: Buffer) -> Greeting:
        """Parse a HELLO's payload (ProtocolError if it is no JSON object)."""
        try:
            content = json.loads(bytes(payload))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"HELLO is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ProtocolError("HELLO is not a JSON object")
        return cls(content)


async def connect(
    address: str,
    cluster: str,
    client: str,
    *,
    timeout_s: float = 2.0,
    maps: bool = False,
    network: Network = TCP,
) -> tuple[Connection, Greeting]:
    """Connect to the daemon at `address` (host:port) and greet it.

    Args:
        cluster: unique id of the cluster; another cluster's daemon refuses.
        client: unique id of this client; a daemon ends an older connection of the same client.
        maps: ask the daemon to send every new cluster map unasked.

    Raises:
        UnreachableError: nobody there, or no answer in time.
        WrongClusterError: the daemon is of another cluster.
        ProtocolError: whoever is there speaks something else.
    """
    transport = None
    try:
        with trio.fail_after(timeout_s):
            transport = await network.connect(address)
            connection = Connection(transport)
            greeting = await _greet(connection, cluster, client, maps)
    except (OSError, ValueError, trio.TooSlowError) as error:
        if transport:
            transport.close()
        reason = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
        raise UnreachableError(f"storage daemon at {address}: {reason}") from error
    except BaseException:
        if transport:
            transport.close()
        raise
    connection.session = int(greeting["session"])
    connection.frame_limit = MAX_FRAME
    return connection, greeting


async def _greet(connection: Connection, cluster: str, client: str, maps: bool) -> Greeting:
    hello = {"protocol": VERSION, "cluster": cluster, "client": client, "maps": maps}
    payload = json.dumps(hello).encode()
    connection.send(Op.HELLO, 0, payload)
    await connection.flush()
    answers: list[tuple[Header, bytes]] = []
    await connection.receive(lambda h, p: answers.append((h, bytes(p))), one=True)
    if not answers:
        raise UnreachableError("the daemon closed the connection instead of greeting")
    header, body = answers[0]
    if header.op != Op.HELLO | REPLY:
        raise ProtocolError(f"greeted with operation {header.op}")
    if header.status:
        raise error_for(header.status, body.decode(errors="replace"))
    greeting = Greeting.parse(body)
    missing = {"session", "node", "incarnation"} - greeting.keys()
    if missing or not all(isinstance(greeting[k], int) for k in ("session", "node", "incarnation")):
        raise ProtocolError("the daemon's greeting lacks session, node or incarnation")
    try:
        greeting["seen"] = Seen.parse(greeting.get("seen", Seen()))  # Older daemons do not tell.
    except ValueError as error:
        raise ProtocolError(f"the daemon's greeting: {error}") from error
    return greeting


def check_greeting(greeting: Mapping[str, Any], cluster: str) -> None:
    """Refuse a client of another protocol or cluster (the daemon's side of the greeting)."""
    if greeting.get("protocol") != VERSION:
        raise WrongClusterError(
            f"protocol {greeting.get('protocol')!r}: this daemon speaks {VERSION}; "
            "upgrade the older side"
        )
    if greeting.get("cluster") != cluster:
        raise WrongClusterError("this daemon belongs to another cluster")


def payload_checksum(payload: Buffer) -> int:
    """Checksum of a payload, computed once and used for every replica it is sent to."""
    return xxh3_64_intdigest(payload) if payload else 0
