"""Moves of groups: few at a time, to the end, and hardly more of them than had to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.core.metadata import AliveRecord, NodeWish
from storaged.logic.leader import Joined, decide
from storaged.logic.moves import ALL, PER_NODE, Move, to_begin

EMPTY = ClusterMap(0, "c" * 32)
moves = st.builds(
    Move,
    pool=st.integers(1, 5),
    pg=st.integers(0, 300),
    nodes=st.frozensets(st.integers(1, 12), min_size=2, max_size=6),
    empties=st.booleans(),
)
parts = st.lists(st.frozensets(st.integers(1, 12), min_size=1, max_size=6), max_size=30)


@given(st.lists(moves, max_size=60, unique_by=lambda move: (move.pool, move.pg)), parts)
def test_no_node_takes_part_in_too_much_and_nothing_waits_without_reason(
    pending: list[Move], under_way: list[frozenset[int]]
) -> None:
    begun = to_begin(pending, under_way)
    by_group = {(move.pool, move.pg): move for move in pending}
    before = Counter(node for nodes in under_way for node in nodes)
    busy = before + Counter(node for group in begun for node in by_group[group].nodes)
    assert all(busy[node] <= max(PER_NODE, before[node]) for node in busy)
    for group, move in by_group.items():
        if group not in begun and len(under_way) + len(begun) < ALL:
            assert any(busy[node] >= PER_NODE for node in move.nodes)


def test_nodes_that_are_to_be_emptied_come_first() -> None:
    balance = [Move(3, pg, frozenset({1, 2}), False) for pg in range(10)]
    empty = [Move(3, pg, frozenset({2, 3}), True) for pg in range(10, 20)]
    assert to_begin(balance + empty, []) == {(3, pg) for pg in range(10, 10 + PER_NODE)}


def test_recovery_holds_moves_back_and_not_the_other_way() -> None:
    many = [{1, 2}] * 100
    assert to_begin([Move(3, 7, frozenset({3, 4}), True)], many) == set()
    assert to_begin([Move(3, 7, frozenset({2, 3}), True)], many[:PER_NODE]) == set()
    assert to_begin([Move(3, 7, frozenset({3, 4}), True)], many[:PER_NODE]) == {(3, 7)}


def records(zones: Mapping[int, str], weights: Mapping[int, float]) -> dict[int, AliveRecord]:
    return {n: AliveRecord(n, n, f"h{n}:1", zone, weights.get(n, 1.0)) for n, zone in zones.items()}


def run(
    current: ClusterMap,
    alive: Mapping[int, AliveRecord],
    pgs: int,
    wishes: Mapping[int, NodeWish] | None = None,
) -> Iterator[ClusterMap]:
    """Yield each epoch until the leader rests; who joins has caught up by the next decision."""
    for _ in range(20_000):
        joined = [
            Joined(n, alive[n].incarnation, copies, pg, group.changed)
            for copies, groups in current.pools.items()
            for pg, group in enumerate(groups)
            for n in group.joining
        ]
        following = decide(current, alive, set(), {3}, pgs, joined, 0.0, wishes=wishes)
        if following is None:
            return
        yield following
        current = following
    raise AssertionError("the leader does not come to rest")


def loads(groups: tuple[PlacementGroup, ...]) -> Counter[int]:
    return Counter(n for group in groups for n in group.sync)


def settle_counting(
    before: ClusterMap,
    alive: Mapping[int, AliveRecord],
    pgs: int,
    wishes: Mapping[int, NodeWish] | None = None,
) -> tuple[ClusterMap, int]:
    """Let the leader move; gives the map at rest, and how often a group was copied to a node."""
    copied = 0
    current = before
    for after in run(before, alive, pgs, wishes):
        busy: Counter[int] = Counter()
        for old, new in zip(current.pools[3], after.pools[3], strict=True):
            assert len(new.sync) >= len(old.sync) or len(new.sync) >= 3
            copied += len(set(new.joining) - set(old.members))
            if new.joining:
                busy.update(new.members)
        assert max(busy.values(), default=0) <= PER_NODE
        current = after
    return current, copied


@pytest.mark.parametrize(
    ("nodes", "change"),
    [
        (4, "add"), (4, "drain"), (5, "remove"), (7, "weight"), (9, "zones"), (12, "add two"),
        (12, "drain"), (20, "weight"), (24, "zones"),
    ],
)  # fmt: skip
def test_throttled_moves_are_at_most_a_fifth_more_than_the_least(nodes: int, change: str) -> None:
    pgs = 128
    zones = {n: f"z{n}" for n in range(1, nodes + 1)}
    weights: dict[int, float] = {}
    wishes: dict[int, NodeWish] = {}
    *_, before = run(EMPTY, records(zones, weights), pgs)
    if change == "add":
        zones[nodes + 1] = "new"
    elif change == "add two":
        zones |= {nodes + 1: "new", nodes + 2: "new"}
    elif change == "drain":
        wishes[2] = NodeWish(2, draining=True)
    elif change == "remove":
        wishes[2] = NodeWish(2, removed=True)
    elif change == "weight":
        wishes[3] = NodeWish(3, weight=2.0)
    else:
        zones = {n: f"rack{n % 4}" for n in zones}
    alive = records(zones, weights)
    after, copied = settle_counting(before, alive, pgs, wishes)
    assert all(len(group.sync) == 3 and not group.joining for group in after.pools[3])
    gained = (loads(after.pools[3]) - loads(before.pools[3])).total()
    if change == "zones":
        # Groups with two members of one rack must change, whatever the loads are.
        gained = sum(3 - len({zones[n] for n in g.sync}) for g in before.pools[3])
    assert gained <= copied <= 1.2 * gained + 1
    if wishes.get(2):
        assert loads(after.pools[3])[2] == 0
        assert (2 in after.nodes) == (change == "drain")


@given(st.integers(4, 9), st.data())
@settings(max_examples=15, deadline=None)
def test_a_leader_that_changes_half_way_goes_on_where_the_other_one_was(
    nodes: int, data: st.DataObject
) -> None:
    zones = {n: f"z{n}" for n in range(1, nodes + 1)}
    *_, before = run(EMPTY, records(zones, {}), 32)
    alive = records(zones | {nodes + 1: "new"}, {})
    epochs = list(run(before, alive, 32))
    # All that a leader knows is the map: from any epoch on the rest is the same.
    at = data.draw(st.integers(0, len(epochs) - 1))
    rest = list(run(epochs[at], alive, 32))
    assert [m.pools for m in rest] == [m.pools for m in epochs[at + 1 :]]
