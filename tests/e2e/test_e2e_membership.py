"""Nodes that leave for good: emptied and removed in order, or lost with what only they had."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted, missing_for_mount, run
from sheepfs.core.geometry import OBJECT_SIZE, is_map_object
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import wait_for

GROUPS = 24
"""Few, so that draining takes seconds: what a move takes is a few rounds, however small it is."""


@pytest.fixture
def cluster_of(tmp_path: Path) -> Iterator[Callable[[int], Mounted]]:
    if reason := missing_for_mount():
        pytest.skip(reason)
    started: list[LocalCluster] = []

    def start(nodes: int) -> Mounted:
        cluster = LocalCluster(tmp_path / "data", node_count=nodes)
        cluster.node_options = [f"--pgs={GROUPS}"]
        started.append(cluster)
        mounted = Mounted(cluster, tmp_path / "mnt")
        mounted.start()
        return mounted

    yield start
    for cluster in started:
        cluster.destroy()


def told(mounted: Mounted, *arguments: str, code: int = 0) -> Any:
    """Run sheepctl; gives its JSON, or what it says on stderr if it failed."""
    done = mounted.cluster.sheepctl(*arguments, "--json", check=False, timeout_s=120)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


class Writer(threading.Thread):
    """Writes 64 KiB here and there, and remembers what must be there."""

    def __init__(self, path: Path, blocks: int) -> None:
        super().__init__()
        self.expected = [0] * blocks
        self.turns = 0
        self.failure: OSError | None = None
        self._fd = os.open(path, os.O_RDWR)
        self._end = threading.Event()

    def run(self) -> None:
        try:
            while not self._end.is_set():
                self.turns += 1
                block = self.turns * 7919 % len(self.expected)
                os.pwrite(self._fd, bytes([self.turns % 255 + 1]) * 65536, block * 65536)
                self.expected[block] = self.turns % 255 + 1
            os.fsync(self._fd)
        except OSError as error:
            self.failure = error

    def stop(self) -> None:
        self._end.set()
        self.join()
        os.close(self._fd)
        if self.failure is not None:
            raise self.failure


def test_a_node_is_drained_under_writes_removed_and_never_comes_back(
    cluster_of: Callable[[int], Mounted],
) -> None:
    mounted = cluster_of(4)
    path = mounted.create("busy", "64M")
    writer = Writer(path, 1024)
    writer.start()
    try:
        assert "is up, and" in told(mounted, "node", "remove", "4", code=1)
        drained = told(mounted, "node", "drain", "4", "--wait")
        assert drained == {
            "nodes": [{"node": 4, "draining": True, "groups_left": 0}],
            "problem": None,
        }
        turns = writer.turns
        told(mounted, "node", "remove", "4")
        daemon = mounted.cluster.nodes[4]
        wait_for(lambda: daemon.pid is None, 10, "the removed daemon to end")
        wait_for(lambda: writer.turns > turns, 10, "writes to go on")
    finally:
        writer.stop()
    data = path.read_bytes()
    for block, value in enumerate(writer.expected):
        assert data[block * 65536 : (block + 1) * 65536] == bytes([value]) * 65536, block
    status = mounted.status()
    assert [node["node"] for node in status["nodes"]] == [1, 2, 3]
    assert status["verdict"] == "ok", status["reasons"]

    def clean() -> bool:
        done = mounted.cluster.sheepctl("cluster", "check", "--json", check=False)
        return done.returncode == 0

    wait_for(clean, 30, "maps and objects to agree, and moved groups' copies to be gone")
    refused = run(*daemon.argv, check=False)
    assert "node 4 was removed from the cluster" in refused
    assert told(mounted, "node", "remove", "4", code=2).endswith("node 4 was removed already\n")


def pair_without_the_map(mounted: Mounted) -> tuple[int, int]:
    """Give two nodes that alone have some data objects, but not the map."""
    where = {
        int(oid, 16): tuple(
            n
            for n in mounted.cluster.nodes
            if any(file.is_relative_to(mounted.cluster.node_directory(n)) for file in files)
        )
        for oid, files in mounted.object_files().items()
    }
    maps = {nodes for oid, nodes in where.items() if is_map_object(oid)}
    return max(pair for oid, pair in where.items() if not is_map_object(oid) and pair not in maps)  # type: ignore[return-value]


def test_what_is_lost_with_its_nodes_is_an_error_and_all_else_is_there(
    cluster_of: Callable[[int], Mounted],
) -> None:
    mounted = cluster_of(3)
    path = mounted.create("half", "64M", copies=2)
    objects = 16
    with path.open("r+b", buffering=0) as file:
        for index in range(objects):
            file.write(bytes([index + 1]) * OBJECT_SIZE)
        os.fsync(file.fileno())
    mounted.cluster.unmount(mounted.path)
    wiped, away = pair_without_the_map(mounted)
    for number in (wiped, away):
        mounted.cluster.nodes[number].kill()
    shutil.rmtree(mounted.cluster.node_directory(wiped))
    mounted.cluster.start_node(wiped)

    def both_missed() -> bool:
        states = {n["node"]: n["state"] for n in mounted.status()["nodes"]}
        return states.get(wiped) == states.get(away) == "down" and 4 in states

    wait_for(both_missed, 20, "the nodes to be missed")
    shown = told(mounted, "cluster", "recover", code=1)
    assert shown["done"] is False
    waited_for = {node for group in shown["survivors"] for node in group["waits_for"]}
    assert waited_for <= {wiped, away}
    damage = shown["damage"]["VDI half.raw"]
    lost = damage["lost"]
    assert 0 < lost < objects
    assert damage["maps_lost"] == damage["maps_old"] == 0
    assert "add --yes" in told(mounted, "cluster", "recover", "--accept-loss", code=2)
    needed = str(min(waited_for))
    assert "groups wait for it" in told(mounted, "node", "remove", needed, code=1)
    done = told(mounted, "cluster", "recover", "--accept-loss", "--yes")
    assert done["done"] is True
    assert told(mounted, "cluster", "recover")["survivors"] == []
    told(mounted, "node", "remove", str(wiped))

    def bad_objects() -> list[int]:
        bad = []
        with path.open("rb", buffering=0) as file:
            for index in range(objects):
                try:
                    data = os.pread(file.fileno(), OBJECT_SIZE, index * OBJECT_SIZE)
                except OSError:
                    bad.append(index)
                else:
                    assert data == bytes([index + 1]) * OBJECT_SIZE, f"object {index} is wrong"
        return bad

    mounted.cluster.mount(mounted.path)
    bad = bad_objects()
    assert len(bad) == lost
    check = told(mounted, "cluster", "check", code=1)
    assert len(check["dangling"]) == lost

    # The other one comes back after all: its old copies are kept aside, and never served.
    mounted.cluster.start_node(away)
    mounted.wait_healthy()
    assert bad_objects() == bad
    assert any((mounted.cluster.node_directory(away) / "quarantine").iterdir())
