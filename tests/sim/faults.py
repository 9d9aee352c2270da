"""What befalls the simulated cluster: faults, each for a while, drawn by the world's seed.

Always holds:
- A loss of power counts as a loss of unflushed data only if it can be one: when nodes were already
  missing, or all go at once. So does the death of the last daemon that has all of a group. Else the
  model expects that nothing is lost.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import trio

from fakes.faulty_disk import BLOCK, FaultyDisk
from sheepfs.core.geometry import BLOCKS_PER_OBJECT as OBJECT_BLOCKS
from sim.clients import SimClient
from sim.registers import Volume as Model
from sim.world import POLL_S, SimNode, World


class Faults:
    """Brings faults, one after the other, some overlapping."""

    def __init__(
        self,
        world: World,
        clients: Sequence[SimClient],
        models: Mapping[str, Model],
        left_out: Sequence[str] = (),
    ) -> None:
        """`left_out`: names of faults that do not happen."""
        self.world = world
        self.clients = clients
        self.models = models
        self.brought = 0
        self._failing = 0
        """Times that all nodes' disks fail at this moment."""
        self._capacities: dict[FaultyDisk, int] = {}
        """Of disks that were filled."""
        self._is_short = False
        """A disk was lost, and what it had is not on as many others yet: no more may be lost."""
        world.pages_lost = self._pages_lost
        world.died = self._died
        rng = world.rng
        self._kinds: list[Callable[[], Awaitable[None]]] = [
            self.kill_node, self.kill_node, self.kill_node_within_a_call, self.cut_power,
            self.pause_node, self.stop_node, self.cut_link, self.isolate, self.slow_disk,
            self.fail_sync, self.fail_read, self.lose_etcd_leader, self.lose_etcd_replies,
            self.compact_etcd,
            self.fail_syncs_of_all, self.cut_from_etcd, self.kill_client, self.pause_client,
            self.cut_power_of_all, self.slow_link, self.replace_disk, self.fill_disk, self.rot,
            self.spoil_write, self.set_clock,
        ]  # fmt: skip
        # Each seed has its own few troubles, so that some are rare and others the rule.
        self._weights = [rng.choice((0, 0, 1, 1, 4)) for _ in self._kinds]
        for place, kind in enumerate(self._kinds):
            if kind.__name__ in left_out:
                self._weights[place] = 0
        if not any(self._weights):
            self._weights[0] = 1
        self.gap_s = rng.choice((0.5, 2.0, 5.0))

    async def run(self, count: int) -> None:
        """Bring so many; returns when the last one is over."""
        rng = self.world.rng
        async with trio.open_nursery() as nursery:
            while self.brought < count:
                await trio.sleep(rng.expovariate(1 / self.gap_s))
                (kind,) = rng.choices(self._kinds, self._weights)
                self.brought += 1
                nursery.start_soon(kind)

    def say(self, what: str) -> None:
        """Add to the history."""
        self.world.history.say("FAULT", what)

    def _node(self) -> SimNode | None:
        """Give a node that runs and has no damage.

        What was damaged since its last flush, a node that then starts anew cannot know.
        """
        up = [node for node in self.world.nodes if node.is_up and node is not self.world.spoiled]
        up = [] if self._is_short else up
        return self.world.rng.choice(up) if up else None

    def _losing(self) -> SimNode | None:
        """Give a node that may lose what it has not synced; none where one has damage."""
        return None if self.world.spoiled else self._node()

    def _to_spoil(self) -> SimNode | None:
        """Give the one node that may get damage, if all others have good copies now."""
        if not self._may_spoil():
            return None
        if self.world.spoiled is None:
            node = self._node()
            if node is None or node.process is None or node.process.fail_next:
                return None  # One that fails soon starts anew, and then trusts what its disk has.
            self.world.spoiled = node
        return self.world.spoiled

    def _may_spoil(self) -> bool:
        """Tell whether each block has a good copy elsewhere: what has none is lost, and rightly."""
        return self._failing == 0 and self.world.is_whole()

    def _some_time(self) -> float:
        return self.world.rng.choice((0.1, 1.0, 3.0, 8.0, 15.0))

    @contextmanager
    def _down(self, *nodes: SimNode) -> Iterator[None]:
        """Keep the service manager from starting nodes again before the block ends."""
        for node in nodes:
            node.kept_down += 1
        try:
            yield
        finally:
            for node in nodes:
                node.kept_down -= 1

    # -- nodes ------------------------------------------------------------------------------

    async def kill_node(self) -> None:
        """SIGKILL."""
        if node := self._node():
            self.say(f"kill {node.name}")
            with self._down(node):
                await node.kill(power=False)
                await trio.sleep(self._some_time())

    async def kill_node_within_a_call(self) -> None:
        """SIGKILL while the disk is being written."""
        node = self._node()
        if node and node.process:
            calls = self.world.rng.randrange(200)
            self.say(f"kill {node.name} within {calls} calls")
            node.process.calls_left = calls
            with self._down(node):
                await trio.sleep(self._some_time())
                await node.kill(power=False)

    async def stop_node(self) -> None:
        """A clean stop."""
        if node := self._node():
            self.say(f"stop {node.name}")
            with self._down(node):
                await node.stop()
                await trio.sleep(self._some_time())

    async def cut_power(self) -> None:
        """Of one node."""
        if node := self._losing():
            safe = self.world.is_whole()
            self.say(f"cut the power of {node.name}, {'nobody else' if safe else 'others'} missing")
            if not safe:
                self._lost()
            with self._down(node):
                await node.kill(power=True)
                await trio.sleep(self._some_time())

    async def cut_power_of_all(self) -> None:
        """Of all nodes at once."""
        if self.world.spoiled is not None or self._is_short:
            return
        self.say("cut the power of all nodes")
        self._lost()
        up = [node for node in self.world.nodes if node.is_up]

        async def come_back(node: SimNode) -> None:
            with self._down(node):
                await trio.sleep(self._some_time())

        async with trio.open_nursery() as nursery:
            with self._down(*up):
                async with trio.open_nursery() as killing:
                    for node in up:
                        killing.start_soon(partial(node.kill, power=True))
                for node in up:
                    nursery.start_soon(come_back, node)
                await trio.sleep(0.01)

    def _died(self, node: SimNode) -> None:
        """Which unflushed blocks of a clone are its own, only the daemons know that have them."""
        if self.world.is_last(node):
            self._lost()

    def _lost(self) -> None:
        for model in self.models.values():
            model.lost(holder=False)

    async def pause_node(self) -> None:
        """SIGSTOP and SIGCONT."""
        if node := self._node():
            self.say(f"pause {node.name}")
            node.host.pause()
            await trio.sleep(self.world.rng.choice((0.5, 3.0, 15.0, 40.0)))
            self.say(f"{node.name} goes on")
            node.host.resume()

    # -- disks ------------------------------------------------------------------------------

    async def slow_disk(self) -> None:
        """Jobs wait for a disk."""
        if node := self._node():
            self.say(f"slow disk of {node.name}")
            self.world.threads.delay_s[node.name] = self.world.rng.choice((0.02, 0.3))
            await trio.sleep(self._some_time())
            self.world.threads.delay_s.pop(node.name, None)

    async def fail_sync(self) -> None:
        """A failed fsync: the daemon leaves; what was not on the disk is lost."""
        node = self._losing()
        if node and node.process:
            self.say(f"fail a sync of {node.name}")
            node.process.fail_next["fdatasync"] = errno.EIO
            with self._down(node):
                with trio.move_on_after(self._some_time()):
                    await node.ended()
                others = [other for other in self.world.nodes if other is not node]
                if not (self.world.is_whole() if node.is_up else all(n.is_up for n in others)):
                    self._lost()
                await node.kill(power=True)

    async def fail_syncs_of_all(self) -> None:
        """Of a bad batch of disks: whoever notices leaves; then the power goes."""
        if self.world.spoiled is not None or self._is_short:
            return
        self.say("fail a sync of all nodes")
        self._failing += 1
        for node in self.world.nodes:
            if node.process is not None:
                node.process.fail_next["fdatasync"] = errno.EIO
        await trio.sleep(self.world.rng.choice((0.1, 1.0, 5.0)))
        await self.cut_power_of_all()
        self._failing -= 1

    def _pages_lost(self) -> None:
        if self._failing or not self.world.is_whole():
            self._lost()

    async def fail_read(self) -> None:
        """EIO from one read."""
        node = self._node()
        if node and node.process:
            self.say(f"fail a read of {node.name}")
            node.process.fail_next["pread"] = errno.EIO
            self.world.failed_reads[node.name] += 1
            await trio.lowlevel.checkpoint()

    async def replace_disk(self) -> None:
        """Of a node, while all others have all; it is given up after `out_after`."""
        node = self._node()
        world = self.world
        if node is None or world.spoiled or world.out_after_s > 60 or not world.is_whole():
            return
        if any(other.host.paused for other in world.nodes) or not world.network.is_well:
            return  # Who hangs, or is cut off, may be as good as lost before anybody knows.
        self.say(f"empty the disk of {node.name}")
        self._is_short = True
        with self._down(node):
            await node.replace_disk()
            await trio.sleep(self._some_time())
        while not world.is_whole():
            await trio.sleep(POLL_S)
        self._is_short = False

    async def fill_disk(self) -> None:
        """Up to the reserve, or wholly; for a while."""
        if node := self._node():
            left = self.world.rng.choice((0, 1 << 18, 1 << 29))
            self.say(f"leave {left} bytes free at {node.name}")
            disk = node.disk
            former = self._capacities.setdefault(disk, disk.capacity)
            disk.fill(left)
            await trio.sleep(self._some_time())
            disk.capacity = former  # Also if it was filled twice.

    async def rot(self) -> None:
        """A bit of stored data flips."""
        rng = self.world.rng
        if node := self._to_spoil():
            objects = node.disk.paths("objects")
            path = rng.choice(objects) if objects else ""
            blocks = [n for n in node.disk.stored_blocks(path) if n < OBJECT_BLOCKS] if path else []
            if blocks:
                block = rng.choice(blocks)
                self.say(f"flip a bit of block {block} of {path} of {node.name}")
                node.disk.rot(path, block * BLOCK + rng.randrange(BLOCK))
        await trio.lowlevel.checkpoint()

    async def spoil_write(self) -> None:
        """A write that the disk says it has done, and has not, or has elsewhere."""
        node = self._to_spoil()
        if node and node.process:
            node.process.spoil_next = self.world.rng.choice(("lost", "misdirected"))
            node.process.may_spoil = self._may_spoil
            self.say(f"the next write to {node.name} is {node.process.spoil_next}")
        await trio.lowlevel.checkpoint()

    # -- networks ---------------------------------------------------------------------------

    async def cut_link(self) -> None:
        """Between two hosts, one way or both."""
        names = list(self.world.network.hosts)
        one, other = self.world.rng.sample(names, 2)
        both = self.world.rng.random() < 0.5
        self.say(f"cut {one} {'<' if both else ''}-> {other}")
        self.world.network.cut(one, other)
        if both:
            self.world.network.cut(other, one)
        await trio.sleep(self._some_time())
        self.world.network.mend()

    async def slow_link(self) -> None:
        """Everything between one host and all others is late, one way or both."""
        names = list(self.world.network.hosts)
        slow = self.world.rng.choice(names)
        ways = self.world.rng.choice(("from", "to", "from and to"))
        mean_s = self.world.rng.choice((0.02, 0.3, 1.5))
        self.say(f"what goes {ways} {slow} takes {mean_s:g} s")
        links = [(slow, name) for name in names if name != slow and "from" in ways]
        links += [(name, slow) for name in names if name != slow and "to" in ways]
        self.world.network.slow_s.update(dict.fromkeys(links, mean_s))
        await trio.sleep(self._some_time())
        for link in links:
            self.world.network.slow_s.pop(link, None)

    async def isolate(self) -> None:
        """One node from everybody, etcd included or not."""
        if node := self._node():
            with_etcd = self.world.rng.random() < 0.5
            self.say(f"isolate {node.name}{' also from etcd' if with_etcd else ''}")
            for name in self.world.network.hosts:
                if name != node.name:
                    self.world.network.cut(node.name, name)
                    self.world.network.cut(name, node.name)
            await self._without_etcd(node.name if with_etcd else "")
            self.world.network.mend()

    async def _without_etcd(self, name: str) -> None:
        client = self.world.clients.get(name)
        if client is not None:
            client.partition(silent=self.world.rng.random() < 0.5)
        await self._some_time_of_etcd()
        if client is not None:
            client.heal()

    # -- etcd -------------------------------------------------------------------------------

    async def _some_time_of_etcd(self) -> None:
        await trio.sleep(self.world.rng.choice((0.5, 4.0, 12.0)))

    async def cut_from_etcd(self) -> None:
        """One program."""
        if self._is_short:
            return  # Whoever cannot renew a lease is voted out, and with that is lost for a while.
        name = self.world.rng.choice(list(self.world.clients))
        self.say(f"cut {name} from etcd")
        await self._without_etcd(name)

    async def lose_etcd_leader(self) -> None:
        """Nobody gets an answer until there is a new one."""
        if not self.world.etcd.is_down:
            self.say("etcd loses its leader")
            self.world.etcd.is_down = True
            await trio.sleep(self.world.rng.choice((0.3, 2.0, 20.0)))
            self.world.etcd.elect()

    async def lose_etcd_replies(self) -> None:
        """Outcomes stay unknown."""
        self.say("etcd's answers get lost")
        for client in self.world.clients.values():
            client.trouble = 0.2
        await trio.sleep(self._some_time())
        for client in self.world.clients.values():
            client.trouble = 0.0

    async def compact_etcd(self) -> None:
        """Watches end, and miss what happens until they are made anew."""
        self.say("etcd is compacted")
        for client in self.world.clients.values():
            client.lose_watches()
        await self._some_time_of_etcd()
        for client in self.world.clients.values():
            client.watch_again()

    # -- clocks -----------------------------------------------------------------------------

    async def set_clock(self) -> None:
        """Of one host, by up to a day."""
        name = self.world.rng.choice(list(self.world.network.hosts))
        step_s = self.world.rng.choice((-86400.0, -30.0, 30.0, 86400.0))
        self.say(f"the clock of {name} jumps by {step_s:g} s")
        self.world.network.hosts[name].clock_s += step_s
        await trio.lowlevel.checkpoint()

    # -- clients ----------------------------------------------------------------------------

    async def kill_client(self) -> None:
        """SIGKILL of a mount."""
        client = self.world.rng.choice(self.clients)
        self.say(f"kill {client.name}")
        client.kill()
        await trio.lowlevel.checkpoint()

    async def pause_client(self) -> None:
        """SIGSTOP and SIGCONT of a mount, perhaps beyond its lease."""
        client = self.world.rng.choice(self.clients)
        self.say(f"pause {client.name}")
        client.host.pause()
        await trio.sleep(self.world.rng.choice((1.0, 8.0, 15.0, 40.0)))
        self.say(f"{client.name} goes on")
        client.host.resume()
