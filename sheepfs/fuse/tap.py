"""The tap between the kernel and libfuse: answers the data path, passes all else through.

    kernel <--/dev/fuse--> Tap <--SEQPACKET pair--> libfuse/pyfuse3 (namespace)

Always holds:
- A request is answered here or passed on, never both; its number is never reused by the kernel.
- Nothing libfuse does can hold up the data path: what it is slow to take waits in a queue.
- libfuse's socket never fills: its thread is ours, so a blocking write there would be the end.
  READDIR replies are therefore kept small and few at a time.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import trio

from sheepfs.core.errors import ProtocolError
from sheepfs.fuse import protocol
from sheepfs.fuse.handles import Handles
from sheepfs.fuse.protocol import InitFlag, Op
from sheepfs.fuse.replies import Replies
from sheepfs.fuse.requests import Requests

log = logging.getLogger(__name__)

BURST = 32
"""Requests taken from the kernel before other tasks get their turn."""
READDIR_LIMIT = 32 << 10
"""Bytes of one READDIR reply."""
READDIR_AT_ONCE = 4
SOCKET_BUFFER = 4 << 20
LIBFUSE_BUFFER = 256 << 10
"""Bytes that hold any message of libfuse: the largest is a READDIR reply."""
INTERRUPT_GRACE_S = 10.0
"""A request that a signal interrupted and that is still not done after this fails with EINTR, so
that a stalled cluster leaves no process that cannot be killed. Shorter than the stalls that are
normal, and harmless signals would fail I/O."""
_NO_REPLY = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.DESTROY})
_READDIRS = frozenset({Op.READDIR, Op.READDIRPLUS})
_OPENS = frozenset({Op.OPEN, Op.CREATE})


class Pair(NamedTuple):
    """The two ends between the tap and libfuse; messages keep their borders."""

    ours: socket.socket
    libfuse: socket.socket


def socketpair() -> Pair:
    """Make the connection between the tap and libfuse."""
    pair = Pair(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    pair.ours.setblocking(False)
    for end in pair:
        # Capped by net.core.wmem_max; 200 KiB, its usual value, are enough.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    return pair


class Tap:
    """Everything between the kernel's device and libfuse's socket.

    Args:
        device: /dev/fuse of this mount, not blocking.
        libfuse: our end of the pair whose other end libfuse has.
        handles: the open files.
        nursery: for requests that must wait.
        ready: called when the kernel has been greeted and the mount works.
    """

    def __init__(
        self,
        device: int,
        libfuse: socket.socket,
        handles: Handles,
        nursery: trio.Nursery,
        ready: Callable[[], None],
    ) -> None:
        self._device = device
        self._handles = handles
        self._nursery = nursery
        self._ready = ready
        self._replies = Replies(device, nursery)
        self._requests = Requests(self._replies, handles, nursery)
        self.changed = self._replies.changed
        """Tells the kernel that a VDI's attributes have changed."""
        self._socket = libfuse
        self._queue: deque[bytes] = deque()
        self._queued = trio.Event()
        self._passed: dict[int, int] = {}
        """Requests that libfuse works on: number -> operation."""
        self._readdirs = 0
        self._readdirs_later: deque[bytes] = deque()
        self._offered = InitFlag(0)

    # -- kernel -> tap --------------------------------------------------------------------------

    async def serve_kernel(self) -> None:
        """Take the kernel's requests until the mount is gone."""
        buffer = bytearray(protocol.RECEIVE_BUFFER)
        view = memoryview(buffer)
        buffers = [buffer]
        device = self._device
        readv = os.readv
        header = protocol.IN_HEADER.unpack_from
        answers = self._requests.answers
        burst = 0
        while True:
            try:
                size = readv(device, buffers)
            except BlockingIOError:
                burst = 0
                await trio.lowlevel.wait_readable(device)
                continue
            except OSError as error:
                # ENOENT: the request was taken back by a signal before we read it.
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    log.info("the kernel has ended the mount")
                    return
                raise
            _, op, unique, _, _, _, _, _, _ = header(buffer)
            answer = answers.get(op)
            if answer is None:
                self._pass_on(op, unique, view[:size])
            else:
                try:
                    answer(unique, view[:size])
                except (ProtocolError, struct.error) as error:
                    log.error("request %d of the kernel: %s", op, error)
                    self._replies.fail(unique, errno.EINVAL)
            burst += 1
            if burst >= BURST:
                burst = 0
                await trio.lowlevel.checkpoint()

    def _pass_on(self, op: int, unique: int, request: memoryview) -> None:
        if op == Op.INTERRUPT:
            self._interrupt(protocol.decode_interrupt(request))
            return
        if op not in _NO_REPLY:
            self._passed[unique] = op
        if op == Op.INIT:
            self._offered = protocol.decode_init_flags(request)
        elif op in _READDIRS:
            message = bytearray(request)
            protocol.limit_readdir(message, READDIR_LIMIT)
            if self._readdirs >= READDIR_AT_ONCE:
                self._readdirs_later.append(bytes(message))
                return
            self._readdirs += 1
            request = memoryview(message)
        self._to_libfuse(request)

    def _to_libfuse(self, message: memoryview | bytes) -> None:
        if not self._queue:
            try:
                self._socket.send(message)
                return
            except BlockingIOError:
                pass
        self._queue.append(bytes(message))
        self._queued.set()

    async def drain_queue(self) -> None:
        """Give libfuse what it was too busy to take."""
        while True:
            while self._queue:
                try:
                    self._socket.send(self._queue[0])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                else:
                    self._queue.popleft()
            self._queued = trio.Event()
            await self._queued.wait()

    def _interrupt(self, unique: int) -> None:
        if not self._requests.interrupt(unique):
            self._nursery.start_soon(self._fail_if_stalled, unique)

    async def _fail_if_stalled(self, unique: int) -> None:
        await trio.sleep(INTERRUPT_GRACE_S)
        # The kernel knows whether the request is still open: we keep no list of them.
        if self._replies.fail(unique, errno.EINTR):
            log.warning("a program was interrupted in a request that makes no progress")

    # -- libfuse -> kernel ----------------------------------------------------------------------

    async def serve_libfuse(self) -> None:
        """Pass libfuse's replies and notifications to the kernel."""
        buffer = bytearray(LIBFUSE_BUFFER)
        view = memoryview(buffer)
        while True:
            try:
                size = self._socket.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            if not size:
                return
            _, _, unique = protocol.OUT_HEADER.unpack_from(buffer)
            # Notifications have number 0, which is never in the table.
            op = self._passed.pop(unique, 0)
            if op in _OPENS:
                self._reply_open(op, bytearray(view[:size]))
            elif op == Op.INIT:
                reply = bytearray(view[:size])
                protocol.amend_init(reply, self._offered)
                self._replies.send((reply,))
                self._ready()
            else:
                self._replies.send((view[:size],))
                if op in _READDIRS:
                    self._next_readdir()

    def _reply_open(self, op: int, reply: bytearray) -> None:
        opened = protocol.amend_open(reply, op)
        if not self._replies.send((reply,)) and opened is not None:
            # Interrupted meanwhile: no RELEASE will come for this handle.
            self._handles.release(opened.fh)

    def _next_readdir(self) -> None:
        if self._readdirs_later:
            self._to_libfuse(self._readdirs_later.popleft())
        else:
            self._readdirs -= 1
