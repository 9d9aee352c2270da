"""One open VDI: byte ranges in, object reads and changes out.

Always holds:
- Reads and writes are plain callbacks; a task is started only for what must wait (a map page, an
  object whose replicas are not known to be equal, an attach, a member that cannot answer).
- Data before map: a map page is stored only after what it names is durable on all members.
- Whoever does not hold the VDI reads what is stored, and after a crash converges first (I2).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from sheepfs.backend import ReadDone
from sheepfs.core.errors import UnreachableError
from sheepfs.core.geometry import map_object
from sheepfs.core.metadata import VdiRecord
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import Buffer
from sheepfs.holding.holding import Attacher
from sheepfs.net.router import Router
from sheepfs.volume.attaching import Holder
from sheepfs.volume.holes import seek
from sheepfs.volume.reading import Opening, failed

log = logging.getLogger(__name__)

READER_MAP_S = 1.0
"""A reader that does not hold the VDI looks at the map again after this."""


class Volume(Holder):
    """An open VDI of this mount; implements `sheepfs.backend.OpenVolume`."""

    read_only = False

    def __init__(
        self,
        name: str,
        record: VdiRecord,
        router: Router,
        attacher: Attacher,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(name, record, router, attacher, nursery)
        self._reader.is_unsure = lambda: self._mending is not None
        self.handles = 0
        self.traffic = Traffic()
        self.on_idle: Callable[[Volume], None] = lambda volume: None
        self._map_read = 0.0

    @property
    def stalled(self) -> str:
        """Why I/O does not move, or an empty string."""
        return self._unsaved or (self.replicator.stalled if self.replicator else "")

    @property
    def converging(self) -> bool:
        """Whether replicas may still differ from the time of an earlier, unclean holder."""
        return self._convergence.pending

    def fence(self, reason: str) -> None:
        """Another holder took over: all I/O fails from now on."""
        if self.replicator is not None:
            self.replicator.fence(reason)

    async def close(self) -> None:
        """One file handle less; the last one flushes and detaches."""
        self.handles -= 1
        if not self.handles:
            try:
                await self.detach()
            finally:
                if not self.handles:
                    self.on_idle(self)

    # -- reads ------------------------------------------------------------------------------

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read up to the end of the VDI; buffers are valid during `done` only."""
        length = min(length, self._size - offset)
        if length <= 0:
            done(0, ())
            return
        if self.attachment:
            self._read_range(offset, length, done)
        elif self._reader_map_is_good():
            self._read_range(offset, length, self._read_once_more(offset, length, done))
        else:
            self._later(lambda: self._read_as_reader(offset, length, done), failed(done))

    def _read_once_more(self, offset: int, length: int, done: ReadDone) -> ReadDone:
        """The holder may have replaced what this reader's map names, and reclaim removed it."""

        async def again() -> None:
            await self.look_again()
            self._read_range(offset, length, done)

        def read(code: int, buffers: Sequence[Buffer]) -> None:
            if code and self.attachment is None:
                self._later(again, failed(done))
            else:
                done(code, buffers)

        return read

    def _unusable(self) -> bool:
        return self.replicator is not None and self.replicator.fenced

    def _to_open(self, oid: int) -> Opening | None:
        replicator = self.replicator
        if replicator is None:
            return None
        state = replicator.state(oid) if self._convergence.pending else replicator.objects.get(oid)
        if state is None or state.ready or not (self._convergence.pending or state.uneven):
            return None
        return partial(replicator.open, state)

    async def _load_map(self, map_index: int, offset: int, length: int) -> bytes:
        oid = map_object(self.record.map, map_index)
        opening = self._to_open(oid)
        if opening is not None:
            await opening()
        return await self._reader.fetch(oid, offset, length)

    async def _clear_end(self) -> None:
        """Find out first which pages of the map hold anything: most of 1,024 do not."""
        for map_index in range(self._map.existing.bit_length()):
            if self._map.existing >> map_index & 1:
                oid = map_object(self.record.map, map_index)
                opening = self._to_open(oid)
                if opening is not None:
                    await opening()
                filled = int.from_bytes(await self._reader.extents(oid), "little")
                self._map.take_empty(map_index, filled)
        await self._clear_beyond_end()

    # -- reading without holding ------------------------------------------------------------

    def _reader_map_is_good(self) -> bool:
        return bool(self._map_read) and trio.current_time() - self._map_read < READER_MAP_S

    async def _read_as_reader(self, offset: int, length: int, done: ReadDone) -> None:
        await self.look_again()
        length = min(length, self._size - offset)
        if length <= 0:
            done(0, ())
        else:
            self._read_range(offset, length, self._read_once_more(offset, length, done))

    async def look_again(self) -> None:
        """Without holding the VDI: see what is stored now; after a crash first converge (I2)."""
        if self.attachment is None:
            try:
                name, record = await self._attacher.read_record(self.record.id)
                self.refresh(name, record)
            except UnreachableError as error:
                # Reading goes on without etcd (I10).
                log.debug("%s: its record cannot be read now: %s", self.name, error)
        if not self.record.clean and not await self._attacher.is_held(self.record.id):
            await self._attach()
        if self.attachment is None:
            self._map.forget_clean()
            self._map_read = trio.current_time()

    # -- holes ------------------------------------------------------------------------------

    async def seek_data(self, offset: int) -> int | None:
        """Give the first offset >= `offset` that may hold data; None if there is none."""
        return await self._seek(offset, data=True)

    async def seek_hole(self, offset: int) -> int:
        """Give the first offset >= `offset` in a hole; the end counts as one."""
        found = await self._seek(offset, data=False)
        return self._size if found is None else found

    async def _seek(self, offset: int, *, data: bool) -> int | None:
        if not self.attachment and not self._reader_map_is_good():
            await self.look_again()
        await self._mended()
        return await seek(self._map, self._extents, self._size, offset, data=data)

    async def _extents(self, oid: int) -> bytes:
        replicator = self.replicator
        if self._convergence.pending and replicator is not None:
            await replicator.open(replicator.state(oid))
        return await self._reader.extents(oid)
