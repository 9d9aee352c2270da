"""The arithmetic of `sheepctl top`."""

from __future__ import annotations

from typing import Any

import pytest

from sheepfs.core.errors import ProtocolError
from sheepfs.core.traffic import Traffic
from sheepfs_tools.sheepctl.analysis.traffic_rates import Sample, node_rates, vdi_rates

MS = 1_000_000


def traffic(reads: int = 0, writes: int = 0, ms: int = 1) -> Traffic:
    made = Traffic()
    made.read.add_many(reads, ms * MS, reads * 4096)
    made.write.add_many(writes, ms * MS, writes * 4096)
    return made


def vdi(number: int, name: str, done: Traffic) -> dict[str, Any]:
    return {"id": number, "name": name, **done.encode()}


def mount(client: str, at: float, *vdis: dict[str, Any]) -> dict[str, Any]:
    return {"client": client, "mount": f"{client}:1:/mnt", "at": at, "vdis": list(vdis)}


def node(
    number: int, at: float, done: Traffic, *mounts: dict[str, Any], incarnation: int = 1
) -> dict[str, Any]:
    head = {"node": number, "incarnation": incarnation, "at": at, "mounts": list(mounts)}
    return {**head, **done.encode()}


def test_a_node_is_measured_by_its_own_clock() -> None:
    before = Sample.of([node(1, 100.0, traffic(reads=1000))])
    after = Sample.of([node(1, 104.0, traffic(reads=1400, writes=40))])
    row = node_rates(before, after)[1]
    read = row.rate("read")
    assert (read.per_s, read.bytes_per_s) == (100, 409_600)
    assert read.mean_s == pytest.approx(0.001)
    assert 0.0005 <= read.p99_s <= 0.0011
    assert row.rate("write").per_s == 10


def test_a_node_that_was_restarted_says_nothing_before_it_has_run_for_a_while() -> None:
    before = Sample.of([node(1, 100.0, traffic(reads=10))])
    after = Sample.of(
        [node(1, 102.0, traffic(reads=90_000), incarnation=2), node(2, 5.0, traffic())]
    )
    assert node_rates(before, after) == {}


def test_a_vdi_is_the_sum_of_what_its_mounts_saw() -> None:
    before = Sample.of(
        [
            node(1, 0, traffic(), mount("a", 10, vdi(7, "vm1.raw", traffic(writes=100)))),
            node(2, 0, traffic(), mount("b", 50, vdi(7, "vm1.raw", traffic(reads=5)))),
        ]
    )
    after = Sample.of(
        [
            node(1, 2, traffic(), mount("a", 12, vdi(7, "vm1.raw", traffic(writes=300)))),
            node(2, 2, traffic(), mount("b", 54, vdi(7, "vm1.raw", traffic(reads=45)))),
        ]
    )
    row = vdi_rates(before, after)[7]
    assert (row.rate("write").per_s, row.rate("read").per_s) == (100, 10)
    assert row.mounts == ["a:1:/mnt", "b:1:/mnt"]


def test_a_vdi_opened_meanwhile_counts_from_its_beginning() -> None:
    before = Sample.of([node(1, 0, traffic(), mount("a", 10))])
    after = Sample.of([node(1, 2, traffic(), mount("a", 12, vdi(7, "x", traffic(writes=4))))])
    assert vdi_rates(before, after)[7].rate("write").per_s == 2


def test_a_mount_that_is_new_or_silent_says_nothing() -> None:
    before = Sample.of([node(1, 0, traffic(), mount("a", 10, vdi(7, "x", traffic(writes=4))))])
    after = Sample.of(
        [
            node(
                1, 2, traffic(),
                mount("a", 10, vdi(7, "x", traffic(writes=4))),
                mount("b", 99, vdi(8, "y", traffic(writes=400))),
            )
        ]
    )  # fmt: skip
    assert vdi_rates(before, after) == {}


def test_of_two_daemons_that_know_a_mount_the_one_told_last_is_believed() -> None:
    old = mount("a", 10, vdi(7, "x", traffic(writes=4)))
    new = mount("a", 30, vdi(7, "x", traffic(writes=8)))
    for answers in (
        [node(1, 0, traffic(), old), node(2, 0, traffic(), new)],
        [node(1, 0, traffic(), new), node(2, 0, traffic(), old)],
    ):
        assert Sample.of(answers).mounts["a"].at == 30


def test_the_busiest_vdi_comes_first() -> None:
    idle = [vdi(n, f"vm{n}", traffic()) for n in (1, 2, 3)]
    busy = [vdi(n, f"vm{n}", traffic(reads=count)) for n, count in ((1, 5), (2, 50), (3, 0))]
    before = Sample.of([node(1, 0, traffic(), mount("a", 1, *idle))])
    after = Sample.of([node(1, 2, traffic(), mount("a", 3, *busy))])
    assert list(vdi_rates(before, after)) == [2, 1, 3]


@pytest.mark.parametrize(
    "answer",
    [None, {}, {"node": "x"}, node(1, 0, traffic(), {}), {**node(1, 0, traffic()), "read": 3}],
)
def test_an_answer_that_makes_no_sense_is_an_error(answer: Any) -> None:
    with pytest.raises(ProtocolError):
        Sample.of([answer])
