"""Nodes that come and go are held out for longer each time; all others come back at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.metadata import AliveRecord, Patience
from storaged.logic.flapping import CALM_AFTER_S, FIRST_HOLD_S, hold_s
from storaged.logic.leader import Joined, decide

NODES = (1, 2, 3, 4)
FREE_RETURNS, LONGEST_HOLD_S = Patience().returns, Patience().longest_s


class Cluster:
    """Four nodes of which one comes and goes; the leader looks twice a second."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.runs = dict.fromkeys(NODES, 1)
        self.up = set(NODES)
        self.map = ClusterMap(0, "c" * 32)
        self.patience = Patience()
        self.settle()

    def look(self) -> None:
        alive = {
            n: AliveRecord(n, 100 * n + self.runs[n], f"h{n}:1", f"z{n}", 1.0) for n in self.up
        }
        joined = [
            Joined(n, alive[n].incarnation, copies, pg, group.changed)
            for copies, groups in self.map.pools.items()
            for pg, group in enumerate(groups)
            for n in group.joining
            if n in alive
        ]
        self.map = (
            decide(self.map, alive, set(), {3}, 4, joined, self.now, patience=self.patience)
            or self.map
        )

    def settle(self) -> None:
        for _ in range(20):
            self.look()

    def state(self, node: int) -> NodeState:
        return self.map.nodes[node].state

    def stop(self, node: int) -> None:
        self.up.discard(node)
        self.settle()

    def start(self, node: int) -> None:
        self.up.add(node)
        self.runs[node] += 1

    def wait_back(self, node: int) -> float:
        """Give how long it takes until a node is let in."""
        began = self.now
        self.settle()
        while self.state(node) is NodeState.DOWN:
            self.now += 0.5
            self.look()
            assert self.now < began + 2 * LONGEST_HOLD_S
        self.settle()
        return self.now - began

    def bounce(self, node: int, down_s: float = 0.0) -> float:
        self.stop(node)
        self.now += down_s
        self.start(node)
        return self.wait_back(node)


def test_the_first_restarts_are_free_and_further_ones_double_the_wait() -> None:
    cluster = Cluster()
    waits = []
    for _ in range(FREE_RETURNS + 10):
        waits.append(cluster.bounce(2))
        cluster.now += 10.0
    assert waits[:FREE_RETURNS] == [0.0] * FREE_RETURNS
    assert waits[FREE_RETURNS : FREE_RETURNS + 4] == [5.0, 10.0, 20.0, 40.0]
    assert waits[-1] == LONGEST_HOLD_S


def test_who_restarts_so_fast_that_nobody_saw_it_go_is_held_out_too() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS):
        cluster.start(2)
        assert cluster.wait_back(2) == 0.0
    cluster.start(2)
    assert cluster.wait_back(2) == FIRST_HOLD_S


def test_one_that_reconnects_as_the_same_run_is_held_out_too() -> None:
    cluster = Cluster()
    for turn in range(FREE_RETURNS + 1):
        cluster.stop(2)
        cluster.up.add(2)
        assert cluster.wait_back(2) == (FIRST_HOLD_S if turn == FREE_RETURNS else 0.0)


def test_time_that_it_was_away_counts() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS):
        cluster.bounce(2)
    assert cluster.bounce(2, down_s=3.0) == FIRST_HOLD_S - 3.0
    assert cluster.bounce(2, down_s=60.0) == 0.0


def test_who_stayed_for_long_has_a_clean_record() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS + 3):
        cluster.bounce(2)
    cluster.now += CALM_AFTER_S
    assert [cluster.bounce(2) for _ in range(FREE_RETURNS)] == [0.0] * FREE_RETURNS
    assert cluster.bounce(2) == FIRST_HOLD_S


def test_to_be_held_out_does_not_count_as_having_stayed() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS + 8):
        cluster.bounce(2)
    assert [cluster.bounce(2), cluster.bounce(2)] == [LONGEST_HOLD_S, LONGEST_HOLD_S]


def test_the_map_says_until_when_and_a_client_reads_it() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS):
        cluster.bounce(2)
    cluster.stop(2)
    cluster.start(2)
    cluster.settle()
    node = ClusterMap.decode(cluster.map.encoded).nodes[2]
    assert node.state is NodeState.DOWN
    assert node.held_until == cluster.now + FIRST_HOLD_S
    assert node.returns == FREE_RETURNS


def test_the_last_that_hold_a_group_are_let_in_at_once() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS + 3):
        cluster.bounce(2)
    for node in NODES:
        cluster.stop(node)
    cluster.start(2)
    assert cluster.wait_back(2) == 0.0
    assert cluster.state(2) is not NodeState.DOWN


def test_who_is_needed_for_writes_is_let_in_at_once() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS + 3):
        cluster.bounce(2)
    cluster.stop(2)
    cluster.stop(3)
    cluster.start(2)
    # A group of nodes 1, 2 and 3 has one copy that is up, and takes writes with two only.
    assert any({*g.sync} == {1} for g in cluster.map.pools[3])
    assert cluster.wait_back(2) == 0.0


def test_a_date_from_a_clock_that_was_wrong_holds_nobody_out() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS):
        cluster.bounce(2)
    cluster.stop(2)
    cluster.now -= 3600.0
    cluster.start(2)
    assert cluster.wait_back(2) == 0.0


@pytest.mark.parametrize("returns", [0, 1, FREE_RETURNS - 1])
def test_few_returns_hold_nobody_out(returns: int) -> None:
    assert hold_s(returns, Patience()) == 0.0


@given(st.integers(0, 10**6))
def test_a_hold_never_shrinks_with_returns_and_is_bounded(returns: int) -> None:
    holds = [hold_s(count, Patience()) for count in (returns, returns + 1)]
    assert holds[0] <= holds[1] <= LONGEST_HOLD_S


def test_operators_say_how_patient_the_cluster_is() -> None:
    cluster = Cluster()
    cluster.patience = Patience(returns=1, longest_s=7.0)
    assert [cluster.bounce(2) for _ in range(4)] == [0.0, 5.0, 7.0, 7.0]
    cluster.patience = Patience(longest_s=0.0)
    assert cluster.bounce(2) == 0.0


def test_a_node_that_is_held_out_comes_in_when_operators_are_more_patient() -> None:
    cluster = Cluster()
    for _ in range(FREE_RETURNS + 4):
        cluster.bounce(2)
    cluster.stop(2)
    cluster.start(2)
    cluster.settle()
    assert cluster.state(2) is NodeState.DOWN
    cluster.patience = Patience(longest_s=0.0)
    assert cluster.wait_back(2) == 0.0
