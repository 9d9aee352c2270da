"""A whole cluster in one trio run: daemons, etcd, network and disks, all by one seed."""

from __future__ import annotations

import logging
import random
import secrets
import struct
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import trio

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.errors import CorruptError, RecoveringError, SheepError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import RecoveryRecord, ScrubRecord
from sheepfs.holding import holding
from sheepfs.net import link, router
from sheepfs.volume import convergence, flusher, vdimap, volume
from sim.machine import HOST, KilledError, ProcessDisk, SimEtcd, SimEtcdServer, Threads
from sim.network import SimHost, SimNetwork
from storaged import server, wiring
from storaged.daemon import Daemon, Machine, Options
from storaged.logic.scrub import DAY_S
from storaged.membership import leader, membership
from storaged.recovery import recovery
from storaged.scrub import agreement, selfcheck
from storaged.space import removal
from storaged.store import dirtylog, files, flush
from storaged.store.disk import Disk
from storaged.store.format import block_sum
from storaged.store.objects import ObjectStore

CLUSTER = "sim"
PORT = 7000
DEADLINE_S = 400.0
POLL_S = 0.1
RESTART_S = 0.3
KNOBS: dict[tuple[ModuleType, str], Sequence[float]] = {
    (dirtylog, "MAX_MARKS"): (2, 16, 4096),
    (files, "_MAX_OPEN"): (16, 8192),
    (flush, "_SYNC_ALL"): (1, 16),
    (flusher, "FLUSH_EVERY_S"): (0.5, 5.0),
    (recovery, "PARALLEL_GROUPS"): (1, 4),
    (removal, "BATCH"): (1, 64),
    (convergence, "PARALLEL_OPENS"): (1, 8),
    (vdimap, "PAGES_PER_LOAD"): (1, 16),
    (volume, "READER_MAP_S"): (0.05, 1.0),
    (membership, "ALIVE_TTL_S"): (3, 5, 10),
    (holding, "LEASE_TTL_S"): (5, 10, 30),
}
"""What each seed draws, besides latencies and the number of placement groups."""
_DIGESTS = struct.Struct(f"<{BLOCKS_PER_OBJECT}Q")


class History:
    """What happened, one line for each event, for whoever looks into a failing seed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._events = count(1)

    def event(self) -> int:
        """Give the number of the next event."""
        return next(self._events)

    def say(self, who: str, what: str) -> None:
        """Add a line."""
        self.lines.append(f"{trio.current_time():10.4f} {who:8} {what}")


class HistoryLog(logging.Handler):
    """Puts the programs' own log lines into the history."""

    def __init__(self, history: History) -> None:
        super().__init__(logging.INFO)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        host = HOST.get()
        name = host.name if host else "-"
        self._history.say(name, f"  {record.levelname} {record.name}: {record.getMessage()}")


