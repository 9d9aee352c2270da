"""Changing an attached VDI: byte ranges in, object changes out, copies of frozen objects first.

Always holds:
- Writes are plain callbacks; a task is started only for what must wait (an attach, a map page,
  the copy of an object that a frozen layer owns).
- Nothing is changed before the attach is complete, that is before the old holder is fenced.
- `hold_changes` lets no change begin: what it was told is complete stays the last one.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from sheepfs.backend import Done
from sheepfs.callbacks import Completed, completion, countdown
from sheepfs.core.errors import CorruptError, LostWritesError, ObjectNotFoundError
from sheepfs.core.geometry import (
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    data_object,
    object_count,
    split,
)
from sheepfs.core.names import check_vdi_size
from sheepfs.core.wire import FLAG_CREATE, Buffer, Op
from sheepfs.net.attach import Attachment
from sheepfs.replication.objects import ObjectReader
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.convergence import Convergence
from sheepfs.volume.copyonwrite import CopyOnWrite
from sheepfs.volume.flusher import Flusher
from sheepfs.volume.reading import MapReader
from sheepfs.volume.vdimap import VdiMap

GATE_POLL_S = 0.001
MAX_OBJECTS = MAX_VDI_SIZE // OBJECT_SIZE


class MapWriter(MapReader):
    """Changes what the map names, for the holder of a VDI.

    Attributes:
        open_layer: takes writes; in etcd it may still be the record's `next`.
    """

    def __init__(
        self,
        name: str,
        reader: ObjectReader,
        vdi_map: VdiMap,
        nursery: trio.Nursery,
        open_layer: int,
        size: int,
    ) -> None:
        super().__init__(name, reader, vdi_map, nursery)
        self.replicator: Replicator | None = None
        self.attachment: Attachment | None = None
        self.flusher: Flusher | None = None
        self.open_layer = open_layer
        self._copies: CopyOnWrite | None = None
        self._size = size
        self._allocated = 0
        self._modified = 0.0
        self._direct = False
        """Changes may go on: attached, and no snapshot holds them up."""
        self._held: list[Callable[[], None]] = []
        """Changes that came while a snapshot held them up, in order."""
        self._passing = 0
        """Changes that passed the gate and are not with the replicator yet."""
        self._convergence = Convergence(False)

    async def _attach(self) -> bool:
        """Become the one writer (HeldElsewhereError); tell whether it was not before."""
        raise NotImplementedError

    async def _save(self, *, durable: bool) -> None:
        """Keep the size in etcd; if they are `durable`, also which map objects there are."""
        raise NotImplementedError

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
        if end > self._size and not self._convergence.end_is_clear.is_set():
            self._later(lambda: self._write_when_clear(offset, data, done), done)
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

    async def _write_when_clear(self, offset: int, data: bytes, done: Done) -> None:
        await self._attach_with_clear_end()
        self.write(offset, data, done)

    async def _attach_with_clear_end(self) -> None:
        await self._attach()
        while not self._convergence.end_is_clear.is_set():
            await self._convergence.end_is_clear.wait()
            await self._attach()  # It may have been let go instead.

    async def _clear_beyond_end(self) -> None:
        """Make holes of what a former holder wrote beyond the end. Raises SheepError."""
        last, within = divmod(self._size, OBJECT_SIZE)
        if within and await self._holds_data(last, within):
            await self._punch_piece(last, within, OBJECT_SIZE - within)
        first = object_count(self._size)
        index = self._map.skip_holes(first, MAX_OBJECTS)
        while index < MAX_OBJECTS:
            await self._punch_piece(index, 0, OBJECT_SIZE)
            index = self._map.skip_holes(index + 1, MAX_OBJECTS)

    async def _holds_data(self, index: int, within: int) -> bool:
        """Whether anything but zeros is in an object from `within` on. Makes its replicas equal."""
        if self._map.get(index) is None:
            await self._map.load(index)
        layer, replicator = self._map.get(index), self.replicator
        if not layer or replicator is None:
            return False
        oid = data_object(layer, index)
        await replicator.open(replicator.state(oid))
        data = await self._reader.fetch(oid, within, OBJECT_SIZE - within)
        return data.count(0) != len(data)

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
        elif not self._copying(index, lambda: self._go_on_writing(index, within, data, done)):
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
        self._go_on_writing(index, within, data, done)

    async def _load_and_write(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        try:
            await self._map.load(index)
            self._go_on_writing(index, within, data, done)
        finally:
            self._passing -= 1

    def _go_on_writing(self, index: int, within: int, data: Buffer, done: Completed) -> None:
        """Write what passed the gate and waited since then; a map that is being mended first."""
        if self._mending is None or self._unusable():
            self._write_piece(index, within, data, done)
        else:
            self._held.append(lambda: self._write_piece(index, within, data, done))

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
        vdi_map.begin_create(index, self.open_layer, replicator.last_version)

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
        is_ours = False
        while index < last:
            start = max(offset - index * OBJECT_SIZE, 0)
            stop = min(end - index * OBJECT_SIZE, OBJECT_SIZE)
            if to_the_end and index == last - 1:
                stop = OBJECT_SIZE
            if stop - start == OBJECT_SIZE and not is_ours:
                is_ours = await self._confirm_hold(index)
            await self._punch_piece(index, start, stop - start)
            index = self._map.skip_holes(index + 1, last)

    async def _confirm_hold(self, index: int) -> bool:
        """Have a member that has an object say that no other mount has taken the VDI over.

        A whole object is discarded in the map here alone. One answer after the discard was asked
        for is enough: who takes over later need not know of what was not flushed.

        Returns:
            False: no member can have the object.

        Raises:
            FencedError: another mount has.
        """
        if self._map.get(index) is None:
            await self._map.load(index)
        layer = self._map.get(index)
        if not layer or index in self._map.creating:
            return False
        with suppress(ObjectNotFoundError, CorruptError):
            await self._reader.extents(data_object(layer, index))
        return True

    async def _punch_piece(self, index: int, within: int, size: int) -> None:
        while not self._direct:
            await self._attach()
            await trio.sleep(GATE_POLL_S)
        self._passing += 1
        losses = self._losses()
        try:
            if self._map.get(index) is None:
                await self._map.load(index)
            if size == OBJECT_SIZE and index not in self._map.creating:
                await self._discard(index)
            else:
                await completion(partial(self._punch_part, index, within, size))
        finally:
            self._passing -= 1
        if self._losses() != losses:
            raise LostWritesError(f"{self.name}: unflushed writes were lost meanwhile")

    def _losses(self) -> int:
        return 0 if self.replicator is None else self.replicator.unflushed.losses

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
            is_lost = False
            if not state.ready:
                try:
                    await replicator.open(state)
                except ObjectNotFoundError:
                    is_lost = True  # It can be given up, and made anew.
            if self._map.get(index) != layer or index in self._map.creating:
                return  # Somebody else punched it meanwhile.
            self._map.discard(index)
            if not is_lost:
                flusher.discarded[state.oid] = state.version
        self._allocated -= OBJECT_SIZE

    def _after_copy(self, index: int, done: Completed) -> None:
        if not self._copying(index, lambda: done(0)):
            done(0)

    async def resize(self, size: int) -> None:
        """Cut or grow; what is cut is gone."""
        check_vdi_size(size)
        await self._attach_with_clear_end()
        cut = size < self._size
        if cut:
            await self.punch(size, self._size - size)
        self._size = size
        self._modified = time.time()
        if cut and self.flusher is not None:
            # The size is saved behind the holes: nobody may find the former bytes beyond it.
            await completion(self.flusher.flush)
        else:
            await self._save(durable=False)

    # -- the gate ---------------------------------------------------------------------------

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
        # Once another mount took over nothing is mended any more: what was held fails then.
        is_mended = self._mending is None or self._unusable()
        self._direct = self.attachment is not None and is_mended
        if not self._direct and self.attachment is not None:
            return  # Until what was lost is mended.
        held, self._held = self._held, []
        for again in held:
            again()

    def _half_made(self, oid: int, version: int) -> None:
        """Some members may have an object that the map will not name."""
        if self.flusher is not None:
            self.flusher.discarded[oid] = version
