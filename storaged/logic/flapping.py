"""Nodes that come and go: each time they are held out of the cluster for longer.

Pure; all it needs to remember is in the map, so a new leader judges as the old one did.

Always holds:
- The first few returns cost nothing: an operator restarts a daemon, a host reboots.
- After that a node that was voted out is let in again only some time later, twice as long with
  each return, up to a limit. Once it has stayed for long, all is forgotten.
- A node is never held out while a group waits for it: the last that hold it, or that it needs in
  order to take writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.metadata import AliveRecord, Patience

FIRST_HOLD_S = 5.0
CALM_AFTER_S = 300.0
"""Who stayed for so long has a clean record."""


def hold_s(returns: int, patience: Patience) -> float:
    """Give how long a node stays out that goes after so many returns."""
    if returns < patience.returns:
        return 0.0
    return min(FIRST_HOLD_S * 2.0 ** min(returns - patience.returns, 16), patience.longest_s)


def gone(node: Node, now: float, patience: Patience) -> Node:
    """Give the entry of a node that goes down."""
    returns = 0 if now - node.up_since >= CALM_AFTER_S else node.returns
    hold = hold_s(returns, patience)
    return replace(
        node,
        state=NodeState.DOWN,
        down_since=now,
        returns=returns,
        held_until=now + hold if hold > 0 else 0.0,
    )


def is_held(node: Node, now: float, patience: Patience) -> bool:
    """Tell whether a node that is down may not come back yet.

    A date that no leader can have meant (another host's clock, a setting that has changed) holds
    nobody.
    """
    return now < node.held_until <= now + patience.longest_s


def held_out(
    current: ClusterMap, live: Mapping[int, AliveRecord], now: float, patience: Patience
) -> set[int]:
    """Give those of the running nodes that are not let in now."""
    held = set()
    staying = set()
    for node_id, record in live.items():
        node = current.nodes.get(node_id)
        if node is None:
            continue
        if node.state is NodeState.DOWN:
            if is_held(node, now, patience):
                held.add(node_id)
        elif node.incarnation == record.incarnation:
            staying.add(node_id)
        elif is_held(gone(node, now, patience), now, patience):
            held.add(node_id)
    return held - _needed(current, held, staying) if held else held


def _needed(current: ClusterMap, held: Collection[int], staying: Collection[int]) -> set[int]:
    """Give those that a group cannot do without: too few others hold it."""
    needed: set[int] = set()
    for copies, groups in current.pools.items():
        enough = current.needed(copies)
        for group in groups:
            if sum(node in staying for node in group.sync) < enough:
                needed.update(n for n in (*group.sync, *group.joining, *group.away) if n in held)
    return needed