class ScrubWatch(logging.Handler):
    """Fails the seed when scrubbing finds damage that is none, or does not repair what is."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        host, world = HOST.get(), self._world
        name = host.name if host else ""
        if getattr(record, "fields", {}).get("event") == "salvaged":
            world.salvaged.add(name)
        if record.name not in (selfcheck.__name__, agreement.__name__):
            return
        if "it cannot be read" in record.getMessage() and world.failed_reads[name] > 1:
            return  # The same object was met twice; it is tried again.
        if record.levelno < logging.ERROR and any(node.disk.is_short for node in world.nodes):
            return  # What must grow to be levelled stays behind as long as the disk is full.
        known = {world.spoiled.name, *world.salvaged} if world.spoiled else world.salvaged
        is_lost = record.levelno >= logging.ERROR
        if name not in known or (is_lost and not world.salvaged):
            world.fail(AssertionError(f"scrubbing says: {record.getMessage()}"))


class SimNode:
    """A storage daemon and its machine."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"n{number}"
        self.host = world.network.host(self.name)
        self.disk = FaultyDisk()
        self.process: ProcessDisk | None = None
        self.is_up = False
        self.kept_down = 0
        """Faults that keep the service manager from starting it."""
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._options = Options(
            Path("/sim"), "etcd", CLUSTER, f"{self.name}:{PORT}", f"{self.name}:{PORT}",
            self.name, 1.0, world.pg_count,
        )  # fmt: skip

    def start(self) -> None:
        """Start the daemon."""
        assert not self.is_up
        self.is_up = True
        self._is_stopping = False
        self.host.live()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.process = ProcessDisk(self.disk, self._scope.cancel, lambda: self.world.pages_lost())
        machine = Machine(
            self.host, lambda _: self.world.etcd_client(self.host), cast(Disk, self.process)
        )
        self._daemon = Daemon(self._options, machine)
        self.world.nursery.start_soon(self._run, self._daemon, self.process)

    async def _run(self, daemon: Daemon, process: ProcessDisk) -> None:
        HOST.set(self.host)
        world = self.world
        try:
            with self._scope:
                await daemon.run(lambda line: None)
        except (SheepError, KilledError, OSError) as error:
            world.history.say(self.name, f"ended: {error!r}")
        except BaseExceptionGroup as group:
            _, other = group.split((SheepError, KilledError, OSError))
            if other is not None:
                raise
            world.history.say(self.name, f"ended: {group!r}")
        finally:
            process.alive = False
            self.host.die(silent=False)
            if not self._is_stopping:
                world.died(self)
            self.is_up = False
            self._ended.set()

    async def supervise(self) -> None:
        """Start the daemon again when it has ended, as its service manager does."""
        while True:
            await self._ended.wait()
            while self.kept_down or not self._ended.is_set():
                await trio.sleep(RESTART_S)
            if not self.is_up:
                self.world.history.say(self.name, "start")
                self.start()
            await trio.sleep(RESTART_S)

    async def stop(self) -> None:
        """Stop it in order."""
        self._is_stopping = True
        self._daemon.stop()
        await self._ended.wait()
        self.disk.kill()

    async def ended(self) -> None:
        """Wait until it has ended by itself."""
        await self._ended.wait()

    async def replace_disk(self) -> None:
        """End it, and put in an empty disk: it comes back as another node."""
        found = self.world.map()
        if found is not None:
            address = f"{self.name}:{PORT}"
            self.world.gone |= {n.id for n in found.nodes.values() if n.address == address}
        await self.kill(power=True)
        self.disk = FaultyDisk()

    async def kill(self, *, power: bool) -> None:
        """End it at once, as SIGKILL does, or a power cut."""
        if self.process is not None:
            self.process.alive = False
        self.host.die(silent=power)
        self._scope.cancel()
        await self._ended.wait()
        if power:
            self.disk.power_cut(self.world.rng)
        else:
            self.disk.kill()


