"""The links that a router keeps to the nodes of the map."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fakes.static_cluster import static_cluster
from fakes.waiting import wait_until
from sheepfs.core.clustermap import Node, NodeState
from sheepfs.net import router as module


async def test_a_dead_node_at_the_address_of_a_live_one_does_not_break_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk was replaced: the daemon of the same host and port is another node now."""
    monkeypatch.setattr(module, "RECONNECT_MIN_S", 0.005)
    monkeypatch.setattr(module, "RECONNECT_MAX_S", 0.005)
    seen: list[int] = []
    is_replaced = module.Router._is_replaced

    def looked_at(router: module.Router, node: Node) -> bool:
        seen.append(node.id)
        return is_replaced(router, node)

    monkeypatch.setattr(module.Router, "_is_replaced", looked_at)
    async with static_cluster(tmp_path) as (cluster, router):
        link = router.link(3)
        dead = dataclasses.replace(
            cluster.map.nodes[3], id=2, state=NodeState.DOWN, incarnation=1 << 40
        )
        router.take_map(cluster.map.with_changes(nodes={**cluster.map.nodes, 2: dead}))
        seen.clear()
        await wait_until(lambda: seen.count(2) > 5)
        assert router.link(3) is link
