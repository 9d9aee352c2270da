from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfs.core.placement import Candidate, place

Rows = Sequence[Sequence[int]]


def nodes_of(count: int, zones: int | None = None, weight: float = 1.0) -> dict[int, Candidate]:
    return {n: Candidate(f"zone-{n % (zones or count)}", weight) for n in range(1, count + 1)}


def loads(rows: Rows) -> Counter[int]:
    return Counter(n for row in rows for n in row)


def moved(before: Rows, after: Rows) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def assert_spread(nodes: Mapping[int, Candidate], copies: int, rows: Rows) -> None:
    zones = {c.zone for c in nodes.values() if c.weight > 0}
    usable = [n for n, c in nodes.items() if c.weight > 0]
    for row in rows:
        assert len(set(row)) == len(row) == min(copies, len(usable))
        assert len({nodes[n].zone for n in row}) == min(copies, len(zones))


def assert_even(rows: Rows, nodes: Mapping[int, Candidate]) -> None:
    """Each load within 5 % of the weight's share, or within the one PG that can't be halved."""
    total = sum(len(row) for row in rows)
    weight = sum(c.weight for c in nodes.values())
    load = loads(rows)
    for node, candidate in nodes.items():
        share = total * candidate.weight / weight
        assert abs(load[node] - share) <= max(1, 0.05 * share), (node, load[node], share)


clusters = st.builds(
    lambda zones: {
        n: Candidate(f"z{zone}", weight)
        for n, (zone, weight) in enumerate(
            ((zone, weight) for zone, weights in enumerate(zones) for weight in weights), 1
        )
    },
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.7]), min_size=1, max_size=5),
        min_size=1,
        max_size=7,
    ),
)


@given(clusters, st.integers(1, 5), st.integers(1, 80))
@settings(max_examples=150, deadline=None)
def test_members_are_distinct_and_spread_over_zones(
    nodes: dict[int, Candidate], copies: int, pg_count: int
) -> None:
    rows = place(nodes, copies, pg_count)
    assert len(rows) == pg_count
    if all(c.weight == 0 for c in nodes.values()):
        nodes = {n: Candidate(c.zone, 1.0) for n, c in nodes.items()}
    assert_spread(nodes, copies, rows)


@given(clusters, st.integers(1, 5), st.integers(1, 80), clusters)
@settings(max_examples=150, deadline=None)
def test_any_change_ends_spread_and_a_second_look_moves_nothing(
    nodes: dict[int, Candidate], copies: int, pg_count: int, later: dict[int, Candidate]
) -> None:
    before = place(nodes, copies, pg_count)
    after = place(later, copies, pg_count, before)
    if any(c.weight for c in later.values()):
        assert_spread(later, copies, after)
    assert moved(after, place(later, copies, pg_count, after)) == 0


@given(
    st.lists(st.floats(1.0, 2.0), min_size=6, max_size=20),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_loads_follow_the_weights(weights: list[float], copies: int) -> None:
    nodes = {n: Candidate(f"host-{n}", w) for n, w in enumerate(weights, 1)}
    assert_even(place(nodes, copies, 40 * len(nodes)), nodes)


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "zones"), [(3, 3), (5, 5), (12, 4), (30, 30), (30, 1), (100, 5)])
def test_equal_nodes_get_equal_loads(count: int, zones: int, copies: int) -> None:
    nodes = nodes_of(count, zones)
    rows = place(nodes, copies, max(256, 20 * count))
    assert_spread(nodes, copies, rows)
    if zones >= copies or zones == 1:
        assert_even(rows, nodes)


def test_fewer_nodes_than_copies_are_all_members() -> None:
    assert all(set(row) == {1, 2} for row in place(nodes_of(2), 3, 64))


def test_no_nodes_give_empty_groups() -> None:
    assert place({}, 3, 2) == [(), ()]


def test_weight_zero_gets_nothing_unless_there_is_nothing_else() -> None:
    nodes = nodes_of(4) | {9: Candidate("zone-9", 0.0)}
    assert 9 not in loads(place(nodes, 3, 64))
    assert loads(place({9: nodes[9]}, 3, 64)) == {9: 64}


def test_a_zone_too_heavy_for_the_spread_is_in_every_group() -> None:
    nodes = nodes_of(4) | {5: Candidate("big", 100.0)}
    assert loads(place(nodes, 3, 128))[5] == 128


def test_four_copies_in_two_zones_are_two_and_two() -> None:
    nodes = nodes_of(10, zones=2)
    for row in place(nodes, 4, 128):
        assert sorted(Counter(nodes[n].zone for n in row).values()) == [2, 2]


@pytest.mark.parametrize(("count", "zones"), [(3, 3), (4, 4), (10, 5), (10, 1), (40, 8), (60, 60)])
def test_adding_a_node_moves_only_its_share(count: int, zones: int) -> None:
    before = place(nodes_of(count, zones), 3, 1024)
    nodes = nodes_of(count, zones) | {99: Candidate("zone-0", 1.0)}
    after = place(nodes, 3, 1024, before)
    gains = sum((loads(after) - loads(before)).values())
    assert loads(after)[99] > 0
    assert moved(before, after) <= 1.2 * gains


@pytest.mark.parametrize(("count", "zones"), [(4, 4), (10, 5), (10, 1), (40, 8), (60, 60)])
def test_removing_a_node_moves_only_what_it_had(count: int, zones: int) -> None:
    nodes = nodes_of(count, zones)
    before = place(nodes, 3, 1024)
    del nodes[2]
    after = place(nodes, 3, 1024, before)
    assert_spread(nodes, 3, after)
    lost = loads(before)[2]
    gains = sum((loads(after) - loads(before)).values())
    assert gains >= lost
    assert moved(before, after) <= 1.2 * gains


@given(st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0]), min_size=8, max_size=16), st.data())
@settings(max_examples=60, deadline=None)
def test_a_new_weight_moves_only_the_difference(weights: list[float], data: st.DataObject) -> None:
    nodes = {n: Candidate(f"host-{n}", w) for n, w in enumerate(weights, 1)}
    before = place(nodes, 3, 256)
    changed = data.draw(st.sampled_from(sorted(nodes)))
    nodes[changed] = Candidate(nodes[changed].zone, data.draw(st.floats(0.5, 4.0)))
    after = place(nodes, 3, 256, before)
    gains = sum((loads(after) - loads(before)).values())
    assert moved(before, after) <= 1.2 * gains + 2


def test_what_returns_to_its_place_is_kept_before_others() -> None:
    nodes = nodes_of(5)
    rows = place(nodes, 3, 256)
    wider = [(*row, *(n for n in nodes if n not in row)) for row in rows]
    assert [set(row) for row in place(nodes, 3, 256, wider)] == [set(row) for row in rows]


def test_placement_is_pinned() -> None:
    """Leaders of two versions that disagree would undo each other's moves."""
    assert place(nodes_of(5), 3, 4) == place(dict(reversed(nodes_of(5).items())), 3, 4)
    assert place(nodes_of(5), 3, 4) == [(1, 4, 2), (3, 5, 4), (3, 5, 4), (1, 2, 3)]


@pytest.mark.parametrize("zones", [1, 40, 1000])
def test_a_thousand_nodes_take_less_than_five_seconds(zones: int) -> None:
    nodes = nodes_of(1000, zones)
    start = time.process_time()
    rows = place(nodes, 3, 8192)
    assert time.process_time() - start < 5
    assert_spread(nodes, 3, rows)
    assert_even(rows, nodes)
    del nodes[500]
    assert moved(rows, place(nodes, 3, 8192, rows)) <= 30
