"""Damage on one node's disk: reads stay right, the replica is repaired, and status says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted, object_bytes, run
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.processes import wait_for

BLOCK = 4096
PATTERN = (bytes(range(1, 251)) * 16778)[:OBJECT_SIZE]
"""One object without a zero byte."""


@pytest.fixture
def victim(mounted: Mounted, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A flushed VDI of one object, and one of its three replica files."""
    before = set(mounted.object_files())
    name = f"damage{abs(hash(request.node.name)) % 10**8}"
    path = mounted.create(name, "4M")
    path.write_bytes(PATTERN)
    run("sync", path)
    new = {oid: files for oid, files in mounted.object_files().items() if oid not in before}
    (files,) = [f for f in new.values() if object_bytes(f[0]) == PATTERN]
    assert len(files) == 3
    return path, files[1]


def read_often(path: Path) -> None:
    """Read often enough that every replica is asked for every block."""
    for _ in range(9):
        assert path.read_bytes() == PATTERN


def repaired(mounted: Mounted) -> int:
    return int(mounted.status()["repaired_blocks"])


def test_a_flipped_byte_in_one_replica_is_never_read_and_is_repaired(
    mounted: Mounted, victim: tuple[Path, Path]
) -> None:
    path, replica = victim
    before = repaired(mounted)
    with replica.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 0x40]))
    read_often(path)
    wait_for(
        lambda: object_bytes(replica) == PATTERN,
        20,
        "the flipped byte to be repaired",
    )
    wait_for(lambda: repaired(mounted) > before, 5, "status to count the repair")
    assert mounted.status()["corrupt_blocks"] > 0
    logs = "".join(node.log.read_text() for node in mounted.cluster.nodes.values())
    assert "repair" in logs
    mounted.assert_replicas_agree(path.stem)


def test_a_deleted_object_file_is_never_read_as_zeros_and_is_restored(
    mounted: Mounted, victim: tuple[Path, Path]
) -> None:
    path, replica = victim
    number = next(
        n
        for n in mounted.cluster.nodes
        if replica.is_relative_to(mounted.cluster.node_directory(n))
    )
    replica.unlink()
    # A daemon keeps files open: what it lost it only sees after a restart.
    mounted.cluster.nodes[number].stop()
    mounted.cluster.start_node(number)
    mounted.wait_healthy()
    read_often(path)
    wait_for(replica.exists, 20, "the object file to be back")
    mounted.assert_replicas_agree(path.stem)
    assert object_bytes(replica) == PATTERN
    assert mounted.status()["restored_objects"] > 0


def scrub_status(mounted: Mounted) -> dict[str, Any]:
    done = mounted.cluster.sheepctl("scrub", "status", "--json", check=False)
    content: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(content["unrepairable"])
    return content


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 0x40]))


def test_damage_is_found_without_being_read_and_repaired_or_named(mounted: Mounted) -> None:
    before = set(mounted.object_files())
    path = mounted.create("scrubbed", "12M")
    path.write_bytes(PATTERN * 3)
    run("sync", path)
    objects = {
        oid: files
        for oid, files in mounted.object_files().items()
        if oid not in before and object_bytes(files[0]) == PATTERN
    }
    assert len(objects) == 3
    victims = list(objects.values())
    for files in victims[:2]:
        flip(files[1], 1_000_000)
    last_oid, everywhere = list(objects.items())[2]
    for replica in everywhere:
        flip(replica, 2 * BLOCK + 5)
    mounted.cluster.sheepctl("scrub", "set", "--rate", "200M")
    mounted.cluster.sheepctl("scrub", "start")

    def settled() -> bool:
        nodes = scrub_status(mounted)["nodes"]
        repaired = sum(node["repaired"] for node in nodes)
        return repaired == 2 and all(node["unrepairable"] == 1 for node in nodes)

    wait_for(settled, 60, "scrubbing to repair two objects and name one")
    for files in victims[:2]:
        assert all(object_bytes(file) == PATTERN for file in files)
    (item,) = scrub_status(mounted)["unrepairable"]
    assert item["oid"] == int(last_oid, 16)
    (user,) = item["used_by"]
    index = item["oid"] & 0xFFFFFFF
    offset = index * OBJECT_SIZE + 2 * BLOCK
    assert user == {"name": "scrubbed.raw", "offsets": [offset]}
    assert sorted(item["nodes"]) == ["1", "2", "3"]
    told = mounted.cluster.sheepctl("scrub", "status", check=False)
    assert f"scrubbed.raw at offset {offset}" in told.stdout
    reasons = " ".join(mounted.status()["reasons"])
    assert "sheepctl scrub status" in reasons
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, BLOCK, offset)
        os.pwrite(fd, b"n" * BLOCK, offset)
    finally:
        os.close(fd)
    run("sync", path)
    mounted.cluster.sheepctl("scrub", "start", "--deep")
    wait_for(
        lambda: not scrub_status(mounted)["unrepairable"], 60, "the overwritten block to be good"
    )
    mounted.assert_replicas_agree("scrubbed")
