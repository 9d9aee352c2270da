"""A virtual machine that commits moves, while it runs, between hosts that mount the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.committing import Machine
from e2e.guest import build_guest, missing_for_guest

STANDSTILL_S = 2.0
"""QEMU aims at 0.3 s; on a machine that emulates the guest its last pages take longer."""
COMMITS = 3


@pytest.fixture
def mounts(mounted: Mounted, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster, as two hosts have them."""
    other = tmp_path / "other"
    mounted.cluster.mount(other)
    yield mounted.path, other
    mounted.cluster.unmount(other)


@pytest.fixture
def machine(mounted: Mounted, mounts: tuple[Path, Path], tmp_path: Path) -> Iterator[Machine]:
    if reason := missing_for_guest():
        pytest.skip(reason)
    disk = mounted.create(f"vm-{tmp_path.name[-12:]}", "256M")
    machine = Machine(build_guest(tmp_path / "guest"), disk, tmp_path)
    yield machine
    machine.kill()


def test_a_guest_that_commits_moves_to_another_host_and_back(
    mounted: Mounted, mounts: tuple[Path, Path], machine: Machine, soak: bool
) -> None:
    name = machine.disk.name
    machine.boot()
    for turn in range(20 if soak else 2):
        assert not machine.wait_commits(COMMITS)
        there = mounts[(turn + 1) % 2] / name
        holder = mounted.holder(name)
        with machine.moving(there):
            standstill_s = machine.wait_migration("completed")["downtime"] / 1000
        print(f"move {turn + 1}: the guest stood still for {standstill_s:.2f} s")
        assert standstill_s < STANDSTILL_S
        assert not machine.wait_commits(COMMITS)
        assert mounted.holder(name) not in (holder, None)
    machine.kill()
    mounted.assert_replicas_agree(name)
    machine.boot()
    machine.kill()


def test_a_guest_whose_move_fails_goes_on_where_it_is(
    mounted: Mounted, mounts: tuple[Path, Path], machine: Machine
) -> None:
    name = machine.disk.name
    machine.boot()
    assert not machine.wait_commits(COMMITS)
    holder = mounted.holder(name)
    with machine.moving(mounts[1] / name, max_bandwidth=1 << 20) as target:
        machine.wait_migration("active")
        assert not machine.wait_commits(COMMITS)
        target.end()
        machine.wait_migration("failed")
    assert not machine.wait_commits(COMMITS)
    assert mounted.holder(name) == holder
    machine.kill()
    machine.boot()
    machine.kill()
    mounted.assert_replicas_agree(name)
