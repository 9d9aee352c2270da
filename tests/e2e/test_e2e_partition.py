"""Networks that break between hosts: nothing acknowledged is lost, and a VDI has one holder.

One host writes stamped blocks to a VDI, with fsync, and runs fio on another one; a second host
wants the first VDI all the time, and gets it when the first has lost its hold.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e import partition
from e2e.cluster import Mounted, missing_for_mount
from e2e.load import end_fio, longest_wait_s, start_fio
from e2e.partition import Hosts, HostsCluster
from e2e.soak import always_or_at_full_length
from e2e.witness import StampingWriter, Taker, assert_nothing_lost, now
from sheepfs.holding.holding import LEASE_TTL_S
from sheepfs_tools.local.processes import wait_for

BACK_S = 10.0
"""After healing, at most."""
TAKE_S = 30.0
"""Until a VDI is taken whose holder has lost its lease."""
STALL_S = 1.0
SIZE = "40M"


class Partitioned:
    """A cluster on hosts of their own, mounted on two of them, and who uses it."""

    def __init__(self, directory: Path, node_count: int) -> None:
        self.cluster = HostsCluster(directory / "data", node_count)
        self.hosts: Hosts = self.cluster.hosts
        self.mounted = Mounted(self.cluster, directory / "mnt")
        self.other = directory / "other"
        self._directory = directory
        self._turn = 0

    def start(self) -> None:
        """Start what does not run."""
        self.mounted.start()
        self.cluster.mount(self.other)
        # Nodes come and go all the time here: they are not to be held out for that.
        self.cluster.sheepctl("node", "patience", "--longest", "0")

    def new_vdi(self, name: str, size: str = SIZE) -> str:
        """Make a VDI that both mounts show; gives its file's name."""
        self._turn += 1
        path = self.mounted.create(f"{name}{self._turn}", size)
        wait_for((self.other / path.name).exists, 10, f"{path.name} on the other mount")
        return path.name

    def writer(self, name: str) -> StampingWriter:
        """Start to write to a VDI on the first client; returns when some of it is durable."""
        writer = StampingWriter(self.mounted.path / name, self._directory / f"{name}.w{now()}")
        wait_for(lambda: writer.synced_after(0), 20, "the first fsync")
        return writer

    def taker(self, name: str) -> Taker:
        """Start to want a VDI on the second client; returns when it was refused."""
        taker = Taker(self.other / name, self._directory / f"{name}.t{now()}")
        wait_for(lambda: taker.taken or taker.refusals(), 20, "the first attempt to take a VDI")
        return taker

    def fio(self, runtime_s: float) -> subprocess.Popen[str]:
        """Start to write and verify on the first client, on a VDI of its own."""
        mib = 64 if runtime_s < 100 else 384
        path = self.mounted.path / self.new_vdi("load", f"{mib}M")
        # Slow enough not to come to the end: it would open the file again, which needs etcd.
        rate = int(0.8 * mib * 256 / runtime_s)
        return start_fio(path, "4k", runtime_s, f"{mib}M", f"--rate_iops={rate}")

    def part(self, name: str) -> str:
        """Give the host of a part: `leader`, `follower` and `third` are nodes."""
        if name not in ("leader", "follower", "third"):
            return name
        rows: list[dict[str, Any]] = self.mounted.status()["nodes"]
        leader = next(row["node"] for row in rows if row.get("leader"))
        others = sorted(row["node"] for row in rows if row["node"] != leader)
        return f"node{[leader, *others][('leader', 'follower', 'third').index(name)]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, soak: bool) -> Iterator[Partitioned]:
    if reason := missing_for_mount() or partition.missing():
        pytest.skip(reason)
    place = Partitioned(tmp_path_factory.mktemp("partition"), 5 if soak else 3)
    try:
        place.start()
        yield place
    finally:
        place.cluster.destroy()


@pytest.fixture
def mounted(place: Partitioned) -> Iterator[Mounted]:
    """What a failed test's report shows the logs of."""
    yield place.mounted
    place.hosts.heal()


@dataclass(frozen=True)
class Cut:
    """A fault between two parts of the cluster; `all` is everybody else.

    Attributes:
        how: `both`, `there` (what the first one sends vanishes), `back`, or `refused`.
        lasts_s: how long at least.
    """

    one: str
    other: str
    how: str
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.one}_{self.how}_{self.other}_{self.lasts_s:g}s"

    @property
    def frees(self) -> bool:
        """Whether the first client may lose its lease, so that the second may have the VDI."""
        return {self.one, self.other} in ({"client1", "etcd"}, {"client1", "all"}, {"etcd", "all"})

    @property
    def gives(self) -> bool:
        """Whether the second client can have the VDI before the cut ends."""
        return self.frees and self.one == "client1" and not 0 < self.lasts_s < LEASE_TTL_S

    @property
    def hides(self) -> bool:
        """Whether nobody can know that the first client is alive, and still uses its VDIs."""
        return self.gives and self.other == "all"

    def make(self, place: Partitioned) -> None:
        """Bring it."""
        one, hosts = place.part(self.one), place.hosts
        if self.other != "all":
            others = [place.part(self.other)]
        else:
            others = [name for name in hosts.names if name != one]
        for other in others:
            if self.how == "refused":
                hosts.refuse(one, other)
            if self.how in ("both", "there"):
                hosts.cut_one_way(one, other)
            if self.how in ("both", "back"):
                hosts.cut_one_way(other, one)


