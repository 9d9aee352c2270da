"""Space comes back on every node, also on one that was away when a VDI was deleted."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from random import Random

from e2e.cluster import Mounted
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.processes import wait_for

DEADLINE_S = 30.0


def objects(mounted: Mounted, number: int) -> int:
    """Count a node's object files."""
    return len(list((mounted.cluster.node_directory(number) / "objects").glob("*/*/*")))


def test_a_node_that_was_away_does_not_bring_deleted_objects_back(mounted: Mounted) -> None:
    cluster = mounted.cluster
    path = mounted.create("gone", str(6 * OBJECT_SIZE))
    with path.open("r+b", buffering=0) as file:
        file.write(Random(8).randbytes(6 * OBJECT_SIZE))
        os.fsync(file.fileno())
    cluster.sheepctl("vdi", "snapshot", "gone", "--tag", "s")
    wait_for(lambda: objects(mounted, 3) >= 7, DEADLINE_S, "objects on node 3")
    cluster.nodes[3].kill()
    wait_for(lambda: mounted.status()["verdict"] != "ok", DEADLINE_S, "node 3 to be missed")
    cluster.sheepctl("snapshot", "delete", "gone@s", "--now")
    cluster.sheepctl("vdi", "delete", "gone", "--now")
    wait_for(lambda: objects(mounted, 1) == objects(mounted, 2) == 0, DEADLINE_S, "space")
    assert objects(mounted, 3) >= 7
    cluster.start_node(3)
    mounted.wait_healthy()
    wait_for(lambda: objects(mounted, 3) == 0, DEADLINE_S, "space on the node that was away")
    done = cluster.sheepctl("cluster", "check", "--json")
    assert json.loads(done.stdout) | {"unanswered": {}} == {
        "clean": True, "objects": 0, "replicas": 0, "bytes": 0, "dangling": {}, "missing": {},
        "orphans": {}, "misplaced": {}, "unanswered": {},
    }  # fmt: skip


def test_what_is_deleted_comes_back_from_the_trash_and_is_gone_after_it(mounted: Mounted) -> None:
    cluster = mounted.cluster
    content = Random(9).randbytes(2 * OBJECT_SIZE)
    path = mounted.create("kept", str(len(content)))
    with path.open("r+b", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    cluster.sheepctl("vdi", "snapshot", "kept", "--tag", "a")
    cluster.sheepctl("vdi", "delete", "kept")
    wait_for(lambda: not path.exists(), 5, "the file to go")
    assert (mounted.path / "kept@a.raw").read_bytes() == content
    cluster.sheepctl("trash", "restore", "kept")
    wait_for(path.exists, 5, "the file to come back")
    assert path.read_bytes() == content
    (mounted.path / "kept@a.raw").unlink()
    path.unlink()
    names = [
        item["name"] for item in json.loads(cluster.sheepctl("trash", "list", "--json").stdout)
    ]
    assert len(names) == 2
    cluster.sheepctl("trash", "purge", "--all")
    wait_for(lambda: sum(objects(mounted, n) for n in (1, 2, 3)) == 0, DEADLINE_S, "space")


def lonely(mounted: Mounted) -> None:
    """Leave a VDI with an object that its map does not name, by a mount that was killed."""
    cluster = mounted.cluster
    path = mounted.path / "lonely.raw"
    path.touch()
    file = path.open("r+b", buffering=0)
    file.write(b"x" * 4096)
    wait_for(lambda: objects(mounted, 3) > 0, DEADLINE_S, "the write to arrive")
    cluster.mounts[mounted.path].kill()
    with suppress(OSError):
        file.close()

    def holder() -> object:
        return json.loads(cluster.sheepctl("vdi", "info", "lonely", "--json").stdout)["held_by"]

    wait_for(lambda: holder() is None, DEADLINE_S, "the dead mount's lease to end")


def test_what_a_dead_mount_wrote_to_a_vdi_that_nobody_opens_again_goes_by_itself(
    mounted: Mounted,
) -> None:
    lonely(mounted)
    mounted.cluster.mount(mounted.path)
    wait_for(lambda: not any(objects(mounted, n) for n in (1, 2, 3)), DEADLINE_S, "space")
    check = mounted.cluster.sheepctl("cluster", "check", "--json")
    assert json.loads(check.stdout)["clean"]


def test_without_any_mount_left_it_goes_by_repair(mounted: Mounted) -> None:
    cluster = mounted.cluster
    lonely(mounted)
    found = cluster.sheepctl("cluster", "check", "--json", check=False)
    assert (found.returncode, len(json.loads(found.stdout)["orphans"])) == (1, 1), found.stdout
    cluster.sheepctl("cluster", "check", "--repair")
    assert objects(mounted, 1) == objects(mounted, 2) == objects(mounted, 3) == 0
    cluster.mount(mounted.path)
