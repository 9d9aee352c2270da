"""Whether a node may leave, and what is lost with nodes that never come back."""

from __future__ import annotations

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.geometry import data_object, make_layer, map_object, pg_of
from sheepfs.layers.inventory import Replica
from sheepfs_tools.sheepctl.analysis.loss_assessment import Damage, assess, choose, waiting_groups
from sheepfs_tools.sheepctl.analysis.node_groups import holding, nowhere_to_go, removal_problem

LAYER = make_layer(2, 2, 2)


def map_of(down: tuple[int, ...], *groups: PlacementGroup, nodes: int = 4) -> ClusterMap:
    states = {n: NodeState.DOWN if n in down else NodeState.ACTIVE for n in range(1, nodes + 1)}
    return ClusterMap(
        9,
        "c" * 32,
        {n: Node(n, state, f"h{n}:1", 10 * n, f"z{n}", 1.0) for n, state in states.items()},
        {2: groups},
    )


def copy(node: int, version: int = 1) -> Replica:
    return Replica(node, 4096, 4096, version)


def test_what_a_node_holds_is_counted() -> None:
    cluster_map = map_of(
        (1,),
        PlacementGroup(1, (1,), (2,)),
        PlacementGroup(1, (2, 3), (), (1,)),
        PlacementGroup(1, (2, 3)),
    )
    assert holding(cluster_map, 1) == (1, 0, 1, 1)
    assert holding(cluster_map, 2) == (2, 1, 0, 0)


def test_a_node_that_is_up_must_be_empty() -> None:
    cluster_map = map_of((), PlacementGroup(1, (1, 2)))
    assert "sheepctl node drain 1 --wait" in removal_problem(cluster_map, 1)
    assert removal_problem(cluster_map, 3) == ""


def test_a_node_that_is_down_may_go_when_others_have_its_data() -> None:
    assert removal_problem(map_of((1,), PlacementGroup(1, (2,), (3,), (1,))), 1) == ""
    assert removal_problem(map_of((1,), PlacementGroup(1, (2, 3))), 1) == ""


def test_a_node_that_a_group_waits_for_may_not_go() -> None:
    assert "1 groups wait for it" in removal_problem(map_of((1,), PlacementGroup(1, (1,))), 1)
    assert "cluster recover" in removal_problem(map_of((1, 2), PlacementGroup(1, (1, 2))), 2)


def test_the_only_node_may_not_go() -> None:
    assert "the only one" in removal_problem(map_of((), PlacementGroup(1, (1,)), nodes=1), 1)


def test_draining_needs_as_many_places_as_copies() -> None:
    cluster_map = map_of((), PlacementGroup(1, (1, 2)), nodes=3)
    assert nowhere_to_go(cluster_map, [1]) == ""
    assert "1 groups of 2 copies have nowhere to go" in nowhere_to_go(cluster_map, [1, 2])
    assert nowhere_to_go(cluster_map, [3]) == ""


def test_a_group_goes_on_with_the_newest_data_that_is_up() -> None:
    group = PlacementGroup(1, (1,), (2,), (3,))
    oids = [data_object(LAYER, n) for n in range(3)]
    replicas = {
        oids[0]: [copy(2, 5), copy(3, 7)],
        oids[1]: [copy(2, 9), copy(3, 9)],
        oids[2]: [copy(2, 1)],
    }
    (survivor,) = choose(map_of((1,), group), replicas)
    assert (survivor.node, survivor.objects, survivor.known) == (2, 3, 3)
    replicas[oids[2]] = [copy(3, 2), copy(2, 1)]
    assert choose(map_of((1,), group), replicas)[0].node == 3


def test_where_nobody_has_anything_an_expected_member_goes_on() -> None:
    group = PlacementGroup(1, (1,), (3,))
    assert choose(map_of((1,), group), {})[0].node == 3


def test_groups_that_nobody_has_anything_of_are_spread() -> None:
    groups = [PlacementGroup(1, (1, 2)) for _ in range(10)]
    chosen = [survivor.node for survivor in choose(map_of((1, 2), *groups), {})]
    assert chosen.count(3) == chosen.count(4) == 5


def test_a_group_with_one_member_that_is_up_is_not_touched() -> None:
    cluster_map = map_of((1,), PlacementGroup(1, (1, 2)))
    assert waiting_groups(cluster_map) == {}
    assert choose(cluster_map, {}) == []
    assert assess(cluster_map, {}, [("VDI a", data_object(LAYER, 0))]).damage == {}


def test_damage_is_told_for_each_map() -> None:
    groups = [PlacementGroup(1, (1,), (), (3,)), PlacementGroup(1, (3, 4))]
    cluster_map = map_of((1,), *groups)
    oids = [data_object(LAYER, n) for n in range(40)]
    waiting = [oid for oid in oids if pg_of(oid, 2) == 0]
    maps = [oid for oid in (map_object(LAYER, n) for n in range(20)) if pg_of(oid, 2) == 0]
    replicas = {oid: [copy(3)] for oid in waiting[:2]}
    named = [("VDI a", oid) for oid in oids] + [("VDI b", waiting[0]), ("VDI b", maps[0])]
    found = assess(cluster_map, replicas, named)
    assert found.damage == {
        "VDI a": Damage(lost=len(waiting) - 2, old=2),
        "VDI b": Damage(old=1, maps_lost=1),
    }
    assert found.waits_for == [1]
