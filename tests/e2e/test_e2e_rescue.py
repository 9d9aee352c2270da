"""All but the data directories is lost: VDIs are rebuilt, and the cluster is brought back."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Mounted, object_bytes
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE
from sheepfs_tools.local.processes import wait_for
from sheepfs_tools.sheepctl.__main__ import main

SIZE = 6 * OBJECT_SIZE - 12345


def write(path: Path, pieces: dict[int, bytes]) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        for offset, data in pieces.items():
            assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def fill(mounted: Mounted) -> dict[str, bytes]:
    """Make a VDI, a snapshot and a clone that all differ; give what each reads as."""
    cluster = mounted.cluster
    vm1 = mounted.create("vm1", str(SIZE))
    write(vm1, {0: noise(1, 5 << 20), 3 * OBJECT_SIZE + 100: noise(2, 50_000)})
    cluster.sheepctl("vdi", "snapshot", "vm1", "--tag", "daily")
    write(vm1, {4096: noise(3, 10_000), 5 * OBJECT_SIZE: noise(4, 20_000)})
    cluster.sheepctl("vdi", "clone", "vm1@daily", "vm2")
    vm2 = mounted.path / "vm2.raw"
    wait_for(vm2.exists, 5, "the clone to appear")
    write(vm2, {200_000: noise(5, 300_000)})
    names = {"vm1": "vm1.raw", "vm1@daily": "vm1@daily.raw", "vm2": "vm2.raw"}
    return {name: (mounted.path / file).read_bytes() for name, file in names.items()}


def kill_all_but_the_mount(mounted: Mounted) -> None:
    """Kill the daemons and etcd, whose data is gone; who uses a VDI waits."""
    for process in (*mounted.cluster.nodes.values(), mounted.cluster.etcd):
        process.kill()
    shutil.rmtree(mounted.cluster.directory / "etcd")


@contextmanager
def flipped(*places: tuple[Path, int]) -> Iterator[None]:
    """Flip one bit at each (file, offset); afterwards it is as it was."""

    def flip() -> None:
        for path, offset in places:
            with path.open("r+b") as file:
                file.seek(offset)
                (byte,) = file.read(1)
                file.seek(offset)
                file.write(bytes([byte ^ 4]))

    flip()
    yield
    flip()


class Rescuer:
    """`sheepctl rescue` on all data directories of a cluster."""

    def __init__(
        self, mounted: Mounted, export: Path, target: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.export, self._target, self._capsys = export, target, capsys
        cluster = mounted.cluster
        self._data = [str(cluster.node_directory(number)) for number in cluster.nodes]

    def run(self, *arguments: str) -> tuple[Any, int]:
        code = main(["rescue", *arguments, "--json", "--data", *self._data])
        return json.loads(self._capsys.readouterr().out), code

    def rescue(self, what: str, *options: str) -> tuple[dict[str, Any], bytes, int]:
        report, code = self.run(what, "--out", str(self._target), "--force", *options)
        return report, self._target.read_bytes(), code

    def check_all(self, expected: dict[str, bytes]) -> None:
        for name, content in expected.items():
            report, found, code = self.rescue(name, "--metadata", str(self.export))
            assert (code, report["missing"], report["doubtful"]) == (0, [], []), report
            assert found == content, name


def test_after_the_loss_of_etcd_vdis_are_rebuilt_and_the_cluster_comes_back(
    new_cluster: Callable[[], Mounted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted = new_cluster()
    cluster = mounted.cluster
    expected = fill(mounted)
    export = tmp_path / "etcd.json"
    used = os.open(mounted.path / "vm1.raw", os.O_RDWR)
    os.pwrite(used, expected["vm1"][:4096], 0)
    os.fsync(used)
    cluster.sheepctl("metadata", "export", str(export))
    assert main(["inspect", str(cluster.node_directory(1))]) == 2
    assert "a storage daemon runs there" in capsys.readouterr().err
    kill_all_but_the_mount(mounted)

    rebuild_from_damaged_directories(
        mounted, Rescuer(mounted, export, tmp_path / "image.raw", capsys), expected
    )
    bring_back_with_a_new_etcd(mounted, export)
    try:
        assert os.pwrite(used, noise(9, 5000), 4 * OBJECT_SIZE) == 5000
        os.fsync(used)
    finally:
        os.close(used)
    vm1 = bytearray(expected["vm1"])
    vm1[4 * OBJECT_SIZE : 4 * OBJECT_SIZE + 5000] = noise(9, 5000)
    for name, content in (expected | {"vm1": bytes(vm1)}).items():
        assert (mounted.path / f"{name}.raw").read_bytes() == content
    everything_works(mounted)


def rebuild_from_damaged_directories(
    mounted: Mounted, rescuer: Rescuer, expected: dict[str, bytes]
) -> None:
    """One object is damaged in each directory: first not everywhere at the same place."""
    cluster = mounted.cluster
    first = expected["vm1@daily"][:OBJECT_SIZE]
    (files,) = [f for f in mounted.object_files().values() if object_bytes(f[0]) == first]
    offset = 40 * BLOCK_SIZE + 7
    with flipped(*((path, i * 9 * BLOCK_SIZE + offset) for i, path in enumerate(files))):
        before = {number: tree(cluster.node_directory(number)) for number in cluster.nodes}
        rescuer.check_all(expected)
        listed, code = rescuer.run("--list")
        assert code == 0
        unnamed = {rescuer.rescue(str(row["map"]))[1].rstrip(b"\0") for row in listed}
        assert unnamed == {content.rstrip(b"\0") for content in expected.values()}
        assert {n: tree(cluster.node_directory(n)) for n in cluster.nodes} == before
    with flipped(*((path, offset) for path in files)):
        report, found, code = rescuer.rescue("vm1@daily", "--metadata", str(rescuer.export))
        lost = slice(40 * BLOCK_SIZE, 41 * BLOCK_SIZE)
        told = report["missing"] + report["doubtful"]
        assert code == 1
        assert [(r["start"], r["end"]) for r in told] == [(lost.start, lost.stop)]
        assert found[: lost.start] == expected["vm1@daily"][: lost.start]
        assert found[lost.stop :] == expected["vm1@daily"][lost.stop :]


def bring_back_with_a_new_etcd(mounted: Mounted, export: Path) -> None:
    cluster = mounted.cluster
    cluster.start_etcd()
    cluster.nodes[1].start()
    wait_for(lambda: cluster.nodes[1].pid is None, 20, "the daemon to refuse an empty etcd")
    assert "sheepctl metadata import" in cluster.nodes[1].last_words(20)
    cluster.sheepctl("metadata", "import", str(export))
    mounted.start()


def everything_works(mounted: Mounted) -> None:
    """VDIs are written, frozen and made, and nothing is in disorder."""
    cluster = mounted.cluster
    write(mounted.path / "vm1.raw", {OBJECT_SIZE: noise(6, 70_000)})
    write(mounted.path / "vm2.raw", {2 * OBJECT_SIZE: noise(7, 70_000)})
    cluster.sheepctl("vdi", "snapshot", "vm1", "--tag", "later")
    write(mounted.path / "vm1.raw", {OBJECT_SIZE: noise(8, 70_000)})
    later = (mounted.path / "vm1@later.raw").read_bytes()
    assert later[OBJECT_SIZE : OBJECT_SIZE + 70_000] == noise(6, 70_000)
    mounted.create("vm3", "8M")
    check = cluster.sheepctl("cluster", "check", check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    mounted.assert_replicas_agree("vm1")


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Give path -> (size, time of change) of all below a directory."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")
    }
