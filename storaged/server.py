"""The daemon's port: greets clients, hands their requests to the table of operations.

Always holds:
- Nothing of a connection is believed before its greeting names this cluster and protocol.
- What a client can make the daemon hold (requests waiting, replies not taken) is bounded: past
  `MAX_HELD_BYTES` its socket is not read until it takes its replies.
- A request is counted when it is answered with success: its time is that from when its frame was
  there to when its reply goes out, for requests that came together that of all of them.
- A client that sends anything but this protocol is disconnected, with one log line.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import perf_counter_ns
from typing import Any

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, SheepError, Status, UsageError, WrongClusterError
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import MAX_FRAME, REPLY, Buffer, Header, Op
from sheepfs.net.connection import Connection, Greeting, check_greeting
from sheepfs.net.groups import plain_errors
from sheepfs.net.transport import Listener, Transport

log = logging.getLogger(__name__)

MAX_HELD_BYTES = 32 << 20
HELLO_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 4096
SILENT_S = 5.0
"""A client that sent no ping for longer may be gone, though its connection is not."""
COMPLAINTS = 20
COMPLAIN_EVERY_S = 10.0
"""At most so many lines about bad connections in so many seconds."""

_READ, _WRITE, _FLUSH = int(Op.READ), int(Op.WRITE), int(Op.FLUSH)
_KINDS = {_READ: "read", _WRITE: "write", _FLUSH: "flush"}
_FAILURES = frozenset({Status.CORRUPT, Status.NO_SPACE, Status.IO_ERROR})

Handler = Callable[["ClientConnection", Header, Buffer], None]


class ClientConnection:
    """One client's connection, as the handlers see it."""

    def __init__(self, connection: Connection, peer: str, traffic: Traffic) -> None:
        self.connection = connection
        self.peer = peer
        self.name = ""
        self.wants_maps = False
        self.pinged = -math.inf
        """When it last sent a ping, as mounts and daemons do each second."""
        self.last_request = 0
        self.hold = connection.hold
        self._traffic = traffic
        self._acks: list[int] = []
        self._acked_bytes = 0
        self._reads = 0
        self._read_bytes = 0
        connection.on_handled = self._handled

    @property
    def received_ns(self) -> int:
        """When the request that is being carried out was there (`perf_counter_ns`)."""
        return self.connection.received_ns

    @received_ns.setter
    def received_ns(self, value: int) -> None:
        self.connection.received_ns = value

    def _took(self) -> int:
        return perf_counter_ns() - self.connection.received_ns

    def reply(
        self, header: Header, payload: Buffer = b"", status: Status = Status.OK, **fields: int
    ) -> None:
        """Queue the reply to a request."""
        op = header.op
        if status:
            # Replies to changes of one object must come in order.
            self.send_acks()
            if status in _FAILURES and op in _KINDS:
                getattr(self._traffic, _KINDS[op]).errors += 1
        if status or fields:
            self.connection.send(op | REPLY, header.request, payload, status=status, **fields)
            return
        if op == _READ:
            if self.connection.handling:
                self._reads += 1
                self._read_bytes += len(payload)
            else:
                self._traffic.read.add(self._took(), len(payload))
        elif op == _FLUSH:
            self._traffic.flush.add(self._took(), 0)
        self.connection.reply(op, header.request, payload)

    def acknowledge(self, header: Header) -> None:
        """Reply OK to a change; changes that came together share one frame."""
        size = header.span if header.op == _WRITE else 0
        if self.connection.handling:
            self._acks.append(header.request)
            self._acked_bytes += size
        else:
            self.connection.reply(header.op, header.request)
            self._traffic.write.add(self._took(), size)

    def send_acks(self) -> None:
        """Send the acknowledgements collected so far."""
        if self._acks:
            count = len(self._acks)
            payload = struct.pack(f"<{count}I", *self._acks)
            self._acks.clear()
            self.connection.reply(Op.ACKS, 0, payload)
            self._traffic.write.add_many(count, self._took(), self._acked_bytes)
            self._acked_bytes = 0

    def _handled(self) -> None:
        """What came together is carried out, or waits."""
        self.send_acks()
        if self._reads:
            self._traffic.read.add_many(self._reads, self._took(), self._read_bytes)
            self._reads = self._read_bytes = 0

    def reply_json(self, header: Header, content: Any) -> None:
        """Queue a reply whose payload is JSON."""
        self.reply(header, json.dumps(content, separators=(",", ":")).encode())


