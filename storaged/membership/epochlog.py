"""What a new epoch brings, told in the log of the leader that made it: one line for each event."""

from __future__ import annotations

import logging

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.logs import fields
from storaged.membership.seen import Seen

log = logging.getLogger(__name__)


def log_changes(before: ClusterMap, after: ClusterMap) -> None:
    """Log a new epoch: a line for each node that changed, one for the groups if they did."""
    epoch = after.epoch
    for node in after.nodes.values():
        known = before.nodes.get(node.id)
        if known is None or (known.state, known.incarnation) != (node.state, node.incarnation):
            log.info(
                "epoch %d: node %d at %s is %s%s", epoch, node.id, node.address, node.state.value,
                _held_out(node),
                extra=fields(event="node", epoch=epoch, node=node.id, state=node.state.value),
            )  # fmt: skip
    for gone in before.nodes.keys() - after.nodes.keys():
        log.info(
            "epoch %d: node %d is removed", epoch, gone,
            extra=fields(event="node", epoch=epoch, node=gone, state="removed"),
        )  # fmt: skip
    for copies in after.pools:
        counts = _count_groups(after, copies)
        if copies not in before.pools or counts != _count_groups(before, copies):
            log.info(
                "epoch %d: groups of %d copies", epoch, copies,
                extra=fields(event="groups", epoch=epoch, copies=copies, **counts),
            )  # fmt: skip


def log_losses(seen: Seen, after: ClusterMap) -> None:
    """Log which groups go on without what some nodes had, since an operator said so."""
    for (pool, pg), (node, _) in (seen.accepted.chosen() if seen.accepted else {}).items():
        groups = seen.map.pools.get(pool, ())
        if pg < len(groups) and node in after.pools[pool][pg].sync and node not in groups[pg].sync:
            log.warning(
                "group %d of pool %d goes on with what node %d has, on an operator's word:"
                " nodes %s are not waited for",
                pg, pool, node, ", ".join(map(str, groups[pg].sync)),
            )  # fmt: skip


def _held_out(node: Node) -> str:
    if node.held_until <= node.down_since:
        return ""
    return (
        f", and held out for {node.held_until - node.down_since:.0f} s:"
        f" it came back {node.returns} times within a short time"
    )


def _count_groups(cluster_map: ClusterMap, copies: int) -> dict[str, int]:
    """Count groups that take no writes, that have fewer good copies than asked for, and so on."""
    down = {n.id for n in cluster_map.nodes.values() if n.state is NodeState.DOWN}
    groups = cluster_map.pools[copies]
    good = [sum(node not in down for node in group.sync) for group in groups]
    stopped = sum(count < cluster_map.needed(copies) for count in good)
    whole = sum(count >= copies for count in good)
    return {
        "whole": whole,
        "degraded": len(groups) - whole - stopped,
        "stopped": stopped,
        "joining": sum(bool(group.joining) for group in groups),
    }
