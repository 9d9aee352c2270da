"""`sheepctl vdi check`, asking real daemons' insides: what it takes for a difference, what not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticCluster, static_cluster
from fakes.static_mount import LAYER, StaticMount, StaticRecord
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import RetryableError
from sheepfs.core.geometry import OBJECT_SIZE, data_object, describe_oid, pg_of
from sheepfs_tools.sheepctl.analysis import replica_check
from sheepfs_tools.sheepctl.analysis.replica_check import Checker, Report
from sheepfs_tools.sheepctl.session import Session

BLOCK = 4096
A, B = b"a" * BLOCK, b"b" * BLOCK


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_check, "PAUSE_S", 0.001)


@asynccontextmanager
async def written(tmp_path: Path) -> AsyncIterator[tuple[StaticCluster, StaticMount]]:
    """A VDI with one object at three nodes, held by a mount."""
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord(2 * OBJECT_SIZE))
        await mount.start()
        await mount.write(0, A)
        await mount.flush()
        yield cluster, mount


async def check(cluster: StaticCluster, mount: StaticMount, *, deep: bool) -> Report:
    async def cluster_map() -> ClusterMap:
        return cluster.map

    session = SimpleNamespace(config=SimpleNamespace(cluster=cluster.uuid), cluster_map=cluster_map)
    with trio.fail_after(30):
        return await Checker(cast(Session, session), mount.etcd.record, deep).run()


@pytest.mark.parametrize("deep", [False, True])
async def test_equal_replicas_agree(tmp_path: Path, deep: bool) -> None:
    async with written(tmp_path) as (cluster, mount):
        report = await check(cluster, mount, deep=deep)
        # The data object and the map object.
        assert (report.agree, report.objects, report.replicas) == (True, 2, 6)


@pytest.mark.parametrize("deep", [False, True])
async def test_a_replica_that_holds_other_bytes_differs(tmp_path: Path, deep: bool) -> None:
    async with written(tmp_path) as (cluster, mount):
        oid = data_object(LAYER, 0)
        store = cluster.nodes[2].store
        entry = store.get(oid)
        assert entry is not None
        store.mark([oid])
        store.write(oid, 0, B, entry.version, create=True, pool=3, pg=pg_of(oid, PG_COUNT))
        report = await check(cluster, mount, deep=deep)
        (answers,) = report.differences.values()
        assert answers[1] == answers[3] != answers[2]
        assert not report.agree


@pytest.mark.parametrize("deep", [False, True])
async def test_a_vdi_that_is_written_all_the_time_differs_nowhere(
    tmp_path: Path, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written between two answers: here something always is, at first."""
    async with written(tmp_path) as (cluster, mount):
        asked = 0
        read = Checker._read

        async def read_and_change(self: Checker, *arguments: object) -> bytes:
            nonlocal asked
            asked += 1
            data = await read(self, *arguments)  # type: ignore[arg-type]
            if asked < 5 * replica_check.ATTEMPTS:
                await mount.write(0, B if asked % 2 else A)
            return data

        monkeypatch.setattr(Checker, "_read", read_and_change)
        report = await check(cluster, mount, deep=deep)
        assert report.agree, report


async def test_members_that_all_refuse_to_tell_do_not_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with written(tmp_path) as (cluster, mount):

        async def refuse(self: Checker, *arguments: object, flags: int = 0) -> tuple[int, str]:
            raise RetryableError("not now")

        monkeypatch.setattr(Checker, "_stat", refuse)
        report = await check(cluster, mount, deep=False)
        assert not report.agree
        assert set(report.differences[describe_oid(data_object(LAYER, 0))].values()) == {"not now"}
