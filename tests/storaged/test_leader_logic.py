from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sheepfs.core.clustermap import ClusterMap, NodeState, PlacementGroup
from sheepfs.core.metadata import AcceptedLoss, AliveRecord, NodeWish
from storaged.logic.leader import DEFAULT_PATIENCE, Joined, decide
from storaged.logic.moves import PER_NODE

PGS = 8
EMPTY = ClusterMap(0, "c" * 32)


def alive(*nodes: int, run: int = 1) -> dict[int, AliveRecord]:
    return {n: AliveRecord(n, 100 * n + run, f"host-{n}:7000", f"zone-{n}", 1.0) for n in nodes}


def test_a_node_whose_disk_was_replaced_is_not_waited_for() -> None:
    whole = step(EMPTY, alive(1, 2, 3))
    assert all(set(group.sync) == {1, 2, 3} for group in whole.pools[3])
    records = alive(1, 2)
    short = step(whole, records)
    assert all(group.away == (3,) for group in short.pools[3])
    # Another node, with an empty disk, at the address of the one that is down.
    records[4] = AliveRecord(4, 401, "host-3:7000", "zone-3", 1.0)
    again = step(short, records)
    assert all(group.joining == (4,) and not group.away for group in again.pools[3])


def draining(*nodes: int) -> dict[int, NodeWish]:
    return {n: NodeWish(n, draining=True) for n in nodes}


def step(
    current: ClusterMap,
    records: dict[int, AliveRecord],
    *,
    unreachable: Iterable[tuple[int, int]] = (),
    pools: Collection[int] = (3,),
    joined: Collection[Joined] = (),
    now: float = 0.0,
    wishes: Mapping[int, NodeWish] | None = None,
    accepted: AcceptedLoss | None = None,
) -> ClusterMap:
    following = decide(
        current,
        records,
        set(unreachable),
        pools,
        PGS,
        joined,
        now,
        wishes=wishes,
        accepted=accepted,
    )
    assert following is not None
    return following


def reports(
    current: ClusterMap, records: dict[int, AliveRecord], only: Collection[int] | None = None
) -> list[Joined]:
    """Every joining member that runs says that it has caught up."""
    return [
        Joined(node, records[node].incarnation, copies, pg, group.changed)
        for copies, groups in current.pools.items()
        for pg, group in enumerate(groups)
        for node in group.joining
        if node in records and (only is None or node in only)
    ]


def settle(
    current: ClusterMap,
    records: dict[int, AliveRecord],
    pools: Collection[int] = (3,),
    wishes: Mapping[int, NodeWish] | None = None,
) -> ClusterMap:
    for _ in range(300):
        joined = reports(current, records)
        following = decide(current, records, set(), pools, PGS, joined, 1e9, wishes=wishes)
        if following is None:
            return current
        current = following
    raise AssertionError("the leader does not come to rest")


def three_nodes() -> ClusterMap:
    return settle(EMPTY, alive(1, 2, 3))


def test_the_first_node_holds_every_group_of_a_new_pool() -> None:
    first = step(EMPTY, alive(1))
    assert first.epoch == 1
    assert set(first.pools[3]) == {PlacementGroup(1, (1,))}
    assert first.nodes[1].state is NodeState.ACTIVE


def test_a_pool_waits_for_the_first_node() -> None:
    assert decide(EMPTY, {}, set(), {3}, PGS, [], 0.0) is None


def test_a_second_node_joins_and_is_sync_once_it_reports() -> None:
    first = step(EMPTY, alive(1))
    second = step(first, alive(1, 2))
    assert set(second.pools[3]) == {PlacementGroup(2, (1,), (2,))}
    assert second.nodes[2].state is NodeState.RECOVERING
    third = step(second, alive(1, 2), joined=reports(second, alive(1, 2)))
    assert {frozenset(g.sync) for g in third.pools[3]} == {frozenset({1, 2})}
    assert third.nodes[2].state is NodeState.ACTIVE


