"""What is lost when nodes never come back: pure, from the map, what nodes have and maps name.

Always holds: nothing is called safe that is not proved to be. What a surviving node has of a group
that goes on without those that held it may be old.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.geometry import is_map_object, pg_of, pool_of
from sheepfs.layers.inventory import Replica
from sheepfs_tools.sheepctl.analysis.node_groups import groups_of, waits

GroupId = tuple[int, int]
"""(pool, number)."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """What becomes of one group: the node to go on with, and how many of its objects it has."""

    pool: int
    pg: int
    waits_for: tuple[int, ...]
    """The nodes that hold the group, all down."""
    node: int
    objects: int
    known: int
    """Objects of the group that any node has."""


@dataclass(slots=True)
class Damage:
    """What a VDI or snapshot loses. Counts of objects of 4 MiB."""

    lost: int = 0
    old: int = 0
    """A surviving node has them as they were when it last was a member."""
    maps_lost: int = 0
    """Parts of its map (2 TiB each): all below them is lost."""
    maps_old: int = 0
    """What was written since may read as before, or as zeros if it was a hole then."""


@dataclass(slots=True)
class Assessment:
    """All of it."""

    survivors: list[Survivor] = field(default_factory=list)
    damage: dict[str, Damage] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    """VDIs and snapshots a part of whose map was lost before: what it names is not counted."""

    @property
    def waits_for(self) -> list[int]:
        """The nodes that are waited for."""
        return sorted({node for group in self.survivors for node in group.waits_for})


def waiting_groups(cluster_map: ClusterMap) -> dict[GroupId, PlacementGroup]:
    """Give the groups of which all that hold them are down."""
    return {
        (copies, pg): group
        for copies, pg, group in groups_of(cluster_map)
        if waits(cluster_map, group)
    }


def group_of(cluster_map: ClusterMap, oid: int) -> GroupId:
    """Give the group of an object."""
    pool = pool_of(oid)
    groups = cluster_map.pools.get(pool, ())
    return pool, pg_of(oid, len(groups)) if groups else 0


def choose(cluster_map: ClusterMap, replicas: Mapping[int, Sequence[Replica]]) -> list[Survivor]:
    """Choose for each waiting group the node with the newest data.

    Of those that have something: the one that has the newest known version of most objects. Where
    nobody has anything, one that is expected to be a member, else the one chosen least often.
    """
    waiting = waiting_groups(cluster_map)
    up = [n for n in cluster_map.nodes.values() if n.state is not NodeState.DOWN]
    newest: dict[GroupId, Counter[int]] = {group_id: Counter() for group_id in waiting}
    have: dict[GroupId, Counter[int]] = {group_id: Counter() for group_id in waiting}
    known: Counter[GroupId] = Counter()
    for oid, copies in replicas.items():
        group_id = group_of(cluster_map, oid)
        if group_id in waiting and copies:
            known[group_id] += 1
            best = max(copy.version for copy in copies)
            for copy in copies:
                have[group_id][copy.node] += 1
                newest[group_id][copy.node] += copy.version == best
    chosen: Counter[int] = Counter()

    def rank(node: Node, group_id: GroupId) -> tuple[int, ...]:
        group = waiting[group_id]
        return (
            newest[group_id][node.id],
            have[group_id][node.id],
            node.id in (*group.joining, *group.away),
            node.state is not NodeState.DRAINING,
            -chosen[node.id],
            -node.id,
        )

    survivors = []
    for group_id, group in waiting.items() if up else ():
        node = max(up, key=partial(rank, group_id=group_id)).id
        chosen[node] += 1
        survivors.append(
            Survivor(*group_id, group.sync, node, have[group_id][node], known[group_id])
        )
    return survivors


def assess(
    cluster_map: ClusterMap,
    replicas: Mapping[int, Sequence[Replica]],
    named: Iterable[tuple[str, int]],
) -> Assessment:
    """Say what is lost.

    Args:
        named: (whose map, object) of all objects that maps name, and of the maps themselves.
    """
    survivors = choose(cluster_map, replicas)
    node_of = {(s.pool, s.pg): s.node for s in survivors}
    found = Assessment(survivors)
    for what, oid in named:
        node = node_of.get(group_of(cluster_map, oid))
        if node is None:
            continue
        damage = found.damage.setdefault(what, Damage())
        is_there = any(copy.node == node for copy in replicas.get(oid, ()))
        if is_map_object(oid):
            damage.maps_old += is_there
            damage.maps_lost += not is_there
        else:
            damage.old += is_there
            damage.lost += not is_there
    return found
