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
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from sheepfs.backend import Attributes, Done, ReadDone
from sheepfs.callbacks import Completed, completion, countdown
from sheepfs.capture import Begin, Captured, Commit, capture
from sheepfs.convergence import converge
from sheepfs.copyonwrite import CopyOnWrite
from sheepfs.core.errors import FencedError, SheepError
from sheepfs.core.geometry import (
    MAP_ENTRIES_PER_BLOCK,
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    copies_of,
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
from sheepfs.net.groups import plain_errors
from sheepfs.net.router import Router
from sheepfs.objects import ObjectReader
from sheepfs.reading import MapReader, Opening, failed
from sheepfs.replication import Replicator
from sheepfs.sweeping import find_orphans
from sheepfs.vdimap import PAGES_PER_OBJECT, VdiMap

log = logging.getLogger(__name__)

READER_MAP_S = 1.0
"""A reader that does not hold the VDI looks at the map again after this."""
GATE_POLL_S = 0.001
PARALLEL_COPIES = 8


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

    async def detach(
        self, attachment: Attachment, record: VdiRecord, *, clean: bool, dropped: bool
    ) -> None:
        """Let others attach; `dropped`: objects of frozen layers may be dead now."""
        ...


class Volume(MapReader):
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
        reader = ObjectReader(router, record.id)
        super().__init__(name, reader, VdiMap(record.maps, self._load_map), nursery)
        self.record = record
        self.handles = 0
        self.on_idle: Callable[[Volume], None] = lambda volume: None
        self.replicator: Replicator | None = None
        self.attachment: Attachment | None = None
        self.open_layer = record.layer
        """Takes writes; in etcd it may still be the record's `next`."""
        self._router = router
        self._attacher = attacher
        self._size = record.size
        self._saved_size = record.size
        self._allocated = record.allocated
        self._modified = record.modified
        self._map_read = 0.0
        self._converge = False
        """The last holder did not detach: replicas are compared before the first read."""
        self._converged = trio.Event()
        self._converging = trio.CancelScope()
        self._attaching = trio.Lock()
        self._capturing = trio.Lock()
        self.flusher: Flusher | None = None
        self._copies: CopyOnWrite | None = None
        self._scope: trio.CancelScope | None = None
        self._direct = False
        """Changes may go on: attached, and no snapshot holds them up."""
        self._borrowed = False
        self._held: list[Callable[[], None]] = []
        """Changes that came while a snapshot held them up, in order."""
        self._passing = 0
        """Changes that passed the gate and are not with the replicator yet."""

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
            record.gid, self._modified, record.changed, False, record.family,
        )  # fmt: skip

    # -- attach -----------------------------------------------------------------------------

    async def attach(self) -> None:
        """Become the one writer.

        Raises:
            HeldElsewhereError: another mount holds it; at once.
        """
        self._borrowed = False
        await self._attach()

    async def borrow(self) -> None:
        """Become the writer until `give_back`, unless somebody attaches meanwhile.

        Raises:
            HeldElsewhereError: another mount holds it; at once.
        """
        self._borrowed = self._borrowed or self.attachment is None
        await self._attach()

    async def give_back(self) -> None:
        """Let the VDI go if it was attached by `borrow` alone."""
        if self._borrowed:
            self._borrowed = False
            await self.detach()

    async def _attach(self) -> None:
        async with self._attaching:
            if self.attachment is not None:
                return
            attachment = await self._attacher.attach(self.record.id)
            record = attachment.record
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self.record = record
            self.open_layer = record.layer
            self._converge = not attachment.was_clean
            self._reader.token = attachment.token
            self.replicator = Replicator(
                self._router, self._nursery, record.id, attachment.token, attachment.generation
            )
            self._use_map(self.replicator)
            self._converged = trio.Event()
            if self._converge:
                # What the last holder had acknowledged and not flushed is this one's to flush.
                self.replicator.unflushed.add_everything(
                    {copies_of(record.layer), copies_of(record.map)}
                )
                self._converging = trio.CancelScope()
                self._nursery.start_soon(self._converge_all, self._map, self.replicator)
            else:
                self._converged.set()
            self.attachment = attachment
            self._direct = True
            self._scope = trio.CancelScope()
            assert self.flusher is not None
            self._nursery.start_soon(_run_both, self._scope, self.replicator, self.flusher)

    def _use_map(self, replicator: Replicator) -> None:
        """Begin with the map that the record names."""
        record = self.record
        self._map = VdiMap(record.maps, self._load_map)
        self.flusher = Flusher(
            self.name, record.map, replicator, self._map, self._save_if_changed, self._is_saved
        )
        self._copies = self._new_copies(replicator)

    def _new_copies(self, replicator: Replicator) -> CopyOnWrite:
        return CopyOnWrite(replicator, self._reader, self._map, self._nursery, self._half_made)

    def _half_made(self, oid: int, version: int) -> None:
        """Some members may have an object that the map will not name."""
        if self.flusher is not None:
            self.flusher.discarded[oid] = version

    async def detach(self) -> None:
        """Flush everything and let other mounts attach.

        Raises:
            SheepError: not everything could be made durable; the VDI is let go all the same,
                marked so that the next holder compares its replicas.
        """
        async with self._capturing, self._attaching:
            attachment, replicator, flusher = self.attachment, self.replicator, self.flusher
            if attachment is None or replicator is None or flusher is None:
                return
            self._converging.cancel()
            problem: SheepError | None = None
            while problem is None and not replicator.fenced:
                await self._settle(replicator)
                try:
                    await completion(flusher.flush)
                except SheepError as error:
                    problem = error
                unflushed = self._is_busy(replicator) or replicator.unflushed.groups
                if not unflushed and not self._map.is_dirty and not flusher.is_asked:
                    break
            dropped = self._copies is not None and self._copies.copied > 0
            # Nothing was changed since that flush, and from here on all changes attach again.
            self.attachment = self.replicator = self.flusher = self._copies = None
            self._direct = False
            if self._scope:
                self._scope.cancel()
            replicator.close()
            self._reader.token = 0
            flusher.fail_waiting()
            self.record = dataclasses.replace(self._current_record(), layer=self.open_layer, next=0)
            self._map = VdiMap(self.record.maps, self._load_map)
            clean = problem is None and replicator.level and not self._converge
            await self._attacher.detach(attachment, self.record, clean=clean, dropped=dropped)
            self.record = dataclasses.replace(self.record, clean=clean)
            if problem is not None:
                raise problem

    async def _converge_all(self, vdi_map: VdiMap, replicator: Replicator) -> None:
        with self._converging:
            if await converge(vdi_map, replicator) and replicator is self.replicator:
                await self._sweep(vdi_map, replicator)
                self._converge = False
                self._converged.set()

    async def _sweep(self, vdi_map: VdiMap, replicator: Replicator) -> None:
        """Remove what the former holder made and the map does not name; best effort."""
        try:
            orphans = await find_orphans(replicator, vdi_map, self.open_layer, self.record.map)
        except SheepError as error:
            log.warning("%s: orphans of the last holder stay: %s", self.name, error)
            return
        if self.flusher is not None and orphans:
            log.info("%s: removing %d objects that the map never named", self.name, len(orphans))
            self.flusher.discarded = {**orphans, **self.flusher.discarded}

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

    # -- reads ------------------------------------------------------------------------------

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read up to the end of the VDI; buffers are valid during `done` only."""
        length = min(length, self._size - offset)
        if length <= 0:
            done(0, ())
            return
        if not self.attachment and not self._reader_map_is_good():
            self._later(lambda: self._read_as_reader(offset, length, done), failed(done))
            return
        self._read_range(offset, length, done)

    def _unusable(self) -> bool:
        return self.replicator is not None and self.replicator.fenced

    def _to_open(self, oid: int) -> Opening | None:
        replicator = self.replicator
        if replicator is None:
            return None
        state = replicator.state(oid) if self._converge else replicator.objects.get(oid)
        if state is None or state.ready or not (self._converge or state.uneven):
            return None
        return partial(replicator.open, state)

    def _reader_map_is_good(self) -> bool:
        return bool(self._map_read) and trio.current_time() - self._map_read < READER_MAP_S

    async def _read_as_reader(self, offset: int, length: int, done: ReadDone) -> None:
        await self.look_again()
        self.read(offset, length, done)

    async def look_again(self) -> None:
        """Without holding the VDI: after a crash of the holder, first converge (I2)."""
        if not self.record.clean and not await self._attacher.is_held(self.record.id):
            await self._attach()
        if self.attachment is None:
            self._map.forget_clean()
            self._map_read = trio.current_time()

    def refresh(self, name: str, record: VdiRecord) -> None:
        """Take a record read from etcd, while this mount does not hold the VDI."""
        self.name = name
        if self.attachment is None and not self._attaching.locked():
            if record.map != self.record.map:
                # Rolled back on another host.
                self._map = VdiMap(record.maps, self._load_map)
            self.record = record
            self.open_layer = record.layer
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self._modified = record.modified
            self._map.existing = record.maps
        else:
            self.record = dataclasses.replace(
                self.record, mode=record.mode, uid=record.uid, gid=record.gid,
                changed=record.changed, attributes=record.attributes, parent=record.parent,
            )  # fmt: skip

    def set_modified(self, modified: float) -> None:
        """Set the time of the last change (`touch`), in seconds since 1970."""
        self._modified = modified

    def fence(self, reason: str) -> None:
        """Another holder took over: all I/O fails from now on."""
        if self.replicator is not None:
            self.replicator.fence(reason)

    async def _load_map(self, map_index: int, offset: int, length: int) -> bytes:
        oid = map_object(self.record.map, map_index)
        if self._converge and self.replicator is not None:
            await self.replicator.open(self.replicator.state(oid))
        return await self._reader.fetch(oid, offset, length)

    # -- writes -----------------------------------------------------------------------------

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Write; `done` when every current member accepted it (I7). Grows the VDI."""
        end = offset + len(data)
        if not self._direct:
            self._write_later(offset, data, done)
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

    def _write_later(self, offset: int, data: bytes, done: Done) -> None:
        if self.attachment is None:
            self._later(lambda: self._attach_and_write(offset, data, done), done)
        else:
            self._held.append(lambda: self.write(offset, data, done))

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
        await self._attach()
        self.write(offset, data, done)

    def _write_piece(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        replicator = self.replicator
        layer = self._map.get(index)
        if replicator is None:
            # Detached while this piece waited for the map.
            self._later(lambda: self._attach_and_write_piece(index, within, data, done), done)
        elif layer == self.open_layer:
            oid = data_object(layer, index)
            state = replicator.objects.get(oid) or replicator.state(oid)
            replicator.change(state, Op.WRITE, within, len(data), data, done)
        elif layer is None:
            self._passing += 1
            self._later(lambda: self._load_and_write(index, within, data, done), done)
        elif layer == 0:
            self._create(replicator, index, within, data, done)
        elif not self._copying(index, lambda: self._write_piece(index, within, data, done)):
            self._copy(index, Op.WRITE, within, len(data), data, done)

    def _copying(self, index: int, again: Callable[[], None]) -> bool:
        """If the object is just being copied, have `again` called after that."""
        return self._copies is not None and self._copies.wait_for(index, again)

    def _copy(
        self, index: int, op: int, within: int, span: int, data: Buffer, done: Completed
    ) -> None:
        """Change an object of a frozen layer: in a copy of the open layer."""
        assert self._copies is not None, "the caller has seen the replicator"
        self._copies.change(index, self.open_layer, op, within, span, data, done)

    async def _attach_and_write_piece(
        self, index: int, within: int, data: Buffer, done: Completed
    ) -> None:
        await self._attach()
        self._write_piece(index, within, data, done)

    async def _load_and_write(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        try:
            await self._map.load(index)
            self._write_piece(index, within, data, done)
        finally:
            self._passing -= 1

    def _create(
        self, replicator: Replicator, index: int, within: int, data: Buffer, done: Completed
    ) -> None:
        """First write to a hole: the object is new, whatever a replica may have of that name."""
        vdi_map = self._map
        oid = data_object(self.open_layer, index)
        state = replicator.state(oid)
        state.ready = not state.opening
        if self.flusher is not None:
            self.flusher.discarded.pop(oid, None)
        self._allocated += OBJECT_SIZE
        vdi_map.begin_create(index, self.open_layer)

        def created(code: int) -> None:
            vdi_map.end_create(index, not code)
            if code:
                self._allocated -= OBJECT_SIZE
                if self.flusher is not None:
                    # Some members may have made it.
                    self.flusher.discarded[oid] = state.version
            done(code)

        replicator.change(state, Op.WRITE, within, len(data), data, created, FLAG_CREATE)

    # -- holes ------------------------------------------------------------------------------

    async def punch(self, offset: int, length: int) -> None:
        """Give back the space of a range; it reads as zeros."""
        await self._attach()
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
        while not self._direct:
            await self._attach()
            await trio.sleep(GATE_POLL_S)
        self._passing += 1
        try:
            if self._map.get(index) is None:
                await self._map.load(index)
            if size == OBJECT_SIZE and index not in self._map.creating:
                await self._discard(index)
            else:
                await completion(partial(self._punch_part, index, within, size))
        finally:
            self._passing -= 1

    def _punch_part(self, index: int, within: int, size: int, done: Completed) -> None:
        layer = self._map.get(index)
        replicator = self.replicator
        if not layer or replicator is None:
            done(0)
        elif layer == self.open_layer:
            state = replicator.state(data_object(layer, index))
            replicator.change(state, Op.PUNCH, within, size, b"", done)
        elif not self._copying(index, lambda: self._punch_part(index, within, size, done)):
            self._copy(index, Op.PUNCH, within, size, b"", done)

    async def _discard(self, index: int) -> None:
        """Make a whole object a hole; its data goes once the map is durable, if it is ours."""
        layer = self._map.get(index)
        replicator, flusher, copies = self.replicator, self.flusher, self._copies
        if not layer or replicator is None or flusher is None or copies is None:
            return
        if layer != self.open_layer:
            if self._copying(index, lambda: None):
                # Then it is ours.
                await completion(partial(self._after_copy, index))
                await self._discard(index)
                return
            self._map.discard(index)
            copies.copied += 1
        else:
            state = replicator.state(data_object(layer, index))
            if not state.ready:
                await replicator.open(state)
            if self._map.get(index) != layer or index in self._map.creating:
                return  # Somebody else punched it meanwhile.
            self._map.discard(index)
            flusher.discarded[state.oid] = state.version
        self._allocated -= OBJECT_SIZE

    def _after_copy(self, index: int, done: Completed) -> None:
        if not self._copying(index, lambda: done(0)):
            done(0)

    async def resize(self, size: int) -> None:
        """Cut or grow; what is cut is gone."""
        check_vdi_size(size)
        await self._attach()
        cut = size < self._size
        if cut:
            await self.punch(size, self._size - size)
        self._size = size
        self._modified = time.time()
        if cut and self.flusher is not None:
            # The size is saved behind the holes: nobody may find the former bytes beyond it.
            await completion(self.flusher.flush)
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
            await self.look_again()
        return await seek(self._map, self._extents, self._size, offset, data=data)

    async def _extents(self, oid: int) -> bytes:
        replicator = self.replicator
        if self._converge and replicator is not None:
            await replicator.open(replicator.state(oid))
        return await self._reader.extents(oid)

    # -- snapshots --------------------------------------------------------------------------

    async def capture(self, begin: Begin, commit: Commit) -> None:
        """Freeze what is written so far under a map of its own (docs/snapshots.md).

        Args:
            begin: gives the ids of two new layers: the next open one, and that of the map.
            commit: makes it known in etcd.

        Durability: what was complete before the call is durable when `commit` is called.
        Ordering: of two writes of which one was complete before the other was issued, it has
        both, the first, or none.

        Raises:
            HeldElsewhereError: another mount holds the VDI.
            SheepError: what `begin` or `commit` raised; or the data could not be made durable.
        """
        async with self._capturing:
            await self._attach()
            await self._converged.wait()
            await capture(self, begin, commit)

    def committed(self, record: VdiRecord) -> None:
        """Take the record as it is in etcd now."""
        self.record = record
        self._saved_size = record.size

    async def replace_map(self, publish: Callable[[Replicator], Awaitable[VdiRecord]]) -> None:
        """Go on with another map; what only the former one names is gone.

        Args:
            publish: makes the map and then makes it the VDI's in etcd; gives the record.
        """
        async with self._capturing:
            await self._attach()
            replicator, flusher = self.replicator, self.flusher
            if replicator is None or flusher is None:
                raise FencedError(f"{self.name} was let go meanwhile")
            async with flusher.paused():
                try:
                    await self.hold_changes()
                    record = await publish(replicator)
                    self.committed(record)
                    self._size, self._allocated = record.size, record.allocated
                    self._modified = record.modified
                    self.open_layer = record.layer
                    self._map = VdiMap(record.maps, self._load_map)
                    flusher.restart(record.map, self._map)
                    self._copies = self._new_copies(replicator)
                    # Frozen objects were level when they were frozen.
                    self._converging.cancel()
                    self._converge = False
                    self._converged.set()
                finally:
                    self.release_changes()

    async def rewrite(
        self, chosen: Callable[[int], bool], progress: Callable[[int, int], None]
    ) -> None:
        """Copy to the open layer every object whose layer is chosen.

        Args:
            progress: told (objects done, objects in all) now and then.

        Raises:
            OperationError: an object could not be copied; those copied before stay so.
        """
        indexes = await self._owned_by(chosen)
        queue = iter(indexes)
        done = 0

        async def worker() -> None:
            nonlocal done
            for index in queue:
                while not self._direct:
                    await self._attach()
                    await trio.sleep(GATE_POLL_S)
                self._passing += 1
                try:
                    await completion(partial(self._copy_up, index))
                finally:
                    self._passing -= 1
                done += 1
                progress(done, len(indexes))

        with plain_errors():
            async with trio.open_nursery() as nursery:
                for _ in range(PARALLEL_COPIES):
                    nursery.start_soon(worker)

    def _copy_up(self, index: int, done: Completed) -> None:
        layer = self._map.get(index)
        if not layer or layer == self.open_layer:
            done(0)
        elif not self._copying(index, lambda: self._copy_up(index, done)):
            self._copy(index, Op.WRITE, 0, 0, b"", done)

    async def _owned_by(self, chosen: Callable[[int], bool]) -> list[int]:
        await self.load_map()
        return [
            number * MAP_ENTRIES_PER_BLOCK + entry
            for number, page in sorted(self._map.pages.items())
            for entry, layer in enumerate(page)
            if layer and chosen(layer)
        ]

    async def load_map(self) -> VdiMap:
        """Load all pages of the map that are stored, and give it."""
        vdi_map = self._map
        for index in range(vdi_map.existing.bit_length()):
            if vdi_map.existing >> index & 1:
                first = index * PAGES_PER_OBJECT
                for number in range(first, first + PAGES_PER_OBJECT):
                    if number not in vdi_map.pages:
                        await vdi_map.load(number * MAP_ENTRIES_PER_BLOCK)
        return vdi_map

    async def entries(self, first: int, last: int) -> dict[int, int]:
        """Give index -> owning layer of [`first`, `last`), up to one that is being changed.

        As it is stored, if another mount holds the VDI.
        """
        found: dict[int, int] = {}
        for index in range(first, last):
            if self._map.get(index) is None:
                await self._map.load(index)
        for index in range(first, last):
            layer = self._map.get(index)
            if layer is None or index in self._map.creating:
                break
            found[index] = layer
        return found

    @property
    def is_empty(self) -> bool:
        """Whether no byte of it was ever stored, as far as this holder knows."""
        return not self._map.existing and not any(any(page) for page in self._map.pages.values())

    async def share(self, entries: dict[int, int], size: int) -> dict[int, int]:
        """Take over what a map of the same family names, in frozen layers; gives what was there.

        Args:
            entries: index -> layer, 0 for a hole.
            size: the VDI has at least so many bytes afterwards.

        Durability: with the next flush.
        """
        async with self._capturing:
            await self._attach()
            for index in entries:
                if self._map.get(index) is None:
                    await self._map.load(index)
            if self.flusher is None:
                raise FencedError(f"{self.name} was let go meanwhile")
            before: dict[int, int] = {}
            try:
                await self.hold_changes()
                for index, layer in entries.items():
                    old = self._map.get(index) or 0
                    if old == layer:
                        continue
                    before[index] = old
                    self._map.replace(index, layer)
                    self._allocated += (bool(layer) - bool(old)) * OBJECT_SIZE
                self._size = max(self._size, size)
                self._modified = time.time()
            finally:
                self.release_changes()
            return before

    async def drop(self, replaced: dict[int, int]) -> None:
        """Let go of what `share` replaced: the map that does not name it is stored."""
        for index, layer in replaced.items():
            if not layer or self._copies is None or self.replicator is None:
                continue
            if layer != self.open_layer:
                self._copies.copied += 1
                continue
            state = self.replicator.state(data_object(layer, index))
            if not state.ready:
                await self.replicator.open(state)
            if self._map.get(index) != layer:
                self._half_made(state.oid, state.version)

    def captured(self, map_layer: int) -> Captured:
        """Describe the VDI as it is, for a map copied to `map_layer`."""
        return Captured(
            self._size, map_layer, self._map.existing, max(self._allocated, 0), self.open_layer
        )

    def _is_busy(self, replicator: Replicator) -> bool:
        copying = self._copies is not None and self._copies.busy
        return bool(replicator.busy or self._passing or copying)

    async def _settle(self, replicator: Replicator) -> None:
        """Wait until no change is under way."""
        while self._is_busy(replicator):
            await replicator.settle()
            if self._is_busy(replicator):
                await trio.sleep(GATE_POLL_S)

    async def hold_changes(self) -> None:
        """Let no change begin until `release_changes`, and wait for those under way."""
        self._direct = False
        if self.replicator is not None:
            await self._settle(self.replicator)

    def release_changes(self) -> None:
        """Carry out what was held, and go on."""
        self._direct = self.attachment is not None
        held, self._held = self._held, []
        for again in held:
            again()

    # -- flush ------------------------------------------------------------------------------

    def flush(self, done: Done) -> None:
        """Make every write completed before this call durable on every member (I1)."""
        if self.flusher is None:
            done(0)
        else:
            self.flusher.flush(done)

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


async def _run_both(scope: trio.CancelScope, replicator: Replicator, flusher: Flusher) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replicator.run)
            nursery.start_soon(flusher.run)
