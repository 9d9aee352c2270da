"""The byte streams below connections: TCP, and the seam where a simulation puts its own network.

Always holds:
- Reads and writes never wait and never pass through trio's scheduler: one system call each.
"""

from __future__ import annotations

import os
import socket as stdlib_socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from sheepfs.core.errors import UsageError
from sheepfs.core.wire import Buffer

_SOCKET_BUFFER = 2 << 20


class Transport(Protocol):
    """One stream. After `close` every call raises OSError or ClosedResourceError."""

    peer: str
    """`host:port` of the other side."""

    def read(self, space: memoryview) -> int:
        """Read what is there; 0 at the end of the stream. Raises BlockingIOError, OSError."""
        ...

    def write(self, buffers: Sequence[Buffer]) -> int:
        """Write what is taken at once. Raises BlockingIOError if nothing is, OSError."""
        ...

    async def wait_readable(self) -> None:
        """Wait until `read` would not raise BlockingIOError."""
        ...

    async def wait_writable(self) -> None:
        """Wait until `write` would not raise BlockingIOError."""
        ...

    def close(self) -> None:
        """End the stream at once; again is fine."""
        ...


Serve = Callable[[Transport], Awaitable[None]]


class Listener(Protocol):
    """A port that is listened at."""

    port: int

    async def serve(self, serve: Serve) -> None:
        """Run `serve` for each stream that comes, until cancelled; the port closes then."""
        ...


class Network(Protocol):
    """What a program reaches others by."""

    async def connect(self, address: str) -> Transport:
        """Connect to `host:port`.

        Raises: OSError, ValueError (no such address).
        """
        ...

    async def listen(self, address: str) -> Listener:
        """Listen at `host:port`; port 0 takes a free one.

        Raises:
            UsageError: the address cannot be listened at; says why.
        """
        ...


class TcpTransport:
    """A TCP connection."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        """Takes the socket over. Raises OSError: it is not connected any more."""
        sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        for option in (stdlib_socket.SO_SNDBUF, stdlib_socket.SO_RCVBUF):
            sock.setsockopt(stdlib_socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self.peer = "{}:{}".format(*sock.getpeername()[:2])
        self._sock = sock
        self._fd = sock.fileno()

    def read(self, space: memoryview) -> int:
        """See Transport."""
        return os.readv(self._fd, (space,))

    def write(self, buffers: Sequence[Buffer]) -> int:
        """See Transport."""
        return os.writev(self._fd, buffers)

    async def wait_readable(self) -> None:
        """See Transport."""
        self._check_open()
        await trio.lowlevel.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        """See Transport."""
        self._check_open()
        await trio.lowlevel.wait_writable(self._sock)

    def close(self) -> None:
        """See Transport."""
        self._fd = -1
        self._sock.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise trio.ClosedResourceError("the connection is closed")


class _TcpListener:
    def __init__(self, listeners: list[trio.SocketListener]) -> None:
        self._listeners = listeners
        self.port: int = listeners[0].socket.getsockname()[1]

    async def serve(self, serve: Serve) -> None:
        async def serve_one(stream: trio.SocketStream) -> None:
            try:
                transport = TcpTransport(stream.socket)
            except OSError:
                stream.socket.close()
            else:
                await serve(transport)

        await trio.serve_listeners(serve_one, self._listeners)


class _Tcp:
    async def connect(self, address: str) -> TcpTransport:
        host, _, port = address.rpartition(":")
        stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
        try:
            return TcpTransport(stream.socket)
        except BaseException:
            stream.socket.close()
            raise

    async def listen(self, address: str) -> _TcpListener:
        host, _, port = address.rpartition(":")
        try:
            if int(port) >= 1 << 16:
                raise ValueError(f"{port} is no port")  # The resolver would cut it to 16 bits.
            opened = await trio.open_tcp_listeners(int(port), host=host.strip("[]") or None)
        except (OSError, ValueError, stdlib_socket.gaierror) as error:
            raise UsageError(f"cannot listen at {address}: {error}") from error
        return _TcpListener(list(opened))


TCP: Network = _Tcp()
