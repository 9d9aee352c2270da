"""What becomes of each node's entry in the next map: pure.

Always holds:
- A node that operators removed stays only as long as a group names it; it never comes back.
- What a disk's size says of a node's weight counts only when it changes notably: small changes
  move nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.metadata import AliveRecord, NodeWish, Patience
from storaged.logic.flapping import gone

SAME_WEIGHT = 0.02
"""A weight that differs by less than this share is the same."""

Wishes = Mapping[int, NodeWish]


def admitted(
    current: ClusterMap, alive: Mapping[int, AliveRecord], wishes: Wishes
) -> dict[int, AliveRecord]:
    """Leave out the daemons of nodes that are removed already."""
    return {
        node: record
        for node, record in alive.items()
        if node in current.nodes or not (node in wishes and wishes[node].removed)
    }


def next_nodes(
    known: Mapping[int, Node],
    live: Mapping[int, AliveRecord],
    wishes: Wishes,
    now: float,
    patience: Patience,
) -> dict[int, Node]:
    """Give every node's entry; who is live is ACTIVE or DRAINING, everyone else DOWN."""
    nodes = {}
    for node_id in sorted({*known, *live}):
        wish = wishes.get(node_id, NodeWish(node_id))
        record = live.get(node_id)
        before = known.get(node_id)
        if record is not None:
            node = _live_node(before, record, wish, now, patience)
        else:
            node = known[node_id]
            if node.state is not NodeState.DOWN:
                node = gone(node, now, patience)
            if wish.has_weight:
                node = replace(node, weight=wish.weight)
        # In the map it stays 0 when the node goes down, so that it isn't given data then.
        nodes[node_id] = replace(node, weight=0.0) if wish.leaves else node
    return nodes


def _live_node(
    known: Node | None, record: AliveRecord, wish: NodeWish, now: float, patience: Patience
) -> Node:
    returns, up_since = 0, now
    if known is not None:
        if known.state is not NodeState.DOWN and known.incarnation == record.incarnation:
            returns, up_since = known.returns, known.up_since
        else:
            left = known if known.state is NodeState.DOWN else gone(known, now, patience)
            returns = left.returns + 1
    weight = record.weight
    if wish.has_weight:
        weight = wish.weight
    elif known is not None and abs(known.weight - weight) < SAME_WEIGHT * weight:
        weight = known.weight
    return Node(
        id=record.id,
        state=NodeState.DRAINING if wish.leaves else NodeState.ACTIVE,
        address=record.address,
        incarnation=record.incarnation,
        zone=record.zone,
        weight=weight,
        returns=returns,
        up_since=up_since,
    )


def without_removed(
    nodes: Mapping[int, Node], wishes: Wishes, named: Collection[int]
) -> dict[int, Node]:
    """Drop the nodes that operators removed, but those that groups name."""
    return {
        n: node
        for n, node in nodes.items()
        if n in named or not (n in wishes and wishes[n].removed)
    }
