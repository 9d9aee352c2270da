"""A cluster in memory that implements sheepfs/backend.py, completing at once or later.

Several `MemoryNamespace` of one `MemoryCluster` are several mounts of it. `journal` records what
reached the "cluster" so that tests can see, say, that a flush came before an O_SYNC write's reply.

Names choose misfortunes: `held…` another mount holds it, `stall…` reads never end, `stuck…` it
never detaches, `bad…` reads and flushes fail (EIO), `full…` writes fail (ENOSPC).
"""

from __future__ import annotations

import dataclasses
import errno
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from sheepfs.backend import Attributes, Capacity, Done, ReadDone
from sheepfs.core.errors import (
    HeldElsewhereError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.metadata import check_vdi_name, check_vdi_size

BLOCK = 4096
_ZEROS = bytes(1 << 20)
Journal = Callable[[str], None]


@dataclasses.dataclass
class MemoryVdi:
    """One VDI: its attributes (`size` and `allocated` are kept here) and its blocks."""

    attributes: Attributes
    size: int = 0
    blocks: dict[int, bytearray] = dataclasses.field(default_factory=dict)
    holder: object | None = None
    modified: float = 0.0

    def shown(self) -> Attributes:
        return dataclasses.replace(
            self.attributes,
            size=self.size,
            allocated=len(self.blocks) * BLOCK,
            modified=self.modified,
        )

    def get(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            index, within = divmod(offset, BLOCK)
            piece = min(BLOCK - within, length)
            block = self.blocks.get(index)
            parts.append(block[within : within + piece] if block else _ZEROS[:piece])
            offset += piece
            length -= piece
        return b"".join(parts)

    def put(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            index, within = divmod(offset + done, BLOCK)
            piece = min(BLOCK - within, len(data) - done)
            block = self.blocks.get(index)
            if block is None:
                block = self.blocks[index] = bytearray(BLOCK)
            block[within : within + piece] = data[done : done + piece]
            done += piece
        self.size = max(self.size, offset + len(data))
        self.modified = time.time()

    def zero(self, offset: int, length: int) -> None:
        end = offset + length
        for index in [i for i in self.blocks if offset < (i + 1) * BLOCK and i * BLOCK < end]:
            start = max(offset - index * BLOCK, 0)
            stop = min(end - index * BLOCK, BLOCK)
            if start == 0 and stop == BLOCK:
                del self.blocks[index]
            else:
                self.blocks[index][start:stop] = bytes(stop - start)


class MemoryCluster:
    """What all mounts share."""

    def __init__(self, journal: Journal = lambda entry: None) -> None:
        self.vdis: dict[str, MemoryVdi] = {}
        self.next_id = 2
        self.journal = journal
        self.capacity = Capacity(total=100 << 30, free=60 << 30)


class MemoryVolume:
    """An open VDI of one mount."""

    def __init__(self, namespace: MemoryNamespace, vdi: MemoryVdi) -> None:
        self._namespace = namespace
        self._journal = namespace.cluster.journal
        self.vdi = vdi
        self.handles = 0
        self._dirty = False

    @property
    def name(self) -> str:
        return self.vdi.attributes.name

    @property
    def size(self) -> int:
        return self.vdi.size

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        length = max(min(length, self.size - offset), 0)
        if self.name.startswith("stall"):
            return
        if self.name.startswith("bad"):
            self._namespace.complete(lambda: done(errno.EIO, ()))
            return
        data = self.vdi.get(offset, length)
        middle = length // 2
        parts = (memoryview(data)[:middle], memoryview(data)[middle:])
        self._namespace.complete(lambda: done(0, parts))

    def write(self, offset: int, data: bytes, done: Done) -> None:
        if self.vdi.holder is None:
            self.vdi.holder = self._namespace
        if self.vdi.holder is not self._namespace:
            self._namespace.complete(lambda: done(errno.EBUSY))
            return

        def finish() -> None:
            self.vdi.put(offset, data)
            self._dirty = True
            self._journal(f"write {self.name} {offset} {len(data)}")
            done(errno.ENOSPC if self.name.startswith("full") else 0)

        self._namespace.complete(finish)

    def flush(self, done: Done) -> None:
        def finish() -> None:
            self._journal(f"flush {self.name}")
            self._dirty = False
            done(errno.EIO if self.name.startswith("bad") else 0)

        self._namespace.complete(finish)

    async def attach(self) -> None:
        await self._namespace.round_trip()
        if self.vdi.holder is self._namespace:
            return
        if self.vdi.holder is not None or self.name.startswith("held"):
            raise HeldElsewhereError(f"{self.name} is held by another mount")
        self.vdi.holder = self._namespace
        self._journal(f"attach {self.name}")

    async def detach(self) -> None:
        await self._namespace.round_trip()
        if self.name.startswith("stuck"):
            await trio.sleep_forever()
        if self.vdi.holder is self._namespace:
            if self._dirty:
                self._journal(f"flush {self.name}")
            self._dirty = False
            self.vdi.holder = None
            self._journal(f"detach {self.name}")

    async def punch(self, offset: int, length: int) -> None:
        await self.attach()
        self.vdi.zero(offset, min(length, max(self.size - offset, 0)))
        self._journal(f"punch {self.name} {offset} {length}")

    async def resize(self, size: int) -> None:
        check_vdi_size(size)
        await self.attach()
        if size < self.vdi.size:
            self.vdi.zero(size, self.vdi.size - size)
        self.vdi.size = size
        self.vdi.modified = time.time()
        self._journal(f"resize {self.name} {size}")

    async def seek_data(self, offset: int) -> int | None:
        await self._namespace.round_trip()
        found = [i for i in self.vdi.blocks if i >= offset // BLOCK and i * BLOCK < self.size]
        return max(offset, min(found) * BLOCK) if found else None

    async def seek_hole(self, offset: int) -> int:
        await self._namespace.round_trip()
        index = offset // BLOCK
        while index in self.vdi.blocks:
            index += 1
        return min(max(offset, index * BLOCK), self.size)

    def attributes(self) -> Attributes:
        return self.vdi.shown()

    async def close(self) -> None:
        self.handles -= 1
        if not self.handles:
            await self.detach()
            if not self.handles:
                self._namespace.volumes.pop(self.vdi.attributes.id, None)


class MemoryNamespace:
    """One mount of a cluster in memory."""

    def __init__(self, cluster: MemoryCluster, *, asynchronous: bool) -> None:
        self.cluster = cluster
        self.volumes: dict[int, MemoryVolume] = {}
        self._asynchronous = asynchronous
        self._completions: deque[Callable[[], None]] = deque()
        self._wake = trio.Event()

    def complete(self, finish: Callable[[], None]) -> None:
        """Run `finish` now or, asynchronously, from the pump's task."""
        if self._asynchronous:
            self._completions.append(finish)
            self._wake.set()
        else:
            finish()

    async def pump(self) -> None:
        """Run completions like a connection's reader task would, a few at a time."""
        while True:
            await self._wake.wait()
            await trio.lowlevel.checkpoint()
            for _ in range(len(self._completions)):
                self._completions.popleft()()
            if not self._completions:
                self._wake = trio.Event()

    async def round_trip(self) -> None:
        await trio.lowlevel.checkpoint()

    def _find(self, name: str) -> MemoryVdi:
        vdi = self.cluster.vdis.get(name)
        if vdi is None:
            raise VdiNotFoundError(f"there is no VDI {name!r}")
        return vdi

    def _by_id(self, vdi_id: int) -> MemoryVdi:
        for vdi in self.cluster.vdis.values():
            if vdi.attributes.id == vdi_id:
                return vdi
        raise VdiNotFoundError(f"there is no VDI {vdi_id}")

    async def list(self) -> Sequence[Attributes]:
        await self.round_trip()
        return [vdi.shown() for _, vdi in sorted(self.cluster.vdis.items())]

    async def lookup(self, name: str) -> Attributes:
        await self.round_trip()
        return self._find(name).shown()

    async def get(self, vdi: int) -> Attributes:
        await self.round_trip()
        return self._by_id(vdi).shown()

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        check_vdi_name(name)
        await self.round_trip()
        if name in self.cluster.vdis:
            raise VdiExistsError(f"there is a VDI {name!r}")
        now = time.time()
        attributes = Attributes(self.cluster.next_id, name, 0, 0, mode, uid, gid, now, now)
        self.cluster.next_id += 1
        self.cluster.vdis[name] = MemoryVdi(attributes, modified=now)
        return attributes

    async def rename(self, old: str, new: str, replace: bool) -> None:
        check_vdi_name(new)
        await self.round_trip()
        vdi = self._find(old)
        if old == new:
            return
        if new in self.cluster.vdis:
            if not replace:
                raise VdiExistsError(f"there is a VDI {new!r}")
            await self.delete(new)
        self.cluster.vdis[new] = self.cluster.vdis.pop(old)
        vdi.attributes = dataclasses.replace(vdi.attributes, name=new)

    async def delete(self, name: str) -> None:
        await self.round_trip()
        vdi = self._find(name)
        if vdi.holder not in (None, self) or name.startswith("held"):
            raise HeldElsewhereError(f"{name} is held by another mount")
        del self.cluster.vdis[name]

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        await self.round_trip()
        found = self._by_id(vdi)
        old = found.attributes
        found.attributes = dataclasses.replace(
            old,
            mode=old.mode if mode is None else mode,
            uid=old.uid if uid is None else uid,
            gid=old.gid if gid is None else gid,
            changed=time.time(),
        )
        if modified is not None:
            found.modified = modified
        return found.shown()

    async def open(self, vdi: int) -> MemoryVolume:
        await self.round_trip()
        volume = self.volumes.get(vdi)
        if volume is None:
            volume = self.volumes[vdi] = MemoryVolume(self, self._by_id(vdi))
        volume.handles += 1
        return volume

    async def capacity(self) -> Capacity:
        await self.round_trip()
        return self.cluster.capacity


@asynccontextmanager
async def memory_namespace(
    cluster: MemoryCluster, *, asynchronous: bool
) -> AsyncIterator[MemoryNamespace]:
    """One mount of `cluster`, with the task that completes its I/O."""
    namespace = MemoryNamespace(cluster, asynchronous=asynchronous)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.pump)
        yield namespace
        nursery.cancel_scope.cancel()
