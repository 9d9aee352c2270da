"""One seed, from start to verdict."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from dataclasses import dataclass

import trio

from sheepfs.callbacks import completion, read_bytes
from sheepfs.cluster import Cluster
from sheepfs.connecting import join
from sheepfs.core.errors import HeldElsewhereError
from sheepfs.core.geometry import data_object, map_object
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.layers.inventory import stored_entries
from sheepfs.replication.objects import ObjectReader
from sheepfs.volume.frozen import FrozenVolume
from sheepfs.volume.volume import Volume
from sim import stalls
from sim.clients import OBJECT_SECTORS, Shelf, SimClient
from sim.faults import Faults
from sim.machine import HOST
from sim.network import SimClock
from sim.planted import planted
from sim.registers import SECTOR
from sim.registers import Volume as Model
from sim.world import CLUSTER, DEADLINE_S, HistoryLog, ScrubWatch, World, determined

LIMIT_S = 1000.0
"""Of simulated time."""
_LIMITS = {
    signal.SIGPROF: (signal.ITIMER_PROF, 400.0),
    signal.SIGALRM: (signal.ITIMER_REAL, 1500.0),
}
"""Seconds of the processor, and of the clock, for a seed that takes about five."""
CHUNK = 1 << 20


class TooSlow(BaseException):
    """Raised out of whatever is running."""


@dataclass
class Outcome:
    """What became of a seed."""

    seed: int
    operations: int
    faults: int
    simulated_s: float
    took_s: float
    problem: str
    """How it failed; empty if it did not."""
    history: list[str]


@dataclass(frozen=True)
class Size:
    """How much one seed does."""

    nodes: int = 5
    clients: int = 3
    operations: int = 2000
    faults: int = 20
    left_out: tuple[str, ...] = ()
    """Names of faults that do not happen."""
    bug: str = ""
    """Name of a planted one."""


def run(seed: int, size: Size = Size()) -> Outcome:
    """Run a seed."""
    world = World(seed, size.nodes)
    handlers = (HistoryLog(world.history), ScrubWatch(world))
    root = logging.getLogger()
    level = root.level
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    began = time.perf_counter()
    outcome = Outcome(seed, 0, 0, 0.0, 0.0, "", world.history.lines)

    async def main() -> None:
        start = trio.current_time()
        with trio.fail_after(LIMIT_S):
            await _main(world, size, outcome)
            if world.problem is not None:
                raise world.problem
        outcome.simulated_s = trio.current_time() - start

    def too_slow(*_: object) -> None:
        raise TooSlow("not done in time: does something go round for ever?")

    former = {number: signal.signal(number, too_slow) for number in _LIMITS}
    for timer, limit_s in _LIMITS.values():
        # More than once: what it is raised in may be code that lets nothing out.
        signal.setitimer(timer, limit_s, 1)
    try:
        with determined(world, seed), planted(size.bug):
            trio.run(main, clock=SimClock(world.network))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.problem = "".join(traceback.format_exception(error))
    finally:
        for number, (timer, _) in _LIMITS.items():
            signal.setitimer(timer, 0)
            signal.signal(number, former[number])
        for handler in handlers:
            root.removeHandler(handler)
        root.setLevel(level)
    outcome.took_s = time.perf_counter() - began
    return outcome


async def _main(world: World, size: Size, outcome: Outcome) -> None:
    async with world.running():
        await world.wait_nodes()
        weights = world.rng.choice(((0.0, 0.0, 0.0, 0.0), (1.0, 3.0, 0.7, 0.3)))
        shelf = Shelf(await _make_volumes(world), weights)
        clients = [
            SimClient(world, i + 1, shelf, -(-size.operations // size.clients))
            for i in range(size.clients)
        ]
        faults = Faults(world, clients, shelf.models, size.left_out)
        for client in clients:
            client.pause_s = faults.gap_s * size.faults * size.clients / size.operations
        async with trio.open_nursery() as watching:
            watching.start_soon(stalls.watch, world, clients)
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(client.run)
                nursery.start_soon(faults.run, size.faults)
            watching.cancel_scope.cancel()
        outcome.operations = sum(client.done for client in clients)
        outcome.faults = faults.brought
        world.history.say("-", "all operations are done")
        await world.wait_whole()
        world.history.say("-", "the cluster is whole")
        await _check(world, shelf)


async def _make_volumes(world: World) -> dict[str, Model]:
    host = world.network.host("maker")
    HOST.set(host)
    models = {}
    async with join(world.etcd_client(host), CLUSTER, "maker", network=host) as cluster:
        for number in range(1, world.rng.randint(2, 4) + 1):
            name = f"v{number}.raw"
            sectors = OBJECT_SECTORS * world.rng.randint(1, 3) - world.rng.choice((0, 8, 3))
            copies = world.rng.choice((2, 3, 3))
            record = await cluster.catalog.create(name, sectors * SECTOR, copies)
            models[name] = Model(record.id, sectors)
            world.history.say("-", f"{name}: {sectors} sectors, {copies} copies")
        for copies in {2, 3}:
            await cluster.catalog.want_pool(copies)
    return models


async def _check(world: World, shelf: Shelf) -> None:
    """All that was written is there, and all replicas agree."""
    named: set[int] = set()
    host = world.network.host("checker")
    HOST.set(host)
    async with join(world.etcd_client(host), CLUSTER, "checker", network=host) as cluster:
        for name, model in shelf.models.items():
            volume = await cluster.open((await cluster.lookup(name)).id)
            assert isinstance(volume, Volume)
            with trio.fail_after(DEADLINE_S):
                while True:
                    try:
                        await volume.attach()
                        break
                    except HeldElsewhereError:
                        await trio.sleep(0.5)
            assert volume.attachment is not None
            model.held_by(volume, was_clean=volume.attachment.was_clean)
            issued = world.history.event()
            with trio.fail_after(DEADLINE_S):
                await completion(volume.flush)
                await _check_all(volume, model, issued)
                while volume.converging:
                    await trio.sleep(0.1)
            await volume.close()
            named |= await _named_by(cluster, volume.record)
            world.history.say("-", f"{name} is as it should be")
        for name, model in shelf.snapshots.items():
            async with cluster.opened((await cluster.lookup(name)).id) as frozen:
                await _check_all(frozen, model, world.history.event())
            named |= await _named_by(cluster, frozen.record)
            world.history.say("-", f"{name} is as it should be")
    await world.check_replicas(named)


async def _named_by(cluster: Cluster, record: VdiRecord | SnapshotRecord) -> set[int]:
    """Give the ids of all objects that a map names, and of its map objects."""
    reader = ObjectReader(cluster.router, record.id)
    named = {
        map_object(record.map, i) for i in range(record.maps.bit_length()) if record.maps >> i & 1
    }
    async for index, layer in stored_entries(reader, record.map, record.maps):
        named.add(data_object(layer, index))
    return named


async def _check_all(volume: Volume | FrozenVolume, model: Model, issued: int) -> None:
    for first in range(0, model.sectors, CHUNK // SECTOR):
        count = min(CHUNK // SECTOR, model.sectors - first)
        model.check(first, await read_bytes(volume, first * SECTOR, count * SECTOR), issued)
