"""The backend conformance tests, which the fake of the mount's tests passes, on a real cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from backend_conformance import BackendConformance, Mounts

from e2e.cluster import Mounted
from sheepfs.backend import Namespace
from sheepfs.connecting import connect
from sheepfs.core.errors import HeldElsewhereError

CLEAN_UP_S = 20


async def delete_everything(namespace: Namespace) -> None:
    """Leave an empty cluster to the next test."""
    with trio.fail_after(CLEAN_UP_S):
        for found in await namespace.list():
            while True:
                try:
                    await namespace.delete(found.name)
                    break
                except HeldElsewhereError:
                    await trio.sleep(0.1)


class TestCluster(BackendConformance):
    """Two clients of one real cluster."""

    @pytest.fixture
    async def mounts(self, mounted: Mounted) -> AsyncIterator[Mounts]:
        etcd = mounted.cluster.etcd_address
        name = mounted.cluster.cluster
        async with connect(etcd, name, "here") as here, connect(etcd, name, "there") as there:
            await delete_everything(here)
            yield Mounts(here, there)
