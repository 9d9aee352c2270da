"""Clients of the simulated cluster: they attach volumes, write, read and check what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

import trio

from sheepfs.callbacks import completion, read_bytes
from sheepfs.cluster import Cluster
from sheepfs.connecting import join
from sheepfs.core.errors import HeldElsewhereError, SheepError
from sheepfs.volume.volume import Volume
from sim.machine import HOST
from sim.registers import SECTOR, ZEROS, stamp
from sim.registers import Volume as Model
from sim.world import CLUSTER, World

OBJECT_SECTORS = 8192
MOST_VOLUMES = 6
SPAN = 200
"""Writes go to so many sectors around each border of objects, so that they meet each other."""


@dataclass
class Shelf:
    """The volumes and snapshots that the clients share, by file name, and what they may hold.

    Attributes:
        weights: how often a snapshot is made, read and deleted, and a clone made.
    """

    models: dict[str, Model]
    weights: tuple[float, float, float, float]
    snapshots: dict[str, Model] = field(default_factory=dict)

    def snapshots_of(self, name: str) -> list[str]:
        """Give the snapshots of a volume."""
        return [file for file in self.snapshots if file.startswith(f"{name.removesuffix('.raw')}@")]


class SimClient:
    """One mount: restarts after each death, until its operations are done."""

    def __init__(self, world: World, number: int, shelf: Shelf, count: int) -> None:
        self.world = world
        self.shelf = shelf
        self.name = f"c{number}"
        self.host = world.network.host(self.name)
        self.left = count
        self.done = 0
        self.pause_s = 0.0
        """Mean time between two operations."""
        self.cluster: Cluster | None = None
        self.under_way: dict[object, tuple[float, str]] = {}
        """Operations: when they began, and what they are."""
        self._scope = trio.CancelScope()
        self._random = Random(world.rng.random())
        self._values = (number << 40) + 1
        self._depth = self._random.choice((1, 4, 16))

    def say(self, what: str) -> None:
        """Add to the history."""
        self.world.history.say(self.name, what)

    async def run(self) -> None:
        """Work until all operations are done."""
        HOST.set(self.host)
        while self.left > 0:
            self.host.live()
            with trio.CancelScope() as self._scope:
                try:
                    store = self.world.etcd_client(self.host)
                    async with join(
                        store, CLUSTER, f"{self.name}:1:/mnt", stays=True, network=self.host
                    ) as self.cluster:
                        await self._work(self.cluster)
                        await self.cluster.close()
                except SheepError as error:
                    self.say(f"cannot start: {error}")
                    await trio.sleep(0.5)
            self.cluster = None
            if self._scope.cancelled_caught:
                self.say("is dead")
                await trio.sleep(self._random.uniform(0, 5))
        self.say("has finished")

    def kill(self) -> None:
        """End it at once."""
        self.host.die(silent=False)
        if self.cluster is not None:
            for volume in self.cluster._open_vdis():
                volume.fence("its mount was killed")
        self._scope.cancel()

    async def _work(self, cluster: Cluster) -> None:
        while self.left > 0:
            name = self._random.choice(sorted(self.shelf.models))
            try:
                await self._use(cluster, name, self._random.randint(5, 80))
            except HeldElsewhereError:
                await trio.sleep(self._random.uniform(0.01, 0.3))
            except SheepError as error:
                self.say(f"{name}: {error}")
                await trio.sleep(self._random.uniform(0.05, 0.5))

    async def _use(self, cluster: Cluster, name: str, count: int) -> None:
        vdi = (await cluster.lookup(name)).id
        volume = await cluster.open(vdi)
        assert isinstance(volume, Volume)
        try:
            await volume.attach()
        except SheepError:
            await volume.close()
            raise
        model = self.shelf.models[name]
        assert volume.attachment is not None
        was_clean = volume.attachment.was_clean
        self.say(f"{name} attached, {'clean' if was_clean else 'unclean'}")
        model.held_by(volume, was_clean=was_clean)
        try:
            await self._operate(volume, model, name, count)
        finally:
            with trio.CancelScope(shield=True):
                await self._close(volume, model, name)

    async def _close(self, volume: Volume, model: Model, name: str) -> None:
        fenced = volume.replicator is not None and volume.replicator.fenced
        in_order = False
        try:
            await volume.close()
            in_order = not fenced
            self.say(f"{name} closed{', fenced' if fenced else ''}")
        except SheepError as error:
            self.say(f"{name} closed with {error}")
        finally:
            model.let_go(volume, in_order=in_order)

    async def _operate(self, volume: Volume, model: Model, name: str, count: int) -> None:
        """Do so many operations, several at a time; the first error ends it."""
        slots = trio.Semaphore(self._depth)
        problem: SheepError | None = None

        async def one(operation: Callable[[Volume, Model, str], object]) -> None:
            nonlocal problem
            key = object()
            self.under_way[key] = trio.current_time(), f"{operation.__name__} of {name}"
            self.left += 1  # Should it not come to its end, another one takes its place.
            try:
                await operation(volume, model, name)  # type: ignore[misc]
                self.done += 1
                self.left -= 1
            except SheepError as error:
                self.say(f"{name} {operation.__name__}: {error}")
                problem = problem or error
            except AssertionError as error:
                self.world.fail(error)
            finally:
                del self.under_way[key]
                slots.release()

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                if self.pause_s:
                    await trio.sleep(self._random.expovariate(1 / self.pause_s))
                await slots.acquire()
                if problem or self.left <= 0:
                    slots.release()
                    break
                self.left -= 1
                (operation,) = self._random.choices(
                    (
                        self.write, self.read, self.flush, self.punch, self.snapshot,
                        self.read_snapshot, self.delete_snapshot, self.clone,
                    ),
                    (50, 30, 12, 8, *self.shelf.weights),
                )  # fmt: skip
                nursery.start_soon(one, operation)
        if problem:
            raise problem

    def _range(self, model: Model) -> tuple[int, int]:
        border = self._random.randrange(0, model.sectors + 1, OBJECT_SECTORS)
        first = max(0, min(border + self._random.randint(-SPAN, SPAN), model.sectors - 1))
        if self._random.random() < 0.7:
            first -= first % 8
        count = self._random.choice((1, 8, 8, 8, 16, 40, 64))
        return first, min(count, model.sectors - first)

    async def write(self, volume: Volume, model: Model, name: str) -> None:
        """Write sectors with a value of their own."""
        first, count = self._range(model)
        self._values += 1
        value = self._values
        data = b"".join(stamp(model.number, first + i, value) for i in range(count))
        issued = model.begin(first, count, value, self.world.history.event())
        self.say(f"{name} write {first}+{count} = {value:#x}")
        await completion(partial(volume.write, first * SECTOR, data))
        issued.completed = self.world.history.event()
        self.say(f"{name} wrote {value:#x}")

    async def punch(self, volume: Volume, model: Model, name: str) -> None:
        """Discard sectors."""
        first, count = self._range(model)
        if self._random.random() < 0.1:
            first, count = first - first % OBJECT_SECTORS, OBJECT_SECTORS
            count = min(count, model.sectors - first)
        issued = model.begin(first, count, ZEROS, self.world.history.event())
        self.say(f"{name} punch {first}+{count}")
        await volume.punch(first * SECTOR, count * SECTOR)
        issued.completed = self.world.history.event()
        self.say(f"{name} punched {first}+{count}")

    async def read(self, volume: Volume, model: Model, name: str) -> None:
        """Read sectors and check them."""
        first, count = self._range(model)
        issued = self.world.history.event()
        with model.reading():
            data = await read_bytes(volume, first * SECTOR, count * SECTOR)
            self.say(f"{name} read {first}+{count}")
            model.check(first, data, issued)

    async def flush(self, volume: Volume, model: Model, name: str) -> None:
        """Make durable."""
        issued = self.world.history.event()
        self.say(f"{name} flush {issued}")
        await completion(volume.flush)
        self.say(f"{name} flushed {issued}")
        model.flushed(issued)

    async def snapshot(self, volume: Volume, model: Model, name: str) -> None:
        """Keep the volume as it is."""
        assert self.cluster is not None
        self._values += 1
        tag = f"s{self._values:x}"
        issued = self.world.history.event()
        self.say(f"{name} snapshot {tag}")
        with model.reading():
            await self.cluster.snapshot(volume.record.id, tag)
            self.shelf.snapshots[f"{name.removesuffix('.raw')}@{tag}.raw"] = model.frozen(issued)
        self.say(f"{name} has snapshot {tag}")

    async def read_snapshot(self, volume: Volume, model: Model, name: str) -> None:
        """Read sectors of a snapshot and check them."""
        assert self.cluster is not None
        files = self.shelf.snapshots_of(name)
        if not files:
            return
        file = self._random.choice(files)
        frozen = self.shelf.snapshots[file]
        first, count = self._range(frozen)
        issued = self.world.history.event()
        async with self.cluster.opened((await self.cluster.lookup(file)).id) as opened:
            data = await read_bytes(opened, first * SECTOR, count * SECTOR)
        self.say(f"{file} read {first}+{count}")
        if file in self.shelf.snapshots:
            frozen.check(first, data, issued)

    async def delete_snapshot(self, volume: Volume, model: Model, name: str) -> None:
        """Delete a snapshot: what it alone names is reclaimed."""
        assert self.cluster is not None
        files = self.shelf.snapshots_of(name)
        if files:
            file = self._random.choice(files)
            del self.shelf.snapshots[file]
            self.say(f"delete {file}")
            await self.cluster.delete(file)

    async def clone(self, volume: Volume, model: Model, name: str) -> None:
        """Make a new volume that begins as this one is."""
        assert self.cluster is not None
        if len(self.shelf.models) >= MOST_VOLUMES:
            return
        self._values += 1
        file = f"x{self._values:x}.raw"
        issued = self.world.history.event()
        self.say(f"{name} clone {file}")
        with model.reading():
            await self.cluster.clone(volume.record.id, file)
            self.shelf.models[file] = model.frozen(issued)
        self.say(f"{name} has clone {file}")
