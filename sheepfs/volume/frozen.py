"""An open snapshot: read-only, the same in every mount, and never attached."""

from __future__ import annotations

from collections.abc import Callable

import trio

from sheepfs.backend import Attributes, Done, ReadDone
from sheepfs.core.errors import ReadOnlyError
from sheepfs.core.geometry import map_object
from sheepfs.core.metadata import SnapshotRecord
from sheepfs.core.traffic import Traffic
from sheepfs.net.router import Router
from sheepfs.replication.objects import ObjectReader
from sheepfs.volume.holes import seek
from sheepfs.volume.reading import MapReader
from sheepfs.volume.vdimap import VdiMap


class FrozenVolume(MapReader):
    """An open snapshot of this mount; implements `sheepfs.backend.OpenVolume`.

    Its objects and its map belong to frozen layers: what was read once stays valid.
    """

    read_only = True
    stalled = ""
    attachment = None

    def __init__(
        self, name: str, record: SnapshotRecord, router: Router, nursery: trio.Nursery
    ) -> None:
        reader = ObjectReader(router, record.vdi)
        super().__init__(name, reader, VdiMap(record.maps, self._load_map), nursery)
        self.record = record
        self.handles = 0
        self.traffic = Traffic()
        self.on_idle: Callable[[FrozenVolume], None] = lambda volume: None

    async def _load_map(self, map_index: int, offset: int, length: int) -> bytes:
        return await self._reader.fetch(map_object(self.record.map, map_index), offset, length)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.record.size

    def attributes(self) -> Attributes:
        """What a file shows."""
        return snapshot_attributes(self.name, self.record)

    async def entries(self, first: int, last: int) -> dict[int, int]:
        """Give index -> owning layer of [`first`, `last`)."""
        found: dict[int, int] = {}
        for index in range(first, last):
            layer = self._map.get(index)
            if layer is None:
                await self._map.load(index)
                layer = self._map.get(index)
            found[index] = layer or 0
        return found

    def refresh(self, name: str, record: SnapshotRecord) -> None:
        """Take a record read from etcd: the snapshot may have got another name."""
        self.name, self.record = name, record

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read up to the end; buffers are valid during `done` only."""
        length = min(length, self.record.size - offset)
        if length <= 0:
            done(0, ())
        else:
            self._read_range(offset, length, done)

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Refuse with EROFS."""
        done(ReadOnlyError.errno)

    def flush(self, done: Done) -> None:
        """Nothing is ever unflushed."""
        done(0)

    async def attach(self) -> None:
        """Refuse. Raises ReadOnlyError."""
        raise ReadOnlyError(f"{self.name} is a snapshot: it cannot be changed")

    async def detach(self) -> None:
        """Nothing to let go."""

    async def punch(self, offset: int, length: int) -> None:
        """Refuse. Raises ReadOnlyError."""
        await self.attach()

    async def resize(self, size: int) -> None:
        """Refuse. Raises ReadOnlyError."""
        await self.attach()

    async def seek_data(self, offset: int) -> int | None:
        """Give the first offset >= `offset` that may hold data; None if there is none."""
        return await seek(self._map, self._reader.extents, self.size, offset, data=True)

    async def seek_hole(self, offset: int) -> int:
        """Give the first offset >= `offset` in a hole; the end counts as one."""
        found = await seek(self._map, self._reader.extents, self.size, offset, data=False)
        return self.size if found is None else found

    async def close(self) -> None:
        """One file handle less."""
        self.handles -= 1
        if not self.handles:
            self.on_idle(self)


def snapshot_attributes(name: str, record: SnapshotRecord) -> Attributes:
    """Give what a file shows of a snapshot."""
    return Attributes(
        record.id, name, record.size, record.allocated, record.mode & ~0o222, record.uid,
        record.gid, record.created, record.created, True, record.family,
    )  # fmt: skip
