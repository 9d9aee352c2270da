"""Entries of nodes in the next map: weights, wishes, removal."""

from __future__ import annotations

import pytest

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.metadata import AliveRecord, NodeWish, Patience
from storaged.logic.nodes import admitted, next_nodes, without_removed


def alive(weight: float) -> dict[int, AliveRecord]:
    return {1: AliveRecord(1, 10, "h:1", "z", weight)}


def known(weight: float, state: NodeState = NodeState.ACTIVE) -> dict[int, Node]:
    return {1: Node(1, state, "h:1", 10, "z", weight)}


@pytest.mark.parametrize(
    ("before", "announced", "after"),
    [
        (1000.0, 1000.1, 1000.0),
        (1000.0, 985.0, 1000.0),
        (1000.0, 1019.0, 1000.0),
        (1000.0, 1100.0, 1100.0),
        (1000.0, 900.0, 900.0),
        (0.0, 1000.0, 1000.0),
        (1000.0, 0.0, 0.0),
    ],
)
def test_a_weight_counts_only_when_it_changes_notably(
    before: float, announced: float, after: float
) -> None:
    assert next_nodes(known(before), alive(announced), {}, 0.0, Patience())[1].weight == after


def test_small_changes_do_not_add_up_unnoticed() -> None:
    nodes = known(1000.0)
    for step in range(1, 20):
        nodes = next_nodes(nodes, alive(1000.0 + 10.0 * step), {}, 0.0, Patience())
    assert abs(nodes[1].weight - 1190.0) < 0.02 * 1190.0


@pytest.mark.parametrize("state", [NodeState.ACTIVE, NodeState.DOWN])
def test_a_weight_that_an_operator_sets_counts_exactly_also_while_it_is_down(
    state: NodeState,
) -> None:
    live = alive(1000.0) if state is NodeState.ACTIVE else {}
    wish = {1: NodeWish(1, weight=1001.0)}
    assert next_nodes(known(1000.0, state), live, wish, 0.0, Patience())[1].weight == 1001.0


def test_an_operators_weight_that_ends_gives_the_announced_one_back() -> None:
    nodes = next_nodes(known(1000.0), alive(1000.0), {1: NodeWish(1, weight=5.0)}, 0.0, Patience())
    assert next_nodes(nodes, alive(1000.0), {}, 0.0, Patience())[1].weight == 1000.0


@pytest.mark.parametrize("wish", [NodeWish(1, draining=True), NodeWish(1, removed=True)])
def test_who_is_to_leave_gets_no_data_up_or_down(wish: NodeWish) -> None:
    up = next_nodes(known(7.0), alive(7.0), {1: wish}, 0.0, Patience())[1]
    assert (up.state, up.weight) == (NodeState.DRAINING, 0.0)
    assert next_nodes(known(7.0), {}, {1: wish}, 0.0, Patience())[1].weight == 0.0
    assert next_nodes({1: up}, alive(7.0), {}, 0.0, Patience())[1].weight == 7.0


def test_a_removed_node_stays_while_a_group_names_it_and_never_returns() -> None:
    wishes = {1: NodeWish(1, removed=True)}
    nodes = known(1.0)
    assert without_removed(nodes, wishes, {1}) == nodes
    assert without_removed(nodes, wishes, {2}) == {}
    assert admitted(ClusterMap(1, "c"), alive(1.0), wishes) == {}
    assert admitted(ClusterMap(1, "c", nodes), alive(1.0), wishes) == alive(1.0)
