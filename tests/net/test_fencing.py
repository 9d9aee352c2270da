"""Who takes a VDI over knows the newest map: a node that is out of it, and alive, has old data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.errors import UnreachableError
from sheepfs.core.wire import Op
from sheepfs.net.fencing import FENCE_TIMEOUT_S, fence_everywhere
from sheepfs.net.router import Router


def cluster_map(epoch: int, *nodes: int) -> ClusterMap:
    """A map with one group, which these nodes have."""
    rows = {n: Node(n, NodeState.ACTIVE, f"host-{n}", 1, f"zone-{n}", 1.0) for n in nodes}
    return ClusterMap(epoch, "cluster", rows, {2: (PlacementGroup(epoch, nodes),)})


class Links:
    """Links to all nodes, which note who was fenced."""

    def __init__(self, fenced: list[int]) -> None:
        self.fenced = fenced
        self.on_fence: Callable[[int], None] = lambda node: None

    def link(self, node: int) -> Any:
        links = self

        class Link:
            incarnation = 1

            def __init__(self) -> None:
                self.node = node

            async def call(self, op: Op, **fields: Any) -> None:
                await trio.sleep(0.1)
                assert op is Op.FENCE
                links.fenced.append(node)
                links.on_fence(node)

        return Link()


def routed(
    first: ClusterMap, fetch: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Router, Links]:
    router = Router("cluster", fetch)
    router.take_map(first)
    links = Links([])
    monkeypatch.setattr(router, "link", links.link)
    return router, links


async def test_what_the_map_became_while_nodes_were_fenced_counts(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    current = cluster_map(3, 1, 2)

    async def fetch() -> ClusterMap:
        await trio.sleep(0.1)
        return current

    def moved(node: int) -> None:
        """The group has moved to a node that nobody has fenced, and the old holder wrote there."""
        nonlocal current
        current = cluster_map(4, 2, 3)

    router, links = routed(cluster_map(3, 1, 2), fetch, monkeypatch)
    links.on_fence = moved
    await fence_everywhere(router, 7, 5)
    assert router.map.epoch == 4
    assert sorted(links.fenced) == [1, 2, 3]


async def test_without_the_newest_map_no_vdi_is_taken(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def fetch() -> ClusterMap:
        await trio.sleep(0.1)
        raise UnreachableError("etcd does not answer")

    router, _ = routed(cluster_map(3, 1, 2), fetch, monkeypatch)
    began = trio.current_time()
    with pytest.raises(UnreachableError, match="etcd does not tell the cluster map"):
        await fence_everywhere(router, 7, 5)
    assert trio.current_time() - began == pytest.approx(FENCE_TIMEOUT_S)


async def test_an_outage_of_etcd_that_ends_soon_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    answers = [UnreachableError("etcd does not answer"), cluster_map(3, 1, 2)]

    async def fetch() -> ClusterMap:
        await trio.sleep(0.1)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast(ClusterMap, answer)

    router, links = routed(cluster_map(3, 1, 2), fetch, monkeypatch)
    await fence_everywhere(router, 7, 5)
    assert sorted(links.fenced) == [1, 2]
