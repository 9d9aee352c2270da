"""Size and number of VDIs cost nothing until they are used."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from e2e.cluster import Mounted, run, seconds
from sheepfs_tools.processes import wait_for

LISTED_S = 1.0


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


def test_two_thousand_vdis_are_listed_in_under_a_second(mounted: Mounted, soak: bool) -> None:
    count = 2000 if soak else 400
    create_many(mounted, count)
    names = {
        fact["name"]
        for fact in json.loads(mounted.cluster.sheepctl("vdi", "list", "--json").stdout)
    }
    assert len([name for name in names if name.startswith("many")]) == count

    def complete() -> bool:
        return len([n for n in run("ls", mounted.path).split() if n.startswith("many")]) == count

    wait_for(complete, 10, "all VDIs to appear")
    assert seconds(lambda: run("ls", "-l", mounted.path)) < LISTED_S


def create_many(mounted: Mounted, count: int) -> None:
    """Create empty VDIs through the mount, several at a time."""

    def create(number: int) -> None:
        (mounted.path / f"many{number}.raw").touch(exist_ok=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(count)))
    subprocess.run(["sync", str(mounted.path)], check=False, capture_output=True)
