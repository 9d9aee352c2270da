from __future__ import annotations

import pytest
import trio

from fakes.etcd import FakeEtcd, FakeServer
from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.errors import UnreachableError, UsageError, WrongClusterError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import AliveRecord, NodeWish
from storaged.membership.membership import (
    Announcer,
    MapFollower,
    ensure_config,
    refuse_removed,
    register,
)

KEYS = Keys("test")
CLUSTER = "c" * 32


async def alive_record(store: FakeEtcd, node: int) -> AliveRecord | None:
    found = await store.get(KEYS.alive_node(node))
    return AliveRecord.decode(found.value) if found else None


def announcer(store: FakeEtcd, node: int = 1) -> Announcer:
    return Announcer(store, KEYS, node, f"host-{node}:7000", "zone", 10.0)


async def until_announced(store: FakeEtcd, node: int = 1) -> AliveRecord:
    with trio.fail_after(60):
        while (record := await alive_record(store, node)) is None:
            await trio.sleep(0.05)
    return record


async def test_daemons_that_start_at_once_make_one_cluster() -> None:
    server = FakeServer()
    made = []

    async def start() -> None:
        made.append(await ensure_config(server.client(), KEYS, 64))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(start)
    assert len({config.cluster for config in made}) == 1
    assert made[0].pg_count == 64


async def test_each_data_directory_gets_its_own_node_id() -> None:
    server = FakeServer()
    ids = []

    async def start(store_uuid: str) -> None:
        ids.append(await register(server.client(), KEYS, store_uuid, None))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(start, f"uuid-{number}")
    assert sorted(ids) == [1, 2, 3, 4, 5]


async def test_a_registration_whose_reply_was_lost_is_found_again(fake_etcd: FakeEtcd) -> None:
    fake_etcd.lose_next_reply()
    with pytest.raises(UnreachableError):
        await register(fake_etcd, KEYS, "uuid-a", None)
    assert await register(fake_etcd, KEYS, "uuid-a", None) == 1
    assert await register(fake_etcd, KEYS, "uuid-b", None) == 2


async def test_a_known_node_registers_as_itself(fake_etcd: FakeEtcd) -> None:
    node = await register(fake_etcd, KEYS, "uuid-a", None)
    assert await register(fake_etcd, KEYS, "uuid-a", node) == node


async def test_a_node_id_of_another_data_directory_is_refused(fake_etcd: FakeEtcd) -> None:
    node = await register(fake_etcd, KEYS, "uuid-a", None)
    with pytest.raises(WrongClusterError, match="another data directory"):
        await register(fake_etcd, KEYS, "uuid-b", node)


async def test_a_node_that_the_cluster_does_not_know_is_refused(fake_etcd: FakeEtcd) -> None:
    with pytest.raises(WrongClusterError, match="does not know"):
        await register(fake_etcd, KEYS, "uuid-a", 7)


async def test_a_daemon_is_alive_until_it_withdraws(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    me = announcer(fake_etcd)
    async with trio.open_nursery() as nursery:
        incarnation = await nursery.start(me.run)
        record = await until_announced(fake_etcd)
        assert record.incarnation == incarnation == me.incarnation
        await trio.sleep(60)
        assert await alive_record(fake_etcd, 1) == record
        await me.withdraw()
        assert await alive_record(fake_etcd, 1) is None


async def test_each_run_is_another_incarnation(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    seen = set()
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            seen.add(await nursery.start(announcer(fake_etcd).run))
            nursery.cancel_scope.cancel()
    assert len(seen) == 3


async def test_a_lost_lease_is_replaced_and_the_incarnation_stays(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    me = announcer(fake_etcd)
    async with trio.open_nursery() as nursery:
        await nursery.start(me.run)
        before = await until_announced(fake_etcd)
        old_lease = me.lease
        fake_etcd.partition()
        await trio.sleep(10)
        fake_etcd.server.expire()
        assert KEYS.alive_node(1) not in fake_etcd.server.keys
        fake_etcd.heal()
        assert await until_announced(fake_etcd) == before
        assert me.lease != old_lease
        nursery.cancel_scope.cancel()


async def test_another_weight_is_announced_at_once(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    me = announcer(fake_etcd)
    async with trio.open_nursery() as nursery:
        await nursery.start(me.run)
        await until_announced(fake_etcd)
        me.change_weight(20.0)
        await trio.sleep(0.1)
        record = await alive_record(fake_etcd, 1)
        assert record is not None
        assert record.weight == 20.0
        nursery.cancel_scope.cancel()


async def put_map(store: FakeEtcd, epoch: int, cluster: str = CLUSTER) -> None:
    put = Put(KEYS.map, ClusterMap(epoch, cluster).encoded)
    assert await store.commit(Transaction([], [put])) is not None


async def test_the_map_is_followed_from_etcd_and_from_peers_each_epoch_once(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    epochs: list[int] = []
    follower = MapFollower(fake_etcd, KEYS, CLUSTER, lambda m: epochs.append(m.epoch))
    await put_map(fake_etcd, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await trio.sleep(0.1)
        assert follower.take(ClusterMap(2, CLUSTER))
        await put_map(fake_etcd, 2)
        await trio.sleep(0.1)
        assert not follower.take(ClusterMap(1, CLUSTER))
        await put_map(fake_etcd, 3)
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert epochs == [1, 2, 3]


async def test_a_map_of_another_cluster_is_refused(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    follower = MapFollower(fake_etcd, KEYS, CLUSTER, lambda m: None)
    assert not follower.take(ClusterMap(5, "d" * 32))


async def test_following_the_map_outlives_an_outage_and_a_bad_value(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    server = fake_etcd.server
    follower = MapFollower(fake_etcd, KEYS, CLUSTER, lambda m: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await server.client().commit(Transaction([], [Put(KEYS.map, b"garbage")]))
        fake_etcd.partition()
        await trio.sleep(20)
        await put_map(server.client(), 4)
        fake_etcd.heal()
        await trio.sleep(1)
        assert follower.map.epoch == 4
        nursery.cancel_scope.cancel()


async def test_a_removed_node_is_refused_once_no_group_needs_it(fake_etcd: FakeEtcd) -> None:
    await refuse_removed(fake_etcd, KEYS, 3)
    node = Node(3, NodeState.DOWN, "h:1", 7, "z", 0.0)
    needed, gone = ClusterMap(5, CLUSTER, {3: node}), ClusterMap(6, CLUSTER)
    wish = Put(KEYS.wish(3), NodeWish(3, removed=True).encode())
    await fake_etcd.commit(Transaction([], [wish, Put(KEYS.map, needed.encoded)]))
    await refuse_removed(fake_etcd, KEYS, 3)
    await fake_etcd.commit(Transaction([], [Put(KEYS.map, gone.encoded)]))
    with pytest.raises(UsageError, match="node 3 was removed from the cluster"):
        await refuse_removed(fake_etcd, KEYS, 3)
    await refuse_removed(fake_etcd, KEYS, 4)
