"""One open VDI: byte ranges in, object reads and changes out.

Always holds:
- Reads and writes are plain callbacks; a task is started only for what must wait (a map page, an
  object whose replicas are not known to be equal, an attach, a member that cannot answer).
- Data before map: a map page is stored only after what it names is durable on all members.
- Nothing is changed before the attach is complete, that is before the old holder is fenced.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import trio

from sheepfs.backend import Attributes, Done, ReadDone
from sheepfs.callbacks import Completed, completion, countdown
from sheepfs.convergence import converge
from sheepfs.core.errors import SheepError, to_errno
from sheepfs.core.geometry import (
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    data_object,
    map_object,
    object_count,
    split,
)
from sheepfs.core.metadata import VdiRecord, check_vdi_size
from sheepfs.core.wire import FLAG_CREATE, Buffer, Op
from sheepfs.flusher import Flusher
from sheepfs.holes import seek
from sheepfs.net.attach import Attachment
from sheepfs.net.router import Router
from sheepfs.objects import ObjectReader
from sheepfs.replication import ObjectState, Replicator
from sheepfs.vdimap import VdiMap

log = logging.getLogger(__name__)

READER_MAP_S = 1.0
"""A reader that does not hold the VDI looks at the map again after this."""
_ZEROS = bytes(OBJECT_SIZE)


class Attacher(Protocol):
    """The etcd side of holding a VDI (sheepfs.cluster)."""

    async def attach(self, vdi: int) -> Attachment:
        """Become the one holder; every node refuses the former one on return."""
        ...

    async def is_held(self, vdi: int) -> bool:
        """Tell whether any mount holds the VDI."""
        ...

    async def save(self, attachment: Attachment, record: VdiRecord) -> None:
        """Keep size and usage in etcd."""
        ...

    async def detach(self, attachment: Attachment, record: VdiRecord, *, clean: bool) -> None:
        """Let others attach."""
        ...


class Volume:
    """An open VDI of this mount; implements `sheepfs.backend.OpenVolume`."""

    def __init__(
        self,
        name: str,
        record: VdiRecord,
        router: Router,
        attacher: Attacher,
        nursery: trio.Nursery,
    ) -> None:
        self.name = name
        self.record = record
        self.handles = 0
        self.on_idle: Callable[[Volume], None] = lambda volume: None
        self.replicator: Replicator | None = None
        self.attachment: Attachment | None = None
        self._router = router
        self._attacher = attacher
        self._nursery = nursery
        self._size = record.size
        self._saved_size = record.size
        self._allocated = record.allocated
        self._modified = record.modified
        self._pool = record.copies
        self._reader = ObjectReader(router, record.id, record.copies)
        self._map = VdiMap(record.maps, self._load_map)
        self._map_read = 0.0
        self._converge = False
        """The last holder did not detach: replicas are compared before the first read."""
        self._converging = trio.CancelScope()
        self._attaching = trio.Lock()
        self._flusher: Flusher | None = None
        self._scope: trio.CancelScope | None = None

    # -- what a file shows ------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Current size in bytes."""
        return self._size

    @property
    def stalled(self) -> str:
        """Why I/O does not move, or an empty string."""
        return self.replicator.stalled if self.replicator else ""

    @property
    def converging(self) -> bool:
        """Whether replicas may still differ from the time of an earlier, unclean holder."""
        return self._converge

    def attributes(self) -> Attributes:
        """Current attributes, with what is not yet in etcd."""
        record = self.record
        return Attributes(
            record.id, self.name, self._size, max(self._allocated, 0), record.mode, record.uid,
            record.gid, self._modified, record.changed,
        )  # fmt: skip

    # -- attach -----------------------------------------------------------------------------

    async def attach(self) -> None:
        """Become the one writer.

        Raises:
            HeldElsewhereError: another mount holds it; at once.
        """
        async with self._attaching:
            if self.attachment is not None:
                return
            attachment = await self._attacher.attach(self.record.id)
            record = attachment.record
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self.record = record
            self._map = VdiMap(record.maps, self._load_map)
            self._converge = not attachment.was_clean
            self._reader.token = attachment.token
            self.replicator = Replicator(
                self._router, self._nursery, record.id, record.copies, attachment.token,
                attachment.generation,
            )  # fmt: skip
            self._flusher = Flusher(
                self.name,
                record.layer,
                self.replicator,
                self._map,
                self._save_if_changed,
                self._is_saved,
            )
            if self._converge:
                # What the last holder had acknowledged and not flushed is this one's to flush.
                self.replicator.dirty.update(range(len(self._router.map.pools[record.copies])))
                self._converging = trio.CancelScope()
                self._nursery.start_soon(self._converge_all, self._map, self.replicator)
            self.attachment = attachment
            self._scope = trio.CancelScope()
            self._nursery.start_soon(_run_both, self._scope, self.replicator, self._flusher)

    async def detach(self) -> None:
        """Flush everything and let other mounts attach.

        Raises:
            SheepError: not everything could be made durable; the VDI is let go all the same,
                marked so that the next holder compares its replicas.
        """
        async with self._attaching:
            attachment, replicator, flusher = self.attachment, self.replicator, self._flusher
            if attachment is None or replicator is None or flusher is None:
                return
            self._converging.cancel()
            problem: SheepError | None = None
            while problem is None and not replicator.fenced:
                await replicator.settle()
                try:
                    await completion(flusher.flush)
                except SheepError as error:
                    problem = error
                unflushed = replicator.busy or replicator.dirty or self._map.is_dirty
                if not unflushed and not flusher.is_asked:
                    break
            # Nothing was changed since that flush, and from here on all changes attach again.
            self.attachment = self.replicator = self._flusher = None
            if self._scope:
                self._scope.cancel()
            replicator.close()
            self._reader.token = 0
            flusher.fail_waiting()
            self.record = self._current_record()
            self._map = VdiMap(self.record.maps, self._load_map)
            clean = problem is None and replicator.level and not self._converge
            await self._attacher.detach(attachment, self.record, clean=clean)
            self.record = dataclasses.replace(self.record, clean=clean)
            if problem is not None:
                raise problem

    async def _converge_all(self, vdi_map: VdiMap, replicator: Replicator) -> None:
        with self._converging:
            if await converge(vdi_map, replicator) and replicator is self.replicator:
                self._converge = False

    def _current_record(self) -> VdiRecord:
        return dataclasses.replace(
            self.record,
            size=self._size,
            maps=self._map.existing,
            allocated=max(self._allocated, 0),
            modified=self._modified,
        )

    async def close(self) -> None:
        """One file handle less; the last one flushes and detaches."""
        self.handles -= 1
        if not self.handles:
            try:
                await self.detach()
            finally:
                if not self.handles:
                    self.on_idle(self)

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

    # -- reads ------------------------------------------------------------------------------

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read up to the end of the VDI; buffers are valid during `done` only."""
        length = min(length, self._size - offset)
        if length <= 0:
            done(0, ())
            return
        if not self.attachment and not self._reader_map_is_good():
            self._later(lambda: self._read_as_reader(offset, length, done), _failed(done))
            return
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
        layer = self._map.get(index)
        replicator = self.replicator
        if layer == 0 or index in self._map.creating:
            if replicator is not None and replicator.fenced:
                done(errno.EIO, ())
            else:
                done(0, (memoryview(_ZEROS)[:length],))
            return
        if layer is None:
            self._later(lambda: self._load_and_read(index, within, length, done), _failed(done))
            return
        oid = data_object(layer, index)
        if replicator is not None:
            state = replicator.state(oid) if self._converge else replicator.objects.get(oid)
            if state is not None and not state.ready and (self._converge or state.uneven):
                self._later(
                    lambda: self._open_and_read(replicator, state, within, length, done),
                    _failed(done),
                )
                return
        self._reader.read(oid, within, length, done, self._later)

    async def _load_and_read(self, index: int, within: int, length: int, done: ReadDone) -> None:
        await self._map.load(index)
        self._read_piece(index, within, length, done)

    async def _open_and_read(
        self, replicator: Replicator, state: ObjectState, within: int, length: int, done: ReadDone
    ) -> None:
        await replicator.open(state)
        self._reader.read(state.oid, within, length, done, self._later)

    def _reader_map_is_good(self) -> bool:
        return bool(self._map_read) and trio.current_time() - self._map_read < READER_MAP_S

    async def _read_as_reader(self, offset: int, length: int, done: ReadDone) -> None:
        await self._look_again()
        self.read(offset, length, done)

    async def _look_again(self) -> None:
        """Without holding the VDI: after a crash of the holder, first converge (I2)."""
        if not self.record.clean and not await self._attacher.is_held(self.record.id):
            await self.attach()
        if self.attachment is None:
            self._map.forget_clean()
            self._map_read = trio.current_time()

    def refresh(self, name: str, record: VdiRecord) -> None:
        """Take a record read from etcd, while this mount does not hold the VDI."""
        self.name = name
        if self.attachment is None and not self._attaching.locked():
            self.record = record
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self._modified = record.modified
            self._map.existing = record.maps
        else:
            self.record = dataclasses.replace(
                self.record, mode=record.mode, uid=record.uid, gid=record.gid,
                changed=record.changed,
            )  # fmt: skip

    def set_modified(self, modified: float) -> None:
        """Set the time of the last change (`touch`), in seconds since 1970."""
        self._modified = modified

    def fence(self, reason: str) -> None:
        """Another holder took over: all I/O fails from now on."""
        if self.replicator is not None:
            self.replicator.fence(reason)

    async def _load_map(self, map_index: int, offset: int, length: int) -> bytes:
        oid = map_object(self.record.layer, map_index)
        if self._converge and self.replicator is not None:
            await self.replicator.open(self.replicator.state(oid))
        return await self._reader.fetch(oid, offset, length)

    # -- writes -----------------------------------------------------------------------------

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Write; `done` when every current member accepted it (I7). Grows the VDI."""
        end = offset + len(data)
        if self.attachment is None:
            self._later(lambda: self._attach_and_write(offset, data, done), done)
            return
        if end > MAX_VDI_SIZE:
            done(errno.EFBIG)
            return
        self._modified = time.time()
        index, within = divmod(offset, OBJECT_SIZE)
        if within + len(data) <= OBJECT_SIZE:
            self._write_piece(index, within, data, self._growing(end, done))
            return
        view = memoryview(data)
        done = self._growing(end, done)
        finish = countdown(len(list(split(offset, len(data)))), done)
        start = 0
        for index, within, size in split(offset, len(data)):
            self._write_piece(index, within, view[start : start + size], finish)
            start += size

    def _growing(self, end: int, done: Done) -> Done:
        """Only a write that succeeded moves the end of the file."""
        if end <= self._size:
            return done

        def grown(code: int) -> None:
            if not code:
                self._size = max(self._size, end)
            done(code)

        return grown

    async def _attach_and_write(self, offset: int, data: bytes, done: Done) -> None:
        await self.attach()
        self.write(offset, data, done)

    def _write_piece(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        replicator = self.replicator
        layer = self._map.get(index)
        if replicator is None:
            # Detached while this piece waited for the map.
            self._later(lambda: self._attach_and_write_piece(index, within, data, done), done)
        elif layer == self.record.layer:
            oid = data_object(layer, index)
            state = replicator.objects.get(oid) or replicator.state(oid)
            replicator.change(state, Op.WRITE, within, len(data), data, done)
        elif layer is None:
            self._later(lambda: self._load_and_write(index, within, data, done), done)
        elif layer == 0:
            self._create(replicator, index, within, data, done)
        else:
            log.error("%s: object %d belongs to layer %d, not the VDI's", self.name, index, layer)
            done(errno.EIO)

    async def _attach_and_write_piece(
        self, index: int, within: int, data: Buffer, done: Completed
    ) -> None:
        await self.attach()
        self._write_piece(index, within, data, done)

    async def _load_and_write(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        await self._map.load(index)
        self._write_piece(index, within, data, done)

    def _create(
        self, replicator: Replicator, index: int, within: int, data: Buffer, done: Completed
    ) -> None:
        """First write to a hole: the object is new, whatever a replica may have of that name."""
        vdi_map = self._map
        oid = data_object(self.record.layer, index)
        state = replicator.state(oid)
        state.ready = not state.opening
        if self._flusher is not None:
            self._flusher.discarded.pop(oid, None)
        self._allocated += OBJECT_SIZE
        vdi_map.begin_create(index, self.record.layer)

        def created(code: int) -> None:
            vdi_map.end_create(index, not code)
            if code:
                self._allocated -= OBJECT_SIZE
                if self._flusher is not None:
                    # Some members may have made it.
                    self._flusher.discarded[oid] = state.version
            done(code)

        replicator.change(state, Op.WRITE, within, len(data), data, created, FLAG_CREATE)

    # -- holes ------------------------------------------------------------------------------

    async def punch(self, offset: int, length: int) -> None:
        """Give back the space of a range; it reads as zeros."""
        await self.attach()
        length = min(length, self._size - offset)
        if length <= 0:
            return
        self._modified = time.time()
        end = offset + length
        to_the_end = end >= self._size
        last = object_count(end)
        index = self._map.skip_holes(offset // OBJECT_SIZE, last)
        while index < last:
            start = max(offset - index * OBJECT_SIZE, 0)
            stop = min(end - index * OBJECT_SIZE, OBJECT_SIZE)
            if to_the_end and index == last - 1:
                stop = OBJECT_SIZE
            await self._punch_piece(index, start, stop - start)
            index = self._map.skip_holes(index + 1, last)

    async def _punch_piece(self, index: int, within: int, size: int) -> None:
        if self._map.get(index) is None:
            await self._map.load(index)
        layer = self._map.get(index)
        replicator, flusher = self.replicator, self._flusher
        if not layer or replicator is None or flusher is None:
            return
        oid = data_object(layer, index)
        if size == OBJECT_SIZE and index not in self._map.creating:
            state = replicator.state(oid)
            if not state.ready:
                await replicator.open(state)
            if self._map.get(index) != layer or index in self._map.creating:
                return  # Somebody else punched it meanwhile.
            self._map.discard(index)
            flusher.discarded[oid] = state.version
            self._allocated -= OBJECT_SIZE
            return
        await completion(
            lambda done: replicator.change(replicator.state(oid), Op.PUNCH, within, size, b"", done)
        )

    async def resize(self, size: int) -> None:
        """Cut or grow; what is cut is gone."""
        check_vdi_size(size)
        await self.attach()
        cut = size < self._size
        if cut:
            await self.punch(size, self._size - size)
        self._size = size
        self._modified = time.time()
        if cut and self._flusher is not None:
            # The size is saved behind the holes: nobody may find the former bytes beyond it.
            await completion(self._flusher.flush)
        else:
            await self._save()

    async def seek_data(self, offset: int) -> int | None:
        """Give the first offset >= `offset` that may hold data; None if there is none."""
        return await self._seek(offset, data=True)

    async def seek_hole(self, offset: int) -> int:
        """Give the first offset >= `offset` in a hole; the end counts as one."""
        found = await self._seek(offset, data=False)
        return self._size if found is None else found

    async def _seek(self, offset: int, *, data: bool) -> int | None:
        if not self.attachment and not self._reader_map_is_good():
            await self._look_again()
        return await seek(self._map, self._extents, self._size, offset, data=data)

    async def _extents(self, oid: int) -> bytes:
        replicator = self.replicator
        if self._converge and replicator is not None:
            await replicator.open(replicator.state(oid))
        return await self._reader.extents(oid)

    # -- flush ------------------------------------------------------------------------------

    def flush(self, done: Done) -> None:
        """Make every write completed before this call durable on every member (I1)."""
        if self._flusher is None:
            done(0)
        else:
            self._flusher.flush(done)

    def _is_saved(self) -> bool:
        return self._size == self._saved_size and self._map.existing == self.record.maps

    async def _save_if_changed(self) -> None:
        if not self._is_saved():
            await self._save()

    async def _save(self) -> None:
        if self.attachment is not None:
            record = self._current_record()
            await self._attacher.save(self.attachment, record)
            self.record = record
            self._saved_size = record.size


def _failed(done: ReadDone) -> Completed:
    return lambda code: done(code, ())


async def _run_both(scope: trio.CancelScope, replicator: Replicator, flusher: Flusher) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replicator.run)
            nursery.start_soon(flusher.run)