PAIRS = (
    ("client1", "follower"),
    ("client1", "leader"),
    ("follower", "third"),
    ("leader", "follower"),
    ("follower", "etcd"),
    ("leader", "etcd"),
    ("client1", "etcd"),
    ("follower", "all"),
    ("leader", "all"),
    ("client1", "all"),
    ("etcd", "all"),
)
CUTS = [
    *((Cut("client1", "etcd", "both", 0), Cut("leader", "follower", "there", 4)),),
    *((Cut(one, other, how, 25),) for one, other in PAIRS for how in ("both", "there", "back")),
    *((Cut(one, other, "both", lasts),) for one, other in PAIRS for lasts in (3, 7, 90)),
    *((Cut(one, other, "refused", 15),) for one, other in PAIRS),
]


@pytest.mark.parametrize(
    "cuts",
    always_or_at_full_length(CUTS[:1], CUTS[1:]),
    ids=lambda cuts: "+".join(map(str, cuts)),
)
def test_a_cut_loses_nothing_and_service_is_back_soon_after_it(
    place: Partitioned, mounted: Mounted, cuts: tuple[Cut, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name = place.new_vdi("stamped")
    lasts_s = max(cut.lasts_s for cut in cuts)
    gives = any(cut.gives for cut in cuts)
    fio = place.fio(max(lasts_s, LEASE_TTL_S * gives) + 5)
    writer = place.writer(name)
    taker = place.taker(name)
    try:
        began = now()
        for cut in cuts:
            cut.make(place)
        if gives:
            wait_for(lambda: taker.taken, LEASE_TTL_S + TAKE_S, "the other host to take the VDI")
            taker.first_reading()
        # Nothing to wait for: a cut has a length.
        time.sleep(max(0.0, began + lasts_s - now()))
        healed = now()
        place.hosts.heal()
        back = _wait_back(writer, healed)
        mounted.wait_healthy()
        whole_s = now() - healed
        figures = {
            "back_s": round(back - healed, 2),
            "whole_s": round(whole_s, 2),
            "stall_s": round(writer.longest_wait_s(began, healed), 2),
            "taken_after_s": taker.taken and round(taker.taken - began, 2),
        }
        with capsys.disabled():
            print(f"\n  {'+'.join(map(str, cuts))}: {figures}")
        assert any(cut.frees for cut in cuts) or taker.taken is None, (
            "two holders: the first one could reach etcd"
        )
        _check_holders(writer, taker)
        if not any(cut.hides for cut in cuts):
            longest_wait_s(fio, 120)
        assert back - healed < BACK_S
    finally:
        place.hosts.heal()
        for process in (writer, taker):
            process.kill()
        end_fio(fio)
    mounted.assert_replicas_agree(name)
    if gives:
        # Objects that the former holder was about to make may be left on some nodes.
        place.cluster.sheepctl("cluster", "check", "--repair", check=False)
    checked = place.cluster.sheepctl("cluster", "check", check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("how", always_or_at_full_length(["paused"], ["killed"]))
def test_io_goes_on_while_etcd_is_away_and_nothing_changes_when_it_is_back(
    place: Partitioned, mounted: Mounted, how: str, soak: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    calm_s, away_s = (30.0, 300.0) if soak else (2.0, LEASE_TTL_S + 1.0)
    etcd = place.cluster.etcd
    name = place.new_vdi("stamped")
    fio = place.fio(calm_s + away_s + 3)
    writer = place.writer(name)
    epoch = mounted.status()["epoch"]
    try:
        calm = now()
        # Nothing to wait for: this is how long etcd is there, and is not.
        time.sleep(calm_s)
        began = now()
        etcd.signal(signal.SIGSTOP) if how == "paused" else etcd.kill()
        time.sleep(away_s)
        etcd.signal(signal.SIGCONT)
        place.cluster.start_etcd()
        back = now()
        wait_for(lambda: mounted.holder(name), BACK_S, "the hold on the VDI to be back in etcd")
        back_s = now() - back
        mounted.wait_healthy()
        baseline_s = writer.longest_wait_s(calm, began)
        stall_s = writer.longest_wait_s(began, now())
        with capsys.disabled():
            figures = f"longest wait {stall_s:.2f} s, before {baseline_s:.2f} s"
            print(f"\n  etcd {how} for {away_s:g} s: {figures}, hold back after {back_s:.1f} s")
        assert writer.failed() is None
        assert stall_s < baseline_s + STALL_S
        assert longest_wait_s(fio, 120) < baseline_s + STALL_S
        assert mounted.status()["epoch"] == epoch
        writer.kill()
        taker = place.taker(name)
        wait_for(lambda: taker.taken, LEASE_TTL_S, "the VDI to be free")
        assert_nothing_lost(writer.blocks(), taker.first_reading())
        taker.let_go()
    finally:
        etcd.signal(signal.SIGCONT)
        writer.kill()
        end_fio(fio)
    mounted.assert_replicas_agree(name)


def _check_holders(writer: StampingWriter, taker: Taker) -> None:
    """The VDI had one holder at a time, and the second one finds all that the first was told of."""
    # Held by the other host; or etcd does not answer.
    assert taker.refusals() <= {errno.EBUSY, errno.EAGAIN, errno.EHOSTUNREACH}
    if taker.taken is None:
        assert writer.failed() is None
        writer.kill()
        wait_for(lambda: taker.taken, LEASE_TTL_S, "the VDI to be free")
    else:
        failed = writer.failed()
        assert failed is not None
        assert failed[0] == errno.EIO
        assert writer.acknowledged_after(taker.taken) == []
    before = taker.first_reading()
    assert_nothing_lost(writer.blocks(), before)
    assert taker.read_again() == before
    taker.let_go()


def _wait_back(writer: StampingWriter, healed: float) -> float:
    """Give when the writer went on after a moment, or learnt that the VDI is another's."""

    def moment() -> float | None:
        failed = writer.failed()
        return max(failed[1], healed) if failed else writer.synced_after(healed)

    wait_for(moment, 180, "service to be back")
    found = moment()
    assert found is not None
    return found
