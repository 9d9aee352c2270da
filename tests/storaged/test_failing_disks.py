"""A node's disk fails: it leaves, and nobody else suffers or leaves for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from test_replication import BLOCK, OID, VDI, holding, on_disk

from fakes.waiting import wait_until
from sheepfs.core.errors import DiskError, RetryableError
from sheepfs.core.wire import Op
from sheepfs.net.fencing import fence_everywhere
from storaged.recovery import pulling


def failed(*_: Any, **__: Any) -> NoReturn:
    raise DiskError("Input/output error")


async def test_a_take_over_waits_until_a_node_whose_disk_fails_is_voted_out(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, router, _), trio.open_nursery() as nursery:
        failing = cluster.nodes[3]
        failing.store.set_token = failed  # type: ignore[method-assign]
        nursery.start_soon(fence_everywhere, router, VDI, 5)
        await wait_until(lambda: failing.disk_errors)
        failing.clean = False
        failing.stop()
        cluster.publish([1, 2])
        with trio.fail_after(5):
            while nursery.child_tasks:
                await trio.sleep(0.005)
        assert [node.replica.tokens[VDI] for node in cluster.nodes.values()][:2] == [5, 5]


async def test_a_node_does_not_leave_because_of_the_disk_of_a_peer_that_it_learns_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "PATIENCE_S", 0.1)
    async with holding(tmp_path) as (cluster, router, holder):
        await holder.create(OID, b"a" * BLOCK)
        cluster.nodes[2].store.difference = failed  # type: ignore[method-assign]
        link = router.link(1)
        assert link is not None
        with pytest.raises(RetryableError, match="node 2 leaves: Input/output error"):
            await link.call(Op.REPAIR, b"", span=2, timeout_s=5, **holder.replicator.fields(OID))
        assert not cluster.nodes[1].disk_errors
        assert cluster.nodes[2].disk_errors


async def test_a_read_that_a_disk_refuses_is_served_by_another_node(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        await holder.create(OID, b"a" * BLOCK)
        for number in (1, 2):
            cluster.nodes[number].store.read = failed  # type: ignore[method-assign]
        for _turn in range(3):
            assert await holder.read(OID) == b"a" * BLOCK
        assert on_disk(cluster, 3) == b"a" * BLOCK
        assert not cluster.nodes[3].disk_errors