class Server:
    """Serves all connections of one daemon.

    Args:
        cluster: the cluster's unique id.
        handlers: operation -> handler; each must see to exactly one reply.
        greet: gives what this node says of itself in a greeting (node, incarnation, epoch).
    """

    def __init__(
        self,
        cluster: str,
        handlers: dict[int, Handler],
        greet: Callable[[], dict[str, Any]],
    ) -> None:
        self.cluster = cluster
        self.handlers = handlers
        self.clients: set[ClientConnection] = set()
        self.traffic = Traffic()
        """Reads, changes (writes, discards, deletions) and flushes of this node."""
        self._greet = greet
        self._complaints = 0
        self._complaints_since = float("-inf")

    def is_present(self, name: str) -> bool:
        """Tell whether the client of a name is connected, and not silent."""
        since = trio.current_time() - SILENT_S
        return any(client.name == name and client.pinged > since for client in self.clients)

    def publish(self, cluster_map: ClusterMap) -> None:
        """Send a new map to every client that asked for maps."""
        for client in self.clients:
            if client.wants_maps:
                client.connection.send(Op.MAP | REPLY, 0, cluster_map.encoded)

    async def serve(self, listener: Listener) -> None:
        """Accept connections until cancelled."""
        await listener.serve(self._serve_one)

    async def _serve_one(self, transport: Transport) -> None:
        peer = transport.peer
        client = ClientConnection(Connection(transport), peer, self.traffic)
        try:
            if len(self.clients) >= MAX_CONNECTIONS:
                log.warning("refused %s: %d connections are open", peer, len(self.clients))
                return
            with trio.move_on_after(HELLO_TIMEOUT_S) as deadline:
                await client.connection.receive(lambda h, p: self._hello(client, h, p), one=True)
            if deadline.cancelled_caught:
                raise ProtocolError("no greeting in time")
            with plain_errors():
                await self._converse(client)
        except ProtocolError as error:
            self._complain("disconnected %s: %s", peer, error)
        except WrongClusterError as error:
            self._complain("refused %s: %s", peer, error)
            with suppress(OSError), trio.move_on_after(1):
                await client.connection.flush()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The client went away; nothing was promised to it that is not kept.
        finally:
            self.clients.discard(client)
            client.connection.close()

    def _complain(self, message: str, *arguments: object) -> None:
        """Log what a stranger did, but let no stranger fill the disk with lines."""
        now = trio.current_time()
        if now >= self._complaints_since + COMPLAIN_EVERY_S:
            if self._complaints > COMPLAINTS:
                log.warning("%d more connections ended badly", self._complaints - COMPLAINTS)
            self._complaints_since, self._complaints = now, 0
        self._complaints += 1
        if self._complaints <= COMPLAINTS:
            log.warning(message, *arguments)

    async def _converse(self, client: ClientConnection) -> None:
        if not client.name:
            return
        for other in list(self.clients):
            if other.name == client.name:
                # What the old connection still has in flight must not be applied behind the
                # new one's requests.
                other.connection.close()
        self.clients.add(client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, client)
            await client.connection.receive(partial(self._dispatch, client))
            nursery.cancel_scope.cancel()

    async def _write(self, client: ClientConnection) -> None:
        # The reader sees the same break and ends the connection.
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await client.connection.run_writer()

    def _hello(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        if header.op != Op.HELLO:
            raise ProtocolError(f"operation {header.op} before the greeting")
        greeting = Greeting.parse(payload)
        try:
            check_greeting(greeting, self.cluster)
        except WrongClusterError as error:
            client.reply(header, str(error).encode(), Status.WRONG_CLUSTER)
            raise
        client.name = str(greeting.get("client", ""))[:128] or secrets.token_hex(8)
        client.wants_maps = bool(greeting.get("maps"))
        session = secrets.randbits(62) | 1
        client.reply_json(header, {**self._greet(), "session": session})
        client.connection.session = session
        client.connection.frame_limit = MAX_FRAME
        client.connection.pause_above_bytes = MAX_HELD_BYTES

    def _dispatch(self, client: ClientConnection, header: Header, payload: memoryview) -> None:
        if header.request <= client.last_request:
            raise ProtocolError(f"request {header.request} after {client.last_request}: a replay?")
        client.last_request = header.request
        handler = self.handlers.get(header.op)
        if handler is None:
            client.reply(
                header, f"operation {header.op} is unknown here".encode(), Status.BAD_REQUEST
            )
            return
        try:
            handler(client, header, payload)
        except SheepError as error:
            client.reply(header, str(error).encode(), error.status)

    def statistics(self) -> dict[str, int]:
        """Connections and bytes held for them."""
        held = sum(client.connection.queued_bytes for client in self.clients)
        return {"connections": len(self.clients), "held_bytes": held}


def json_object(payload: Buffer) -> dict[str, Any]:
    """Parse a control request's payload (UsageError if it is no JSON object)."""
    try:
        content = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"payload is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError("payload is not a JSON object")
    return content
