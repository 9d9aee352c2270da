"""Reading a byte range through a map: what open VDIs and open snapshots have in common.

Always holds:
- Reads are plain callbacks; a task is started only for what must wait (a map page, an object
  whose replicas are not known to be equal, a member that cannot answer).
- A read that meets a loss of unflushed writes waits, and gives what is left: an error would pass,
  and whoever gets it may not be ready for that.
- A hole is zeros because the map says so (I3); so is an object that is being created.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import trio

from sheepfs.backend import ReadDone
from sheepfs.callbacks import Completed
from sheepfs.core.errors import LostWritesError, SheepError, to_errno
from sheepfs.core.geometry import OBJECT_SIZE, data_object, index_of, split
from sheepfs.core.wire import Buffer
from sheepfs.replication.objects import Later, ObjectReader
from sheepfs.volume.vdimap import VdiMap

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0

_ZEROS = memoryview(bytes(OBJECT_SIZE))

Opening = Callable[[], Coroutine[Any, Any, None]]
"""Makes an object's replicas equal."""


class MapReader:
    """Reads what `map` names."""

    def __init__(
        self, name: str, reader: ObjectReader, vdi_map: VdiMap, nursery: trio.Nursery
    ) -> None:
        self.name = name
        self._reader = reader
        self._map = vdi_map
        self._nursery = nursery

    _mending: trio.Event | None = None
    """Set when the map is again one of what there is; reads wait for that (losses.py)."""

    def _unusable(self) -> bool:
        """Whether nothing may be read any more, holes included."""
        return False

    def _to_open(self, oid: int) -> Opening | None:
        """Give what must happen before an object may be read; None: nothing."""
        return None

    def _later(
        self, work: Callable[[], Coroutine[Any, Any, None]], fail: Callable[[int], None]
    ) -> None:
        """Do in a task what cannot be done at once; an error goes to `fail` as errno."""

        async def task() -> None:
            try:
                await work()
            except SheepError as error:
                log.info("%s: %s", self.name, error)
                fail(to_errno(error))

        self._nursery.start_soon(task)

    def _read_range(self, offset: int, length: int, done: ReadDone) -> None:
        """Read a range that is within the VDI; buffers are valid during `done` only."""
        index, within = divmod(offset, OBJECT_SIZE)
        if within + length <= OBJECT_SIZE:
            self._read_piece(index, within, length, done)
            return
        pieces = list(split(offset, length))
        parts: list[Buffer] = [b""] * len(pieces)
        left = len(pieces)
        failed = 0

        def part_done(i: int, code: int, buffers: Any) -> None:
            nonlocal left, failed
            parts[i] = b"".join(buffers)
            failed = failed or code
            left -= 1
            if not left:
                done(failed, () if failed else parts)

        for i, (index, within, size) in enumerate(pieces):
            self._read_piece(index, within, size, lambda c, b, i=i: part_done(i, c, b))  # type: ignore[misc]

    def _read_piece(self, index: int, within: int, length: int, done: ReadDone) -> None:
        if self._mending is not None and not self._unusable():
            self._later(lambda: self._read_when_mended(index, within, length, done), failed(done))
            return
        layer = self._map.get(index)
        if layer == 0 or index in self._map.creating:
            if self._unusable():
                done(errno.EIO, ())
            else:
                done(0, (_ZEROS[:length],))
            return
        if layer is None:
            self._later(lambda: self._load_and_read(index, within, length, done), failed(done))
            return
        oid = data_object(layer, index)
        opening = self._to_open(oid)
        if opening is None:
            self._reader.read(oid, within, length, done, self._slowly(index, within, length, done))
        else:
            self._later(
                lambda: self._open_and_read(opening, oid, within, length, done), failed(done)
            )

    def _slowly(self, index: int, within: int, length: int, done: ReadDone) -> Later:
        """Give what reads in a task; if writes are lost meanwhile it reads what is left."""

        async def read(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
            try:
                await work()
            except LostWritesError as error:
                if self._unusable():
                    raise  # Nobody mends the map any more.
                log.info("%s: %s", self.name, error)
                await self._read_when_mended(index, within, length, done)

        return lambda work, fail: self._later(lambda: read(work), fail)

    async def _read_when_mended(self, index: int, within: int, length: int, done: ReadDone) -> None:
        await self._mended()
        self._read_piece(index, within, length, done)

    async def _mended(self) -> None:
        while self._mending is not None and not self._unusable():
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._mending.wait()

    async def _load_and_read(self, index: int, within: int, length: int, done: ReadDone) -> None:
        await self._map.load(index)
        self._read_piece(index, within, length, done)

    async def _open_and_read(
        self, opening: Opening, oid: int, within: int, length: int, done: ReadDone
    ) -> None:
        await opening()
        slowly = self._slowly(index_of(oid), within, length, done)
        self._reader.read(oid, within, length, done, slowly)


def failed(done: ReadDone) -> Completed:
    """Give a callback that ends a read with an errno."""
    return lambda code: done(code, ())
