"""Requests that the mount answers itself, without libfuse: data, space and locks.

Always holds:
- Every request gets exactly one reply, from the callback or task that finishes it, written
  straight to the device.
- READ and WRITE start no task and copy nothing but a write's data out of the receive buffer.
- A write with O_DSYNC or O_SYNC (or RWF_DSYNC) is flushed before its reply: the kernel sends no
  FSYNC of its own for files with FOPEN_DIRECT_IO.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from sheepfs.backend import Done
from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import MAX_VDI_SIZE
from sheepfs.core.wire import Buffer
from sheepfs.fuse import protocol
from sheepfs.fuse.handles import Handle, Handles, Node, code_of
from sheepfs.fuse.locks import Lock, foreign_conflict, means_to_write
from sheepfs.fuse.protocol import FallocateMode, LockType, Op, Seek

log = logging.getLogger(__name__)

FOREIGN_LOCK_POLL_S = 0.5
"""How often a waiting lock looks whether another mount has let the VDI go."""
_O_DSYNC = os.O_DSYNC
_transfer = protocol.TRANSFER.unpack_from
_AT = protocol.IN_HEADER_SIZE

Handler = Callable[[int, memoryview], None]


class Requests:
    """Answers to the kernel's requests about open files.

    Args:
        device: file descriptor of /dev/fuse.
        handles: the open files.
        nursery: for what must wait.
    """

    def __init__(self, device: int, handles: Handles, nursery: trio.Nursery) -> None:
        self._device = device
        self._handles = handles
        self._by_fh = handles.by_fh
        self._nursery = nursery
        self._waiting: dict[int, trio.CancelScope] = {}
        """Requests that an INTERRUPT ends at once: number -> scope of the task."""
        self.answers: dict[int, Handler] = {
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.FSYNC: self._fsync,
            Op.FLUSH: self._flush,
            Op.RELEASE: self._release,
            Op.FALLOCATE: lambda u, r: self._start(u, self._fallocate, bytes(r)),
            Op.LSEEK: lambda u, r: self._start(u, self._lseek, bytes(r)),
            Op.GETLK: lambda u, r: self._start(u, self._get_lock, bytes(r)),
            Op.SETLK: lambda u, r: self._start_lock(u, bytes(r), wait=False),
            Op.SETLKW: lambda u, r: self._start_lock(u, bytes(r), wait=True),
            # The kernel remembers ENOSYS and copies with reads and writes from then on.
            Op.COPY_FILE_RANGE: lambda u, r: self.finish(u, errno.ENOSYS),
            Op.COPY_FILE_RANGE_64: lambda u, r: self.finish(u, errno.ENOSYS),
            Op.IOCTL: lambda u, r: self.finish(u, errno.ENOTTY),
        }

    # -- replies --------------------------------------------------------------------------------

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Write a reply to the kernel; False if the request is gone (interrupted, unmounted)."""
        try:
            os.writev(self._device, parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EPERM):
                # A reply that the kernel refuses leaves a program hanging: that must be seen.
                log.error("the kernel refused a reply: %s", error)
            return False
        return True

    def fail(self, unique: int, code: int) -> bool:
        """Reply with errno `code`, or with success and nothing else if it is 0."""
        return self.send((protocol.encode_error(unique, code),))

    def finish(self, unique: int, code: int) -> None:
        """Reply with errno `code`; a `Done` callback once bound to the request's number."""
        self.fail(unique, code)

    def interrupt(self, unique: int) -> bool:
        """End a request that waits for a lock; False if it is no such request."""
        scope = self._waiting.get(unique)
        if scope is None:
            return False
        scope.cancel()
        return True

    def _start(self, unique: int, work: Callable[[bytes], Awaitable[bytes]], raw: bytes) -> None:
        self._nursery.start_soon(self._answer, unique, work, raw)

    async def _answer(
        self, unique: int, work: Callable[[bytes], Awaitable[bytes]], raw: bytes
    ) -> None:
        try:
            payload = await work(raw)
        except OSError as error:
            self.fail(unique, error.errno or errno.EIO)
        except Exception as error:
            self.fail(unique, code_of(error, "request"))
        else:
            self.send((protocol.encode_reply(unique, payload),))

    def _handle(self, fh: int) -> Handle:
        handle = self._by_fh.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    # -- data -----------------------------------------------------------------------------------

    def _read(self, unique: int, request: memoryview) -> None:
        fh, offset, size, _, _, _, _ = _transfer(request, _AT)
        handle = self._by_fh.get(fh)
        if handle is None:
            self.fail(unique, errno.EBADF)
            return

        def done(code: int, buffers: Sequence[Buffer]) -> None:
            if code:
                self.fail(unique, code)
            else:
                self.send(protocol.encode_read(unique, buffers))

        handle.node.volume.read(offset, size, done)

    def _write(self, unique: int, request: memoryview) -> None:
        fh, offset, size, _, _, flags, _ = _transfer(request, _AT)
        handle = self._by_fh.get(fh)
        if handle is None:
            self.fail(unique, errno.EBADF)
            return
        if len(request) != protocol.WRITE_DATA + size:
            raise ProtocolError(f"WRITE of {size} bytes in a request of {len(request)}")
        if offset + size > MAX_VDI_SIZE:
            self.fail(unique, errno.EFBIG)
            return
        data = bytes(request[protocol.WRITE_DATA :])
        node = handle.node

        def replied(code: int) -> None:
            if code:
                self.fail(unique, code)
            else:
                self.send((protocol.encode_written(unique, size),))

        done = _flush_between(node, replied) if flags & _O_DSYNC else replied
        if node.attached:
            node.volume.write(offset, data, done)
            return
        self._handles.when_attached(
            node, lambda code: done(code) if code else node.volume.write(offset, data, done)
        )

    def _fsync(self, unique: int, request: memoryview) -> None:
        handle = self._by_fh.get(protocol.decode_fh(request))
        if handle is None:
            self.fail(unique, errno.EBADF)
        elif handle.node.attached:
            handle.node.volume.flush(functools.partial(self.finish, unique))
        else:
            self._unattached_flush(unique, handle.node)

    def _unattached_flush(self, unique: int, node: Node) -> None:
        """What was never attached has nothing to flush; a detach under way flushes: wait."""
        if node.gate.locked():
            self._start(unique, self._wait_gate, node.id.to_bytes(8, "little"))
        else:
            self.fail(unique, 0)

    async def _wait_gate(self, raw: bytes) -> bytes:
        node = self._handles.nodes.get(int.from_bytes(raw, "little"))
        if node is not None:
            async with node.gate:
                pass
        return b""

    def _flush(self, unique: int, request: memoryview) -> None:
        """close(2): write errors are reported here, and the process's POSIX locks end."""
        fh, owner = protocol.decode_flush(request)
        handle = self._by_fh.get(fh)
        if handle is None:
            self.fail(unique, errno.EBADF)
            return
        node = handle.node

        def done(code: int) -> None:
            if node.locks.release(owner):
                self._handles.wake(node)
                if not node.locks:
                    self._nursery.start_soon(self._detach_and_reply, unique, node, code)
                    return
            self.fail(unique, code)

        if handle.writable and node.attached:
            node.volume.flush(done)
        else:
            done(0)

    async def _detach_and_reply(self, unique: int, node: Node, code: int = 0) -> None:
        detached = await self._handles.detach(node)
        self.fail(unique, code or detached)

    def _release(self, unique: int, request: memoryview) -> None:
        self._handles.release(protocol.decode_fh(request))
        self.fail(unique, 0)

    # -- space ----------------------------------------------------------------------------------

    async def _fallocate(self, raw: bytes) -> bytes:
        """Punch and zero give space back; plain preallocation only moves the end of the file."""
        fh, offset, length, mode = protocol.decode_fallocate(raw)
        node = self._handle(fh).node
        known = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE | FallocateMode.ZERO_RANGE
        if mode & ~known:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        end = offset + length
        if end > MAX_VDI_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        await self._handles.attach(node)
        volume = node.volume
        if mode & (FallocateMode.PUNCH_HOLE | FallocateMode.ZERO_RANGE):
            inside = min(end, volume.size) - offset
            if inside > 0:
                await volume.punch(offset, inside)
        if not mode & FallocateMode.KEEP_SIZE and end > volume.size:
            await volume.resize(end)
        return b""

    async def _lseek(self, raw: bytes) -> bytes:
        fh, offset, whence = protocol.decode_lseek(raw)
        volume = self._handle(fh).node.volume
        found: int | None = None
        if offset < volume.size:
            if whence == Seek.DATA:
                found = await volume.seek_data(offset)
            elif whence == Seek.HOLE:
                found = await volume.seek_hole(offset)
            else:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if found is None:
            # Anything else here makes cp loop for ever at the end of the data.
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return protocol.pack_offset(found)

    # -- locks ----------------------------------------------------------------------------------

    async def _held_elsewhere(self, node: Node) -> bool:
        """Try to attach for a lock; True if another mount is the writer.

        Cancellation: ends the waiting only; the attach itself goes on in a task of its own.
        """
        if node.attached:
            return False
        tried = trio.Event()
        result = 0

        def done(code: int) -> None:
            nonlocal result
            result = code
            tried.set()

        self._handles.when_attached(node, done)
        await tried.wait()
        if result and not node.held_elsewhere:
            raise OSError(result, os.strerror(result))
        return bool(result)

    async def _get_lock(self, raw: bytes) -> bytes:
        request = protocol.decode_lock(raw)
        handle = self._handle(request.fh)
        node = handle.node
        wanted = _lock_of(request)
        blocker = node.locks.conflict(wanted)
        writes = handle.writable or means_to_write(wanted, node.locks)
        if blocker is None and node.held_elsewhere and writes and await self._held_elsewhere(node):
            blocker = foreign_conflict(wanted)
        if blocker is None:
            return protocol.pack_lock(request.start, request.end, LockType.UNLOCK, 0)
        kind = LockType.WRITE if blocker.exclusive else LockType.READ
        return protocol.pack_lock(blocker.start, blocker.end, kind, blocker.pid)

    def _start_lock(self, unique: int, raw: bytes, *, wait: bool) -> None:
        request = protocol.decode_lock(raw)
        handle = self._by_fh.get(request.fh)
        if handle is None:
            self.fail(unique, errno.EBADF)
        elif request.type == LockType.UNLOCK:
            node = handle.node
            if node.locks.release(request.owner, request.start, request.end):
                self._handles.wake(node)
                if not node.locks and node.attached:
                    # The reply waits: a migration's target attaches when this returns.
                    self._nursery.start_soon(self._detach_and_reply, unique, node)
                    return
            self.fail(unique, 0)
        else:
            scope = self._waiting[unique] = trio.CancelScope()
            self._nursery.start_soon(self._set_lock, unique, handle, _lock_of(request), wait, scope)

    async def _set_lock(
        self, unique: int, handle: Handle, wanted: Lock, wait: bool, scope: trio.CancelScope
    ) -> None:
        code = errno.EINTR
        try:
            with scope:
                code = await self._acquire(handle, wanted, wait=wait)
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            del self._waiting[unique]
        if not self.fail(unique, code) and not code:
            # The kernel gave up on the request, so nobody would ever unlock this.
            handle.node.locks.release(wanted.owner, wanted.start, wanted.end)
            self._handles.wake(handle.node)

    async def _acquire(self, handle: Handle, wanted: Lock, *, wait: bool) -> int:
        node = handle.node
        while True:
            writes = handle.writable or means_to_write(wanted, node.locks)
            foreign = writes and await self._held_elsewhere(node)
            blocker = foreign_conflict(wanted) if foreign else None
            if blocker is None:
                blocker = node.locks.acquire(wanted)
            if blocker is None:
                return 0
            if not wait:
                return errno.EAGAIN
            with trio.move_on_after(FOREIGN_LOCK_POLL_S if foreign else float("inf")):
                await node.unlocked.wait()


def _flush_between(node: Node, done: Done) -> Done:
    """Give a callback for a write that flushes the volume before `done` is called."""

    def written(code: int) -> None:
        if code:
            done(code)
        else:
            node.volume.flush(done)

    return written


def _lock_of(request: protocol.LockRequest) -> Lock:
    if request.type not in (LockType.READ, LockType.WRITE) or request.end < request.start:
        raise ProtocolError(f"lock of type {request.type}, {request.start} to {request.end}")
    return Lock(
        request.owner,
        request.fh,
        request.pid,
        request.start,
        request.end,
        request.type == LockType.WRITE,
    )
