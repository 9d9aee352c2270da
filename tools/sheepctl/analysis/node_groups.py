"""What placement groups need of a node, and whether it may leave: pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from sheepfs.core.clustermap import ClusterMap, NodeState, PlacementGroup


class Holding(NamedTuple):
    """How many groups a node has a part in.

    Attributes:
        waiting: groups whose data is on nodes that are down, this one included: nothing is
            read or written there until one is back.
    """

    sync: int
    joining: int
    away: int
    waiting: int

    @property
    def total(self) -> int:
        """All groups that name the node."""
        return self.sync + self.joining + self.away


def groups_of(cluster_map: ClusterMap) -> Iterator[tuple[int, int, PlacementGroup]]:
    """Yield (pool, number, group) of all groups."""
    for copies, groups in sorted(cluster_map.pools.items()):
        for pg, group in enumerate(groups):
            yield copies, pg, group


def waits(cluster_map: ClusterMap, group: PlacementGroup) -> bool:
    """Tell whether all that hold a group are down."""
    return all(cluster_map.nodes[n].state is NodeState.DOWN for n in group.sync)


def holding(cluster_map: ClusterMap, node: int) -> Holding:
    """Count the groups that name a node."""
    sync = joining = away = waiting = 0
    for _, _, group in groups_of(cluster_map):
        sync += node in group.sync
        joining += node in group.joining
        away += node in group.away
        waiting += node in group.sync and waits(cluster_map, group)
    return Holding(sync, joining, away, waiting)


def removal_problem(cluster_map: ClusterMap, node: int) -> str:
    """Say why a node of the map cannot be removed now, and what to do; empty: it can."""
    held = holding(cluster_map, node)
    if len(cluster_map.nodes) == 1 and cluster_map.pools:
        return f"node {node} is the only one: add another, and drain this one"
    if cluster_map.nodes[node].state is not NodeState.DOWN:
        if held.total:
            return (
                f"node {node} is up, and {held.total} groups are on it: empty it first, with"
                f" sheepctl node drain {node} --wait, or add --drain"
            )
    elif held.waiting:
        return (
            f"node {node} is down, and {held.waiting} groups wait for it, as all nodes that have"
            " their data are down: start it again. If it will never come back, see what is lost"
            " with sheepctl cluster recover"
        )
    return ""


def nowhere_to_go(cluster_map: ClusterMap, leaving: Collection[int]) -> str:
    """Say why nodes that are drained cannot be emptied; empty: they can."""
    places = sum(
        node.id not in leaving and node.weight > 0 and node.state is not NodeState.DOWN
        for node in cluster_map.nodes.values()
    )
    stuck = [
        f"{sum(not leaving_from.isdisjoint(group.sync) for group in groups)} groups of {copies}"
        for copies, groups in sorted(cluster_map.pools.items())
        if (leaving_from := set(leaving)) and places < copies
        if any(not leaving_from.isdisjoint(group.sync) for group in groups)
    ]
    if not stuck:
        return ""
    return (
        f"{' and '.join(stuck)} copies have nowhere to go: without it there are {places} nodes that"
        " take data. Add nodes; or stop the daemon and remove the node, if fewer copies will do"
    )
