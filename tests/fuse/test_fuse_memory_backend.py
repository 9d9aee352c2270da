"""The in-memory backend keeps the promises of sheepfs/backend.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from backend_conformance import BackendConformance, Mounts

from fakes.memory_backend import MemoryCluster, memory_namespace


class TestMemoryBackend(BackendConformance):
    @pytest.fixture(params=[True, False], ids=["later", "at once"])
    async def mounts(self, request: pytest.FixtureRequest) -> AsyncIterator[Mounts]:
        cluster = MemoryCluster()
        async with (
            memory_namespace(cluster, asynchronous=request.param) as here,
            memory_namespace(cluster, asynchronous=request.param) as there,
        ):
            yield Mounts(here, there)
