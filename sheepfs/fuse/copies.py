"""COPY_FILE_RANGE: copies within the mount, which share data where the cluster can.

Always holds:
- Nothing is flushed and no lock of the mount is held meanwhile, so a copy within one VDI, or two
  in opposite directions, cannot block each other.
- A request does what one call of the backend does, and replies with how far that came; the
  program, or its C library, asks for the rest.
- A signal ends a copy at once: what was done of that request is not told, and may be done again.
- The kernel learns the target's new size from a reply; where that is an error, it is told to ask.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import trio

from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE
from sheepfs.fuse import protocol
from sheepfs.fuse.handles import Handles, code_of
from sheepfs.fuse.protocol import Op
from sheepfs.fuse.replies import Replies

LEGACY_LIMIT = (1 << 32) - OBJECT_SIZE
"""Where the source of a request may end whose reply has 32 bits for the length, counted from the
start of its first object: a border of objects, so that the next request shares whole ones."""


class CopyRequests:
    """Answers to COPY_FILE_RANGE requests."""

    def __init__(self, replies: Replies, handles: Handles, nursery: trio.Nursery) -> None:
        self._replies = replies
        self._handles = handles
        self._nursery = nursery
        self._running: dict[int, trio.CancelScope] = {}
        """Requests that an INTERRUPT ends at once: number -> scope of the task."""
        self.answers: dict[Op, Callable[[int, memoryview], None]] = {
            Op.COPY_FILE_RANGE: lambda u, r: self._start(u, bytes(r), protocol.pack_copied),
            Op.COPY_FILE_RANGE_64: lambda u, r: self._start(u, bytes(r), protocol.pack_copied_64),
        }

    def interrupt(self, unique: int) -> bool:
        """End a request; False if it is not one of these."""
        scope = self._running.get(unique)
        if scope is None:
            return False
        scope.cancel()
        return True

    def _start(self, unique: int, raw: bytes, pack: Callable[[int], bytes]) -> None:
        request = protocol.decode_copy_range(raw)
        if pack is protocol.pack_copied:
            limit = LEGACY_LIMIT - request.source_offset % OBJECT_SIZE
            request = request._replace(length=min(request.length, limit))
        scope = self._running[unique] = trio.CancelScope()
        self._nursery.start_soon(self._answer, unique, request, pack, scope)

    async def _answer(
        self,
        unique: int,
        request: protocol.CopyRange,
        pack: Callable[[int], bytes],
        scope: trio.CancelScope,
    ) -> None:
        code, copied = errno.EINTR, 0
        try:
            with scope:
                copied = await self._copy(request)
                code = 0
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception as error:
            code = code_of(error, "copy")
        finally:
            del self._running[unique]
        if code:
            self._replies.fail(unique, code)
            self._replies.changed(request.target_node)
        else:
            self._replies.send((protocol.encode_reply(unique, pack(copied)),))

    async def _copy(self, request: protocol.CopyRange) -> int:
        source = self._handles.get(request.source_fh).node
        target = self._handles.get(request.target_fh)
        if not target.writable:
            raise _error(errno.EBADF)
        if request.flags:
            raise _error(errno.EINVAL)
        if request.target_offset >= MAX_VDI_SIZE:
            raise _error(errno.EFBIG)
        length = min(request.length, MAX_VDI_SIZE - request.target_offset)
        code = await self._handles.attached(target.node)
        if code:
            raise _error(code)
        return await self._handles.namespace.copy_range(
            source.volume,
            request.source_offset,
            target.node.volume,
            request.target_offset,
            length,
        )


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
