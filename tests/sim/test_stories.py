"""Short stories in the simulated world, each about one thing that once went wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from sheepfs.callbacks import completion, read_bytes
from sheepfs.cluster import Cluster
from sheepfs.connecting import join
from sheepfs.volume import Volume
from sim.machine import HOST
from sim.world import CLUSTER, World, determined
from storaged.store import dirtylog

MIB = 1 << 20


def tell(story: Callable[[World, Cluster], Awaitable[None]]) -> None:
    """Run a story with three nodes and one mount."""
    world = World(0, nodes=3)
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
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


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
