"""SIGSTOP for longer than any lease, then SIGCONT: of a daemon, of the leader, of a mount."""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.test_e2e_power_cut import Writer, check
from sheepfs_tools.local.processes import ManagedProcess, wait_for

WRITE_S = 30.0


@pytest.fixture
def paused_s(soak: bool) -> float:
    """How long a process is stopped: leases are of 5 s (daemons) and 10 s (mounts)."""
    return 60.0 if soak else 8.0


@contextmanager
def paused(process: ManagedProcess) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_daemon_that_is_stopped_and_goes_on_is_noticed_by_no_client(
    mounted: Mounted, tmp_path: Path, paused_s: float, role: str
) -> None:
    path = mounted.create(f"by-{role}", "32M")
    mounted.wait_healthy()
    leads = {node["node"]: bool(node["leader"]) for node in mounted.status()["nodes"]}
    number = next(node for node, leader in leads.items() if leader == (role == "leader"))
    writer = Writer(path, tmp_path / "writer", 1, 0)
    until_fsyncs(writer, 20)
    with paused(mounted.cluster.nodes[number]):
        end = time.monotonic() + paused_s
        wait_for(lambda: mounted.state_of(number) == "down", 30, f"node {number} to be missed")
        until_fsyncs(writer, 20)
        wait_for(lambda: time.monotonic() > end, paused_s + 1, "the end of the pause")
    until_fsyncs(writer, 20)
    mounted.wait_healthy()
    until_fsyncs(writer, 20)
    written, _ = writer.end()
    assert not writer.errors()
    check(path, written)
    mounted.assert_replicas_agree(f"by-{role}")


@pytest.mark.parametrize("by_force", [False, True], ids=["lease", "force"])
def test_a_mount_that_slept_while_it_lost_a_vdi_gets_errors_and_reads_nothing_stale(
    mounted: Mounted, tmp_path: Path, paused_s: float, by_force: bool
) -> None:
    cluster = mounted.cluster
    second = mounted.path.with_name("mnt2")
    cluster.mount(second)
    name = "forced" if by_force else "taken"
    path = mounted.create(name, "32M")
    sleeper = Writer(path, tmp_path / "sleeper", 1, 0)
    until_fsyncs(sleeper, 20)
    with paused(cluster.mounts[mounted.path]):
        end = time.monotonic() + paused_s
        if by_force:
            refused = cluster.sheepctl("vdi", "unlock", name, check=False)
            assert refused.returncode == 2
            assert "say --force" in refused.stderr
            taken = cluster.sheepctl("vdi", "unlock", name, "--force", "--json").stdout
            assert json.loads(taken)["taken_from"].endswith(str(mounted.path))
        wait_for(lambda: not is_held(mounted, name), 60, "the lock to end")
        taker = Writer(second / f"{name}.raw", tmp_path / "taker", 2, 1 << 32)
        until_fsyncs(taker, 20)
        wait_for(lambda: by_force or time.monotonic() > end, paused_s + 1, "the end of the pause")
    wait_for(sleeper.errors, WRITE_S, "the mount that slept to refuse its writer")
    assert sleeper.errors() == [errno.EIO]
    written, _ = sleeper.end()
    newer, _ = taker.end()
    legal = dict(written)
    for block, numbers in newer.items():
        former = written.get(block, {0}) if 0 in numbers else set()
        legal[block] = numbers - {0} | former
    # The mount that slept reads what the other one wrote, though it had the former map and pages.
    check(path, legal)
    check(second / f"{name}.raw", legal)
    cluster.unmount(second)
    mounted.assert_replicas_agree(name)


def until_fsyncs(writer: Writer, count: int) -> None:
    before = writer.fsyncs()
    wait_for(lambda: writer.fsyncs() >= before + count, WRITE_S, f"{count} more fsyncs")


def is_held(mounted: Mounted, name: str) -> bool:
    """Tell whether a mount holds a VDI."""
    done = mounted.cluster.sheepctl("vdi", "info", name, "--json")
    return json.loads(done.stdout)["held_by"] is not None
