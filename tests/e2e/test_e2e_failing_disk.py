"""EIO of a real block layer: the disk leaves, nobody notices, and another one takes its place."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from e2e.cluster import Mounted, missing_for_mount, object_bytes, run
from e2e.failing_disk import FailingDisk, missing
from e2e.test_e2e_power_cut import Writer, check
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import wait_for
from storaged.main import EXIT_DISK_FAILED

VICTIM = 3
"""The daemon whose disk fails; its node's id is another one after each replacement."""
LEAVES_S = 20.0
RESTORED_S = 60.0
LONGEST_STALL_S = 10.0
"""On a machine that is busy with other things; on an idle one it is below a second."""
GROUPS = 24
"""Few, so that a new disk is full in seconds: each group takes a few rounds, however small."""
MIB = 1 << 20
PIECE = 64 << 10


class Site:
    """A mounted cluster; the disk of one of its daemons fails when told, and is replaced."""

    def __init__(self, directory: Path, kind: str) -> None:
        self._directory = directory
        self._kind = kind
        self._disks = 0
        self.cluster = LocalCluster(directory / "data")
        self.cluster.directory.mkdir(parents=True)
        self.cluster.node_options = [f"--pgs={GROUPS}"]
        self.disk = self._insert()
        self.mounted = Mounted(self.cluster, directory / "mnt")

    def _insert(self) -> FailingDisk:
        """Give the daemon a new, empty disk."""
        self._disks += 1
        disk = FailingDisk(self._directory / f"disk{self._disks}", self._kind)
        link = self.cluster.node_directory(VICTIM)
        link.unlink(missing_ok=True)
        link.symlink_to(disk.path / "data")
        (disk.path / "data").mkdir()
        return disk

    def wait_left(self) -> str:
        """Wait until the daemon has ended because of its disk; give what it said."""
        daemon = self.cluster.nodes[VICTIM]
        # Threads that wait for the disk may outlive the rest of it for a moment.
        wait_for(lambda: daemon.exit_code is not None, LEAVES_S, "the daemon to end")
        assert daemon.exit_code == EXIT_DISK_FAILED, daemon.last_words()
        said = daemon.last_words(200)
        assert "the disk failed, leaving the cluster for good" in said
        return said

    def start_again(self) -> None:
        """Start the daemon on the disk that failed, as often as it takes.

        A file system tells of its failed write-back once: that ends the first start.
        """
        daemon = self.cluster.nodes[VICTIM]
        for _ in range(2):
            self.cluster.start_node(VICTIM, wait=False)
            wait_for(
                lambda: self.cluster.is_listening(daemon.name) or daemon.exit_code is not None,
                RESTORED_S,
                "the daemon to start or to end",
            )
            if daemon.exit_code is None:
                return
            assert daemon.exit_code == EXIT_DISK_FAILED, daemon.last_words()
        raise AssertionError(f"it does not start:{daemon.last_words()}")

    def replace_disk(self) -> None:
        """Do what the manual says: an empty directory on a new disk, and the old node goes."""
        address = self.cluster.address(f"node{VICTIM}")
        status = self.mounted.status()
        (failed,) = (node for node in status["nodes"] if node["address"] == address)
        assert failed["state"] == "down"
        assert f"node {failed['node']} at {address} is down" in status["reasons"]
        old = self.disk
        self.disk = self._insert()
        old.destroy()
        self.cluster.start_node(VICTIM)

        def removed() -> bool:
            remove = self.cluster.sheepctl("node", "remove", str(failed["node"]), check=False)
            return remove.returncode == 0

        wait_for(removed, RESTORED_S, f"node {failed['node']} to be removed")

    def wait_restored(self, name: str) -> None:
        """Wait until three nodes have all of everything, and nothing that they should not have."""
        self.mounted.assert_replicas_agree(name)

        def clean() -> bool:
            done = self.cluster.sheepctl("cluster", "check", check=False)
            return done.returncode == 0 and "maps and objects agree" in done.stdout

        wait_for(clean, RESTORED_S, "cluster check to be clean")

    def destroy(self) -> None:
        """Take everything away."""
        self.cluster.destroy()
        self.disk.destroy()


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    if reason := missing_for_mount() or missing(request.param):
        pytest.skip(reason)
    made = Site(tmp_path_factory.mktemp(request.param), request.param)
    try:
        made.mounted.start()
        yield made
    finally:
        made.destroy()


