"""Random operations on a VDI over a cluster that fails, each compared with bytes in memory.

What may be there after the holder died without a detach: of each byte the flushed value or one
written later; and what is read then stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticCluster, StaticNode, static_cluster
from fakes.static_mount import COPIES, StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.callbacks import OperationError, read_bytes
from sheepfs.core.geometry import OBJECT_SIZE, data_object, map_object, object_count, pg_of
from sheepfs.core.metadata import SnapshotRecord
from sheepfs.core.wire import Op

MAX_SIZE = 3 * OBJECT_SIZE + 70_001
EDGES = (0, 1, 511, 4095, 4096, 4097, 65536)
OPERATIONS = 400
Change = tuple[int, int, int]
"""Start, end and the byte that fills it; what a cut removes is filled with zeros."""


class Model:
    """A VDI, the mount that has it open, and what may be read of it."""

    def __init__(self, cluster: StaticCluster, seed: int) -> None:
        self.cluster = cluster
        self.random = Random(seed)
        self.etcd = StaticRecord()
        self.mount = StaticMount(cluster, self.etcd)
        self.size = 0
        self.bytes = bytearray(MAX_SIZE)
        self.flushed = bytearray(MAX_SIZE)
        self.since: list[Change] = []
        self.sizes = {0}
        self.away = 0
        self.snapshots: list[tuple[SnapshotRecord, bytes]] = []
        self.history: list[str] = []
        self.operations: tuple[tuple[int, Callable[[], Awaitable[None]]], ...] = (
            (30, self.write),
            (8, self.write_many),
            (25, self.read),
            (6, self.punch),
            (3, self.resize),
            (5, self.flush),
            (5, self.seek),
            (2, self.reattach),
            (3, self.crash),
            (3, self.lose_node),
            (3, self.return_node),
            (3, self.snapshot),
            (4, self.read_snapshot),
            (1, self.rollback),
        )

    async def run(self, count: int) -> None:
        await self.mount.start()
        for number in range(count):
            (_, operation), *_ = self.random.choices(
                self.operations, [weight for weight, _ in self.operations]
            )
            try:
                await operation()
            except (AssertionError, OSError, OperationError, trio.TooSlowError) as error:
                recent = "\n".join(self.history[-25:])
                raise AssertionError(f"operation {number}: {error!r} after\n{recent}") from error
        await self.finish()

    # -- what the bytes are -----------------------------------------------------------------

    def place(self) -> int:
        border = self.random.randrange(4) * OBJECT_SIZE
        sign = self.random.choice((-1, 1))
        edge = self.random.choice(EDGES) + self.random.choice((0, 0, 8192))
        return min(max(border + sign * edge, 0), MAX_SIZE)

    def span(self) -> tuple[int, int]:
        start = self.place()
        length = self.random.choice((*EDGES[1:], self.random.randrange(1, 20_000)))
        if self.random.random() < 0.03:
            length = self.random.randrange(1, MAX_SIZE)
        return start, min(start + length, MAX_SIZE)

    def changed(self, start: int, end: int, fill: int) -> None:
        self.bytes[start:end] = bytes([fill]) * (end - start)
        self.since.append((start, end, fill))

    def settle(self) -> None:
        for start, end, _ in self.since:
            self.flushed[start:end] = self.bytes[start:end]
        self.since.clear()
        self.sizes = {self.size}

    def may_be(self, found: bytes) -> None:
        """Check bytes found after an unclean end, range by range of the same changes."""
        borders = sorted({0, MAX_SIZE, *(b for start, end, _ in self.since for b in (start, end))})
        for start, end in pairwise(borders):
            fills = {fill for s, e, fill in self.since if s <= start and end <= e}
            here, before = found[start:end], bytes(self.flushed[start:end])
            if here == before or any(here == bytes([fill]) * len(here) for fill in fills):
                continue
            bad = [
                start + i
                for i, (new, old) in enumerate(zip(here, before, strict=True))
                if new != old and new not in fills
            ]
            assert not bad, f"{len(bad)} bytes from {bad[0]:#x}: {here[bad[0] - start]}, {fills=}"

    # -- operations -------------------------------------------------------------------------

    async def write(self) -> None:
        start, end = self.span()
        if start < end:
            fill = self.random.randrange(256)
            self.history.append(f"write {start:#x} {end:#x} {fill}")
            await self.mount.write(start, bytes([fill]) * (end - start))
            self.changed(start, end, fill)
            self.grow(end)

    def grow(self, size: int) -> None:
        self.size = max(self.size, size)
        self.sizes.add(self.size)

    def many(self) -> list[Change]:
        """Changes that do not overlap, small and close together."""
        start = min(self.place(), MAX_SIZE - 70_000)
        steps = sorted(self.random.sample(range(start, start + 70_000), 10))
        return [
            (s, e, self.random.randrange(256)) for s, e in zip(steps[::2], steps[1::2], strict=True)
        ]

    async def write_many(self) -> None:
        changes = self.many()
        self.history.append(f"write at once {changes}")
        async with trio.open_nursery() as nursery:
            for start, end, fill in changes:
                nursery.start_soon(self.mount.write, start, bytes([fill]) * (end - start))
        for change in changes:
            self.changed(*change)
            self.grow(change[1])

    async def read(self) -> None:
        start, end = self.span()
        self.history.append(f"read {start:#x} {end:#x}")
        found = await self.mount.read(start, end - start)
        expected = bytes(self.bytes[start : min(end, self.size)])
        if found != expected:
            assert len(found) == len(expected), f"{len(found)} bytes, not {len(expected)}"
            first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            raise AssertionError(f"at {start + first:#x}: {found[first]}, not {expected[first]}")

    async def punch(self) -> None:
        start, end = self.span()
        if self.random.random() < 0.4:
            start = start // OBJECT_SIZE * OBJECT_SIZE
            end = min(start + OBJECT_SIZE, MAX_SIZE)
        self.history.append(f"punch {start:#x} {end:#x}")
        if start < end:
            with trio.fail_after(15):
                await self.mount.volume.punch(start, end - start)
            self.changed(start, end, 0)

    async def resize(self) -> None:
        size = self.place()
        self.history.append(f"resize {size:#x}")
        with trio.fail_after(15):
            await self.mount.volume.resize(size)
        if size < self.size:
            self.changed(size, MAX_SIZE, 0)
        self.size = size
        self.sizes.add(size)

    async def flush(self) -> None:
        self.history.append("flush")
        await self.mount.volume.attach()
        await self.mount.flush()
        self.settle()

    async def seek(self) -> None:
        """What `seek` calls a hole must be zeros; at the ends there is no doubt."""
        start = self.place()
        if start >= self.size:
            return
        self.history.append(f"seek {start:#x}")
        with trio.fail_after(15):
            data = await self.mount.volume.seek_data(start)
            hole = await self.mount.volume.seek_hole(start)
        assert start <= hole <= self.size
        end = self.size if data is None else data
        assert start <= end <= self.size
        assert not any(self.bytes[start:end]), f"data before {end:#x}"

    async def reattach(self) -> None:
        self.history.append("detach")
        with trio.fail_after(15):
            await self.mount.volume.detach()
        self.settle()
        if self.random.random() < 0.5:
            await self.read()

    async def crash(self) -> None:
        """End the holder in the middle of some writes; the next one must find one truth."""
        changes = self.many() if self.random.random() < 0.7 else []
        self.history.append(f"crash in {changes}")
        if self.mount.volume.attachment is None and not changes:
            return
        nodes = [node for n, node in self.cluster.nodes.items() if n != self.away]
        deaf = self.random.sample(nodes, self.random.randrange(3))
        for node in deaf:
            # What was sent to this node is lost with the sender.
            for op in (Op.WRITE, Op.PUNCH):
                node.server.handlers[op] = lambda client, header, payload: None
        for start, end, fill in changes:
            self.mount.volume.write(start, bytes([fill]) * (end - start), lambda code: None)
            self.since.append((start, end, fill))
            self.sizes.add(max(self.size, end))
        for _ in range(self.random.randrange(12)):
            await trio.sleep(0)
        await self.mount.end()
        for node in deaf:
            for op in (Op.WRITE, Op.PUNCH):
                node.server.handlers[op] = node.replica.handle
        if self.etcd.record.clean:
            # The end came before the attach was complete: nothing was written.
            del self.since[len(self.since) - len(changes) :]
        self.mount = StaticMount(self.cluster, self.etcd)
        await self.mount.start()
        with trio.fail_after(15):
            await self.mount.volume.attach()
        size = self.mount.volume.size
        assert size in self.sizes, f"size {size:#x}, not of {self.sizes}"
        if self.random.random() < 0.5:
            # A holder that leaves before it saw everything must not hide what may differ.
            self.history.append("detach before the first read")
            with trio.fail_after(15):
                await self.mount.volume.detach()
        # Grown, so that what lies beyond the end is seen too.
        await self.mount.volume.resize(MAX_SIZE)
        found = await self.mount.read(0, MAX_SIZE)
        self.may_be(found)
        for node in nodes:
            self.as_read(node, found)
        self.bytes[:] = found
        await self.mount.volume.resize(size)
        self.bytes[size:] = bytes(MAX_SIZE - size)
        self.size = size
        await self.mount.flush()
        self.flushed[:] = self.bytes
        self.since.clear()
        self.sizes = {size}

    def as_read(self, node: StaticNode, found: bytes) -> None:
        """Any member of a group may be asked next: each must have what was read."""
        for index in range(object_count(MAX_SIZE)):
            layer = self.mount.volume._map.get(index)
            if not layer:
                continue
            oid = data_object(layer, index)
            start = index * OBJECT_SIZE
            piece = found[start : start + OBJECT_SIZE]
            buffers = node.store.read(oid, 0, len(piece), wait=True)
            same = buffers is not None and b"".join(buffers) == piece
            assert same, f"node {node.node} has another object {index}"

    async def snapshot(self) -> None:
        """Writes under way are in it whole or not at all; all that was acknowledged is."""
        changes = self.many()
        self.history.append(f"snapshot in {changes}")
        made: list[SnapshotRecord] = []

        async def take() -> None:
            made.append(await self.mount.snapshot())

        await self.mount.volume.attach()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            for _ in range(self.random.randrange(30)):
                await trio.sleep(0)
            for start, end, fill in changes:
                nursery.start_soon(self.mount.write, start, bytes([fill]) * (end - start))
        found = await self.read_frozen(made[0])
        expected = bytearray(self.bytes[: made[0].size])
        for start, end, fill in changes:
            if found[start:end] == bytes([fill]) * (min(end, len(found)) - start):
                expected[start:end] = found[start:end]
        assert found == expected
        self.snapshots.append((made[0], found))
        del self.snapshots[:-5]
        for change in changes:
            self.changed(*change)
            self.grow(change[1])

    async def read_frozen(self, snapshot: SnapshotRecord) -> bytes:
        with trio.fail_after(15):
            return await read_bytes(self.mount.frozen(snapshot), 0, snapshot.size)

    async def read_snapshot(self) -> None:
        if self.snapshots:
            snapshot, expected = self.random.choice(self.snapshots)
            self.history.append(f"read snapshot {snapshot.map:#x}")
            self.same(await self.read_frozen(snapshot) if snapshot.size else b"", expected)

    def same(self, found: bytes, expected: bytes) -> None:
        assert len(found) == len(expected), f"{len(found)} bytes, not {len(expected)}"
        if found != expected:
            first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            raise AssertionError(f"at {first:#x}: {found[first]}, not {expected[first]}")

    async def rollback(self) -> None:
        if not self.snapshots or self.away:
            return
        snapshot, expected = self.random.choice(self.snapshots)
        self.history.append(f"rollback to {snapshot.map:#x}")
        await self.mount.volume.attach()
        await self.mount.rollback(snapshot)
        self.size = len(expected)
        self.bytes[:] = expected + bytes(MAX_SIZE - self.size)
        await self.mount.flush()
        self.flushed[:] = self.bytes
        self.since.clear()
        self.sizes = {self.size}

    async def lose_node(self) -> None:
        if self.away:
            return
        changes = self.many()
        self.away = self.random.choice(list(self.cluster.nodes))
        self.history.append(f"node {self.away} is lost in {changes}")
        stay = [n for n in self.cluster.nodes if n != self.away]
        node = self.cluster.nodes[self.away]
        node.clean = False
        async with trio.open_nursery() as nursery:
            for start, end, fill in changes:
                nursery.start_soon(self.mount.write, start, bytes([fill]) * (end - start))
            for _ in range(self.random.randrange(8)):
                await trio.sleep(0)
            node.stop()
            for _ in range(self.random.randrange(8)):
                await trio.sleep(0)
            self.cluster.publish(stay)
        for change in changes:
            self.changed(*change)
            self.grow(change[1])

    async def return_node(self) -> None:
        if not self.away:
            return
        self.history.append(f"node {self.away} returns")
        await self.cluster.nodes[self.away].start()
        stay = [n for n in self.cluster.nodes if n != self.away]
        self.cluster.publish(stay, [self.away])
        for _ in range(self.random.randrange(4)):
            await self.write_many()
        await wait_until(lambda: all(len(g.sync) == 3 for g in self.cluster.map.pools[COPIES]))
        self.away = 0

    # -- at the end -------------------------------------------------------------------------

    async def finish(self) -> None:
        await self.return_node()
        await self.mount.volume.attach()
        await wait_until(lambda: not self.mount.volume.converging)
        await self.reattach()
        assert await self.mount.read(0, MAX_SIZE) == self.bytes[: self.size]
        await self.mount.volume.detach()
        assert self.etcd.record.clean
        for snapshot, expected in self.snapshots:
            if snapshot.size:
                self.same(await self.read_frozen(snapshot), expected)
        for number in [self.etcd.record.map, *(snapshot.map for snapshot, _ in self.snapshots)]:
            self.equal(map_object(number, 0))
        layers = await self.mount.volume.load_map()
        for index, layer in enumerate(layers.pages[0]):
            if layer:
                self.equal(data_object(layer, index))
        assert [node.disk_errors for node in self.cluster.nodes.values()] == [[], [], []]

    def equal(self, oid: int) -> None:
        stores = [node.store for node in self.cluster.nodes.values()]
        found = [store.get(oid) for store in stores]
        versions = {entry.version if entry else None for entry in found}
        assert len(versions) == 1, f"{oid:x} of group {pg_of(oid, PG_COUNT)}: {versions}"
        assert len({store.digests(oid) for store in stores}) == 1, f"{oid:x} differs"


@pytest.mark.parametrize("seed", range(4))
async def test_any_operations_give_the_bytes_that_were_written(tmp_path: Path, seed: int) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        await Model(cluster, seed).run(OPERATIONS)
