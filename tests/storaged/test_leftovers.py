"""Copies of groups that have moved away: removed when all members have them, else kept aside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticCluster, StaticNode, static_cluster
from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import data_object, make_layer, pg_of
from storaged.space.leftovers import Leftovers, is_settled

LAYER, NEXT_LAYER = make_layer(2, 2, 2), make_layer(3, 2, 2)
OID = data_object(LAYER, 0)
PG = pg_of(OID, PG_COUNT)
BLOCK = 4096


def put(node: StaticNode, oid: int, version: int, *, base: int | None = None) -> None:
    node.store.mark([oid])
    node.store.write(
        oid, 0, bytes([version]) * BLOCK, version, create=True, pool=2, pg=PG, base=base
    )


@asynccontextmanager
async def moved_away(path: Path) -> AsyncIterator[tuple[StaticCluster, Leftovers]]:
    """A cluster in which node 1 has left all groups to nodes 2 and 3, and its leftovers."""
    async with static_cluster(path, nodes=3, copies=2) as (cluster, _):
        cluster.publish([2, 3])
        former = cluster.nodes[1]
        with trio.fail_after(5):
            while len(former.router.links) < 2:
                await trio.sleep(0.005)
        # The map of these tests calls who is no member down; node 1 is only empty.
        yield cluster, Leftovers(former.replica, former.router)


@pytest.mark.parametrize("theirs", [5, 6])
async def test_a_copy_that_all_members_have_is_removed(tmp_path: Path, theirs: int) -> None:
    async with moved_away(tmp_path) as (cluster, leftovers):
        put(cluster.nodes[1], OID, 5)
        for node in (2, 3):
            put(cluster.nodes[node], OID, theirs)
        assert await leftovers.look()
        assert cluster.nodes[1].store.get(OID) is None
        assert cluster.nodes[1].store.usage().quarantined == 0
        assert all(cluster.nodes[n].store.get(OID) is not None for n in (2, 3))


@pytest.mark.parametrize("theirs", [None, 4])
async def test_a_copy_that_a_member_lacks_or_has_older_is_kept_aside(
    tmp_path: Path, theirs: int | None
) -> None:
    async with moved_away(tmp_path) as (cluster, leftovers):
        put(cluster.nodes[1], OID, 5)
        put(cluster.nodes[2], OID, 5)
        if theirs is not None:
            put(cluster.nodes[3], OID, theirs)
        assert await leftovers.look()
        assert cluster.nodes[1].store.get(OID) is None
        assert cluster.nodes[1].store.usage().quarantined == 1


async def test_a_copy_of_what_is_known_to_be_damaged_at_a_member_is_kept_aside(
    tmp_path: Path,
) -> None:
    async with moved_away(tmp_path) as (cluster, leftovers):
        for node in (1, 2, 3):
            put(cluster.nodes[node], OID, 5)
        path = next(cluster.nodes[2].path.glob(f"objects/*/*/{OID:016x}"))
        with path.open("r+b") as file:
            file.write(b"\xaa")
        with pytest.raises(CorruptError):
            cluster.nodes[2].store.read(OID, 0, BLOCK, wait=True)
        assert await leftovers.look()
        assert cluster.nodes[1].store.usage().quarantined == 1


async def test_copies_that_inherit_from_each_other_go_without_being_unshared(
    tmp_path: Path,
) -> None:
    async with moved_away(tmp_path) as (cluster, leftovers):
        heir = data_object(NEXT_LAYER, 0)
        for node in cluster.nodes.values():
            put(node, OID, 5)
            put(node, heir, 6, base=OID)
        assert await leftovers.look()
        assert not cluster.nodes[1].store.list(2, PG)
        assert cluster.nodes[1].store.usage().quarantined == 0


async def test_a_member_that_cannot_be_asked_keeps_everything_in_place(tmp_path: Path) -> None:
    async with moved_away(tmp_path) as (cluster, leftovers):
        for node in cluster.nodes.values():
            put(node, OID, 5)
        cluster.nodes[3].stop()
        assert not await leftovers.look()
        assert cluster.nodes[1].store.get(OID) is not None


async def test_what_a_member_has_is_never_looked_at(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, nodes=3, copies=2) as (cluster, _):
        cluster.publish([1, 2])
        put(cluster.nodes[1], OID, 5)
        assert await Leftovers(cluster.nodes[1].replica, cluster.nodes[1].router).look()
        assert cluster.nodes[1].store.get(OID) is not None


@pytest.mark.parametrize(
    ("group", "settled"),
    [
        (PlacementGroup(1, (1, 2)), True),
        (PlacementGroup(1, (1, 2, 3)), True),
        (PlacementGroup(1, (1,)), False),
        (PlacementGroup(1, (1, 2), (3,)), False),
        (PlacementGroup(1, (1, 2), (), (3,)), False),
        (PlacementGroup(1, (1, 4)), False),
    ],
)
def test_only_a_group_with_all_its_copies_up_is_settled(
    group: PlacementGroup, settled: bool
) -> None:
    states = {1: NodeState.ACTIVE, 2: NodeState.ACTIVE, 3: NodeState.ACTIVE, 4: NodeState.DOWN}
    nodes = {n: Node(n, state, "h:1", n, "z", 1.0) for n, state in states.items()}
    cluster_map = ClusterMap(1, "c" * 32, nodes, {2: (group,)})
    assert is_settled(cluster_map, 2, group) == settled
