"""What the end-to-end tests do with a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import StartError, wait_for

SETTLE_S = 60.0


class Mounted:
    """A local cluster and its mount."""

    def __init__(self, cluster: LocalCluster, mount: Path) -> None:
        self.cluster = cluster
        self.path = mount

    def start(self) -> None:
        """Start what does not run, mount, and wait until every node is a full member."""
        self.cluster.start()
        self.cluster.mount(self.path)
        self.wait_healthy()

    def stop(self) -> None:
        """Stop everything in order."""
        self.cluster.stop()

    def status(self) -> dict[str, Any]:
        """Give `sheepctl cluster status --json`."""
        done = self.cluster.sheepctl("cluster", "status", "--json", check=False)
        content: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        return content

    def state_of(self, number: int) -> str:
        """Give a node's state in the map, as `sheepctl node list` shows it."""
        return {n["node"]: str(n["state"]) for n in self.status()["nodes"]}[number]

    def wait_healthy(self, deadline_s: float = SETTLE_S) -> None:
        """Wait until all three nodes are active and no group is degraded or catching up."""

        status: dict[str, Any] = {}

        def healthy() -> bool:
            nonlocal status
            status = self.status()
            nodes = status.get("nodes", [])
            pools = status.get("pools", [])
            return (
                len(nodes) == self.cluster.node_count
                and all(node["state"] == "active" and node["answers"] for node in nodes)
                and all(p["whole"] == p["groups"] and not p["joining"] for p in pools)
            )

        try:
            wait_for(healthy, deadline_s, "the cluster to be healthy")
        except StartError as error:
            raise StartError(f"{error}: {json.dumps(status)[:3000]}") from error

    def create(self, name: str, size: str, copies: int = 3) -> Path:
        """Make a VDI and give its file in the mount."""
        self.cluster.sheepctl("vdi", "create", name, size, "--copies", str(copies))
        path = self.path / f"{name}.raw"
        wait_for(path.exists, 5, f"{path} to appear")
        return path

    def holder(self, name: str) -> str | None:
        """Tell who holds a VDI."""
        done = self.cluster.sheepctl("vdi", "info", name, "--json")
        holder: str | None = json.loads(done.stdout)["held_by"]
        return holder

    def assert_replicas_agree(self, name: str) -> dict[str, Any]:
        """Let `sheepctl vdi check` read every replica; give its report."""
        self.wait_healthy()
        done = self.cluster.sheepctl(
            "vdi", "check", name, "--deep", "--json", check=False, timeout_s=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def object_files(self) -> dict[str, list[Path]]:
        """Give object id (16 hex digits) -> its files on all nodes."""
        found: dict[str, list[Path]] = {}
        for number in self.cluster.nodes:
            for path in (self.cluster.node_directory(number) / "objects").glob("*/*/*"):
                found.setdefault(path.name, []).append(path)
        return found


def object_bytes(path: Path) -> bytes:
    """Give the data of an object file: its first 4 MiB."""
    with path.open("rb") as file:
        return file.read(OBJECT_SIZE).ljust(OBJECT_SIZE, b"\0")


def run(*argv: str | Path, timeout_s: float = 60, check: bool = True) -> str:
    """Run a program and give what it prints; a failure shows all of it."""
    done = subprocess.run(
        [str(word) for word in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{argv}: exit {done.returncode}\n{done.stdout}"
    return done.stdout


def seconds(action: Callable[[], object]) -> float:
    """Give how long an action takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def missing_for_mount() -> str:
    """Say why no mount can be made here; empty when it can."""
    if shutil.which("etcd") is None:
        return "etcd is not installed"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    return ""
