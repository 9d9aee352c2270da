"""The metrics of a storage daemon (docs/monitoring.md lists them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.exposition import family, labels, traffic_metrics
from sheepfs.core.traffic import Traffic

_COUNTERS = {
    "corrupt_blocks": "Blocks of this disk whose checksum did not match.",
    "repaired_blocks": "Blocks repaired from a peer.",
    "restored_objects": "Objects that were missing here and came back from a peer.",
    "laundered_objects": "Objects taken as they were after an unclean stop: no peer knew better.",
    "pulled_objects": "Objects brought level with a peer's.",
    "pulled_bytes": "Bytes that this took.",
}
_GAUGES = {
    "leader": ("leader", "1 on the daemon that leads the cluster."),
    "epoch": ("epoch", "Epoch of the newest cluster map that this daemon has."),
    "objects": ("objects", "Objects on this disk."),
    "used": ("used_bytes", "Bytes that objects take."),
    "free": ("free_bytes", "Bytes free on the disk."),
    "total": ("size_bytes", "Bytes of the disk's file system."),
    "quarantined": ("quarantined_objects", "Objects in quarantine."),
    "suspects": ("suspect_objects", "Objects to be compared with a peer's before they are used."),
    "joining": ("joining_groups", "Placement groups in which this node catches up."),
    "connections": ("connections", "Open connections of mounts, tools and peers."),
    "held_bytes": ("held_bytes", "Memory held for replies and waiting requests."),
}
"""STATUS field -> metric, what it is."""


def node_metrics(
    status: Mapping[str, Any], traffic: Traffic, stalled: int, cluster_map: ClusterMap
) -> Iterator[str]:
    """Give a daemon's metrics in pieces.

    Args:
        status: what STATUS tells.
        stalled: VDIs that connected mounts say cannot go on.
    """
    info = labels(node=status["node"], zone=status["zone"], version=status["version"])
    yield from family("sheepfs_node_info", "gauge", "1; its labels tell who this is.", [(info, 1)])
    yield from traffic_metrics("sheepfs_node", "this node", [("", traffic)])
    for field, about in _COUNTERS.items():
        yield from family(f"sheepfs_node_{field}_total", "counter", about, [("", status[field])])
    for field, (name, about) in _GAUGES.items():
        yield from family(f"sheepfs_node_{name}", "gauge", about, [("", int(status[field]))])
    yield from family(
        "sheepfs_node_stalled_vdis", "gauge", "VDIs that mounts connected here cannot go on with.",
        [("", stalled)],
    )  # fmt: skip
    yield from cluster_metrics(cluster_map)


def cluster_metrics(cluster_map: ClusterMap) -> Iterator[str]:
    """Give what the map tells; every daemon that is up to date says the same."""
    states = Counter(node.state for node in cluster_map.nodes.values())
    yield from family(
        "sheepfs_cluster_nodes", "gauge", "Nodes of the cluster by state.",
        [(labels(state=state.value), states[state]) for state in NodeState],
    )  # fmt: skip
    down = {n.id for n in cluster_map.nodes.values() if n.state is NodeState.DOWN}
    good: Counter[tuple[int, int]] = Counter()
    stopped: Counter[int] = Counter()
    joining: Counter[int] = Counter()
    for copies, groups in cluster_map.pools.items():
        needed = cluster_map.needed(copies)
        for group in groups:
            up = sum(node not in down for node in group.sync)
            good[copies, up] += 1
            stopped[copies] += up < needed
            joining[copies] += bool(group.joining)
    yield from family(
        "sheepfs_cluster_groups", "gauge", "Placement groups by pool and number of good copies.",
        [
            (labels(copies=copies, good=up), good[copies, up])
            for copies in sorted(cluster_map.pools)
            for up in sorted({*range(copies + 1), *(u for c, u in good if c == copies)})
        ],
    )  # fmt: skip
    for name, about, counts in (
        ("stopped", "Placement groups that take no writes.", stopped),
        ("joining", "Placement groups in which a member catches up.", joining),
    ):
        yield from family(
            f"sheepfs_cluster_groups_{name}", "gauge", about,
            [(labels(copies=copies), counts[copies]) for copies in sorted(cluster_map.pools)],
        )  # fmt: skip
