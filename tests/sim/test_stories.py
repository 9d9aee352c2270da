"""Short stories in the simulated world, each about one thing that once went wrong."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from sheepfs.callbacks import completion, read_bytes
from sheepfs.cluster import Cluster
from sheepfs.connecting import join
from sheepfs.volume.volume import Volume
from sim.machine import HOST
from sim.network import SimClock
from sim.world import CLUSTER, World, determined
from storaged.scrub.mapreading import MapReading
from storaged.store import dirtylog

MIB = 1 << 20


def tell(story: Callable[[World, Cluster], Awaitable[None]], groups: int = 0) -> None:
    """Run a story with three nodes and one mount, and so many groups (0: some)."""
    world = World(0, nodes=3)
    world.pg_count = groups or world.pg_count
    world.knobs[dirtylog, "MAX_MARKS"] = 1

    async def main() -> None:
        with trio.fail_after(300):
            async with world.running():
                await world.wait_nodes()
                host = world.network.host("mount")
                HOST.set(host)
                async with join(world.etcd_client(host), CLUSTER, "mount", network=host) as cluster:
                    await story(world, cluster)
                    await cluster.close()

    with determined(world, 0):
        trio.run(main, clock=SimClock(world.network))


async def change(cluster: Cluster, name: str, offset: int, data: bytes) -> None:
    """Attach, write, flush and let go."""
    async with cluster.opened((await cluster.lookup(name)).id) as volume:
        await volume.attach()
        await completion(lambda done: volume.write(offset, data, done))
        await completion(volume.flush)


def test_a_clone_of_a_vdi_that_was_attached_more_often_takes_all_writes() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        for turn in range(5):
            await change(cluster, "v1.raw", 0, bytes([turn + 1]) * 4096)
        await cluster.clone((await cluster.lookup("v1.raw")).id, "x1.raw")
        # The nodes forget, for lack of room, that the clone's map was written.
        for place in range(3):
            await change(cluster, "v1.raw", place * 4 * MIB, b"v" * 4096)
        for place in range(3):
            await change(cluster, "x1.raw", place * 4 * MIB, b"x" * 4096)
        for turn in range(6):
            async with cluster.opened((await cluster.lookup("x1.raw")).id) as volume:
                assert isinstance(volume, Volume)
                if turn:
                    await volume.attach()
                for place in range(3):
                    assert await read_bytes(volume, place * 4 * MIB, 4096) == b"x" * 4096

    tell(story)


@asynccontextmanager
async def flushing(
    cluster: Cluster, name: str, fault: Callable[[], None]
) -> AsyncIterator[trio.Event]:
    """Write and flush beside the block, after a fault; gives what is set when that is done."""
    async with cluster.opened((await cluster.lookup(name)).id) as volume:
        await volume.attach()
        fault()
        done = trio.Event()

        async def write() -> None:
            await completion(lambda done: volume.write(0, b"b" * 4096, done))
            await completion(volume.flush)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            yield done
            await done.wait()


def cut_off(world: World, name: str, *others: str) -> None:
    """Let nothing pass between a host and others."""
    for other in others:
        world.network.cut(name, other)
        world.network.cut(other, name)


def test_a_mount_goes_on_soon_after_it_was_cut_off_from_a_node_for_long() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        await change(cluster, "v1.raw", 0, b"a" * 4096)
        async with flushing(cluster, "v1.raw", lambda: cut_off(world, "mount", "n1")) as done:
            await trio.sleep(30)
            assert not done.is_set()
            world.network.mend()
            with trio.fail_after(10):
                await done.wait()

    tell(story)


def test_a_flush_does_not_wait_for_a_node_that_has_vanished() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        await change(cluster, "v1.raw", 0, b"a" * 4096)
        async with cluster.opened((await cluster.lookup("v1.raw")).id) as volume:
            await volume.attach()
            await completion(lambda done: volume.write(0, b"b" * 4096, done))
            cut_off(world, "n3", "n1", "n2", "mount")
            world.clients["n3"].partition(silent=True)
            with trio.fail_after(15):
                await completion(volume.flush)
            world.clients["n3"].heal()
            world.network.mend()

    tell(story)


def test_the_first_flush_of_a_vdi_waits_for_etcd_and_does_not_fail() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)

        def lose_etcd() -> None:
            world.etcd.is_down = True

        async with flushing(cluster, "v1.raw", lose_etcd) as done:
            await trio.sleep(30)
            assert not done.is_set()
            world.etcd.elect()
            with trio.fail_after(10):
                await done.wait()

    tell(story)


def test_no_mount_levels_a_vdi_whose_holder_has_only_lost_etcd() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        other = world.network.host("other")
        HOST.set(other)
        async with join(
            world.etcd_client(other), CLUSTER, "other", stays=True, network=other
        ) as bystander:
            HOST.set(world.network.host("mount"))
            async with cluster.opened((await cluster.lookup("v1.raw")).id) as volume:
                await volume.attach()
                await completion(lambda done: volume.write(0, b"a" * 4096, done))
                await completion(volume.flush)
                world.clients["mount"].partition(silent=True)
                await trio.sleep(60)
                assert not await bystander.holding.is_held(volume.record.id)
                await completion(lambda done: volume.write(0, b"b" * 4096, done))
                await completion(volume.flush)
                world.clients["mount"].heal()
                with trio.fail_after(10):
                    while not await bystander.holding.is_held(volume.record.id):
                        await trio.sleep(0.1)
                await completion(volume.flush)

    tell(story)


def test_a_mount_levels_a_vdi_whose_holder_died() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        dead = world.network.host("dead")
        HOST.set(dead)
        with trio.CancelScope() as life:
            async with join(world.etcd_client(dead), CLUSTER, "dead", network=dead) as dying:
                volume = await dying.open((await dying.lookup("v1.raw")).id)
                assert isinstance(volume, Volume)
                await volume.attach()
                await completion(lambda done: volume.write(0, b"a" * 4096, done))
                dead.die(silent=True)
                volume.fence("its mount was killed")
                life.cancel()
                await trio.lowlevel.checkpoint()
        other = world.network.host("other")
        HOST.set(other)
        async with join(world.etcd_client(other), CLUSTER, "other", stays=True, network=other):
            with trio.fail_after(60):
                while not (await cluster.catalog.vdi("v1.raw"))[0].clean:
                    await trio.sleep(0.1)
        HOST.set(world.network.host("mount"))

    tell(story)


def test_a_node_whose_disk_fails_while_it_catches_up_leaves_though_no_client_asks() -> None:
    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        node = world.nodes[2]
        node.kept_down += 1
        await node.kill(power=False)
        await change(cluster, "v1.raw", 0, b"a" * 4096)
        node.start()
        while not is_joining(world):
            await trio.sleep(0.001)
        assert node.process is not None
        node.process.fail_next["pwrite"] = errno.EIO
        with trio.fail_after(10):
            await node.ended()
        node.kept_down -= 1

    # Another group that is whole would be flushed and reported, and that would end the node.
    tell(story, groups=1)


def test_reclaim_takes_nothing_that_a_snapshot_took_over_while_it_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, go_on = trio.Event(), trio.Event()
    pages = MapReading.pages

    async def slow_pages(
        self: MapReading, layer: int, maps: int, settled: bool
    ) -> AsyncIterator[tuple[int, bytes]]:
        reading.set()
        await go_on.wait()
        async for page in pages(self, layer, maps, settled):
            yield page

    async def story(world: World, cluster: Cluster) -> None:
        await cluster.catalog.create("v1.raw", 16 * MIB, 3)
        vdi = (await cluster.lookup("v1.raw")).id
        await change(cluster, "v1.raw", 0, b"a" * 4096)
        # From here on the first object is frozen, and only the VDI's own map names it.
        await cluster.snapshot(vdi, "old")
        await cluster.delete("v1@old.raw")
        await cluster.catalog.purge(expired_only=False)
        monkeypatch.setattr(MapReading, "pages", slow_pages)
        with trio.fail_after(60):
            await reading.wait()
        await cluster.snapshot(vdi, "new")
        await change(cluster, "v1.raw", 0, b"b" * 4096)
        go_on.set()
        with trio.fail_after(60):
            while await cluster.catalog.reclaim_wanted():
                await trio.sleep(0.1)
        for name, data in (("v1@new.raw", b"a"), ("v1.raw", b"b")):
            async with cluster.opened((await cluster.lookup(name)).id) as volume:
                assert await read_bytes(volume, 0, 4096) == data * 4096

    tell(story)


def is_joining(world: World) -> bool:
    """Tell whether a node has yet to catch up with a group."""
    found = world.map()
    pools = found.pools.values() if found else ()
    return any(group.joining for groups in pools for group in groups)
