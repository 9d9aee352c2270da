"""The leader's decision: what the next cluster map should be, given what is seen of the nodes.

Pure. Always holds, for every map made here from a map made here:
- The epoch is one higher, and something besides the epoch differs.
- A PG that has a `sync` member keeps one. If all of them fail at once, all stay in `sync` although
  they are down, and the PG waits for the first that comes back: each has all that was flushed (I8).
- Only a `joining` member that reported, as of the PG's `changed`, that it has everything becomes
  `sync`. A run that ended (another incarnation) is never `sync`, but for the last ones.
- `changed` is the new epoch whenever a PG's members differ, or a member is another incarnation:
  every holder then sends again what that member may lack. A mere promotion from `joining` to
  `sync` leaves it alone: the member already got every write, and the reports of others stay good.
- Of each PG, `joining` and `away` are targets of placement; in `sync`, targets stand first. So the
  targets can be read back from the map, and a new leader moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.metadata import AliveRecord
from sheepfs.core.placement import Candidate, place

OUT_AFTER_S = 600.0
"""A node down for longer is given up: its share is rebuilt elsewhere."""

Groups = tuple[PlacementGroup, ...]


class Joined(NamedTuple):
    """A node's report that it holds all of a PG, as of the PG's `changed`."""

    node: int
    incarnation: int
    pool: int
    pg: int
    changed: int


@dataclass(frozen=True, slots=True)
class _View:
    """What one decision is made from."""

    epoch: int
    live: AbstractSet[int]
    """Nodes that run and can be reached."""
    same: AbstractSet[int]
    """Those of them that are the incarnation of the current map, and were not voted out."""
    renewed: AbstractSet[int]
    """Nodes whose incarnation differs from the current map's."""
    candidates: Mapping[int, Candidate]
    """Nodes that may be given data: neither draining nor down for too long."""


def decide(
    current: ClusterMap,
    alive: Mapping[int, AliveRecord],
    unreachable: AbstractSet[tuple[int, int]],
    pools_wanted: Collection[int],
    pg_count: int,
    joined: Collection[Joined],
    now: float,
    out_after_s: float = OUT_AFTER_S,
) -> ClusterMap | None:
    """Give the next map, or None when there is nothing to change.

    Args:
        current: the map to follow (epoch 0 and empty for a new cluster).
        alive: the leased records of running nodes, by node id.
        unreachable: (node, incarnation) that can't be reached though its lease may live on.
        pools_wanted: numbers of copies that some VDI asks for.
        pg_count: placement groups of a new pool.
        joined: reports since the last decision; those that no longer fit are ignored.
        now: seconds, on one clock for all decisions of a leader; stamped as `down_since`.
        out_after_s: how long a node may be down before it is given up.
    """
    live = {
        node: record
        for node, record in alive.items()
        if (node, record.incarnation) not in unreachable
    }
    nodes = _next_nodes(current.nodes, live, now)
    view = _View(
        epoch=current.epoch + 1,
        live=live.keys(),
        same={n for n in live if _runs_on(current.nodes.get(n), live[n])},
        renewed={
            n
            for n, node in nodes.items()
            if n in current.nodes and node.incarnation != current.nodes[n].incarnation
        },
        candidates={
            n: Candidate(node.zone, node.weight)
            for n, node in nodes.items()
            if node.state is not NodeState.DRAINING
            and not (node.state is NodeState.DOWN and _given_up(node, now, out_after_s))
        },
    )
    pools: dict[int, Groups] = {}
    for copies in sorted({*current.pools, *pools_wanted}):
        if copies in current.pools:
            pools[copies] = _next_groups(current, copies, view, joined)
        elif live:
            pools[copies] = _new_groups(copies, pg_count, view)
    nodes = _with_activity(nodes, pools)
    if nodes == current.nodes and pools == current.pools:
        return None
    return current.with_changes(nodes, pools)


def as_in_map(cluster_map: ClusterMap) -> dict[int, AliveRecord]:
    """Give the map's nodes the benefit of the doubt: the records they would have if all ran on."""
    return {
        node.id: AliveRecord(
            node.id,
            node.incarnation,
            node.address,
            node.zone,
            node.weight,
            node.state is NodeState.DRAINING,
        )
        for node in cluster_map.nodes.values()
        if node.state is not NodeState.DOWN
    }


def _runs_on(known: Node | None, record: AliveRecord) -> bool:
    return known is not None and known.incarnation == record.incarnation


def _given_up(node: Node, now: float, out_after_s: float) -> bool:
    return node.weight <= 0 or now - node.down_since > out_after_s