def test_promotion_leaves_changed_alone_so_that_other_reports_stay_good() -> None:
    current = step(step(EMPTY, alive(1)), alive(1, 2, 3))
    late = reports(current, alive(1, 2, 3), only={3})
    current = step(current, alive(1, 2, 3), joined=reports(current, alive(1, 2, 3), only={2}))
    current = step(current, alive(1, 2, 3), joined=late)
    assert all(set(g.sync) == {1, 2, 3} for g in current.pools[3])


def test_nothing_to_change_is_no_new_map() -> None:
    assert decide(three_nodes(), alive(1, 2, 3), set(), {3}, PGS, [], 0.0) is None


def test_a_new_pool_starts_with_all_members_sync() -> None:
    current = step(three_nodes(), alive(1, 2, 3), pools={2, 3})
    assert {len(g.sync) for g in current.pools[2]} == {2}
    assert all(g.changed == current.epoch and not g.joining for g in current.pools[2])


def test_a_node_without_a_lease_is_down_and_voted_out_but_still_expected() -> None:
    before = three_nodes()
    current = step(before, alive(1, 2), now=5.0)
    assert current.nodes[3].state is NodeState.DOWN
    assert current.nodes[3].down_since == 5.0
    for group in current.pools[3]:
        assert set(group.sync) == {1, 2}
        assert group.away == (3,)
        assert group.changed == current.epoch
    assert ClusterMap.decode(current.encoded) == current


def test_an_unreachable_incarnation_is_voted_out_though_its_lease_lives() -> None:
    current = step(three_nodes(), alive(1, 2, 3), unreachable={(3, 301)})
    assert current.nodes[3].state is NodeState.DOWN
    assert all(3 not in g.members for g in current.pools[3])


def test_an_unreachable_old_incarnation_says_nothing_of_the_new_one() -> None:
    records = alive(1, 2) | alive(3, run=2)
    current = step(three_nodes(), records, unreachable={(3, 301)})
    assert current.nodes[3].state is NodeState.RECOVERING


def test_a_restarted_node_joins_again_in_the_same_decision() -> None:
    records = alive(1, 2) | alive(3, run=2)
    current = step(three_nodes(), records)
    assert current.nodes[3].incarnation == 302
    for group in current.pools[3]:
        assert set(group.sync) == {1, 2}
        assert group.joining == (3,)
        assert group.changed == current.epoch


def test_who_comes_back_in_its_old_incarnation_joins_too() -> None:
    current = step(three_nodes(), alive(1, 2, 3), unreachable={(3, 301)})
    current = step(current, alive(1, 2, 3))
    assert all(g.joining == (3,) and g.changed == current.epoch for g in current.pools[3])


def test_the_last_sync_member_stays_though_it_is_down() -> None:
    current = step(step(three_nodes(), alive(1, 2)), alive(2))
    current = step(current, {})
    assert current.nodes[2].state is NodeState.DOWN
    assert all(g.sync == (2,) and not g.joining for g in current.pools[3])
    current = step(current, alive(1, 3, run=2))
    assert all(g.sync == (2,) and set(g.joining) == {1, 3} for g in current.pools[3])


def test_a_last_sync_member_that_restarts_stamps_its_groups() -> None:
    current = step(step(three_nodes(), alive(1, 2)), alive(2))
    current = step(current, alive(2, run=2))
    assert all(g.sync == (2,) and g.changed == current.epoch for g in current.pools[3])


def test_of_all_that_fail_at_once_one_that_is_back_is_kept() -> None:
    current = step(three_nodes(), alive(2, run=2))
    assert all(g.sync == (2,) for g in current.pools[3])


def test_a_group_that_goes_on_without_anybodys_memory_says_so_for_good() -> None:
    whole = three_nodes()
    lost = step(whole, alive(2, run=2))
    assert all(g.lost == lost.epoch for g in lost.pools[3])
    later = step(lost, alive(1, 2, 3, run=2))
    later = step(later, alive(1, 2, 3, run=2), joined=reports(later, alive(1, 2, 3, run=2)))
    assert all(len(g.sync) == 3 and g.lost == lost.epoch for g in later.pools[3])
    waiting = step(whole, {})
    assert not any(g.lost for g in waiting.pools[3])
    back = step(waiting, {**alive(1), **alive(2, run=2)})
    assert all(g.sync == (1,) and not g.lost for g in back.pools[3])


