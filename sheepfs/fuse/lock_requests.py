"""GETLK, SETLK and SETLKW: byte-range locks, which also attach and let go of VDIs.

Always holds:
- A lock through a writable handle, or one that says "I write" as QEMU does, needs the VDI
  attached here; a VDI that another mount holds is locked by a foreign owner.
- A snapshot is never attached: shared locks of it are this mount's alone, and a lock that says
  "I write" fails (EROFS).
- When the last lock of a VDI is dropped it is let go before the reply, so that the target of a
  live migration can attach it as soon as the source's unlock has returned.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import trio

from sheepfs.core.errors import ProtocolError
from sheepfs.fuse import protocol
from sheepfs.fuse.handles import Handle, Handles, Node
from sheepfs.fuse.locks import Lock, foreign_conflict, means_to_write
from sheepfs.fuse.protocol import LockType, Op
from sheepfs.fuse.replies import Replies

FOREIGN_LOCK_POLL_S = 0.5
"""How often a waiting lock looks whether another mount has let the VDI go."""


class LockRequests:
    """Answers to requests about locks."""

    def __init__(self, replies: Replies, handles: Handles, nursery: trio.Nursery) -> None:
        self._replies = replies
        self._handles = handles
        self._nursery = nursery
        self._waiting: dict[int, trio.CancelScope] = {}
        """Requests that an INTERRUPT ends at once: number -> scope of the task."""
        self.answers: dict[Op, Callable[[int, memoryview], None]] = {
            Op.GETLK: lambda u, r: replies.start(u, self._get_lock, bytes(r)),
            Op.SETLK: lambda u, r: self._set(u, bytes(r), wait=False),
            Op.SETLKW: lambda u, r: self._set(u, bytes(r), wait=True),
        }

    def interrupt(self, unique: int) -> bool:
        """End a request that waits for a lock; False if it is no such request."""
        scope = self._waiting.get(unique)
        if scope is None:
            return False
        scope.cancel()
        return True

    async def detach_and_reply(self, unique: int, node: Node, code: int = 0) -> None:
        """Let the VDI go, then reply with `code`, or the errno of a flush that failed."""
        detached = await self._handles.detach(node)
        self._replies.fail(unique, code or detached)

    async def _held_elsewhere(self, node: Node) -> bool:
        """Try to attach for a lock; True if another mount is the writer.

        Cancellation: ends the waiting only.
        """
        result = await self._handles.attached(node)
        if result and not node.held_elsewhere:
            raise OSError(result, os.strerror(result))
        return bool(result)

    async def _get_lock(self, raw: bytes) -> bytes:
        request = protocol.decode_lock(raw)
        handle = self._handles.get(request.fh)
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

    def _set(self, unique: int, raw: bytes, *, wait: bool) -> None:
        request = protocol.decode_lock(raw)
        handle = self._handles.by_fh.get(request.fh)
        if handle is None:
            self._replies.fail(unique, errno.EBADF)
        elif request.type == LockType.UNLOCK:
            node = handle.node
            released = node.locks.release(request.owner, request.start, request.end)
            if released:
                self._handles.wake(node)
            # The reply waits: a migration's target attaches when this returns. QEMU may have opened
            # the file anew, closed the handle with the locks, and unlock what it has no more.
            if not node.locks and ((released and node.attached) or node.leaving):
                self._nursery.start_soon(self.detach_and_reply, unique, node)
            else:
                self._replies.fail(unique, 0)
        else:
            wanted = _lock_of(request)
            scope = self._waiting[unique] = trio.CancelScope()
            self._nursery.start_soon(self._set_lock, unique, handle, wanted, wait, scope)

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
        if not self._replies.fail(unique, code) and not code:
            # The kernel gave up on the request, so nobody would ever unlock this.
            handle.node.locks.release(wanted.owner, wanted.start, wanted.end)
            self._handles.wake(handle.node)

    async def _acquire(self, handle: Handle, wanted: Lock, *, wait: bool) -> int:
        node = handle.node
        while True:
            writes = handle.writable or means_to_write(wanted, node.locks)
            if writes and node.volume.read_only:
                return errno.EROFS
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
