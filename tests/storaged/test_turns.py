"""Removing many objects on a slow file system: requests have their turn meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticNode, static_cluster
from sheepfs.core.geometry import data_object, make_layer, pg_of
from storaged.space import leftovers, removal
from storaged.space.leftovers import Leftovers
from storaged.space.removal import Removal

LAYER = make_layer(2, 2, 2)
COUNT = 20
OFTEN = COUNT // 2 - 1
"""Two tasks that are ready have their turns in any order: after every second object, at least."""


def fill(nodes: list[StaticNode]) -> None:
    for node in nodes:
        for index in range(COUNT):
            oid = data_object(LAYER, index)
            node.store.mark([oid])
            node.store.write(oid, 0, b"a" * 4096, 5, create=True, pool=2, pg=pg_of(oid, PG_COUNT))


async def turns_during(
    node: StaticNode, slow_s: float, monkeypatch: pytest.MonkeyPatch, remove: Callable[[], object]
) -> int:
    """Give after how many of the objects another task had its turn; each takes `slow_s`."""
    delete = node.store.delete
    taken = 0
    turns: set[int] = set()

    def slowly(oid: int) -> None:
        nonlocal taken
        time.sleep(slow_s)
        taken += 1
        delete(oid)

    async def other() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            turns.add(taken)

    monkeypatch.setattr(node.store, "delete", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await remove()  # type: ignore[misc]
        nursery.cancel_scope.cancel()
    assert taken == COUNT
    return len(turns - {0, COUNT})


@pytest.mark.parametrize("slow", [False, True])
async def test_reclaim_gives_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(removal, "BATCH", COUNT)
    monkeypatch.setattr(removal, "SLICE_S", 0.002 if slow else 60.0)
    async with static_cluster(tmp_path, copies=2) as (cluster, _), trio.open_nursery() as nursery:
        node = cluster.nodes[1]
        fill([node])
        remove = Removal(node.replica, nursery)
        ran = await turns_during(node, 0.003, monkeypatch, lambda: remove.remove(LAYER, [], False))
        assert ran >= OFTEN if slow else not ran


@pytest.mark.parametrize("slow", [False, True])
async def test_what_has_moved_away_gives_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(leftovers, "BATCH", COUNT)
    monkeypatch.setattr(leftovers, "SLICE_S", 0.002 if slow else 60.0)
    async with static_cluster(tmp_path, nodes=3, copies=2) as (cluster, _):
        fill(list(cluster.nodes.values()))
        cluster.publish([2, 3])
        node = cluster.nodes[1]
        with trio.fail_after(5):
            while len(node.router.links) < 2:
                await trio.sleep(0.005)
        ran = await turns_during(
            node, 0.003, monkeypatch, Leftovers(node.replica, node.router).look
        )
        # Without that, between two groups.
        assert ran >= OFTEN if slow else ran < PG_COUNT
