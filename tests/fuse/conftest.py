"""Fixtures: a real mount of a cluster in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.mount_process import MountProcess, can_mount


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[MountProcess]:
    """A mount that has not been started."""
    if not can_mount():
        pytest.skip("/dev/fuse cannot be opened")
    mount = MountProcess(tmp_path)
    yield mount
    mount.clean_up()


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountProcess]:
    """One mount for all tests of a module, which use file names of their own."""
    if not can_mount():
        pytest.skip("/dev/fuse cannot be opened")
    mount = MountProcess(tmp_path_factory.mktemp("mount"))
    try:
        mount.start(
            MEMORY_VDIS="held.raw,stall.raw,bad.raw,full.raw",
            MEMORY_CONTROL=str(mount.path.parent / "control"),
        )
        yield mount
    finally:
        mount.clean_up()