def _next_nodes(
    known: Mapping[int, Node], live: Mapping[int, AliveRecord], now: float
) -> dict[int, Node]:
    """Give every node's entry; who is live is taken for ACTIVE until `_with_activity`."""
    nodes = {}
    for node_id in sorted({*known, *live}):
        record = live.get(node_id)
        if record is None:
            node = known[node_id]
            if node.state is not NodeState.DOWN:
                node = replace(node, state=NodeState.DOWN, down_since=now)
        else:
            node = Node(
                id=node_id,
                state=NodeState.DRAINING if record.draining else NodeState.ACTIVE,
                address=record.address,
                incarnation=record.incarnation,
                zone=record.zone,
                # Kept in the map when the node goes down, so that it isn't given data then.
                weight=0.0 if record.draining else record.weight,
            )
        nodes[node_id] = node
    return nodes


def _with_activity(nodes: Mapping[int, Node], pools: Mapping[int, Groups]) -> dict[int, Node]:
    busy = {n for groups in pools.values() for group in groups for n in group.joining}
    return {
        n: replace(node, state=NodeState.RECOVERING)
        if n in busy and node.state is NodeState.ACTIVE
        else node
        for n, node in nodes.items()
    }


def _new_groups(copies: int, pg_count: int, view: _View) -> Groups:
    """Make a pool. No object of it can exist yet, so its members start with everything."""
    usable = {n: c for n, c in view.candidates.items() if n in view.live}
    # With nothing but draining nodes a VDI can still be made; it moves when others come.
    usable = usable or {n: Candidate("", 1.0) for n in view.live}
    return tuple(
        PlacementGroup(view.epoch, members) for members in _targets(usable, copies, [()] * pg_count)
    )


def _next_groups(
    current: ClusterMap, copies: int, view: _View, joined: Collection[Joined]
) -> Groups:
    groups = current.pools[copies]
    targets = _targets(view.candidates, copies, [g.joining + g.away + g.sync for g in groups])
    complete: dict[int, set[int]] = {}
    for report in joined:
        if (
            report.pool == copies
            and 0 <= report.pg < len(groups)
            and report.changed == groups[report.pg].changed
            and report.node in view.same
            and report.incarnation == current.nodes[report.node].incarnation
        ):
            complete.setdefault(report.pg, set()).add(report.node)
    return tuple(
        _next_group(group, targets[pg], copies, view, complete.get(pg, frozenset()))
        for pg, group in enumerate(groups)
    )


def _next_group(
    group: PlacementGroup,
    placed: Sequence[int],
    copies: int,
    view: _View,
    complete: AbstractSet[int],
) -> PlacementGroup:
    whole = [*group.sync, *(n for n in group.joining if n in complete)]
    stay = [n for n in whole if n in view.same] or _last_stand(whole, view)
    # Too few places for all copies (draining, weight 0): who holds the PG goes on holding it.
    targets = [*placed, *(n for n in stay if n not in placed)][: max(copies, len(placed))]
    joining = tuple(n for n in targets if n in view.live and n not in stay)
    away = tuple(n for n in targets if n not in view.live and n not in stay)
    leavers = [n for n in stay if n not in targets]
    if not joining and not away:
        leavers = []
    sync = (*(n for n in targets if n in stay), *leavers)
    following = PlacementGroup(group.changed, sync, joining, away)
    if _roles(following) == _roles(group):
        following = group
    members = following.members
    if set(members) != set(group.members) or not view.renewed.isdisjoint(members):
        following = replace(following, changed=view.epoch)
    return following


def _roles(group: PlacementGroup) -> tuple[set[int], set[int], set[int]]:
    return set(group.sync), set(group.joining), set(group.away)


def _last_stand(whole: Sequence[int], view: _View) -> list[int]:
    """All that hold the PG failed at once: keep one that is already back, or all until one is.

    To choose one that is down would be to wait for it, though it may be the one that never returns.
    """
    back = [n for n in whole if n in view.live]
    return back[:1] or list(whole)


def _targets(
    candidates: Mapping[int, Candidate], copies: int, previous: Sequence[tuple[int, ...]]
) -> Sequence[tuple[int, ...]]:
    return _placed(tuple(sorted(candidates.items())), copies, tuple(previous))


@lru_cache(maxsize=16)
def _placed(
    candidates: tuple[tuple[int, Candidate], ...],
    copies: int,
    previous: tuple[tuple[int, ...], ...],
) -> Sequence[tuple[int, ...]]:
    # The same question is asked twice a second; with many nodes the answer takes a while.
    return place(dict(candidates), copies, len(previous), previous)
