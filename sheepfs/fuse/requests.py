"""Requests that the mount answers itself, without libfuse: data, space, open files.

Always holds:
- Every request gets exactly one reply, from the callback or task that finishes it, written
  straight to the device.
- READ and WRITE start no task and copy nothing but a write's data out of the receive buffer.
- READ, WRITE and FSYNC are counted when their replies are written, if their VDI is open.
- QEMU is told that it need not widen what a guest writes to whole blocks. It would read the rest of
  the block first, and write garbage there if that read failed.
- A write with O_DSYNC or O_SYNC (or RWF_DSYNC) is flushed before its reply: the kernel sends no
  FSYNC of its own for files with FOPEN_DIRECT_IO.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from time import perf_counter_ns

import trio

from sheepfs.backend import Done
from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import MAX_VDI_SIZE
from sheepfs.core.wire import Buffer
from sheepfs.fuse import protocol
from sheepfs.fuse.copies import CopyRequests
from sheepfs.fuse.handles import Handles, Node
from sheepfs.fuse.lock_requests import LockRequests
from sheepfs.fuse.protocol import FallocateMode, Op, Seek
from sheepfs.fuse.replies import Replies

log = logging.getLogger(__name__)

SECTOR = 512
"""Size and alignment of direct I/O that programs are told; any other works as well."""
_O_DSYNC = os.O_DSYNC
_transfer = protocol.TRANSFER.unpack_from
_AT = protocol.IN_HEADER_SIZE
_OUT_SIZE = protocol.OUT_HEADER_SIZE
_pack_out = protocol.OUT_HEADER.pack
_writev = os.writev
_clock = perf_counter_ns

Handler = Callable[[int, memoryview], None]


class Requests:
    """Answers to the kernel's requests about open files.

    Args:
        replies: where the answers go.
        handles: the open files.
        nursery: for what must wait.
    """

    def __init__(self, replies: Replies, handles: Handles, nursery: trio.Nursery) -> None:
        self._replies = replies
        self._device = replies.device
        self._handles = handles
        self._by_fh = handles.by_fh
        self._nursery = nursery
        self.locks = LockRequests(replies, handles, nursery)
        self._copies = CopyRequests(replies, handles, nursery)
        answers: dict[Op, Handler] = {
            **self.locks.answers,
            **self._copies.answers,
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.FSYNC: self._fsync,
            Op.FLUSH: self._flush,
            Op.RELEASE: self._release,
            Op.FALLOCATE: lambda u, r: self._replies.start(u, self._fallocate, bytes(r)),
            Op.LSEEK: lambda u, r: self._replies.start(u, self._lseek, bytes(r)),
            Op.IOCTL: self._ioctl,
        }
        # Plain ints: looked up for every request.
        self.answers = {int(op): answer for op, answer in answers.items()}

    def interrupt(self, unique: int) -> bool:
        """End a request that waits and can be ended at once; False if it is no such request."""
        return self.locks.interrupt(unique) or self._copies.interrupt(unique)

    # -- data -----------------------------------------------------------------------------------

    def _read(self, unique: int, request: memoryview) -> None:
        fh, offset, size, _, _, _, _ = _transfer(request, _AT)
        handle = self._by_fh.get(fh)
        if handle is None:
            self._replies.fail(unique, errno.EBADF)
            return
        began = _clock()
        meter = handle.node.traffic.read

        def done(code: int, buffers: Sequence[Buffer]) -> None:
            if code:
                meter.errors += 1
                self._replies.fail(unique, code)
                return
            length = _OUT_SIZE
            for part in buffers:
                length += len(part)
            try:
                _writev(self._device, (_pack_out(length, 0, unique), *buffers))
            except OSError as error:
                self._replies.refused(error)
            meter.add(_clock() - began, length - _OUT_SIZE)

        handle.node.volume.read(offset, size, done)

    def _write(self, unique: int, request: memoryview) -> None:
        fh, offset, size, _, _, flags, _ = _transfer(request, _AT)
        handle = self._by_fh.get(fh)
        if handle is None:
            self._replies.fail(unique, errno.EBADF)
            return
        if len(request) != protocol.WRITE_DATA + size:
            raise ProtocolError(f"WRITE of {size} bytes in a request of {len(request)}")
        if offset + size > MAX_VDI_SIZE:
            self._replies.fail(unique, errno.EFBIG)
            return
        began = _clock()
        data = bytes(request[protocol.WRITE_DATA :])
        node = handle.node
        meter = node.traffic.write

        def replied(code: int) -> None:
            if code:
                meter.errors += 1
                self._replies.fail(unique, code)
                return
            try:
                _writev(self._device, (protocol.encode_written(unique, size),))
            except OSError as error:
                self._replies.refused(error)
            meter.add(_clock() - began, size)

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
            self._replies.fail(unique, errno.EBADF)
        elif handle.node.attached:
            began = _clock()
            meter = handle.node.traffic.flush

            def flushed(code: int) -> None:
                self._replies.fail(unique, code)
                if code:
                    meter.errors += 1
                else:
                    meter.add(_clock() - began, 0)

            handle.node.volume.flush(flushed)
        else:
            self._unattached_flush(unique, handle.node)

    def _unattached_flush(self, unique: int, node: Node) -> None:
        """What was never attached has nothing to flush; a detach under way flushes: wait."""
        if node.gate.locked():
            self._replies.start(unique, self._wait_gate, node.id.to_bytes(8, "little"))
        else:
            self._replies.fail(unique, 0)

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
            self._replies.fail(unique, errno.EBADF)
            return
        node = handle.node

        def done(code: int) -> None:
            if node.locks.release(owner):
                self._handles.wake(node)
                if not node.locks:
                    self._nursery.start_soon(self.locks.detach_and_reply, unique, node, code)
                    return
            self._replies.fail(unique, code)

        if handle.writable and node.attached:
            node.volume.flush(done)
        else:
            done(0)

    def _release(self, unique: int, request: memoryview) -> None:
        self._handles.release(protocol.decode_fh(request))
        self._replies.fail(unique, 0)

    def _ioctl(self, unique: int, request: memoryview) -> None:
        if protocol.decode_ioctl(request) == protocol.DIRECT_IO_LIMITS:
            self._replies.send((protocol.encode_direct_io_limits(unique, SECTOR, 1 << 30),))
        else:
            self._replies.fail(unique, errno.ENOTTY)

    # -- space ----------------------------------------------------------------------------------

    async def _fallocate(self, raw: bytes) -> bytes:
        """Punch and zero give space back; plain preallocation only moves the end of the file."""
        fh, offset, length, mode = protocol.decode_fallocate(raw)
        node = self._handles.get(fh).node
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
        volume = self._handles.get(fh).node.volume
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


def _flush_between(node: Node, done: Done) -> Done:
    """Give a callback for a write that flushes the volume before `done` is called."""

    def written(code: int) -> None:
        if code:
            done(code)
        else:
            node.volume.flush(done)

    return written
