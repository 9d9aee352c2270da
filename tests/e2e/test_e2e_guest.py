"""A virtual machine's file system outlives a stop and start of the whole cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.guest import DONE, Guest, build_guest, missing_for_guest


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    if reason := missing_for_guest():
        pytest.skip(reason)
    return build_guest(tmp_path / "guest")


def used(mounted: Mounted) -> int:
    return sum(int(node["used"]) for node in mounted.status()["nodes"])


def test_what_a_guest_deletes_and_trims_is_given_back_on_every_node(
    mounted: Mounted, guest: Guest, soak: bool
) -> None:
    megabytes = 500 if soak else 60
    before_all = used(mounted)
    disk = mounted.create("trim", "2G")
    assert DONE in (console := guest.run(disk, "format")), console[-3000:]
    before = used(mounted) - before_all
    assert DONE in (console := guest.run(disk, f"fill fill={megabytes}")), console[-3000:]
    full = used(mounted) - before_all
    assert full - before >= 3 * megabytes * 1_000_000
    assert DONE in (console := guest.run(disk, "trim")), console[-3000:]
    trimmed = used(mounted) - before_all
    print(f"used by all replicas: {before} before, {full} full, {trimmed} after fstrim")
    assert trimmed <= before * 1.05
    assert disk.stat().st_blocks * 512 <= before / 3 * 1.05


def test_what_a_guest_wrote_holds_after_the_whole_cluster_was_stopped_and_started(
    mounted: Mounted, guest: Guest
) -> None:
    disk = mounted.create("vm1", "1G")
    console = guest.run(disk, "write")
    assert DONE in console, console[-3000:]
    mounted.stop()
    assert mounted.cluster.running() == []
    mounted.start()
    console = guest.run(disk, "verify")
    assert DONE in console, console[-3000:]
    assert console.count(": OK") == 20
    mounted.assert_replicas_agree("vm1")
