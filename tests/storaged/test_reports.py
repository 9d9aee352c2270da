"""What daemons count, and what they keep of the mounts' reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import trio

import storaged.reports
from fakes.static_cluster import static_cluster
from fakes.static_mount import StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.core.errors import UsageError
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import MAX_PAYLOAD
from storaged.reports import MAX_TEXT, MAX_VDIS, MountReports
from storaged.server import ClientConnection


async def test_a_write_counts_once_on_each_of_its_nodes_and_a_read_on_one(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        volume = await mount.start()
        await volume.attach()
        await mount.write(0, bytes(OBJECT_SIZE))
        await mount.flush()
        nodes = [node.server.traffic for node in cluster.nodes.values()]

        def counts() -> list[tuple[int, ...]]:
            return [(n.read.count, n.write.count, n.write.bytes, n.flush.count) for n in nodes]

        before = counts()
        for number in range(10):
            await mount.write(number * 4096, b"x" * 4096)
        for number in range(12):
            await mount.read(number * 4096, 4096)
        await mount.flush()
        after = counts()
        grown = [
            tuple(a - b for a, b in zip(*pair, strict=True))
            for pair in zip(after, before, strict=True)
        ]
        assert [row[1:] for row in grown] == [(10, 40_960, 1)] * 3
        assert sum(row[0] for row in grown) == 12
        assert sum(n.read.bytes for n in nodes) >= 12 * 4096


async def test_what_waits_for_the_disk_is_timed_from_its_receipt(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        volume = await mount.start()
        await volume.attach()
        gate = trio.Event()
        for node in cluster.nodes.values():
            flush_store = node.replica.flush_store

            async def slow(layer: int | None, real: Any = flush_store) -> None:
                await gate.wait()
                await real(layer)

            vars(node.replica)["flush_store"] = slow
        async with trio.open_nursery() as nursery:
            await mount.write(0, b"x" * 4096)
            began = trio.current_time()
            nursery.start_soon(mount.flush)
            await wait_until(lambda: trio.current_time() > began + 0.1)
            gate.set()
        for node in cluster.nodes.values():
            assert node.server.traffic.flush.nanoseconds > 80_000_000


class _Connection:
    def __init__(self) -> None:
        self.connection = self
        self.closed = False


def client() -> ClientConnection:
    return cast(ClientConnection, _Connection())


def row(vdi: int, name: str = "vm", **more: Any) -> dict[str, Any]:
    return {"id": vdi, "name": name, **Traffic().encode(), **more}


def report(*rows: object, at: object = 1.0) -> dict[str, Any]:
    return {"client": "c", "mount": "host:1:/mnt", "at": at, "vdis": list(rows)}


def told(reports: MountReports) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(reports.encoded())
    return content


def test_a_later_report_replaces_what_it_names_and_leaves_the_rest() -> None:
    reports, mount = MountReports(), client()
    reports.take(mount, report(row(1, "a"), row(2, "b"), at=1.0))
    reports.take(mount, report(row(2, "new"), at=2.0))
    (content,) = told(reports)
    assert content["at"] == 2.0
    assert {v["id"]: v["name"] for v in content["vdis"]} == {1: "a", 2: "new"}


def test_a_mounts_figures_go_with_its_connection() -> None:
    reports, gone, here = MountReports(), client(), client()
    reports.take(gone, report(row(1)))
    reports.take(here, report(row(2)))
    gone.connection.closed = True
    assert [v["id"] for content in told(reports) for v in content["vdis"]] == [2]


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        report(at="now"),
        report(at=float("inf")),
        {**report(), "vdis": {}},
        report(row(1), 5),
        report(row(-1)),
        report(row(1 << 32)),
        report(row(1, name=None)),  # type: ignore[arg-type]
        report(row(1, read=None)),
        report({"id": 1, "name": "x"}),
    ],
)
def test_a_bad_report_is_refused_and_nothing_of_it_is_kept(bad: object) -> None:
    reports = MountReports()
    with pytest.raises(UsageError):
        reports.take(client(), bad)
    assert told(reports) == []


def test_what_a_mount_can_make_a_daemon_keep_is_bounded() -> None:
    reports, mount = MountReports(), client()
    for first in range(0, 3 * MAX_VDIS, 64):
        reports.take(mount, report(*(row(v, "n" * 10_000) for v in range(first, first + 64))))
    (content,) = told(reports)
    assert len(content["vdis"]) == MAX_VDIS
    assert {len(v["name"]) for v in content["vdis"]} == {MAX_TEXT}
    assert max(v["id"] for v in content["vdis"]) == 3 * MAX_VDIS - 1


def test_a_reply_that_would_be_too_long_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert storaged.reports.MAX_REPLY_BYTES < MAX_PAYLOAD * 9 // 10
    monkeypatch.setattr(storaged.reports, "MAX_REPLY_BYTES", 50_000)
    reports = MountReports()
    for _ in range(2):
        reports.take(client(), report(*(row(v, "n" * MAX_TEXT) for v in range(64))))
    assert len(reports.encoded()) < 51_000
    content = told(reports)
    assert sum(len(c["vdis"]) + c["left_out"] for c in content) == 128
    assert content[-1]["left_out"] > 0