def longest_stall_s(log: Path) -> float:
    """Give the longest time that a write or fsync of a Writer took."""
    times = [float(line.split()[-1]) for line in log.read_text().splitlines()]
    return max(after - before for before, after in pairwise(times))


def read_all(path: Path) -> tuple[bytes, float]:
    """Read past the page cache; give the bytes and the longest wait."""
    pieces: list[bytes] = []
    longest_s = 0.0
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PIECE) as buffer:
            for offset in range(0, os.fstat(fd).st_size, PIECE):
                start = time.monotonic()
                length = os.preadv(fd, [buffer], offset)
                longest_s = max(longest_s, time.monotonic() - start)
                pieces.append(buffer[:length])
    finally:
        os.close(fd)
    return b"".join(pieces), longest_s


def until_fsyncs(writer: Writer, count: int) -> None:
    before = writer.fsyncs()
    wait_for(lambda: writer.fsyncs() >= before + count, 30, f"{count} more fsyncs")


def test_what_a_disk_cannot_read_is_served_from_others_and_the_disk_leaves(site: Site) -> None:
    data = random.Random(1).randbytes(16 * MIB)
    path = site.mounted.create("read", "16M")
    with path.open("r+b") as held:
        held.write(data)
        held.flush()
        os.fsync(held.fileno())
        site.disk.forget()
        site.disk.fail("read")
        found, stall_s = read_all(path)
    assert found == data
    print(f"longest read: {stall_s:.2f} s")
    assert stall_s < LONGEST_STALL_S
    assert "read failed: [Errno 5]" in site.wait_left()
    site.replace_disk()
    assert read_all(path)[0] == data
    site.wait_restored("read")


@pytest.mark.parametrize(("kind", "once"), [("write", False), ("flush", True)])
def test_a_disk_that_cannot_write_or_sync_leaves_and_its_successor_gets_everything(
    site: Site, tmp_path: Path, soak: bool, kind: str, once: bool
) -> None:
    name = f"no-{kind}"
    path = site.mounted.create(name, "32M")
    durable: dict[int, set[int]] = {}
    number = 0
    for turn in range(5 if soak else 1):
        log = tmp_path / f"writer{turn}"
        writer = Writer(path, log, turn, number)
        until_fsyncs(writer, 20)
        site.disk.fail(kind, once=once)
        said = site.wait_left()
        assert "sync failed" in said or "Input/output error" in said
        until_fsyncs(writer, 20)
        site.replace_disk()
        until_fsyncs(writer, 20)
        assert not writer.errors()
        written, number = writer.end()
        stall_s = longest_stall_s(log)
        print(f"{kind}: longest stall {stall_s:.2f} s")
        assert stall_s < LONGEST_STALL_S
        for block, numbers in written.items():
            former = durable.get(block, {0}) if 0 in numbers else set()
            durable[block] = numbers - {0} | former
        check(path, durable)
        site.wait_restored(name)


def test_what_a_failed_sync_left_in_memory_only_comes_from_others_when_the_daemon_starts_again(
    site: Site,
) -> None:
    mounted = site.mounted
    before = set(mounted.object_files())
    old, new = (random.Random(seed).randbytes(OBJECT_SIZE) for seed in (1, 2))
    path = mounted.create("lost", "4M")
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, old, 0)
        os.fsync(fd)
        # Nothing else is to be written: what fails is the data.
        run("sync", "--file-system", site.disk.path)
        os.pwrite(fd, new[:MIB], MIB)
        site.disk.fail("write", once=True)
        os.fsync(fd)
    finally:
        os.close(fd)
    expected = old[:MIB] + new[:MIB] + old[2 * MIB :]
    site.wait_left()
    site.disk.fail()
    (files,) = (
        files
        for oid, files in mounted.object_files().items()
        if oid not in before and old[:MIB] == object_bytes(files[0])[:MIB]
    )
    assert [object_bytes(file) == expected for file in files] == [True] * 3, "in memory it is there"
    site.start_again()
    mounted.wait_healthy()
    site.disk.forget()
    assert [object_bytes(file) == expected for file in files] == [True] * 3
    site.wait_restored("lost")
    assert path.read_bytes() == expected
