"""Which changes of the map tell that unflushed writes are lost: pure, but for the stubs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.replication.unflushed import Unflushed


def cluster_map(epoch: int, lost: int = 0) -> ClusterMap:
    """A map with one group, which last lost what was not flushed in epoch `lost`."""
    return ClusterMap(epoch, "cluster", {}, {2: (PlacementGroup(1, (1,), lost=lost),)})


@pytest.mark.parametrize(
    ("maps", "is_lost"),
    [
        ((cluster_map(1), cluster_map(2)), False),
        ((cluster_map(1), cluster_map(2, 2)), True),
        # Before this mount saw the first map, and wrote.
        ((cluster_map(5, 5), cluster_map(6, 5)), False),
        # What happened between these two maps was slept through.
        ((cluster_map(5, 3), cluster_map(9, 7)), True),
        ((cluster_map(5, 3), cluster_map(9, 9)), True),
        ((cluster_map(5, 3), cluster_map(9, 3)), False),
        # It is told once.
        ((cluster_map(5), cluster_map(6, 6), cluster_map(7, 6)), True),
    ],
)
def test_writes_are_lost_when_the_map_says_so(maps: tuple[ClusterMap, ...], is_lost: bool) -> None:
    failed: list[Any] = []
    unflushed = Unflushed(cast(Any, SimpleNamespace(vdi=7, fail_groups=failed.append)))
    unflushed.groups.add((2, 0))
    for old, new in pairwise(maps):
        unflushed.map_changed(old, new)
    assert bool(unflushed.losses) == is_lost
    assert failed == ([{(2, 0)}] if is_lost else [])
