"""Size and number of VDIs cost nothing until they are used."""

from __future__ import annotations

import json
from functools import partial

import trio

from e2e.cluster import Mounted, run, seconds
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Transaction
from sheepfs.core.metadata import NameRecord, VdiRecord
from sheepfs.net.etcd import Etcd
from sheepfs_tools.local.processes import wait_for

LISTED_S = 1.0
COUNT = 2000
PER_TRANSACTION = 50
FIRST_ID = 1 << 30
"""Far from the ids that the cluster gives out."""


def disk_usage(mounted: Mounted) -> int:
    return sum(
        int(run("du", "-sk", mounted.cluster.node_directory(number)).split()[0])
        for number in mounted.cluster.nodes
    )


def test_ten_tebibytes_are_created_as_fast_as_ten_gibibytes_and_use_no_space(
    mounted: Mounted,
) -> None:
    create = mounted.cluster.sheepctl
    create("vdi", "create", "warm-up", "1G")
    before = disk_usage(mounted)

    def fastest(size: str) -> float:
        return min(seconds(partial(create, "vdi", "create", f"{size}-{n}", size)) for n in range(3))

    small, large = fastest("10G"), fastest("10T")
    assert large < small * 1.5 + 0.1
    # Logs of the daemons' own may grow by some pages.
    assert disk_usage(mounted) - before < 256
    path = mounted.path / "10T-0.raw"
    wait_for(path.exists, 5, "the VDI to appear")
    assert path.stat().st_size == 10 << 40
    assert path.stat().st_blocks == 0
    with path.open("rb") as file:
        file.seek((10 << 40) - 4096)
        assert file.read() == bytes(4096)


def test_two_thousand_vdis_are_listed_in_under_a_second(mounted: Mounted) -> None:
    trio.run(add_vdis, mounted.cluster.etcd_address, mounted.cluster.cluster)
    known = json.loads(mounted.cluster.sheepctl("vdi", "list", "--json").stdout)
    assert sum(fact["name"].startswith("many") for fact in known) == COUNT

    def listed() -> int:
        return sum(line.endswith(".raw") and " many" in line for line in ls_lines(mounted))

    wait_for(lambda: listed() == COUNT, 10, "all VDIs to appear")
    assert min(seconds(lambda: ls_lines(mounted)) for _ in range(3)) < LISTED_S


def ls_lines(mounted: Mounted) -> list[str]:
    return run("ls", "-l", mounted.path).splitlines()


async def add_vdis(etcd: str, cluster: str) -> None:
    """Write the records of `COUNT` VDIs, many in one transaction."""
    keys = Keys(cluster)
    async with Etcd(etcd) as store:
        for first in range(0, COUNT, PER_TRANSACTION):
            changes: list[Put | Delete] = []
            for number in range(first, first + PER_TRANSACTION):
                vdi, name = FIRST_ID + number, f"many{number}.raw"
                record = VdiRecord(
                    vdi, 1 << 30, 3, vdi, map=vdi, family=vdi, created=1.0, modified=1.0
                )
                changes.append(Put(keys.vdi(name), record.encode()))
                changes.append(Put(keys.vdi_name(vdi), NameRecord(name).encode()))
            assert await store.commit(Transaction([], changes)) is not None
