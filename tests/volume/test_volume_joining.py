"""A node that was away and joins again, while the VDI is in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.static_cluster import PG_COUNT, StaticCluster, static_cluster
from fakes.static_mount import LAYER, StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.core.errors import FencedError, RetryableError
from sheepfs.core.geometry import data_object, pg_of
from sheepfs.core.wire import Op
from sheepfs.net.fencing import fence_everywhere

BLOCK = 4096
OID = data_object(LAYER, 0)
A, B = b"a" * BLOCK, b"b" * BLOCK


def first_blocks(cluster: StaticCluster) -> list[bytes]:
    found = [node.store.read(OID, 0, BLOCK, wait=True) for node in cluster.nodes.values()]
    return [b"".join(buffers or ()) for buffers in found]


async def test_a_joining_node_takes_nothing_from_a_holder_fenced_while_it_was_away(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, router):
        etcd = StaticRecord()
        old = StaticMount(cluster, etcd)
        await old.start()
        await old.write(0, A)
        await old.flush()
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        await wait_until(lambda: router.map.epoch == cluster.map.epoch)
        await fence_everywhere(router, 2, etcd.token + 1)
        for node in (1, 2):
            cluster.nodes[node].server.handlers[Op.LIST] = lambda client, header, payload: None
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await wait_until(lambda: router.link(3))
        link = router.link(3)
        entry = cluster.nodes[1].store.get(OID)
        assert link is not None
        assert entry is not None
        change = {
            "oid": OID, "pool": 3, "pg": pg_of(OID, PG_COUNT), "vdi": 2, "token": etcd.token,
            "span": BLOCK, "prev": entry.version, "version": entry.version + 1,
            "epoch": cluster.map.epoch,
        }  # fmt: skip
        with pytest.raises(RetryableError):
            await link.call(Op.WRITE, B, **change)
        for node in (1, 2):
            cluster.nodes[node].server.handlers[Op.LIST] = cluster.nodes[node].replica.handle
        await wait_until(lambda: all(3 in g.sync for g in cluster.map.pools[3]), 20)
        with pytest.raises(FencedError):
            await link.call(Op.WRITE, B, **change)
        assert first_blocks(cluster) == [A] * 3
        assert cluster.nodes[3].store.tokens() == {2: etcd.token + 1}


async def test_writes_go_on_while_a_node_joins(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        await mount.start()
        for i in range(20):
            await mount.write(i * BLOCK, A)
        cluster.nodes[3].clean = False
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        await mount.write(0, B)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        count = 0
        while not all(3 in g.sync for g in cluster.map.pools[3]):
            count += 1
            await mount.write(BLOCK, bytes([count % 251]) * BLOCK)
        assert first_blocks(cluster) == [B] * 3
        assert len({node.store.digests(OID) for node in cluster.nodes.values()}) == 1
