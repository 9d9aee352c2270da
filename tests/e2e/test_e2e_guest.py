"""A virtual machine's file system outlives a stop and start of the whole cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.guest import DONE, Guest, build_guest, kernel_image


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    if kernel_image() is None:
        pytest.skip("no guest kernel: tools/test fetches it")
    return build_guest(tmp_path / "guest")


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
