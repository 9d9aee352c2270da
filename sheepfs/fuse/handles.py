"""Open files of the mount: handles as the kernel numbers them, and the volumes behind them.

Always holds:
- A `Node` exists exactly as long as one of its handles is open; all handles of a VDI share it.
- `Node.attached` is False while an attach or detach is under way: a change that comes then waits
  for `Node.gate`, so that none slips through to a volume that is being let go.
- A snapshot is opened for reading alone, so no change of it can come this far.
- Opening never attaches; the first change or lock through a writable handle does. The VDI is let
  go when its last lock is dropped (live migration), or else with its last handle.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable

import trio

from sheepfs.backend import Namespace, OpenVolume
from sheepfs.core.errors import HeldElsewhereError, ReadOnlyError, SheepError, to_errno
from sheepfs.fuse.locks import LockTable

log = logging.getLogger(__name__)


class Node:
    """An open VDI of this mount."""

    __slots__ = (
        "attached",
        "gate",
        "handles",
        "held_elsewhere",
        "id",
        "leaving",
        "locks",
        "traffic",
        "unlocked",
        "volume",
        "waiting",
    )

    def __init__(self, vdi: int, volume: OpenVolume) -> None:
        self.id = vdi
        self.volume = volume
        self.traffic = volume.traffic
        self.handles = 0
        self.attached = False
        self.held_elsewhere = False
        """The last try to attach failed since another mount holds the VDI."""
        self.locks = LockTable()
        self.unlocked = trio.Event()
        """Set, and replaced by a fresh one, whenever a lock is dropped."""
        self.leaving = 0
        """Tasks that let it go since a handle was closed that had the last lock."""
        self.gate = trio.Lock()
        self.waiting: list[Callable[[int], None]] = []
        """Changes that came before the VDI was attached, in order."""


class Handle:
    """One open file; `fh` is its number in the kernel's requests."""

    __slots__ = ("fh", "node", "writable")

    def __init__(self, fh: int, node: Node, *, writable: bool) -> None:
        self.fh = fh
        self.node = node
        self.writable = writable


def code_of(error: Exception, what: str) -> int:
    """Give the errno for an error and log it; what is no expected error gets a traceback."""
    if not isinstance(error, SheepError | OSError):
        log.error("%s failed", what, exc_info=error)
    elif not isinstance(error, HeldElsewhereError):
        log.warning("%s: %s", what, error)
    return to_errno(error)