class World:
    """See the module."""

    def __init__(self, seed: int, nodes: int = 5) -> None:
        self.rng = random.Random(seed)
        self.history = History()
        rng = self.rng
        self.pg_count = rng.choice((2, 4, 8))
        self.out_after_s = rng.choice((5.0, 60.0, 600.0))
        self.parallel = rng.choice((1, 4))
        self.knobs = {knob: rng.choice(values) for knob, values in KNOBS.items()}
        scrub_rng = random.Random(f"scrub {seed}")
        self.scrub_every_s = scrub_rng.choice((0.0, 2.0, 10.0))
        """How often scrubbing looks at everything; 0: by its default, so never."""
        self.knobs[agreement, "SECOND_LOOK_S"] = scrub_rng.choice((0.5, 10.0))
        self.hints = random.Random(f"hints {seed}").random() < 0.5
        """Whether daemons push each new map to their clients, which nothing may depend on."""
        self.gone: set[int] = set()
        """Ids of nodes that never come back."""
        self.failed_reads = Counter[str]()
        """Name of a node -> how often one of its reads has failed."""
        self.spoiled: SimNode | None = None
        """The one node whose disk may hold other data than was written."""
        self.salvaged: set[str] = set()
        """Nodes that took what was good of a damaged copy, when nobody with another was left."""
        self.network = SimNetwork(
            random.Random(rng.random()),
            rng.choice((0.0001, 0.0005, 0.003)),
            rng.choice(((1.0,), (1.0, 1.0, 30.0), (1.0, 10.0, 100.0))),
        )
        self.threads = Threads(random.Random(rng.random()))
        self.etcd = SimEtcdServer()
        self._etcd_rng = random.Random(rng.random())
        self._node_count = nodes
        self.nodes: list[SimNode] = []
        self.clients: dict[str, SimEtcd] = {}
        self.nursery: trio.Nursery
        self.problem: AssertionError | None = None
        self.pages_lost: Callable[[], None] = lambda: None
        """Told when a node has lost what was not synced, and lives."""
        self.died: Callable[[SimNode], None] = lambda node: None
        """Told of a node that ends without having flushed."""
        self.keys = Keys(CLUSTER)

    def etcd_client(self, host: SimHost) -> SimEtcd:
        """Give a client of etcd for a program on a host."""
        client = SimEtcd(self.etcd, host, self._etcd_rng)
        self.clients[host.name] = client
        return client

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have all nodes run; whatever still runs at the end is cancelled."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            knobs = {name: value for (_, name), value in self.knobs.items()}
            hints = "" if self.hints else ", new maps are not pushed"
            self.history.say("-", f"{knobs}, out after {self.out_after_s:g} s{hints}")
            if self.scrub_every_s:
                days = self.scrub_every_s / DAY_S
                record = ScrubRecord(deep_days=days, light_days=days)
                put = Put(self.keys.setting("scrub"), record.encode())
                self.etcd.commit(Transaction([], [put]))
            self.nodes = [SimNode(self, i + 1) for i in range(self._node_count)]
            for node in self.nodes:
                node.start()
                nursery.start_soon(node.supervise)
            yield
            for node in self.nodes:
                if node.process is not None:
                    node.process.alive = False
            nursery.cancel_scope.cancel()

    def map(self) -> ClusterMap | None:
        """Give the newest map."""
        found = self.etcd.keys.get(self.keys.map)
        return None if found is None else ClusterMap.decode(found.value)

    def fail(self, problem: AssertionError) -> None:
        """End all: the seed has failed."""
        self.problem = self.problem or problem
        # Nobody shall wait, shielded, for what is cancelled now.
        for host in self.network.hosts.values():
            host.die(silent=True)
        self.nursery.cancel_scope.cancel()

    def lacks(self) -> str:
        """Tell what is not as it should be: every node serves, every group has all its copies."""
        found = self.map()
        if found is None:
            return "there is no map"
        lacks = [f"{node.name} is not up" for node in self.nodes if not node.is_up]
        lacks += [
            f"node {node.id} at {node.address} is {node.state}"
            for node in found.nodes.values()
            if node.state is not NodeState.ACTIVE and node.id not in self.gone
        ]
        lacks += [
            f"group {copies}/{number} is {group}"
            for copies, groups in found.pools.items()
            for number, group in enumerate(groups)
            if len(group.sync) != copies or group.joining
        ]
        if len(found.nodes.keys() - self.gone) != self._node_count:
            lacks.append(f"there are {len(found.nodes)} nodes, {len(self.gone)} gone for good")
        return "; ".join(lacks)

    def is_whole(self) -> bool:
        """Tell whether nothing lacks."""
        return not self.lacks()

    def is_last(self, node: SimNode) -> bool:
        """Tell whether some group has nobody else who runs and has everything."""
        found = self.map()
        if found is None:
            return False
        running = {other.name for other in self.nodes if other.is_up}
        # One that was voted out may be waited for all the same; one whose disk was replaced is not.
        newest = {found.nodes[number].address: number for number in sorted(found.nodes)}
        hosts = {number: address.partition(":")[0] for address, number in newest.items()}
        return any(
            running.intersection(hosts.get(member, "") for member in group.sync) == {node.name}
            for groups in found.pools.values()
            for group in groups
        )

    async def wait_nodes(self) -> None:
        """Wait until all nodes are in the map."""
        with trio.fail_after(DEADLINE_S):
            while (found := self.map()) is None or len(found.nodes) < self._node_count:
                await trio.sleep(POLL_S)

    async def check_replicas(self, named: Collection[int]) -> None:
        """End all nodes; all members have the same of what maps name. Raises AssertionError.

        What no map names is a leftover, which reclaim may be about to remove.
        """
        found = self.map()
        assert found is not None
        stores: dict[int, ObjectStore] = {}
        damaged = []
        for node in self.nodes:
            node.kept_down += 1
            await node.kill(power=False)
            store = ObjectStore.open(Path("/sim"), disk=node.disk)
            assert store.node_id is not None
            stores[store.node_id] = store
            if node is self.spoiled or node.name in self.salvaged:
                damaged.append(store)
        for copies, groups in found.pools.items():
            for number, group in enumerate(groups):
                held = {
                    node: {
                        info.oid
                        for info in stores[node].list(copies, number, len(groups))
                        if info.oid in named
                    }
                    for node in group.members
                }
                (first, expected), *others = held.items()
                for other, objects in others:
                    assert objects == expected, (
                        f"group {copies}/{number}: node {first} has {sorted(expected)},"
                        f" node {other} has {sorted(objects)}"
                    )
                    sides = (stores[first], stores[other])
                    bad = [oid for oid in sorted(objects) if differ(oid, sides, damaged)]
                    assert not bad, f"nodes {first} and {other} differ in {bad}"

    async def wait_whole(self) -> None:
        """Wait until it is so. Raises AssertionError."""
        with trio.move_on_after(DEADLINE_S):
            while not self.is_whole():
                await trio.sleep(POLL_S)
            return
        raise AssertionError(f"not whole after {DEADLINE_S:g} s: {self.lacks()}")


