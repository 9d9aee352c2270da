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
  targets can be read back from the map, and a new leader goes on with every move that has begun.
  Moves that have not are nowhere (storaged.logic.moves): they are planned anew each time, from
  rows in which those that have begun count as done.
- A group that goes on with nobody who had everything in memory says so (`lost`): holders of VDIs
  that missed some maps in between learn of it all the same.
- Only an operator's word makes a group go on without all that hold it (I8), and only while none of
  these is back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.metadata import AcceptedLoss, AliveRecord, Patience
from sheepfs.core.placement import Candidate, place
from storaged.logic.flapping import held_out
from storaged.logic.moves import Move, to_begin
from storaged.logic.nodes import Wishes, admitted, next_nodes, without_removed

OUT_AFTER_S = 600.0
"""A node down for longer is given up: its share is rebuilt elsewhere."""

DEFAULT_PATIENCE = Patience()

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
    """Nodes that run, can be reached, and are let in."""
    same: AbstractSet[int]
    """Those of them that are the incarnation of the current map."""
    renewed: AbstractSet[int]
    """Nodes whose incarnation differs from the current map's."""
    candidates: Mapping[int, Candidate]
    """Nodes that may be given data: neither draining nor down for too long."""
    removed: AbstractSet[int]
    """Nodes that are to go even if there are fewer copies then."""


@dataclass(frozen=True, slots=True)
class _Standing:
    """A group as it stands, before it is decided who joins it."""

    group: PlacementGroup
    stay: Sequence[int]
    """Nodes that have everything and go on as `sync`."""
    row: Sequence[int]
    """Nodes to go on with if nothing new begins, those to keep first."""
    targets: Sequence[int]
    """Where the group should be."""
    is_to_move: bool
    """It lacks no copy, but should have some elsewhere."""
    is_at_rest: bool
    """Nobody is to catch up or expected back, and all that hold it are up."""
    is_cut: bool
    """It goes on, and nobody is left who had everything in memory."""


