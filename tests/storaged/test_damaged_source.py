"""A node joins a group whose last copies are damaged: it takes what is good, and serves no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from fakes.static_cluster import StaticCluster, static_cluster
from fakes.waiting import wait_until
from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import data_object, make_layer, pg_of
from sheepfs.core.wire import FLAG_CREATE, Op
from sheepfs.net.router import Router
from storaged.store.format import META_OFFSET

BLOCK = 4096
OID, OTHER = (data_object(make_layer(1, 2, 3), i) for i in range(2))
V = 1 << 40


async def change(
    cluster: StaticCluster, router: Router, oid: int, data: bytes, prev: int, version: int
) -> None:
    """Write at the start of an object, as its holder does: at every member."""
    group = cluster.map.pools[3][pg_of(oid, len(cluster.map.pools[3]))]
    for node in group.members:
        link = router.link(node)
        assert link is not None
        fields = {"oid": oid, "pool": 3, "pg": pg_of(oid, len(cluster.map.pools[3]))}
        fields |= {"vdi": 2, "token": 1, "epoch": router.map.epoch}
        with trio.fail_after(10):
            await link.call(
                Op.WRITE, data, span=len(data), prev=prev, version=version,
                flags=0 if prev else FLAG_CREATE, **fields,
            )  # fmt: skip
            await link.call(Op.FLUSH, b"", **fields)


def spoil(cluster: StaticCluster, node: int, offset: int) -> None:
    path = next(cluster.nodes[node].path.glob(f"objects/*/*/{OID:016x}"))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xaa")


def read(cluster: StaticCluster, node: int, oid: int, block: int) -> bytes:
    pieces = cluster.nodes[node].store.read(oid, block * BLOCK, BLOCK, wait=True)
    assert pieces is not None
    return b"".join(pieces)


async def mend(cluster: StaticCluster, node: int) -> None:
    """What a read of a bad block, or scrubbing, leads to."""
    await cluster.nodes[node].replica.level(OID, 3, pg_of(OID, len(cluster.map.pools[3])))


def joined(cluster: StaticCluster, node: int) -> bool:
    return all(node in group.sync for group in cluster.map.pools[3])


async def lone(cluster: StaticCluster, router: Router, *others: int) -> None:
    """Write 8 blocks to two objects while only node 1 (and `others`) are there."""
    cluster.nodes[3].stop()
    cluster.publish([1, *others])
    await wait_until(lambda: router.map.epoch == cluster.map.epoch)
    for oid in (OID, OTHER):
        await change(cluster, router, oid, b"a" * 8 * BLOCK, 0, V)


async def test_a_damaged_block_of_the_last_copy_is_handed_over_as_damaged(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        cluster.nodes[2].stop()
        await lone(cluster, router)
        spoil(cluster, 1, 3 * BLOCK + 7)
        await cluster.nodes[3].start()
        cluster.publish([1], [3])
        await wait_until(lambda: joined(cluster, 3))
        store = cluster.nodes[3].store
        found = store.get(OID)
        assert found is not None
        assert found.version == V
        assert [read(cluster, 3, OID, i) for i in range(8) if i != 3] == [b"a" * BLOCK] * 7
        with pytest.raises(CorruptError):
            read(cluster, 3, OID, 3)
        assert read(cluster, 3, OTHER, 3) == b"a" * BLOCK
        assert store.sums(OID) == cluster.nodes[1].store.sums(OID)
        await change(cluster, router, OID, b"b" * 4 * BLOCK, V, V + 1)
        assert {read(cluster, node, OID, 3) for node in (1, 3)} == {b"b" * BLOCK}


async def test_while_another_is_expected_back_nobody_takes_less(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        await lone(cluster, router, 2)
        spoil(cluster, 1, 3 * BLOCK + 7)
        cluster.nodes[2].stop()
        cluster.publish([1], away=[2])
        await cluster.nodes[3].start()
        cluster.publish([1], [3], away=[2])
        await wait_until(lambda: cluster.nodes[3].store.get(OTHER) is not None)
        assert not joined(cluster, 3)
        await cluster.nodes[2].start()
        cluster.publish([1], [2, 3])
        await wait_until(lambda: joined(cluster, 2) and joined(cluster, 3))
        await mend(cluster, 3)
        assert all(read(cluster, n, OID, 3) == b"a" * BLOCK for n in (2, 3))


async def test_what_one_damaged_copy_lacks_comes_from_another(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        await lone(cluster, router, 2)
        spoil(cluster, 1, 3 * BLOCK + 7)
        spoil(cluster, 2, 5 * BLOCK + 7)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await wait_until(lambda: joined(cluster, 3))
        await mend(cluster, 3)
        assert [read(cluster, 3, OID, i) for i in range(8)] == [b"a" * BLOCK] * 8


async def test_a_last_copy_with_a_damaged_header_keeps_no_other_object_from_its_second(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        cluster.nodes[2].stop()
        await lone(cluster, router)
        cluster.nodes[1].stop()
        spoil(cluster, 1, META_OFFSET + 20)
        await cluster.nodes[1].start()
        await cluster.nodes[3].start()
        cluster.publish([1], [3])
        await wait_until(lambda: joined(cluster, 3))
        assert read(cluster, 3, OTHER, 0) == b"a" * BLOCK
        with pytest.raises(CorruptError):
            read(cluster, 3, OID, 0)
