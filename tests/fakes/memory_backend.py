"""A cluster in memory that implements sheepfs/backend.py, completing at once or later.

Several `MemoryNamespace` of one `MemoryCluster` are several mounts of it. `journal` records what
reached the "cluster" so that tests can see, say, that a flush came before an O_SYNC write's reply.

Names choose misfortunes: `held…` another mount holds it, `stall…` reads never end, `stuck…` it
never detaches, `bad…` reads and flushes fail (EIO), `full…` writes fail (ENOSPC), `alien…` never
shares data with another VDI, `slow…` never ends being copied.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import trio

from sheepfs.accounts import Account, Accounts
from sheepfs.backend import Attributes, Capacity, Done, OnChange, OpenVolume, ReadDone
from sheepfs.core.errors import (
    HeldElsewhereError,
    ReadOnlyError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE
from sheepfs.core.names import (
    check_attributes,
    check_tag,
    check_vdi_name,
    check_vdi_size,
    snapshot_file,
    split_name,
)
from sheepfs.core.traffic import Traffic
from sheepfs.mount_metrics import vdi_metrics

BLOCK = 4096
COPY_AT_ONCE = 2 * OBJECT_SIZE
"""Bytes that one call of `copy_range` copies where it cannot share."""
_WRITE_BITS = 0o222
_ZEROS = bytes(1 << 20)
Journal = Callable[[str], None]


class ProtectedError(UsageError):
    """The snapshot may not be deleted."""

    errno = errno.EPERM


@dataclasses.dataclass
class MemoryVdi:
    """One VDI or snapshot: attributes (`size` and the like are kept here) and blocks.

    Blocks are never changed in place, so that snapshots and copies can share them.
    """

    attributes: Attributes
    size: int = 0
    blocks: dict[int, bytes] = dataclasses.field(default_factory=dict)
    holder: object | None = None
    modified: float = 0.0
    family: int = 0
    user_attributes: dict[str, str] = dataclasses.field(default_factory=dict)
    vdi: int = 0
    """Id of the VDI that this is a snapshot of."""
    protected: bool = False

    def shown(self) -> Attributes:
        return dataclasses.replace(
            self.attributes,
            size=self.size,
            allocated=len(self.blocks) * BLOCK,
            modified=self.modified,
            read_only=bool(self.vdi),
            family=self.family,
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
            part = data[done : done + piece]
            if piece < BLOCK:
                old = self.blocks.get(index, _ZEROS[:BLOCK])
                part = old[:within] + part + old[within + piece :]
            self.blocks[index] = part
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
                old = self.blocks[index]
                self.blocks[index] = old[:start] + bytes(stop - start) + old[stop:]


class MemoryCluster:
    """What all mounts share."""

    def __init__(self, journal: Journal = lambda entry: None) -> None:
        self.vdis: dict[str, MemoryVdi] = {}
        """VDIs and snapshots by the name of the file."""
        self.retired: dict[int, str] = {}
        """Deleted VDIs of which there are snapshots: id -> name."""
        self.mounts: list[MemoryNamespace] = []
        self.next_id = 2
        self.journal = journal
        self.capacity = Capacity(total=100 << 30, free=60 << 30)

    def snapshots_of(self, vdi_id: int) -> list[MemoryVdi]:
        return [vdi for vdi in self.vdis.values() if vdi.vdi == vdi_id]

    def changed(self, vdi: MemoryVdi, by: object) -> None:
        for mount in self.mounts:
            if mount is not by:
                for tell in mount.on_change:
                    tell(vdi.attributes.id)


class MemoryVolume:
    """An open VDI of one mount."""

    def __init__(self, namespace: MemoryNamespace, vdi: MemoryVdi) -> None:
        self._namespace = namespace
        self._journal = namespace.cluster.journal
        self.vdi = vdi
        self.handles = 0
        self.traffic = Traffic()
        self._dirty = False

    @property
    def name(self) -> str:
        return self.vdi.attributes.name

    @property
    def read_only(self) -> bool:
        return bool(self.vdi.vdi)

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
        if self.read_only:
            self._namespace.complete(lambda: done(errno.EROFS))
            return
        if self.vdi.holder is None:
            self.vdi.holder = self._namespace
        if self.vdi.holder is not self._namespace:
            self._namespace.complete(lambda: done(errno.EBUSY))
            return

        def finish() -> None:
            size = self.size
            self.vdi.put(offset, data)
            if self.size != size:
                self._namespace.cluster.changed(self.vdi, self._namespace)
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
        if self.read_only:
            raise ReadOnlyError(f"{self.name} is a snapshot")
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
        self._namespace.cluster.changed(self.vdi, self._namespace)
        self._journal(f"resize {self.name} {size}")

    def take(self, source: MemoryVolume, start: int, at: int, length: int) -> int:
        """Share, or else copy, the start of a range; give the bytes done."""
        joins = not self.vdi.blocks and not self.name.startswith("alien")
        shares = start == at and (source.vdi.family == self.vdi.family or joins)
        end = start + length
        # Where neither has anything behind the end, the last object is a whole one too.
        whole = end if end == source.size >= self.size else end // OBJECT_SIZE * OBJECT_SIZE
        if shares and not start % OBJECT_SIZE and whole > start:
            what, done = "share", whole - start
            self.vdi.family = source.vdi.family
            blocks = range(start // BLOCK, -(-whole // BLOCK))
            kept = {i: b for i, b in self.vdi.blocks.items() if i not in blocks}
            kept.update((i, b) for i, b in source.vdi.blocks.items() if i in blocks)
            self.vdi.blocks = kept
        else:
            border = OBJECT_SIZE - start % OBJECT_SIZE
            what, done = "copy", min(length, border if shares else COPY_AT_ONCE)
            self._copy(source, start, at, done)
        self.vdi.size = max(self.vdi.size, at + done)
        self.vdi.modified = time.time()
        self._dirty = True
        self._journal(f"{what} {self.name} {at} {done}")
        self._namespace.cluster.changed(self.vdi, self._namespace)
        return done

    def _copy(self, source: MemoryVolume, start: int, at: int, length: int) -> None:
        data = source.vdi.get(start, length)
        self.vdi.zero(at, length)
        for offset in range(0, length, BLOCK):
            piece = data[offset : offset + BLOCK]
            if piece.strip(b"\0"):
                self.vdi.put(at + offset, piece)

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
        self.accounts = Accounts()
        self.on_change: list[OnChange] = []
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
        self._check_free(name)
        return self._add(MemoryVdi(self._new(name, mode, uid, gid))).shown()

    def _check_free(self, name: str) -> None:
        if name in self.cluster.vdis or name in self.cluster.retired.values():
            raise VdiExistsError(f"there is a VDI {name!r}, or there are snapshots of one")

    def _new(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        now = time.time()
        made = Attributes(self.cluster.next_id, name, 0, 0, mode, uid, gid, now, now)
        self.cluster.next_id += 1
        return made

    def _add(self, vdi: MemoryVdi) -> MemoryVdi:
        vdi.modified = vdi.attributes.modified
        vdi.family = vdi.family or vdi.attributes.id
        self.cluster.vdis[vdi.attributes.name] = vdi
        return vdi

    async def snapshot(self, vdi: int, tag: str) -> Attributes:
        check_tag(tag)
        await self.round_trip()
        of = self._by_id(vdi)
        if of.vdi:
            raise UsageError(f"{of.attributes.name} is a snapshot")
        old = of.attributes
        name = snapshot_file(old.name, tag)
        if name in self.cluster.vdis:
            raise VdiExistsError(f"there is a snapshot {name!r}")
        made = MemoryVdi(
            self._new(name, old.mode & ~_WRITE_BITS, old.uid, old.gid),
            size=of.size,
            blocks=dict(of.blocks),
            family=of.family,
            vdi=vdi,
        )
        self.cluster.journal(f"snapshot {name}")
        return self._add(made).shown()

    async def rename(self, old: str, new: str, replace: bool) -> None:
        await self.round_trip()
        vdi = self._find(old)
        if vdi.vdi:
            of, tag = split_name(new)
            if not tag or of != split_name(old)[0]:
                raise UsageError(f"{old} is a snapshot: only its tag can be changed")
            check_tag(tag)
        else:
            check_vdi_name(new)
        if old == new:
            return
        if new in self.cluster.vdis:
            if not replace:
                raise VdiExistsError(f"there is a VDI {new!r}")
            await self.delete(new)
        self._check_free(new)
        for snapshot in self.cluster.snapshots_of(vdi.attributes.id):
            _, tag = split_name(snapshot.attributes.name)
            self._move(snapshot, snapshot_file(new, tag))
        self._move(vdi, new)

    def _move(self, vdi: MemoryVdi, new: str) -> None:
        self.cluster.vdis[new] = self.cluster.vdis.pop(vdi.attributes.name)
        vdi.attributes = dataclasses.replace(vdi.attributes, name=new)

    async def delete(self, name: str) -> None:
        await self.round_trip()
        vdi = self._find(name)
        if vdi.holder not in (None, self) or name.startswith("held"):
            raise HeldElsewhereError(f"{name} is held by another mount")
        if vdi.protected:
            raise ProtectedError(f"{name} is protected")
        del self.cluster.vdis[name]
        if self.cluster.snapshots_of(vdi.attributes.id):
            self.cluster.retired[vdi.attributes.id] = name
        if vdi.vdi and not self.cluster.snapshots_of(vdi.vdi):
            self.cluster.retired.pop(vdi.vdi, None)

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
        if found.vdi and ((mode or 0) & _WRITE_BITS or modified is not None):
            raise ReadOnlyError(f"{found.attributes.name} is a snapshot")
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
        self.cluster.changed(found, self)
        return found.shown()

    async def get_user_attributes(self, vdi: int) -> dict[str, str]:
        await self.round_trip()
        return dict(self._by_id(vdi).user_attributes)

    async def set_user_attribute(self, vdi: int, name: str, value: str | None) -> None:
        await self.round_trip()
        found = self._by_id(vdi)
        changed = {k: v for k, v in found.user_attributes.items() if k != name}
        if value is not None:
            changed[name] = value
            check_attributes(changed)
        found.user_attributes = changed

    async def copy_range(
        self,
        source: OpenVolume,
        source_offset: int,
        target: OpenVolume,
        target_offset: int,
        length: int,
    ) -> int:
        assert isinstance(source, MemoryVolume)
        assert isinstance(target, MemoryVolume)
        await target.attach()
        length = min(length, source.size - source_offset)
        if length <= 0:
            return 0
        if target_offset + length > MAX_VDI_SIZE:
            raise UsageError("the target would be too large")
        if source is target and abs(source_offset - target_offset) < length:
            raise UsageError("the ranges overlap")
        done = target.take(source, source_offset, target_offset, length)
        if source.name.startswith("slow"):
            await trio.sleep_forever()
        return done

    async def open(self, vdi: int) -> MemoryVolume:
        await self.round_trip()
        volume = self.volumes.get(vdi)
        if volume is None:
            volume = self.volumes[vdi] = MemoryVolume(self, self._by_id(vdi))
            volume.traffic = self.accounts.open(vdi, volume.name, self.volumes)
        volume.handles += 1
        return volume

    async def capacity(self) -> Capacity:
        await self.round_trip()
        return self.cluster.capacity

    def metrics(self) -> Iterator[str]:
        return vdi_metrics(Account(*row, stalled=False) for row in self.accounts.rows())


@asynccontextmanager
async def memory_namespace(
    cluster: MemoryCluster, *, asynchronous: bool
) -> AsyncIterator[MemoryNamespace]:
    """One mount of `cluster`, with the task that completes its I/O."""
    namespace = MemoryNamespace(cluster, asynchronous=asynchronous)
    cluster.mounts.append(namespace)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.pump)
        try:
            yield namespace
        finally:
            cluster.mounts.remove(namespace)
            nursery.cancel_scope.cancel()