@pytest.mark.parametrize("first", [1, 2, 3])
def test_of_all_that_vanish_at_once_the_first_that_comes_back_is_kept(first: int) -> None:
    current = step(three_nodes(), {})
    assert all(set(g.sync) == {1, 2, 3} for g in current.pools[3])
    current = step(current, alive(first, run=2))
    assert all(g.sync == (first,) and g.changed == current.epoch for g in current.pools[3])
    current = step(current, alive(1, 2, 3, run=2))
    assert all(g.sync == (first,) and len(g.joining) == 2 for g in current.pools[3])


@pytest.mark.parametrize("first", [1, 2, 3])
def test_of_all_that_only_seemed_to_vanish_the_first_is_kept(first: int) -> None:
    current = step(step(three_nodes(), {}), alive(first))
    assert all(g.sync == (first,) for g in current.pools[3])


def test_a_member_that_has_joined_takes_over_from_the_last_that_fails() -> None:
    current = step(step(EMPTY, alive(1)), alive(1, 2))
    current = step(current, alive(2), joined=reports(current, alive(2)))
    assert all(g.sync == (2,) and g.away == (1,) for g in current.pools[3])


def test_stale_and_foreign_joined_reports_are_ignored() -> None:
    current = step(step(EMPTY, alive(1)), alive(1, 2))
    good = reports(current, alive(1, 2))
    bad = [
        changed
        for report in good
        for changed in (
            report._replace(changed=report.changed - 1),
            report._replace(incarnation=999),
            report._replace(node=7),
            report._replace(pool=5),
            report._replace(pg=PGS),
            report._replace(pg=-1),
        )
    ]
    assert decide(current, alive(1, 2), set(), {3}, PGS, bad, 0.0) is None


def test_a_node_down_for_long_is_replaced_and_one_back_soon_is_not() -> None:
    four = settle(EMPTY, alive(1, 2, 3, 4))
    down = step(four, alive(1, 2, 3), now=0.0)
    assert decide(down, alive(1, 2, 3), set(), {3}, PGS, [], 600.0) is None
    out = step(down, alive(1, 2, 3), now=601.0)
    for before, after in zip(four.pools[3], out.pools[3], strict=True):
        assert after.joining if 4 in before.sync else after.sync == before.sync
    back = settle(down, alive(1, 2, 3) | alive(4, run=2))
    for before, after in zip(four.pools[3], back.pools[3], strict=True):
        assert set(before.sync) == set(after.sync)


def test_two_nodes_that_return_get_just_the_groups_they_had() -> None:
    five = settle(EMPTY, alive(*range(1, 6)))
    down = step(five, alive(1, 2, 3))
    back = step(down, alive(1, 2, 3) | alive(4, 5, run=2))
    for before, after in zip(five.pools[3], back.pools[3], strict=True):
        assert set(before.sync) == set(after.members)


def test_rebalancing_drops_a_member_only_when_all_targets_are_sync() -> None:
    current = step(three_nodes(), alive(1, 2, 3, 4))
    moving = [g for g in current.pools[3] if g.joining]
    assert moving
    assert all(set(g.sync) == {1, 2, 3} for g in current.pools[3])
    settled = settle(current, alive(1, 2, 3, 4))
    assert all(len(g.sync) == 3 and not g.joining for g in settled.pools[3])
    assert sum(4 in g.sync for g in settled.pools[3]) == PGS * 3 // 4


def test_a_move_goes_on_as_planned_when_a_leader_looks_again() -> None:
    current = step(three_nodes(), alive(1, 2, 3, 4))
    assert decide(current, alive(1, 2, 3, 4), set(), {3}, PGS, [], 0.0) is None


def test_draining_moves_data_away_first() -> None:
    four = settle(EMPTY, alive(1, 2, 3, 4))
    records = alive(1, 2, 3, 4)
    current = step(four, records, wishes=draining(4))
    assert current.nodes[4].state is NodeState.DRAINING
    moving = 0
    for before, after in zip(four.pools[3], current.pools[3], strict=True):
        assert set(before.sync) == set(after.sync)
        assert not after.joining or 4 in before.sync
        moving += bool(after.joining)
    assert moving == PER_NODE
    settled = settle(current, records, wishes=draining(4))
    assert all(set(g.sync) == {1, 2, 3} for g in settled.pools[3])


