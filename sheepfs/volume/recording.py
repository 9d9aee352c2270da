"""What etcd knows of an open VDI, and what it does not know yet: attributes, size, space in use.

Always holds:
- A record that was read before what is known here is not taken.
- While etcd is away a flush waits; it does not fail (I10).
"""

from __future__ import annotations

import dataclasses
import logging

import trio

from sheepfs.backend import Attributes, Done
from sheepfs.callbacks import completion
from sheepfs.core.errors import FencedError, RetryableError, SheepError
from sheepfs.core.geometry import object_count
from sheepfs.core.metadata import VdiRecord
from sheepfs.holding.holding import Attacher
from sheepfs.layers.inventory import data_of
from sheepfs.net.router import Router
from sheepfs.replication.objects import ObjectReader
from sheepfs.volume.mapping import MapOwner
from sheepfs.volume.vdimap import VdiMap

log = logging.getLogger(__name__)

MEASURE_EVERY_S = 10.0
RECLAIM_EVERY_S = 300.0
SAVE_RETRY_S = 0.5


class RecordKeeper(MapOwner):
    """Keeps a VDI's record."""

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
        self.record = record
        self._router = router
        self._attacher = attacher
        self._saved_size = record.size
        self._allocated = record.allocated
        self._modified = self._measured = record.modified
        """Time of the last change; and of the last one that `_allocated` has counted exactly."""
        self._attaching = trio.Lock()
        """Held while the VDI is attached or let go; its record is not taken from etcd then."""
        self._saving = trio.Lock()
        self._unsaved = ""
        """Why a flush waits for etcd; empty if none does."""
        self._leaving = False
        """Being detached: what cannot be saved now is given up."""

    @property
    def size(self) -> int:
        """Current size in bytes."""
        return self._size

    def attributes(self) -> Attributes:
        """Current attributes, with what is not yet in etcd."""
        record = self.record
        return Attributes(
            record.id, self.name, self._size, max(self._allocated, 0), record.mode, record.uid,
            record.gid, self._modified, record.changed, False, record.family,
        )  # fmt: skip

    def set_modified(self, modified: float) -> None:
        """Set the time of the last change (`touch`), in seconds since 1970."""
        self._modified = modified

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

    def _current_record(self, *, durable: bool) -> VdiRecord:
        """Give the record as it is now; `durable`: all map objects are, as of the last flush."""
        return dataclasses.replace(
            self.record,
            size=self._size,
            maps=self._map.existing if durable else self.record.maps,
            allocated=max(self._allocated, 0),
            modified=self._modified,
        )

    # -- saving -----------------------------------------------------------------------------

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

    # -- space in use -----------------------------------------------------------------------

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
