"""Placement for 3 to 1,000 nodes: how even it is, and how little moves when something changes.

What is tested, for each size and shape:
- Balance: with at least `GROUPS_PER_NODE` replicas of groups for a node on average, no node of
  average weight or more is further than 5 % from its weight's share. Groups are whole, so a lighter
  node may be up to one group off. Shapes are such that the spread over zones allows the shares.
- Movement: at most 1.2 times what no way to get there can go below: the sum of what nodes gain,
  and moves that are only there because a group must not be in a zone twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from random import Random

import pytest

from sheepfs.core.placement import Candidate, place

GROUPS_PER_NODE = 20
COPIES = 3
SIZES = (3, 4, 5, 6, 8, 11, 16, 25, 38, 60, 100, 250)
SHAPES = ("equal", "weights", "zones")
SOAK = pytest.mark.skipif(os.environ.get("SHEEPFS_SOAK") != "1", reason="takes seconds")

Rows = Sequence[Sequence[int]]


def pg_count_for(nodes: int) -> int:
    """Give the smallest power of two, from 256 on, with enough groups for so many nodes."""
    count = 256
    while count * COPIES < GROUPS_PER_NODE * nodes:
        count *= 2
    return count


def cluster(nodes: int, shape: str) -> dict[int, Candidate]:
    rng = Random(nodes)
    ids = range(1, nodes + 1)
    if shape == "equal":
        return {n: Candidate(f"host{n}", 1.0) for n in ids}
    if shape == "weights":
        # With few nodes, each must be in most groups, whatever it weighs.
        weights = (1.0, 1.5, 2.0, 3.0) if nodes >= 8 else (1.0, 1.2) if nodes > COPIES else (1.0,)
        return {n: Candidate(f"host{n}", rng.choice(weights)) for n in ids}
    zones = max(4, nodes // 10)
    return {n: Candidate(f"rack{n % zones}", 1.0) for n in ids}


def loads(rows: Rows) -> Counter[int]:
    return Counter(n for row in rows for n in row)


def assert_balanced(rows: Rows, nodes: Mapping[int, Candidate]) -> None:
    total = sum(c.weight for c in nodes.values())
    load = loads(rows)
    mean = total / len(nodes)
    for node, (_, weight) in nodes.items():
        share = len(rows) * COPIES * weight / total
        allowed = 0.05 * share if weight >= mean else max(1.0, 0.05 * share)
        assert abs(load[node] - share) <= allowed, (node, load[node], share)


def assert_spread(rows: Rows, nodes: Mapping[int, Candidate]) -> None:
    zones = len({c.zone for c in nodes.values()})
    for row in rows:
        assert len({nodes[n].zone for n in row}) == min(COPIES, zones)


def moved(before: Rows, after: Rows) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def least_moves(before: Rows, after: Rows, nodes: Mapping[int, Candidate]) -> int:
    """Give a number of moves that no way to get from loads to loads can go below.

    What nodes gain has to move there; and each replica that is gone, but cannot be made anew in a
    zone that gains, because its group is in that zone already, takes a second move.
    """
    gained: Counter[str] = Counter()
    for node, count in (loads(after) - loads(before)).items():
        gained[nodes[node].zone] += count
    filled: dict[str, list[frozenset[str]]] = {zone: [] for zone in gained}

    def fill(gap: frozenset[str], seen: set[str]) -> bool:
        for zone in gap & filled.keys() - seen:
            seen.add(zone)
            if len(filled[zone]) < gained[zone]:
                filled[zone].append(gap)
                return True
            for other in set(filled[zone]):
                if fill(other, seen):
                    filled[zone].remove(other)
                    filled[zone].append(gap)
                    return True
        return False

    zones = {c.zone for c in nodes.values()}
    gaps = [
        frozenset(zones - {nodes[n].zone for n in row if n in nodes})
        for row in before
        if any(n not in nodes for n in row)
    ]
    return gained.total() + (
        sum(not fill(gap, set()) for gap in gaps) if len(zones) > COPIES else 0
    )


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        *product(SIZES, SHAPES),
        (1000, "equal"),
        pytest.param(1000, "zones", marks=SOAK),
        pytest.param(1000, "weights", marks=SOAK),
    ],
)
def test_loads_are_within_five_percent_of_the_weights_and_changes_move_little(
    size: int, shape: str
) -> None:
    nodes = cluster(size, shape)
    pg_count = pg_count_for(size)
    before = place(nodes, COPIES, pg_count)
    assert_spread(before, nodes)
    if shape != "zones" or size % max(4, size // 10) == 0:
        assert_balanced(before, nodes)
    new = size + 1
    middle = sorted(nodes)[size // 2]
    changes = {
        "add": nodes | {new: Candidate(nodes[1].zone if shape == "zones" else "new", 1.0)},
        "weight": nodes | {middle: nodes[middle]._replace(weight=nodes[middle].weight * 1.5)},
        "zone": nodes | {new + i: Candidate("new zone", 1.0) for i in range(max(1, size // 10))},
    }
    if size > COPIES + 1:
        changes["remove"] = {n: c for n, c in nodes.items() if n != middle}
    for change, after_nodes in changes.items():
        after = place(after_nodes, COPIES, pg_count, before)
        assert_spread(after, after_nodes)
        assert moved(before, after) <= 1.2 * least_moves(before, after, after_nodes), change
        if shape == "equal" and change in ("add", "remove") and len(after_nodes) > COPIES:
            assert_balanced(after, after_nodes)


def test_too_few_groups_for_the_nodes_are_uneven_by_one_group_at_most() -> None:
    """256 groups of 3 copies are 0.77 for each of 1,000 nodes: balance needs more groups."""
    load = loads(place(cluster(1000, "equal"), COPIES, 256))
    assert set(load.values()) == {1}
    assert len(load) == 768


@pytest.mark.parametrize(("size", "groups"), [(38, 256), (76, 512), (153, 1024), (1228, 8192)])
def test_docs_say_how_many_groups_are_enough(size: int, groups: int) -> None:
    assert pg_count_for(size) == groups
    assert pg_count_for(size + 1) > groups