def decide(
    current: ClusterMap,
    alive: Mapping[int, AliveRecord],
    unreachable: AbstractSet[tuple[int, int]],
    pools_wanted: Collection[int],
    pg_count: int,
    joined: Collection[Joined],
    now: float,
    out_after_s: float = OUT_AFTER_S,
    wishes: Wishes | None = None,
    accepted: AcceptedLoss | None = None,
    patience: Patience = DEFAULT_PATIENCE,
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
        wishes: what operators want of nodes.
        accepted: the operator's word on groups whose nodes won't come back; counts at most once.
        patience: with nodes that come and go.
    """
    wishes = wishes or {}
    reached = {
        node: record
        for node, record in admitted(current, alive, wishes).items()
        if (node, record.incarnation) not in unreachable
    }
    held = held_out(current, reached, now, patience)
    live = {node: record for node, record in reached.items() if node not in held}
    nodes = next_nodes(current.nodes, live, wishes, now, patience)
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
            if not (n in wishes and wishes[n].leaves)
            and not (node.state is NodeState.DOWN and _given_up(node, live, now, out_after_s))
        },
        removed={n for n, wish in wishes.items() if wish.removed},
    )
    pools = _next_pools(current, view, joined, _words(current, live, accepted))
    for copies in sorted(set(pools_wanted) - pools.keys()):
        if live:
            pools[copies] = _new_groups(copies, pg_count, view)
    pools = dict(sorted(pools.items()))
    nodes = _with_activity(nodes, pools)
    named = {n for groups in pools.values() for g in groups for n in (*g.members, *g.away)}
    nodes = without_removed(nodes, wishes, named)
    if nodes == current.nodes and pools == current.pools:
        return None
    return current.with_changes(nodes, pools)


def as_in_map(cluster_map: ClusterMap) -> dict[int, AliveRecord]:
    """Give the map's nodes the benefit of the doubt: the records they would have if all ran on."""
    return {
        node.id: AliveRecord(node.id, node.incarnation, node.address, node.zone, node.weight)
        for node in cluster_map.nodes.values()
        if node.state is not NodeState.DOWN
    }


def _runs_on(known: Node | None, record: AliveRecord) -> bool:
    return known is not None and known.incarnation == record.incarnation


def _given_up(node: Node, live: Mapping[int, AliveRecord], now: float, out_after_s: float) -> bool:
    # A later node at its address has a new disk in place of this one's: it won't come back.
    is_replaced = any(r.address == node.address and r.id > node.id for r in live.values())
    return is_replaced or node.weight <= 0 or now - node.down_since > out_after_s


def _words(
    current: ClusterMap, live: Mapping[int, AliveRecord], accepted: AcceptedLoss | None
) -> dict[tuple[int, int], int]:
    """Give (pool, pg) -> the node that has all there is from now on, where the word counts."""
    words = {}
    for (pool, pg), (node, run) in (accepted.chosen() if accepted else {}).items():
        groups = current.pools.get(pool, ())
        if (
            accepted is not None
            and 0 <= pg < len(groups)
            and groups[pg].changed <= accepted.epoch
            and live.keys().isdisjoint(groups[pg].sync)
            and node in live
            and live[node].incarnation == run
        ):
            words[pool, pg] = node
    return words


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


def _next_pools(
    current: ClusterMap,
    view: _View,
    joined: Collection[Joined],
    words: Mapping[tuple[int, int], int],
) -> dict[int, Groups]:
    """Give all groups of the pools that there are."""
    standings: dict[int, list[_Standing]] = {}
    pending = []
    under_way = []
    for copies, groups in current.pools.items():
        complete = _complete(current, copies, view, joined)
        standings[copies] = _standings(groups, copies, view, complete, words)
        for pg, standing in enumerate(standings[copies]):
            if standing.is_to_move and standing.is_at_rest:
                nodes = frozenset((*standing.stay, *standing.targets))
                empties = not view.candidates.keys() >= set(standing.stay)
                pending.append(Move(copies, pg, nodes, empties))
            else:
                aims = _aims(standing, copies, False)
                if any(n in view.live and n not in standing.stay for n in aims):
                    under_way.append({*standing.stay, *aims})
    begun = to_begin(pending, under_way)
    return {
        copies: tuple(
            _next_group(standing, _aims(standing, copies, (copies, pg) in begun), copies, view)
            for pg, standing in enumerate(row)
        )
        for copies, row in standings.items()
    }


def _aims(standing: _Standing, copies: int, begins: bool) -> Sequence[int]:
    """Give the nodes that the group goes for now."""
    if begins or not standing.is_to_move:
        return standing.targets
    return standing.row[:copies]


def _complete(
    current: ClusterMap, copies: int, view: _View, joined: Collection[Joined]
) -> dict[int, set[int]]:
    """Give pg -> the members whose reports make them `sync`."""
    groups = current.pools[copies]
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
    return complete


def _standings(
    groups: Groups,
    copies: int,
    view: _View,
    complete: Mapping[int, AbstractSet[int]],
    words: Mapping[tuple[int, int], int],
) -> list[_Standing]:
    rows = []
    stays = []
    cuts = []
    for pg, group in enumerate(groups):
        done = complete.get(pg, frozenset())
        whole = [*group.sync, *(n for n in group.joining if n in done)]
        unbroken = [n for n in whole if n in view.same]
        stay = unbroken or _last_stand(whole, view)
        is_cut = not unbroken and not view.live.isdisjoint(stay)
        if (copies, pg) in words:
            stay, is_cut = [words[copies, pg]], True
        cuts.append(is_cut)
        known = dict.fromkeys((*group.joining, *group.away, *group.sync, *stay))
        # The last stand's nodes may be given up long ago: that the group waits for them is no
        # copy that it has.
        there = [n for n in known if n in view.candidates or (n in stay and n in view.live)]
        stays.append(stay)
        rows.append(there)
    targets = _targets(view.candidates, copies, rows)
    return [
        _Standing(
            group,
            stay,
            row,
            aims,
            is_to_move=len(row) >= len(aims) and not set(aims) <= set(row),
            is_at_rest=view.live >= set(stay) >= set(row),
            is_cut=is_cut,
        )
        for group, stay, row, aims, is_cut in zip(groups, stays, rows, targets, cuts, strict=True)
    ]


def _next_group(
    standing: _Standing, placed: Sequence[int], copies: int, view: _View
) -> PlacementGroup:
    group, stay = standing.group, standing.stay
    # Too few places for all copies (draining, weight 0): who holds the PG goes on holding it.
    extra = [n for n in stay if n not in placed and not (placed and n in view.removed)]
    targets = [*placed, *extra][: max(copies, len(placed))]
    joining = tuple(n for n in targets if n in view.live and n not in stay)
    away = tuple(n for n in targets if n not in view.live and n not in stay)
    leavers = [n for n in stay if n not in targets]
    if not joining and not away:
        leavers = []
    sync = (*(n for n in targets if n in stay), *leavers)
    following = PlacementGroup(group.changed, sync, joining, away, group.lost)
    if _roles(following) == _roles(group):
        following = group
    members = following.members
    if set(members) != set(group.members) or not view.renewed.isdisjoint(members):
        following = replace(following, changed=view.epoch)
    if standing.is_cut:
        following = replace(following, lost=view.epoch)
    return following


def _roles(group: PlacementGroup) -> tuple[set[int], set[int], set[int]]:
    return set(group.sync), set(group.joining), set(group.away)


def leaves_doubtful(current: ClusterMap, gone: Collection[int], doubtful: Collection[int]) -> bool:
    """Tell whether without the nodes that are gone a group would be left to doubtful ones alone.

    If these turn out to be gone too, they would be the last that have everything (I8), though who
    is voted out now has it, and may be back first.
    """
    for groups in current.pools.values():
        for group in groups:
            stay = [node for node in group.sync if node not in gone]
            if stay and len(stay) < len(group.sync) and all(node in doubtful for node in stay):
                return True
    return False


def _last_stand(whole: Sequence[int], view: _View) -> list[int]:
    """All that hold the PG failed at once: keep one that is already back, or all until one is.

    To choose one that is down would be to wait for it, though it may be the one that never returns.
    """
    back = [n for n in whole if n in view.live]
    return back[:1] or list(whole)


def _targets(
    candidates: Mapping[int, Candidate], copies: int, rows: Sequence[Sequence[int]]
) -> Sequence[tuple[int, ...]]:
    # Who comes first matters only where there are too many: sorted, so that a node that goes down
    # for a while changes nothing.
    previous = tuple(tuple(row if len(row) > copies else sorted(row)) for row in rows)
    return _placed(tuple(sorted(candidates.items())), copies, previous)


@lru_cache(maxsize=16)
def _placed(
    candidates: tuple[tuple[int, Candidate], ...],
    copies: int,
    previous: tuple[tuple[int, ...], ...],
) -> Sequence[tuple[int, ...]]:
    # The same question is asked twice a second; with many nodes the answer takes a while.
    return place(dict(candidates), copies, len(previous), previous)
