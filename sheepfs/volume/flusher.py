"""Flushing one attached VDI: data, then the map, then the record in etcd.

Always holds:
- A map page is stored only after what it names is durable on all members (DESIGN section 6).
- Nothing is deleted that the map names when it is stored, or when it is to be deleted: what was
  made again while its deletion waited may be back as it was before, version and all (losses.py).
- Flushes asked for while one runs share the next one.
- A failed flush that nobody waited for is told to the next one who asks: it is never lost.
- Once writes were lost, every flush fails until the VDI is let go, though it is carried out: nobody
  here knows which programs (of a guest, say) wrote what is gone, and each of them flushes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from sheepfs.callbacks import Completed, completion
from sheepfs.core.errors import LostWritesError, SheepError, to_errno
from sheepfs.core.geometry import BLOCK_SIZE, describe_oid, map_object
from sheepfs.core.wire import FLAG_CREATE, Op
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.vdimap import PAGES_PER_OBJECT, VdiMap

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 5.0


class Taken(NamedTuple):
    """What one flush makes durable besides data: map pages, and objects that are holes now."""

    pages: dict[int, bytes]
    discarded: dict[int, int]


class Flusher:
    """Makes one attached VDI durable.

    Args:
        layer: the layer id of the VDI's map objects.
        save: puts size and map objects in etcd if they changed.
        is_saved: tells whether that has nothing to do.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        replicator: Replicator,
        vdi_map: VdiMap,
        save: Callable[[], Awaitable[None]],
        is_saved: Callable[[], bool],
    ) -> None:
        self._name = name
        self._layer = layer
        self._replicator = replicator
        self._map = vdi_map
        self._save = save
        self._is_saved = is_saved
        self._waiters: list[Completed] = []
        self._served: list[Completed] = []
        """Who asked before the flush under way began."""
        self._closed = False
        self._wanted = trio.Event()
        self._busy = False
        """A flush is under way: who asks now waits for the next one."""
        self._pausing = 0
        self._freed = trio.Event()
        self._unreported = 0
        self._lost = 0
        """Once writes were lost: what every flush is answered with."""
        self.discarded: dict[int, int] = {}
        """Objects made holes -> their last version; deleted once the map is durable."""

    def flush(self, done: Completed) -> None:
        """Make every change completed before this call durable on every member (I1)."""
        if self._replicator.fenced or self._closed:
            done(errno.EIO)
        elif self._busy:
            self._waiters.append(done)
        elif not self._start_directly(done):
            self._waiters.append(done)
            self._wanted.set()

    def _start_directly(self, done: Completed) -> bool:
        """Where only data is to be flushed, the most frequent case, no task need wake up."""
        more = self._map.is_dirty or self.discarded or not self._is_saved()
        if more or self._unreported or self._lost or self._pausing:
            return False

        def flushed(good: bool) -> None:
            if not good and not self._closed:
                self._waiters.insert(0, done)
            self._end()
            if good or self._closed:
                done(0 if good else errno.EIO)

        self._busy = True
        started = self._replicator.unflushed.flush_directly(flushed)
        self._busy = started and self._busy
        return started

    def _end(self) -> None:
        self._busy = False
        self._freed.set()
        self._freed = trio.Event()
        if self._waiters:
            self._wanted.set()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Let no flush begin inside of the block, which begins when none is under way."""
        self._pausing += 1
        try:
            while self._busy:
                await self._freed.wait()
            self._busy = True
        finally:
            self._pausing -= 1
        try:
            yield
        finally:
            self._end()

    @property
    def is_asked(self) -> bool:
        """Whether anybody waits for a flush."""
        return bool(self._waiters or self._served or self._busy)

    def fail_waiting(self) -> None:
        """Answer everybody with EIO, now and from now on: the VDI is being let go."""
        self._closed = True
        waiters = self._served + self._waiters
        self._served, self._waiters = [], []
        for done in waiters:
            done(errno.EIO)

    async def run(self) -> None:
        """Flush for everyone who asked before it began, until cancelled; then nobody waits."""
        try:
            await self._run()
        finally:
            self.fail_waiting()

    async def _run(self) -> None:
        while True:
            with trio.move_on_after(FLUSH_EVERY_S):
                await self._wanted.wait()
            self._wanted = trio.Event()
            if self._busy or self._pausing:
                continue
            self._served, self._waiters = self._waiters, []
            # Without a waiter: bound what a crash can lose, like a disk that empties its cache.
            unflushed = self._replicator.unflushed.groups
            if self._served or unflushed or self._map.is_dirty or self.discarded:
                self._busy = True
                code = await self._try()
                self._end()
                self._tell(code)

    async def _try(self) -> int:
        try:
            await self._flush()
        except SheepError as error:
            log.error("%s: flush failed: %s", self._name, error)
            if isinstance(error, LostWritesError):
                self._replicator.unflushed.told()
                self._lost = to_errno(error)
            return to_errno(error)
        return 0

    def _tell(self, code: int) -> None:
        waiters, self._served = self._served, []
        if not waiters:
            self._unreported = code or self._unreported
            return
        code, self._unreported = code or self._unreported or self._lost, 0
        for done in waiters:
            done(code)

    async def _flush(self) -> None:
        await self.store(self.begin())

    def restart(self, layer: int, vdi_map: VdiMap) -> None:
        """Go on with another map, stored under another layer id; flushes are paused."""
        self._layer, self._map = layer, vdi_map
        self.discarded = {}

    def begin(self) -> Taken:
        """Take what is to be stored, as it is at this moment."""
        discarded, self.discarded = self.discarded, {}
        unnamed = {oid: v for oid, v in discarded.items() if not self._map.names(oid)}
        return Taken(self._map.take_dirty(), unnamed)

    async def store(self, taken: Taken) -> None:
        """Make data durable, then what was taken. Raises SheepError: it is taken back."""
        unflushed = self._replicator.unflushed
        try:
            await unflushed.make_durable()
            if taken.pages:
                await store_pages(self._replicator, self._layer, self._map, taken.pages)
                await unflushed.make_durable()
            await self._save()
        except BaseException:
            self._map.give_back(set(taken.pages))
            self.discarded = {**taken.discarded, **self.discarded}
            raise
        self._map.stored(taken.pages)
        for oid, version in taken.discarded.items():
            self._delete(oid, version)

    def _delete(self, oid: int, version: int) -> None:
        """Free a discarded object's space; best effort, the stored map does not name it."""
        if self._map.names(oid):
            return  # It was made again.
        replicator = self._replicator
        state = replicator.state(oid)
        if replicator.in_use(state):
            self.discarded.setdefault(oid, version)
            return
        if state.version not in (0, version):
            return  # It was made again.
        state.version, state.ready = version, True

        def deleted(code: int) -> None:
            if code:
                log.warning("%s: %s stays for now", self._name, describe_oid(oid))
            elif replicator.objects.get(oid) is state and not replicator.in_use(state):
                del replicator.objects[oid]

        replicator.change(state, Op.DELETE, 0, 0, b"", deleted)


async def store_pages(
    replicator: Replicator, layer: int, vdi_map: VdiMap, pages: Mapping[int, bytes]
) -> None:
    """Write map pages to the map objects of a layer id; `vdi_map.existing` learns of new ones.

    Durability: none before the next flush. Raises: SheepError.
    """
    for number, page in sorted(pages.items()):
        map_index, place = divmod(number, PAGES_PER_OBJECT)
        state = replicator.state(map_object(layer, map_index))
        flags = 0
        if not vdi_map.existing >> map_index & 1:
            flags = FLAG_CREATE
            state.ready = not state.opening
        await completion(
            lambda done, state=state, place=place, page=page, flags=flags: (  # type: ignore[misc]
                replicator.change(
                    state, Op.WRITE, place * BLOCK_SIZE, BLOCK_SIZE, page, done, flags
                )
            )
        )
        vdi_map.existing |= 1 << map_index
