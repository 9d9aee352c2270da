"""Snapshots, clones, trash and reclaim of many VDIs on a real cluster, against bytes in memory."""

from __future__ import annotations

import pytest
import trio

from e2e.cluster import Mounted
from e2e.families import Families, seed_of
from e2e.soak import always_or_at_full_length
from sheepfs.cluster import Cluster
from sheepfs.connecting import connect
from sheepfs_tools.sheepctl.analysis.cluster_check import ClusterCheck, Findings

RECLAIM_S = 60.0


async def check_clean(cluster: Cluster) -> Findings:
    """Wait until reclaim has done what it was asked to, then compare all maps and objects."""
    with trio.fail_after(RECLAIM_S):
        while await cluster.catalog.reclaim_wanted():
            await trio.sleep(0.1)
    findings = await ClusterCheck(cluster).run()
    assert findings.clean, findings
    return findings


@pytest.mark.parametrize("number", always_or_at_full_length([0], range(1, 5)))
async def test_families_of_vdis_hold_what_was_written_and_leave_nothing_behind(
    mounted: Mounted, number: int, soak: bool
) -> None:
    etcd, name = mounted.cluster.etcd_address, mounted.cluster.cluster
    async with connect(etcd, name, "families") as cluster:
        families = Families(cluster, seed_of(number))
        await families.run(2_000 if soak else 300)
        await families.read_all()
        await families.close_all()
        await families.read_all()
        await families.close_all()
        await check_clean(cluster)
        await families.delete_all()
        findings = await check_clean(cluster)
        assert (findings.objects, findings.replicas, findings.own_bytes) == (0, 0, 0)
