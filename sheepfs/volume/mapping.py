"""Operations on the whole map of an attached VDI: sharing, taking over, writing anew.

Always holds:
- Only entries of frozen layers come in; what they replace is let go after the map is stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from sheepfs.callbacks import Completed, completion
from sheepfs.core.errors import FencedError, SheepError
from sheepfs.core.geometry import (
    MAP_ENTRIES_PER_BLOCK,
    MAX_VDI_SIZE,
    OBJECT_SIZE,
    data_object,
)
from sheepfs.core.metadata import VdiRecord
from sheepfs.core.wire import Op
from sheepfs.net.groups import plain_errors
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.capture import Begin, Captured, Commit, capture
from sheepfs.volume.copyonwrite import CopyOnWrite
from sheepfs.volume.losses import mend_map
from sheepfs.volume.vdimap import PAGES_PER_OBJECT, VdiMap
from sheepfs.volume.writing import GATE_POLL_S, MapWriter

log = logging.getLogger(__name__)

PARALLEL_COPIES = 8
AGAIN_S = 1.0


class MapOwner(MapWriter):
    """A map that takes entries of others."""

    record: VdiRecord
    """As in etcd, as far as this mount knows."""
    _saved_size: int
    _capturing: trio.Lock
    """Held by whoever works on the whole map."""

    async def _load_map(self, map_index: int, offset: int, length: int) -> bytes:
        """Read a part of one of the VDI's map objects."""
        raise NotImplementedError

    def _new_copies(self, replicator: Replicator) -> CopyOnWrite:
        return CopyOnWrite(replicator, self._reader, self._map, self._nursery, self._half_made)

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
        while True:
            await self._attach()
            await self._convergence.ended.wait()
            async with self._capturing:
                if self.attachment is not None and self._convergence.ended.is_set():
                    await capture(self, begin, commit)
                    return

    def committed(self, record: VdiRecord) -> None:
        """Take the record as it is in etcd now."""
        self.record = record
        self._saved_size = record.size

    def _is_losing(self) -> None:
        """Writes were lost: nothing is read or changed before the map tells what is left."""
        if self._mending is None:
            self._mending = trio.Event()
        self._direct = False

    def _has_mended(self) -> None:
        mending, self._mending = self._mending, None
        if mending is not None:
            mending.set()

    async def _mend_losses(self) -> None:
        """Whenever writes were lost that were not flushed: go on with a map of what is left."""
        replicator, flusher = self.replicator, self.flusher
        if replicator is None or flusher is None:
            return
        while True:
            await replicator.unflushed.wait_lost()
            if replicator.fenced:
                self.release_changes()
                return
            try:
                async with self._capturing, flusher.paused():
                    await self._mend_map(replicator)
            except SheepError as error:
                log.error("%s: what is left is not known yet: %s", self.name, error)
                await trio.sleep(AGAIN_S)

    async def _mend_map(self, replicator: Replicator) -> None:
        try:
            await self.hold_changes()
            losses, maps = replicator.unflushed.losses, self.record.maps
            gone = await mend_map(self.name, self._map, maps, self.open_layer, replicator)
            self._allocated -= gone * OBJECT_SIZE
            if replicator.unflushed.mended(losses):
                self._has_mended()
        finally:
            self.release_changes()

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
                    self._convergence.stop(pending=False)
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

    async def load_map(self, objects: int = MAX_VDI_SIZE // OBJECT_SIZE) -> VdiMap:
        """Load all pages of the map that are stored, and give it.

        Args:
            objects: pages that only tell of later objects are left out.
        """
        vdi_map = self._map
        end = -(-objects // MAP_ENTRIES_PER_BLOCK)
        for index in range(vdi_map.existing.bit_length()):
            if vdi_map.existing >> index & 1:
                first = index * PAGES_PER_OBJECT
                for number in range(first, min(first + PAGES_PER_OBJECT, end)):
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
        while True:
            await self._attach_with_clear_end()
            async with self._capturing:
                if self.attachment is not None and self._convergence.end_is_clear.is_set():
                    return await self._share(entries, size)

    async def _share(self, entries: dict[int, int], size: int) -> dict[int, int]:
        for index in entries:
            if self._map.get(index) is None:
                await self._map.load(index)
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