class Handles:
    """The mount's table of open files."""

    def __init__(self, namespace: Namespace, nursery: trio.Nursery) -> None:
        self.by_fh: dict[int, Handle] = {}
        self.nodes: dict[int, Node] = {}
        self.namespace = namespace
        self._nursery = nursery
        self._numbers = itertools.count(1)
        self._closing: dict[int, int] = {}
        """VDI id -> handles released whose volume has not finished closing."""
        self._closed = trio.Event()
        self.stopping = False

    async def open(self, vdi: int, flags: int) -> Handle:
        """Open a VDI for one more handle; `flags` are those of open(2).

        Raises:
            SheepError: the backend cannot open it.
            ReadOnlyError: a snapshot cannot be opened for writing.
            OSError: ENOTCONN, the mount is being stopped.
        """
        if self.stopping:
            raise OSError(errno.ENOTCONN, "the mount is being stopped")
        volume = await self.namespace.open(vdi)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if volume.read_only and (writable or flags & os.O_TRUNC):
            await volume.close()
            raise ReadOnlyError(f"{volume.attributes().name} is a snapshot")
        # No await from here on: the handle must not be lost.
        node = self.nodes.get(vdi)
        if node is None:
            node = self.nodes[vdi] = Node(vdi, volume)
        node.handles += 1
        handle = Handle(next(self._numbers), node, writable=writable)
        self.by_fh[handle.fh] = handle
        return handle

    def get(self, fh: int) -> Handle:
        """Give an open handle. Raises OSError (EBADF) if there is none of that number."""
        handle = self.by_fh.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def release(self, fh: int) -> None:
        """Forget a handle at once, drop its locks, and close the volume in a task."""
        handle = self.by_fh.pop(fh, None)
        if handle is None:
            return
        self._nursery.start_soon(self._close, self._remove(handle))

    async def close(self, handle: Handle) -> None:
        """Close a handle that the mount opened for itself."""
        if self.by_fh.pop(handle.fh, None) is not None:
            await self._close(self._remove(handle))

    def _remove(self, handle: Handle) -> Node:
        node = handle.node
        node.handles -= 1
        if not node.handles:
            del self.nodes[node.id]
        self._closing[node.id] = self._closing.get(node.id, 0) + 1
        if node.locks.release_handle(handle.fh):
            self.wake(node)
            if node.handles and not node.locks:
                node.leaving += 1
                self._nursery.start_soon(self._leave, node)
        return node

    async def _close(self, node: Node) -> None:
        try:
            # Behind an attach or detach under way, so that the volume sees one thing at a time.
            async with node.gate:
                if not node.handles:
                    node.attached = False
                await node.volume.close()
        except Exception as error:
            code_of(error, f"closing VDI {node.id}")
        finally:
            self._closing[node.id] -= 1
            if not self._closing[node.id]:
                del self._closing[node.id]
            self._closed.set()
            self._closed = trio.Event()

    def is_open(self, vdi: int) -> bool:
        """Tell whether a program has the VDI open through this mount."""
        return vdi in self.nodes

    async def wait_closed(self, vdi: int) -> None:
        """Wait until handles that were released have let the VDI go.

        The kernel announces a close(2) without waiting for it: without this, `rm` right behind
        the end of a program would find its file held.
        """
        while vdi in self._closing:
            await self._closed.wait()

    # -- attach ---------------------------------------------------------------------------------

    async def attach(self, node: Node) -> None:
        """Make this mount the VDI's one writer, if it is not yet.

        Raises:
            HeldElsewhereError: another mount is.
            SheepError: the backend cannot tell or fence.
        """
        if node.attached:
            return
        # A last handle may just be letting the VDI go: attached before that has ended, the
        # volume would be let go under our feet.
        await self.wait_closed(node.id)
        async with node.gate:
            if node.attached:
                return
            try:
                await node.volume.attach()
            except HeldElsewhereError:
                node.held_elsewhere = True
                raise
            node.attached = True
            node.held_elsewhere = False

    async def detach(self, node: Node) -> int:
        """Flush a VDI and let others attach it, unless it was locked again meanwhile.

        Returns:
            0, or the errno of a flush that failed.
        """
        async with node.gate:
            if not node.attached or node.locks:
                return 0
            node.attached = False
            try:
                await node.volume.detach()
            except Exception as error:
                return code_of(error, f"detaching VDI {node.id}")
            return 0

    async def _leave(self, node: Node) -> None:
        try:
            await self.detach(node)
        finally:
            node.leaving -= 1

    def when_attached(self, node: Node, then: Callable[[int], None]) -> None:
        """Call `then` with 0 once the VDI is attached, or with the errno why it cannot be."""
        if node.attached:
            then(0)
            return
        node.waiting.append(then)
        if len(node.waiting) == 1:
            self._nursery.start_soon(self._attach_for_waiting, node)

    async def attached(self, node: Node) -> int:
        """Wait until the VDI is attached; give 0, or the errno why it cannot be.

        Cancellation: ends the waiting only; the attach itself goes on in a task of its own.
        """
        tried = trio.Event()
        result = 0

        def done(code: int) -> None:
            nonlocal result
            result = code
            tried.set()

        self.when_attached(node, done)
        await tried.wait()
        return result

    async def _attach_for_waiting(self, node: Node) -> None:
        code = 0
        try:
            await self.attach(node)
        except Exception as error:
            code = code_of(error, f"attaching VDI {node.id}")
        waiting, node.waiting = node.waiting, []
        for then in waiting:
            then(code)

    def wake(self, node: Node) -> None:
        """Let those who wait for a lock look again."""
        node.unlocked.set()
        node.unlocked = trio.Event()

    async def shut_down(self) -> None:
        """Flush and close everything; new opens are refused from now on."""
        self.stopping = True
        async with trio.open_nursery() as nursery:
            for handle in list(self.by_fh.values()):
                nursery.start_soon(self.close, handle)
        while self._closing:
            await self._closed.wait()
