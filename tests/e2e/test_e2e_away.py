"""A node of five that stays away, and one that comes back: others make up for it, little moves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted, missing_for_mount
from e2e.load import longest_wait_s, verifying
from e2e.test_e2e_kill_under_load import LONGEST_STALL_S
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import wait_for

OBJECT = 4 << 20
BLOCK = 4096
OBJECTS = 24
MARK = b"changed while it was away" + bytes(BLOCK - 25)
PLACE = 77 * BLOCK
"""Where it stands in each second object."""


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    if reason := missing_for_mount():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("five")
    mounted = Mounted(LocalCluster(directory / "data", 5), directory / "mnt")
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.cluster.destroy()


def row_of(mounted: Mounted, number: int) -> dict[str, Any]:
    """Give what the status says of a node."""
    port = f":{mounted.cluster.ports[f'node{number}']}"
    rows = mounted.status()["nodes"]
    return next(row for row in rows if row["address"].endswith(port))


def lacking(mounted: Mounted) -> int:
    """Count the groups that have fewer copies than they should."""
    return sum(pool["groups"] - pool["whole"] for pool in mounted.status()["pools"])


def test_a_node_that_was_away_gets_what_changed_and_nothing_else(five: Mounted, soak: bool) -> None:
    cluster, number = five.cluster, 2
    path = five.create("calm", f"{OBJECTS * 4}M")
    fd = os.open(path, os.O_RDWR)
    try:
        for index in range(OBJECTS):
            os.pwrite(fd, os.urandom(OBJECT), index * OBJECT)
        os.fsync(fd)
        cluster.nodes[number].kill()
        wait_for(lambda: row_of(five, number)["state"] == "down", 10, "the node to be missed")
        for index in range(0, OBJECTS, 2):
            os.pwrite(fd, MARK, index * OBJECT + PLACE)
        os.fsync(fd)
        if soak:
            time.sleep(60)
        cluster.start_node(number)
        five.wait_healthy()
    finally:
        os.close(fd)
    files = [
        file
        for files in five.object_files().values()
        for file in files
        if file.is_relative_to(cluster.node_directory(number))
    ]
    changed = sum(has_mark(file) for file in files)
    assert 0 < changed < len(files)
    # What had been written just before the kill is compared too, and found equal.
    assert row_of(five, number)["pulled_bytes"] == changed * BLOCK


def has_mark(file: Path) -> bool:
    with file.open("rb") as data:
        data.seek(PLACE)
        return data.read(BLOCK) == MARK


def test_a_node_that_stays_away_under_load_is_made_up_for_by_the_others(
    five: Mounted, soak: bool
) -> None:
    cluster = five.cluster
    runtime_s = 300.0 if soak else 30.0
    path = five.create("load", "256M")
    cluster.sheepctl("cluster", "recovery", "--out-after", "2s")
    with verifying(path, "4k", runtime_s) as fio:
        cluster.nodes[5].kill()
        wait_for(lambda: lacking(five), 10, "the node to be missed")
        wait_for(lambda: not lacking(five), runtime_s * 2, "all copies to be there again")
        assert row_of(five, 5)["state"] == "down"
        print(f"whole again {'beside' if fio.poll() is None else 'after'} fio")
        assert longest_wait_s(fio, runtime_s * 3 + 120) < LONGEST_STALL_S
    done = cluster.sheepctl("vdi", "check", "load", "--deep", check=False, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
