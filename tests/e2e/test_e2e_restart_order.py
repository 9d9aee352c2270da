"""Nodes go one after the other and come back in any order: who missed writes never serves alone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from e2e.cluster import Mounted, missing_for_mount, run
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import wait_for

BLOCK = 4096
SERVED_S = 10.0
ORDERS = {
    count: [(down, up) for down in permutations(nodes) for up in permutations(nodes)]
    for count, nodes in ((2, (1, 2)), (3, (1, 2, 3)))
}


@pytest.fixture(params=ORDERS, ids=["two nodes", "three nodes"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    if reason := missing_for_mount():
        pytest.skip(reason)
    mounted = Mounted(LocalCluster(tmp_path / "data", request.param), tmp_path / "mnt")
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.cluster.destroy()


def test_only_who_has_all_writes_serves_whatever_the_order(
    cluster: Mounted, tmp_path: Path, soak: bool
) -> None:
    cluster.cluster.sheepctl("node", "patience", "--longest", "0")
    nodes = tuple(cluster.cluster.nodes)
    orders = ORDERS[len(nodes)]
    orders = orders if soak else orders[::3][:2]
    path = cluster.create("vm", "8M", copies=len(nodes))
    for turn, (down, up) in enumerate(orders):
        write(path, tmp_path, turn, 0)
        first, *others = down
        kill(cluster, first)
        write(path, tmp_path, turn, 1)  # The first one to go misses this.
        for number in others:
            kill(cluster, number)
        reader = subprocess.Popen(
            ["dd", f"if={path}", f"bs={BLOCK}", "count=1", "iflag=direct"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            last = others[-1]
            for number in up:
                cluster.cluster.start_node(number)
                if number == last:
                    break
                wait_for(
                    lambda number=number: cluster.state_of(number) != "down",  # type: ignore[misc]
                    SERVED_S,
                    f"node {number} to be back",
                )
                assert reader.poll() is None, f"{down} went, {number} of {up} serves"
                assert cluster.status()["verdict"] == "down"
            found, _ = reader.communicate(timeout=SERVED_S)
            assert found == block(turn, 1), f"{down} went, {up} came"
        finally:
            reader.kill()
            reader.wait()
        for number in nodes:
            cluster.cluster.start_node(number)
        cluster.wait_healthy()
    cluster.assert_replicas_agree("vm")


def block(turn: int, part: int) -> bytes:
    return bytes([1 + turn, part]) * (BLOCK // 2)


def write(path: Path, scratch: Path, turn: int, part: int) -> None:
    data = scratch / "block"
    data.write_bytes(block(turn, part))
    run("dd", f"if={data}", f"of={path}", f"bs={BLOCK}", "conv=notrunc,fsync", "oflag=direct")


def kill(cluster: Mounted, number: int) -> None:
    """Kill a node, and wait until the others know; whether the last one is gone, nobody can."""
    cluster.cluster.nodes[number].kill()
    if any(node.pid is not None for node in cluster.cluster.nodes.values()):
        wait_for(
            lambda: cluster.state_of(number) == "down", SERVED_S, f"node {number} to be missed"
        )