def differ(oid: int, sides: Sequence[ObjectStore], damaged: Collection[ObjectStore]) -> bool:
    """Tell whether two stores give different data for a block of an object.

    Of those that may be damaged, a block that they refuse to give does not count.
    """
    digests = [store.digests(oid) for store in sides]
    if digests[0] == digests[1]:
        return False
    for block, sums in enumerate(zip(*map(_DIGESTS.unpack, digests), strict=True)):
        if sums[0] == sums[1]:
            continue
        given = set()
        for store, on_disk in zip(sides, sums, strict=True):
            if store not in damaged:
                given.add(on_disk)
                continue
            with suppress(CorruptError, RecoveringError):
                data = store.read(oid, block * BLOCK_SIZE, BLOCK_SIZE, wait=True)
                given.add(block_sum(b"".join(data or ())))
        if len(given) > 1:
            return True
    return False


@contextmanager
def determined(world: World, seed: int) -> Iterator[None]:
    """Take chance, time and threads from the seed, for everything that runs in the block."""
    rng = random.Random(seed)
    start = 1_700_000_000.0
    numbers = count(1)
    former: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        former.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def made_up() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    def mortal(make: Callable[..., trio.CancelScope]) -> Callable[..., trio.CancelScope]:
        """What is shielded from cancellation is not shielded from its process's death."""

        def made(*args: Any, **kwargs: Any) -> trio.CancelScope:
            scope = make(*args, **kwargs)
            host = HOST.get()
            if scope.shield and host is not None:
                host.shields(scope)
            return scope

        return made

    put(trio, "CancelScope", mortal(trio.CancelScope))
    put(trio, "move_on_after", mortal(trio.move_on_after))
    put(trio.to_thread, "run_sync", world.threads.run_sync)

    def wall_clock() -> float:
        host = HOST.get()
        return start + trio.current_time() + (host.clock_s if host else 0.0)

    put(time, "time", wall_clock)
    put(
        leader.Leader.__init__,
        "__kwdefaults__",
        {**(leader.Leader.__init__.__kwdefaults__ or {}), "wall": wall_clock},
    )
    setting = partial(RecoveryRecord, out_after_s=world.out_after_s, parallel=world.parallel)
    put(wiring, "RecoveryRecord", setting)
    for (module, name), value in world.knobs.items():
        put(module, name, value)
    if not world.hints:
        put(server.Server, "publish", lambda self, cluster_map: None)
    put(secrets, "token_hex", lambda size=16: rng.randbytes(size).hex())
    put(secrets, "randbits", rng.getrandbits)
    put(uuid, "uuid4", made_up)
    put(link, "uuid4", made_up)
    put(link, "_numbers", numbers)
    put(router, "uuid4", made_up)
    scheduler = trio._core._run
    put(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    state = scheduler._r.getstate()
    scheduler._r.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        scheduler._r.setstate(state)
        for owner, name, value in reversed(former):
            setattr(owner, name, value)