def test_draining_with_nowhere_to_go_lowers_no_redundancy() -> None:
    settled = settle(three_nodes(), alive(1, 2, 3), wishes=draining(3))
    assert all(set(g.sync) == {1, 2, 3} for g in settled.pools[3])


class LeaderMachine(RuleBasedStateMachine):
    """Nodes die, restart, partition and catch up in any order; the map must stay sound."""

    @initialize(count=st.integers(1, 5))
    def start(self, count: int) -> None:
        self.now = 0.0
        self.runs = 1
        self.records = alive(*range(1, count + 1))
        self.unreachable: set[tuple[int, int]] = set()
        self.joined: list[Joined] = []
        self.pools = {3}
        self.wishes: dict[int, NodeWish] = {}
        self.accepted: AcceptedLoss | None = None
        self.map = EMPTY

    def nodes(self) -> list[int]:
        return sorted(self.records)

    @rule(data=st.data())
    @precondition(lambda self: self.records)
    def kill(self, data: st.DataObject) -> None:
        del self.records[data.draw(st.sampled_from(self.nodes()))]

    @rule(node=st.integers(1, 6), zone=st.integers(1, 3))
    def restart(self, node: int, zone: int) -> None:
        self.runs += 1
        record = alive(node, run=self.runs)[node]
        self.records[node] = replace(record, zone=f"zone-{zone}")

    @rule(data=st.data())
    @precondition(lambda self: self.records)
    def cut_off(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(self.nodes()))
        self.unreachable.add((node, self.records[node].incarnation))

    @rule()
    def heal(self) -> None:
        self.unreachable.clear()

    @rule(node=st.integers(1, 6), draining=st.booleans(), weight=st.sampled_from([-1.0, 0.0, 2.0]))
    def wish(self, node: int, draining: bool, weight: float) -> None:
        removed = node in self.wishes and self.wishes[node].removed
        self.wishes[node] = NodeWish(node, draining, removed, weight)

    @rule(node=st.integers(4, 6))
    def remove(self, node: int) -> None:
        self.wishes[node] = NodeWish(node, removed=True)

    @rule(data=st.data(), late=st.booleans())
    @precondition(lambda self: self.records)
    def accept_losses(self, data: st.DataObject, late: bool) -> None:
        """An operator gives up whatever does not serve; perhaps on an old map."""
        node = data.draw(st.sampled_from(self.nodes()))
        run = node, self.records[node].incarnation
        chosen = {
            (copies, pg): run
            for copies, groups in self.map.pools.items()
            for pg, group in enumerate(groups)
            if late or all(self.map.nodes[n].state is NodeState.DOWN for n in group.sync)
        }
        self.accepted = AcceptedLoss.of(max(0, self.map.epoch - 2 * late), chosen)

    @rule(copies=st.integers(1, 5))
    def want_pool(self, copies: int) -> None:
        self.pools.add(copies)

    @rule(seconds=st.sampled_from([1.0, 299.0, 599.0, 601.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        good = reports(self.map, self.records)
        if good:
            self.joined += data.draw(st.lists(st.sampled_from(good), unique=True))

    @rule()
    def lead(self) -> None:
        before = self.map
        after = decide(
            before,
            self.records,
            self.unreachable,
            self.pools,
            PGS,
            self.joined,
            self.now,
            wishes=self.wishes,
            accepted=self.accepted,
        )
        if after is None:
            self.joined.clear()
            self.accepted = None
            return
        assert after.epoch == before.epoch + 1
        assert (after.nodes, after.pools) != (before.nodes, before.pools)
        self.begun: Counter[int] = Counter()
        for copies, groups in before.pools.items():
            for pg, group in enumerate(groups):
                self.check_group(before, after, copies, pg, group)
        assert max(self.begun.values(), default=0) <= PER_NODE
        self.check_nodes(after)
        self.joined.clear()
        self.accepted = None
        self.map = after

    def check_group(
        self, before: ClusterMap, after: ClusterMap, copies: int, pg: int, old: PlacementGroup
    ) -> None:
        new = after.pools[copies][pg]
        given_up = self.is_given_up(copies, pg, old)
        for node in new.sync:
            run = after.nodes[node].incarnation
            said = Joined(node, run, copies, pg, old.changed) in self.joined
            assert (given_up and new.sync == (node,)) or (
                node in old.sync or (node in old.joining and said)
            )
            gone = self.is_gone(before, node)
            assert not gone or new.sync == (node,) or self._all_vanished(new.sync)
        is_up = any(after.nodes[n].state is not NodeState.DOWN for n in new.sync)
        intact = [n for n in new.sync if not self.is_gone(before, n)]
        is_cut = (given_up and set(new.sync).isdisjoint(old.sync)) or (is_up and not intact)
        assert new.lost == (after.epoch if is_cut else old.lost)
        stayed = {n for n in old.sync if not self.is_gone(before, n)}
        if not stayed <= set(new.sync):
            removed = {n for n, wish in self.wishes.items() if wish.removed}
            assert len(new.sync) >= min(copies, len(stayed - removed))
            assert not new.joining
            assert not new.away
        if new.joining and stayed == set(old.members) and len(stayed) >= copies and not old.away:
            self.begun.update({*new.members, *old.members})
        renewed = any(
            after.nodes[n].incarnation != before.nodes[n].incarnation
            for n in new.members
            if n in before.nodes
        )
        if set(new.members) != set(old.members) or renewed:
            assert new.changed == after.epoch
        else:
            assert new.changed == old.changed

    def check_nodes(self, after: ClusterMap) -> None:
        for node, wish in self.wishes.items():
            if wish.removed and node in after.nodes:
                groups = [g for groups in after.pools.values() for g in groups]
                assert any(node in (*g.members, *g.away) for g in groups)
        for node, record in self.records.items():
            entry = after.nodes.get(node)
            if entry and entry.state is NodeState.DOWN:
                is_reached = (node, record.incarnation) not in self.unreachable
                assert (
                    not is_reached
                    or self.now < entry.held_until <= self.now + DEFAULT_PATIENCE.longest_s
                )

    def is_gone(self, before: ClusterMap, node: int) -> bool:
        record = self.records.get(node)
        return (
            record is None
            or (node, record.incarnation) in self.unreachable
            or node not in before.nodes
            or record.incarnation != before.nodes[node].incarnation
        )

    def is_given_up(self, copies: int, pg: int, old: PlacementGroup) -> bool:
        word = self.accepted
        return (
            word is not None
            and (copies, pg) in word.chosen()
            and old.changed <= word.epoch
            and self._all_vanished(old.sync)
        )

    @invariant()
    def map_is_sound(self) -> None:
        current = getattr(self, "map", EMPTY)
        for groups in current.pools.values():
            for group in groups:
                assert group.sync
                ids = group.sync + group.joining + group.away
                assert len(set(ids)) == len(ids)
                assert set(ids) <= current.nodes.keys()

    def _all_vanished(self, nodes: Collection[int]) -> bool:
        return not any(
            node in self.records and (node, self.records[node].incarnation) not in self.unreachable
            for node in nodes
        )

    def teardown(self) -> None:
        if not hasattr(self, "map"):
            return
        everyone = {
            n: self.records.get(n) or alive(n, run=9999)[n] for n in {*self.map.nodes, 1, 2, 3}
        }
        wishes = {n: wish for n, wish in self.wishes.items() if wish.removed}
        final = settle(self.map, everyone, self.pools, wishes)
        there = everyone.keys() - wishes.keys()
        for copies, groups in final.pools.items():
            for group in groups:
                assert len(group.sync) == min(copies, len(there))
                assert not group.joining
                assert not group.away
        assert final.nodes.keys() == there
        assert {n.state for n in final.nodes.values()} == {NodeState.ACTIVE}


TestLeaderMachine = LeaderMachine.TestCase
TestLeaderMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
