"""Twenty VDIs, their snapshots, clones and trash, as bytes in memory beside a real cluster."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

import trio

from sheepfs.callbacks import completion, read_bytes
from sheepfs.cluster import Cluster
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.names import snapshot_file
from sheepfs.volume.frozen import FrozenVolume
from sheepfs.volume.volume import Volume

MAX_VDIS = 20
MAX_SNAPSHOTS = 5
MAX_SIZE = 2 * OBJECT_SIZE + 300_001
MAX_SPAN = 64 << 10
EDGES = (0, 1, 511, 4095, 4096, 4097, 65536)
DEADLINE_S = 60.0
KEEP_S = 3600.0


@dataclass
class Disk:
    """What a VDI must hold."""

    content: bytearray = field(default_factory=bytearray)
    snapshots: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Thrown:
    """What the trash must hold."""

    name: str
    tag: str
    content: bytes


class Families:
    """Random operations on a cluster, each compared with the same on bytes in memory."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = Random(seed)
        self.disks: dict[str, Disk] = {}
        self.trash: dict[int, Thrown] = {}
        self.open: dict[str, Volume] = {}
        self.history: list[str] = []
        self._number = 0
        self.operations: tuple[tuple[int, Callable[[], Awaitable[None]]], ...] = (
            (6, self.create),
            (30, self.write),
            (15, self.read),
            (6, self.punch),
            (4, self.resize),
            (4, self.flush),
            (8, self.snapshot),
            (8, self.read_snapshot),
            (6, self.clone),
            (4, self.copy_range),
            (3, self.rollback),
            (3, self.rename),
            (3, self.delete),
            (5, self.delete_snapshot),
            (3, self.restore),
            (2, self.purge),
            (4, self.close),
        )

    async def run(self, count: int) -> None:
        """Do `count` operations; a difference is an AssertionError that tells the last ones."""
        weights = [weight for weight, _ in self.operations]
        for number in range(count):
            (_, operation), *_ = self.random.choices(self.operations, weights)
            try:
                with trio.fail_after(DEADLINE_S):
                    await operation()
            except Exception as error:
                recent = "\n".join(self.history[-25:])
                raise AssertionError(f"step {number}: {error!r} after\n{recent}") from error

    async def read_all(self) -> None:
        """Compare every live byte."""
        for name, disk in self.disks.items():
            volume = await self._volume(name)
            assert volume.size == len(disk.content), name
            await self._compare(volume, disk.content, 0, len(disk.content))
            for tag, content in disk.snapshots.items():
                await self._read_frozen(name, tag, content, 0, len(content))

    async def delete_all(self) -> None:
        """Leave nothing, not even in the trash."""
        await self.close_all()
        for name, disk in self.disks.items():
            for tag in disk.snapshots:
                await self.cluster.delete(snapshot_file(name, tag))
            await self.cluster.delete(name)
        await self.cluster.catalog.purge()

    async def close_all(self) -> None:
        """Let every VDI go."""
        while self.open:
            _, volume = self.open.popitem()
            await volume.close()

    # -- choosing -----------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.history.append(text)

    def _name(self) -> str | None:
        return self.random.choice(list(self.disks)) if self.disks else None

    def _new_name(self) -> str:
        self._number += 1
        return f"vm{self._number}.raw"

    def _with_snapshots(self) -> str | None:
        names = [name for name, disk in self.disks.items() if disk.snapshots]
        return self.random.choice(names) if names else None

    def _place(self, limit: int) -> int:
        if self.random.random() < 0.6:
            border = self.random.randrange(0, limit // OBJECT_SIZE + 1) * OBJECT_SIZE
            place = border + self.random.choice((-1, 1)) * self.random.choice(EDGES)
            return min(max(place, 0), limit)
        return self.random.randint(0, limit)

    async def _volume(self, name: str) -> Volume:
        if name not in self.open:
            found = await self.cluster.lookup(name)
            volume = await self.cluster.open(found.id)
            assert isinstance(volume, Volume)
            self.open[name] = volume
        return self.open[name]

    # -- data ---------------------------------------------------------------------------------

    async def create(self) -> None:
        """Make an empty VDI."""
        if len(self.disks) < MAX_VDIS:
            name = self._new_name()
            self._note(f"create {name}")
            await self.cluster.create(name, 0o644, 0, 0)
            self.disks[name] = Disk()

    async def write(self) -> None:
        """Write anywhere."""
        if name := self._name():
            start = self._place(MAX_SIZE - MAX_SPAN)
            span = self.random.choice((1, 512, 4096, 8192, 20_000, MAX_SPAN))
            self._note(f"write {name} {start:#x}+{span:#x}")
            data = self.random.randbytes(span)
            volume = await self._volume(name)
            await completion(partial(volume.write, start, data))
            content = self.disks[name].content
            content.extend(bytes(max(0, start + span - len(content))))
            content[start : start + span] = data

    async def read(self) -> None:
        """Read anywhere."""
        if name := self._name():
            content = self.disks[name].content
            start = self._place(len(content))
            self._note(f"read {name} {start:#x}")
            await self._compare(await self._volume(name), content, start, MAX_SPAN)

    async def _compare(
        self, volume: Volume | FrozenVolume, content: bytes | bytearray, start: int, span: int
    ) -> None:
        found = await read_bytes(volume, start, span)
        expected = bytes(content[start : start + span])
        assert len(found) == len(expected), f"{len(found)} bytes, not {len(expected)}"
        if found != expected:
            bad = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            raise AssertionError(f"byte {start + bad:#x} is {found[bad]}, not {expected[bad]}")

    async def punch(self) -> None:
        """Give back a range."""
        if name := self._name():
            content = self.disks[name].content
            start = self._place(len(content))
            span = self.random.choice((4096, 100_000, OBJECT_SIZE, 2 * OBJECT_SIZE))
            if self.random.random() < 0.3:
                start = start // OBJECT_SIZE * OBJECT_SIZE
            end = min(start + span, len(content))
            self._note(f"punch {name} {start:#x}..{end:#x}")
            if start < end:
                await (await self._volume(name)).punch(start, end - start)
                content[start:end] = bytes(end - start)

    async def resize(self) -> None:
        """Cut or grow."""
        if name := self._name():
            size = self._place(MAX_SIZE)
            self._note(f"resize {name} {size:#x}")
            await (await self._volume(name)).resize(size)
            content = self.disks[name].content
            del content[size:]
            content.extend(bytes(size - len(content)))

    async def flush(self) -> None:
        """Make durable."""
        if name := self._name():
            self._note(f"flush {name}")
            await completion((await self._volume(name)).flush)

    async def close(self) -> None:
        """Let a VDI go."""
        if self.open:
            name = self.random.choice(list(self.open))
            self._note(f"close {name}")
            await self.open.pop(name).close()

    # -- snapshots and clones -------------------------------------------------------------------

    async def snapshot(self) -> None:
        """Keep a VDI as it is."""
        name = self._name()
        if name and len(self.disks[name].snapshots) < MAX_SNAPSHOTS:
            self._number += 1
            tag = f"s{self._number}"
            self._note(f"snapshot {name} {tag}")
            found = await self.cluster.lookup(name)
            made = await self.cluster.snapshot(found.id, tag)
            assert made.size == len(self.disks[name].content)
            self.disks[name].snapshots[tag] = bytes(self.disks[name].content)

    async def read_snapshot(self) -> None:
        """Read anywhere in a snapshot."""
        if name := self._with_snapshots():
            tag, content = self.random.choice(list(self.disks[name].snapshots.items()))
            self._note(f"read {name}@{tag}")
            await self._read_frozen(name, tag, content, self._place(len(content)), MAX_SPAN)

    async def _read_frozen(
        self, name: str, tag: str, content: bytes, start: int, span: int
    ) -> None:
        found = await self.cluster.lookup(snapshot_file(name, tag))
        assert found.size == len(content)
        async with self.cluster.opened(found.id) as volume:
            await self._compare(volume, content, start, span)

    async def clone(self) -> None:
        """Make a VDI of a VDI or of a snapshot."""
        name = self._name()
        if not name or len(self.disks) >= MAX_VDIS:
            return
        new = self._new_name()
        source, content = name, bytes(self.disks[name].content)
        if self.disks[name].snapshots and self.random.random() < 0.6:
            tag, content = self.random.choice(list(self.disks[name].snapshots.items()))
            source = snapshot_file(name, tag)
        self._note(f"clone {source} {new}")
        await self.cluster.clone((await self.cluster.lookup(source)).id, new)
        self.disks[new] = Disk(bytearray(content))

    async def copy_range(self) -> None:
        """Copy a whole VDI to another, or a part."""
        source, target = self._name(), self._name()
        if not source or not target or source == target:
            return
        content = self.disks[source].content
        start = 0 if self.random.random() < 0.6 else self._place(len(content))
        end = len(content) if self.random.random() < 0.6 else self._place(len(content))
        self._note(f"copy {source} {target} {start:#x}..{end:#x}")
        here, there = await self._volume(source), await self._volume(target)
        while start < end:
            done = await self.cluster.copy_range(here, start, there, start, end - start)
            assert 0 < done <= end - start
            changed = self.disks[target].content
            changed.extend(bytes(max(0, start + done - len(changed))))
            changed[start : start + done] = content[start : start + done]
            start += done

    async def rollback(self) -> None:
        """Make a VDI as one of its snapshots is."""
        if name := self._with_snapshots():
            tag, content = self.random.choice(list(self.disks[name].snapshots.items()))
            self._note(f"rollback {name} {tag}")
            record = (await self.cluster.catalog.snapshot(name, tag)).record
            await self.cluster.rollback(record.vdi, record)
            self.disks[name].content[:] = content

    async def rename(self) -> None:
        """Give a VDI another name; its snapshots follow."""
        if name := self._name():
            new = self._new_name()
            self._note(f"rename {name} {new}")
            await self.cluster.rename(name, new, False)
            self.disks[new] = self.disks.pop(name)
            if name in self.open:
                self.open[new] = self.open.pop(name)
            for thrown in self.trash.values():
                if thrown.tag and thrown.name == name:
                    thrown.name = new

    # -- the trash --------------------------------------------------------------------------------

    async def delete(self) -> None:
        """Throw a VDI away; its snapshots first, so that names stay simple."""
        if name := self._name():
            self._note(f"delete {name}")
            if name in self.open:
                await self.open.pop(name).close()
            disk = self.disks.pop(name)
            for tag, content in disk.snapshots.items():
                await self._throw(name, tag, content)
            await self._throw(name, "", bytes(disk.content))

    async def _throw(self, name: str, tag: str, content: bytes) -> None:
        file = snapshot_file(name, tag) if tag else name
        found = await self.cluster.lookup(file)
        await self.cluster.delete(file)
        self.trash[found.id] = Thrown(name, tag, content)

    async def delete_snapshot(self) -> None:
        """Throw a snapshot away, any of a VDI's."""
        if name := self._with_snapshots():
            tag = self.random.choice(list(self.disks[name].snapshots))
            self._note(f"delete {name}@{tag}")
            await self._throw(name, tag, self.disks[name].snapshots.pop(tag))

    async def restore(self) -> None:
        """Take a VDI, or a snapshot of a VDI that is there, out of the trash."""
        possible = [
            (item, thrown)
            for item, thrown in self.trash.items()
            if (thrown.name in self.disks if thrown.tag else len(self.disks) < MAX_VDIS)
        ]
        if not possible:
            return
        item, thrown = self.random.choice(possible)
        self._note(f"restore {thrown.name} {thrown.tag}")
        await self.cluster.catalog.restore(item)
        self.cluster.names_changed()
        del self.trash[item]
        if thrown.tag:
            self.disks[thrown.name].snapshots[thrown.tag] = thrown.content
        else:
            self.disks[thrown.name] = Disk(bytearray(thrown.content))

    async def purge(self) -> None:
        """Free some of what is in the trash."""
        if self.trash:
            item = self.random.choice(list(self.trash))
            self._note(f"purge {self.trash[item].name} {self.trash[item].tag}")
            await self.cluster.catalog.purge(item)
            del self.trash[item]


def seed_of(number: int) -> int:
    """Give the seed of a run; `SHEEPFS_SEED` sets the first one."""
    return int(os.environ.get("SHEEPFS_SEED", "0")) + number
