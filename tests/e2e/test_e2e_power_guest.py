"""Power is cut under a virtual machine that commits: whatever it was told is durable is there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from e2e.cluster import missing_for_mount
from e2e.committing import Machine
from e2e.guest import build_guest, missing_for_guest
from e2e.power import Powered, missing
from e2e.soak import always_or_at_full_length
from sheepfs_tools.local.processes import wait_for

AGREE_S = 120.0
HOLD_S = 60.0
COMMITS = 3
"""To each database, before each cut and after it."""


@pytest.fixture(params=always_or_at_full_length(["ext4"], ["xfs"]))
def powered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Powered]:
    if reason := missing(request.param) or missing_for_mount() or missing_for_guest():
        pytest.skip(reason)
    cluster = Powered(tmp_path, request.param)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


@pytest.fixture
def machine(powered: Powered, tmp_path: Path) -> Iterator[Machine]:
    disk = powered.mounted.create("vm1", "256M")
    machine = Machine(build_guest(tmp_path / "guest"), disk, tmp_path)
    try:
        yield machine
    finally:
        machine.kill()


def cut_one(powered: Powered, machine: Machine, number: int) -> None:
    """The guest goes on."""
    powered.cut(number)
    assert not machine.wait_commits(COMMITS)
    powered.mounted.assert_replicas_agree("vm1")


def cut_all_below(powered: Powered, machine: Machine) -> bool:
    """The guest goes on, unless something is lost that it had not flushed; tells if it did not.

    What it then commits, to a database that has met no error, counts as well. After an error it
    must be started again.
    """
    powered.cut(1, 2, 3)
    return bool(machine.wait_commits(COMMITS))


def cut_site(powered: Powered, machine: Machine, *, etcd: bool) -> None:
    """Everything dies at once, the guest and the mount too."""
    mounted = powered.mounted
    hold = mounted.holder("vm1")
    powered.cut_all(machine.process, etcd=etcd)
    machine.kill()
    if etcd and mounted.holder("vm1") == hold:
        # For whoever cannot wait until the hold of the mount that died has ended.
        mounted.cluster.sheepctl("vdi", "unlock", "vm1", "--force")
    wait_for(lambda: mounted.holder("vm1") != hold, HOLD_S, "the former hold to end")


def check(powered: Powered) -> None:
    """All replicas agree, and every map with what is there; the VDI may be levelled first."""

    def clean(*words: str) -> bool:
        done = powered.mounted.cluster.sheepctl(*words, check=False, timeout_s=300)
        if done.returncode:
            print(f"sheepctl {words}: {done.stdout}{done.stderr}")
        return done.returncode == 0

    wait_for(partial(clean, "vdi", "check", "vm1", "--deep"), AGREE_S, "replicas to agree")
    wait_for(partial(clean, "cluster", "check"), AGREE_S, "maps and objects to agree")


def test_every_commit_that_a_guest_was_told_of_is_there_whatever_loses_power(
    powered: Powered, machine: Machine, soak: bool
) -> None:
    rounds = 20 if soak else 1
    errors = 0
    machine.boot()
    for turn in range(rounds):
        assert not machine.wait_commits(COMMITS)
        cut_one(powered, machine, turn % 3 + 1)
        met = cut_all_below(powered, machine)
        errors += met
        if met or soak:
            machine.kill()
            machine.boot(mend=True)
            assert not machine.wait_commits(COMMITS)
        if soak:
            check(powered)
        cut_site(powered, machine, etcd=turn % 2 == 0)
        machine.boot()
        check(powered)
        machine.wait_commits(1)
        print(f"round {turn + 1}: acknowledged {machine.acknowledged}, all of them there")
    print(f"{errors} times of {rounds} the guest met an error when all nodes lost power")
