"""How is the cluster? Pure: from the map and what the nodes say to one verdict with reasons."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs_tools.sheepctl.analysis.recovery_view import node_recoveries, sentence, whole_recovery

LOW_SPACE_SHARE = 0.1
"""A node with less than this share of its disk free is named as a reason."""

Statuses = Mapping[int, Mapping[str, Any] | str]
"""Node -> its STATUS, or why it gave none."""


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """Placement groups of one pool, counted."""

    copies: int
    groups: int
    whole: int
    """As many sync members as copies are asked for (or as there are nodes)."""
    degraded: int
    """Fewer, but writes go on."""
    stopped: int
    """Too few for writes."""
    joining: int
    """Groups in which a member catches up."""


@dataclass(frozen=True, slots=True)
class Health:
    """The verdict: `ok`, `degraded` (all works, some safety is missing) or `down` (writes stop)."""

    verdict: str
    reasons: tuple[str, ...]
    pools: tuple[PoolHealth, ...]
    corrupt_blocks: int
    repaired_blocks: int
    restored_objects: int
    suspects: int
    stalled: tuple[str, ...]
    total_bytes: int
    free_bytes: int


def pool_health(cluster_map: ClusterMap, copies: int) -> PoolHealth:
    """Count one pool's placement groups; members that vanished all at once are still in `sync`."""
    groups = cluster_map.pools[copies]
    wanted = min(copies, len(cluster_map.nodes))
    down = {n.id for n in cluster_map.nodes.values() if n.state is NodeState.DOWN}
    up = [sum(node not in down for node in group.sync) for group in groups]
    stopped = sum(count < cluster_map.needed(copies) for count in up)
    whole = sum(count >= wanted for count in up)
    return PoolHealth(
        copies,
        len(groups),
        whole,
        len(groups) - whole - stopped,
        stopped,
        sum(bool(group.joining) for group in groups),
    )


def assess(cluster_map: ClusterMap, statuses: Statuses) -> Health:
    """Give the verdict; the most urgent reasons come first."""
    pools = tuple(pool_health(cluster_map, copies) for copies in sorted(cluster_map.pools))
    answers = [status for status in statuses.values() if not isinstance(status, str)]
    corrupt, repaired = _sum(answers, "corrupt_blocks"), _sum(answers, "repaired_blocks")
    stalled = tuple(sorted({str(item) for a in answers for item in a.get("stalled") or ()}))
    down = _what_stops(cluster_map, pools, bool(answers))
    reasons = [f"a volume waits: {item}" for item in stalled]
    for node in cluster_map.nodes.values():
        reasons += _node_reasons(node, statuses.get(node.id, "not asked"))
    for pool in pools:
        reasons += _pool_reasons(pool, len(cluster_map.nodes))
    if (recovery := whole_recovery(node_recoveries(statuses))) is not None:
        reasons.append(sentence(recovery))
    if corrupt > repaired:
        reasons.append(f"{corrupt - repaired} corrupt blocks were found and not repaired yet")
    unrepairable = sum(int((a.get("scrub") or {}).get("unrepairable") or 0) for a in answers)
    if unrepairable:
        reasons.append(
            f"{unrepairable} damaged or differing replicas cannot be repaired:"
            " sheepctl scrub status"
        )
    return Health(
        "down" if down else "degraded" if reasons else "ok",
        (*down, *reasons),
        pools,
        corrupt,
        repaired,
        _sum(answers, "restored_objects"),
        _sum(answers, "suspects"),
        stalled,
        _sum(answers, "total"),
        _sum(answers, "free"),
    )


def held_until(node: Node) -> float:
    """Give until when a node that comes and goes is not let in; 0: it may come at any time."""
    return (
        node.held_until if node.state is NodeState.DOWN and node.held_until > time.time() else 0.0
    )


def _sum(answers: list[Mapping[str, Any]], key: str) -> int:
    return sum(int(answer.get(key) or 0) for answer in answers)


def _what_stops(
    cluster_map: ClusterMap, pools: tuple[PoolHealth, ...], is_answered: bool
) -> list[str]:
    stopped = [
        f"{pool.stopped} of {pool.groups} groups of the pool of {pool.copies} copies"
        " take no writes: too few of their nodes are up"
        for pool in pools
        if pool.stopped
    ]
    if not cluster_map.nodes:
        return ["no storage daemon has joined yet: start sheepfs-storaged DATA_DIR", *stopped]
    if not is_answered:
        return ["no storage daemon answers: are they running, can they be reached?", *stopped]
    return stopped


def _pool_reasons(pool: PoolHealth, nodes: int) -> list[str]:
    reasons = []
    if pool.degraded:
        reasons.append(
            f"{pool.degraded} of {pool.groups} groups of the pool of {pool.copies} copies"
            " have fewer good copies than they should"
        )
    if pool.joining:
        reasons.append(
            f"{pool.joining} of {pool.groups} groups of the pool of {pool.copies} copies"
            " are catching up"
        )
    if nodes and pool.copies > nodes:
        reasons.append(
            f"{pool.copies} copies are asked for, but there are {nodes} nodes: add nodes"
        )
    return reasons


def _node_reasons(node: Node, status: Mapping[str, Any] | str) -> list[str]:
    if node.state is NodeState.DOWN:
        down = f"node {node.id} at {node.address} is down"
        if held_until(node):
            down += f", and held out for a while as it came back {node.returns} times"
        return [down]
    if isinstance(status, str):
        return [f"node {node.id} at {node.address} does not answer: {status}"]
    reasons = []
    if node.state is not NodeState.ACTIVE:
        reasons.append(f"node {node.id} is {node.state}")
    total, free = int(status.get("total") or 0), int(status.get("free") or 0)
    if total and free < total * LOW_SPACE_SHARE:
        reasons.append(f"node {node.id} is nearly full: {free * 100 // total} % free")
    return reasons
