"""Scrubbing of real daemons: damage that nobody read is found, repaired, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted, object_bytes, run
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.processes import wait_for

BLOCK = 4096
PATTERN = (bytes(range(1, 251)) * 16778)[:OBJECT_SIZE]
"""One object without a zero byte."""


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
    for file in everywhere:
        flip(file, 2 * BLOCK + 5)
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
    with path.open("rb") as file, pytest.raises(OSError, match="Input/output error"):
        file.seek(offset)
        file.read(BLOCK)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"n" * BLOCK)
    run("sync", path)
    mounted.cluster.sheepctl("scrub", "start", "--deep")
    wait_for(
        lambda: not scrub_status(mounted)["unrepairable"], 60, "the overwritten block to be good"
    )
    mounted.assert_replicas_agree("scrubbed")
