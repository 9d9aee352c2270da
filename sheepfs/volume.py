"""One open VDI: byte ranges in, object reads and changes out.

Always holds:
- Reads and writes are plain callbacks; a task is started only for what must wait (a map page, an
  object whose replicas are not known to be equal, an attach, a member that cannot answer).
- Data before map: a map page is stored only after what it names is durable on all members.
- Nothing is changed before the attach is complete, that is before the old holder is fenced.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from sheepfs.backend import Attributes, Done, ReadDone
from sheepfs.callbacks import completion
from sheepfs.convergence import Convergence
from sheepfs.core.errors import (
    FencedError,
    HeldElsewhereError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import (
    copies_of,
    map_object,
    object_count,
)
from sheepfs.core.metadata import VdiRecord
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import Buffer
from sheepfs.flusher import Flusher
from sheepfs.holding import Attacher
from sheepfs.holes import seek
from sheepfs.inventory import data_of
from sheepfs.logs import fields
from sheepfs.mapping import MapOwner
from sheepfs.net.router import Router
from sheepfs.objects import ObjectReader
from sheepfs.reading import Opening, failed
from sheepfs.replication import Replicator
from sheepfs.sweeping import find_orphans
from sheepfs.vdimap import VdiMap
from sheepfs.writing import GATE_POLL_S

log = logging.getLogger(__name__)

READER_MAP_S = 1.0
"""A reader that does not hold the VDI looks at the map again after this."""
MEASURE_EVERY_S = 10.0
MEASURE_AT_DETACH_S = 0.5
RECLAIM_EVERY_S = 300.0
DISCARD_TRIES = 100
SAVE_RETRY_S = 0.5


class Volume(MapOwner):
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
        vdi_map = VdiMap(record.maps, self._load_map)
        super().__init__(name, reader, vdi_map, nursery, record.layer, record.size)
        reader.is_unsure = lambda: self._mending is not None
        self.record = record
        self.handles = 0
        self.traffic = Traffic()
        self.on_idle: Callable[[Volume], None] = lambda volume: None
        self._router = router
        self._attacher = attacher
        self._saved_size = record.size
        self._allocated = record.allocated
        self._modified = self._measured = record.modified
        """Time of the last change; and of the last one that `_allocated` has counted exactly."""
        self._map_read = 0.0
        self._attaching = trio.Lock()
        self._capturing = trio.Lock()
        self._saving = trio.Lock()
        self._unsaved = ""
        """Why a flush waits for etcd; empty if none does."""
        self._leaving = False
        """Being detached: what cannot be saved now is given up."""
        self._scope: trio.CancelScope | None = None
        self._borrowed = False
        """Attached for a moment only, by `borrow`."""
        self.gives_way = False
        """Attached by `level` alone: whoever else wants the VDI may have it."""

    # -- what a file shows ------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Current size in bytes."""
        return self._size

    @property
    def stalled(self) -> str:
        """Why I/O does not move, or an empty string."""
        return self._unsaved or (self.replicator.stalled if self.replicator else "")

    @property
    def converging(self) -> bool:
        """Whether replicas may still differ from the time of an earlier, unclean holder."""
        return self._convergence.pending

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

    async def level(self) -> None:
        """Make all replicas equal, as a holder does first, unless another wants the VDI meanwhile.

        Raises: HeldElsewhereError, SheepError.
        """
        self._borrowed = self._borrowed or self.attachment is None
        await self._attach(gives_way=True)
        await self._convergence.ended.wait()
        await self.give_back()

    async def settled(self) -> None:
        """Wait for an attach or detach that is under way."""
        async with self._attaching:
            pass

    async def give_way(self) -> None:
        """Let another have the VDI, if `level` alone holds it.

        Raises:
            HeldElsewhereError: it is in use here.
        """
        if not self.gives_way:
            raise HeldElsewhereError(f"{self.name} is in use")
        try:
            await self.detach()
        except SheepError as error:
            # It is let go all the same, and the next holder begins again.
            log.warning("%s is given away: %s", self.name, error)

    async def give_back(self) -> None:
        """Let the VDI go if it was attached by `borrow` alone."""
        if self._borrowed:
            self._borrowed = False
            await self.detach()

    async def _attach(self, *, gives_way: bool = False) -> None:
        async with self._attaching:
            if self.attachment is not None:
                self.gives_way = self.gives_way and gives_way
                return
            attachment = await self._attacher.attach(self.record.id, gives_way=gives_way)
            self.gives_way = gives_way
            record = attachment.record
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self.record = record
            self.open_layer = record.layer
            self._convergence = Convergence(not attachment.was_clean)
            self._reader.token = attachment.token
            self.replicator = Replicator(
                self._router, self._nursery, record.id, attachment.token, attachment.generation
            )
            self.replicator.unflushed.on_loss = self._is_losing
            self._use_map(self.replicator)
            if self._convergence.pending:
                # What the last holder had acknowledged and not flushed is this one's to flush.
                self.replicator.unflushed.add_everything(
                    {copies_of(record.layer), copies_of(record.map)}
                )
                self._nursery.start_soon(
                    self._convergence.run,
                    self.name,
                    self._map,
                    self.replicator,
                    self._clear_end,
                    self._sweep,
                )
            self.attachment = attachment
            self._direct = True
            log.info(
                "%s is attached%s", self.name,
                "" if attachment.was_clean else ": its last holder ended uncleanly",
                extra=fields(event="attach", vdi=record.id, token=attachment.token),
            )  # fmt: skip
            self._scope = trio.CancelScope()
            assert self.flusher is not None
            self._nursery.start_soon(
                _run_all,
                self._scope,
                self.replicator.run,
                self.flusher.run,
                self._mend_losses,
                self._measure_now_and_then,
                self._reclaim_now_and_then,
            )

    def _use_map(self, replicator: Replicator) -> None:
        """Begin with the map that the record names."""
        record = self.record
        self._map = VdiMap(record.maps, self._load_map)
        self.flusher = Flusher(
            self.name, record.map, replicator, self._map, self._save_if_changed, self._is_saved
        )
        self._copies = self._new_copies(replicator)

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
            self._leaving = True
            self._convergence.stop()
            with trio.move_on_after(MEASURE_AT_DETACH_S):
                await self._measure_if_changed()
            problem: SheepError | None = None
            patience = DISCARD_TRIES
            while problem is None and not replicator.fenced:
                await self._settle(replicator)
                try:
                    await completion(flusher.flush)
                except SheepError as error:
                    problem = error
                unflushed = self._is_busy(replicator) or replicator.unflushed.groups
                if unflushed or self._map.is_dirty or flusher.is_asked:
                    continue
                if not flusher.discarded or not patience:
                    break
                # A discarded object is in use, by a read that was issued before.
                patience -= 1
                await trio.sleep(GATE_POLL_S)
            dropped = not attachment.was_clean or (
                self._copies is not None and self._copies.copied > 0
            )
            self._leaving = False
            # Nothing was changed since that flush, and from here on all changes attach again.
            self.attachment = self.replicator = self.flusher = self._copies = None
            self._direct = False
            if self._scope:
                self._scope.cancel()
            replicator.close()
            self._has_mended()
            self._reader.token = 0
            flusher.fail_waiting()
            record = self._current_record(durable=problem is None)
            self.record = dataclasses.replace(record, layer=self.open_layer, next=0)
            self._map = VdiMap(self.record.maps, self._load_map)
            clean = problem is None and replicator.level and not self._convergence.pending
            await self._attacher.detach(attachment, self.record, clean=clean, dropped=dropped)
            self.record = dataclasses.replace(self.record, clean=clean)
            log.info(
                "%s is let go%s", self.name, "" if clean else ", marked as unclean",
                extra=fields(event="detach", vdi=record.id),
            )  # fmt: skip
            if problem is not None:
                raise problem

    async def sweep(self) -> None:
        """As the holder: remove what former ones made and the map does not name. Raises SheepError.

        Durability: what is found is deleted by the next flush. Ordering: no snapshot begins
        meanwhile, since what that freezes is named by another map.
        """
        await self._convergence.ended.wait()
        async with self._capturing:
            await self.load_map()
            await self._sweep()

    async def _sweep(self) -> None:
        """Remove what the former holder made and the map does not name; best effort."""
        replicator, flusher = self.replicator, self.flusher
        if replicator is None or flusher is None:
            return
        try:
            orphans = await find_orphans(replicator, self._map, self.open_layer, self.record.map)
        except SheepError as error:
            log.warning("%s: orphans of the last holder stay: %s", self.name, error)
            return
        if orphans:
            log.info("%s: removing %d objects that the map never named", self.name, len(orphans))
            flusher.discarded = {**orphans, **flusher.discarded}

    def _current_record(self, *, durable: bool) -> VdiRecord:
        """Give the record as it is now; `durable`: all map objects are, as of the last flush."""
        return dataclasses.replace(
            self.record,
            size=self._size,
            maps=self._map.existing if durable else self.record.maps,
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

    def refresh(self, name: str, record: VdiRecord) -> None:
        """Take a record read from etcd, while this mount does not hold the VDI."""
        self.name = name
        if record.generation < self.record.generation:
            return  # Read before what is known here, and only now taken.
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

    # -- snapshots --------------------------------------------------------------------------

    async def measure(self) -> None:
        """Count the data that the map names; `allocated` is exact then. Raises SheepError."""
        modified = self._modified
        self._allocated = await data_of(self._router, await self.load_map(object_count(self._size)))
        self._measured = modified

    async def _measure_if_changed(self) -> None:
        if self._measured != self._modified:
            try:
                await self.measure()
            except SheepError as error:
                log.info("%s: its space cannot be counted now: %s", self.name, error)

    async def _measure_now_and_then(self) -> None:
        while True:
            await trio.sleep(MEASURE_EVERY_S)
            await self._measure_if_changed()

    async def _reclaim_now_and_then(self) -> None:
        """What is written takes the place of frozen objects, which may be of no use to anyone."""
        asked = (self._copies, 0)
        while True:
            await trio.sleep(RECLAIM_EVERY_S)
            copies = self._copies
            replaced = (copies, copies.copied if copies else 0)
            if replaced == asked or not replaced[1]:
                continue
            try:
                await completion(self.flush)
                await self._attacher.want_reclaim(self.record.family)
                asked = replaced
            except SheepError as error:
                log.info("%s: no reclaim can be asked for now: %s", self.name, error)

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
        """Keep size and map objects in etcd; while it is away, the flush waits (I10).

        An error would be for good: file systems in guests then write no more.
        """
        try:
            while not self._is_saved():
                try:
                    await self._save(durable=True)
                except RetryableError as error:
                    if self._leaving:
                        raise
                    if not self._unsaved:
                        log.warning("%s: a flush waits for etcd: %s", self.name, error)
                    self._unsaved = f"a flush waits for etcd: {error}"
                    await trio.sleep(SAVE_RETRY_S)
                if self.replicator is not None and self.replicator.fenced:
                    raise FencedError(f"VDI {self.record.id} was taken over by another holder")
        finally:
            self._unsaved = ""

    async def _save(self, *, durable: bool) -> None:
        async with self._saving:
            if self.attachment is not None:
                record = self._current_record(durable=durable)
                await self._attacher.save(self.attachment, record)
                self.record = record
                self._saved_size = record.size


async def _run_all(scope: trio.CancelScope, *tasks: Callable[[], Awaitable[None]]) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
