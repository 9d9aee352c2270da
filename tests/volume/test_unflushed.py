"""Which changes of the map tell that unflushed writes are lost: pure, but for the stubs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.replication.unflushed import Unflushed


def cluster_map(
    epoch: int,
    sync: tuple[int, ...],
    joining: tuple[int, ...] = (),
    runs: dict[int, int] | None = None,
) -> ClusterMap:
    """A map of three nodes; `runs`: those that are not in their first run."""
    rows = {
        n: Node(n, NodeState.ACTIVE, f"host-{n}", (runs or {}).get(n, 1), f"zone-{n}", 1.0)
        for n in (1, 2, 3)
    }
    return ClusterMap(epoch, "cluster", rows, {2: (PlacementGroup(epoch, sync, joining),)})


ALONE = cluster_map(1, (1,))
JOINING = cluster_map(2, (1,), (2,))


@pytest.mark.parametrize(
    ("maps", "is_lost"),
    [
        ((ALONE, JOINING, cluster_map(3, (1, 2)), cluster_map(4, (2,))), False),
        ((cluster_map(1, (1, 2)), cluster_map(2, (2,))), False),
        ((cluster_map(1, (1, 2)), cluster_map(2, (1,), (2,), {2: 2})), False),
        ((ALONE, cluster_map(2, (1,), (), {1: 2})), True),
        ((JOINING, cluster_map(3, (1,), (2,), {1: 2})), True),
        # What happened between these two maps was slept through: node 2 may have learnt from a
        # second run of node 1, which had lost what was not flushed.
        ((JOINING, cluster_map(9, (2,), (1,), {1: 2})), True),
        ((JOINING, cluster_map(9, (2,))), True),
    ],
)
def test_writes_are_lost_with_the_last_that_surely_had_them(
    maps: tuple[ClusterMap, ...], is_lost: bool
) -> None:
    failed: list[Any] = []
    unflushed = Unflushed(cast(Any, SimpleNamespace(vdi=7, fail_groups=failed.append)))
    unflushed.groups.add((2, 0))
    for old, new in pairwise(maps):
        unflushed.map_changed(old, new)
    assert bool(unflushed.losses) == is_lost
    assert failed == ([{(2, 0)}] if is_lost else [])
