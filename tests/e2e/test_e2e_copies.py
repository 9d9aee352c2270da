"""Changing what a VDI is made of while a mount writes to it: copies, flatten, resize, rollback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from e2e.cluster import Mounted
from e2e.test_e2e_snapshots import StampedWriter, assert_is_a_prefix
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.processes import wait_for


def write(path: Path, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def info(mounted: Mounted, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        mounted.cluster.sheepctl("vdi", "info", name, "--json").stdout
    )
    return content


def test_copies_are_changed_under_a_writer_and_survive_a_node(mounted: Mounted) -> None:
    blocks = 4 * OBJECT_SIZE // 4096
    path = mounted.create("grow", str(4 * OBJECT_SIZE), copies=1)
    with StampedWriter(path, blocks, seed=2) as writer:
        wait_for(lambda: writer.completed > 200, 30, "some writes")
        mounted.cluster.sheepctl("vdi", "copies", "grow", "3")
    assert writer.problem is None
    mounted.assert_replicas_agree("grow")
    assert info(mounted, "grow")["copies"] == 3
    mounted.cluster.nodes[2].kill()
    wait_for(lambda: mounted.status()["verdict"] != "ok", 10, "node 2 to be missed")
    assert_is_a_prefix(path.read_bytes(), writer.log, len(writer.log), len(writer.log))
    mounted.cluster.start_node(2)
    mounted.wait_healthy()
    mounted.cluster.sheepctl("vdi", "copies", "grow", "2")
    assert_is_a_prefix(path.read_bytes(), writer.log, len(writer.log), len(writer.log))
    mounted.assert_replicas_agree("grow")


def test_a_flattened_clone_outlives_everything_it_came_from(mounted: Mounted) -> None:
    cluster = mounted.cluster
    content = Random(7).randbytes(3 * OBJECT_SIZE + 5000)
    origin = mounted.create("origin", str(len(content)))
    write(origin, content)
    cluster.sheepctl("vdi", "snapshot", "origin", "--tag", "s")
    cluster.sheepctl("vdi", "clone", "origin@s", "flat")
    flat = mounted.path / "flat.raw"
    wait_for(flat.exists, 5, "the clone to appear")
    shared = info(mounted, "flat")
    assert (shared["exclusive"], shared["shared"]) == (0, shared["allocated"])
    cluster.sheepctl("vdi", "flatten", "flat")
    cluster.sheepctl("snapshot", "delete", "origin@s", "--now")
    cluster.sheepctl("vdi", "delete", "origin", "--now")
    wait_for(lambda: int(str(info(mounted, "flat")["exclusive"])) >= len(content), 30, "reclaim")
    assert flat.read_bytes() == content
    done = cluster.sheepctl("cluster", "check", "--json")
    assert json.loads(done.stdout)["clean"]


def test_a_vdi_in_use_is_grown_from_elsewhere_and_the_mount_sees_it_at_once(
    mounted: Mounted,
) -> None:
    path = mounted.create("online", "1M")
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"held", 0)
        mounted.cluster.sheepctl("vdi", "resize", "online", "3M")
        wait_for(lambda: os.fstat(fd).st_size == 3 << 20, 1, "the new size")
        os.pwrite(fd, b"end", (3 << 20) - 3)
        refused = mounted.cluster.sheepctl("vdi", "resize", "online", "2M", check=False)
        assert refused.returncode == 2
        assert "--shrink" in refused.stderr
        rolled = mounted.cluster.sheepctl("vdi", "rollback", "online", "none", check=False)
        assert rolled.returncode == 1
    finally:
        os.close(fd)
