"""What a mount keeps of its VDIs' figures, and what of them it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import trio

from sheepfs.accounts import KEPT, REPORT_S, ROWS_AT_ONCE, Account, Accounts, Reporter
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import Buffer, Op
from sheepfs.net.router import Router


def test_a_vdi_that_is_opened_again_goes_on_counting() -> None:
    accounts = Accounts()
    first = accounts.open(7, "vm1.raw", {})
    first.read.add(1000, 4096)
    assert accounts.open(7, "new.raw", {}) is first
    assert [(item, name) for item, name, _ in accounts.rows()] == [(7, "new.raw")]


def test_the_longest_closed_goes_first_and_none_that_is_open() -> None:
    accounts = Accounts()
    for item in range(KEPT + 10):
        accounts.open(item, f"vm{item}", {0, 1, item})
    items = [item for item, _, _ in accounts.rows()]
    assert len(items) == KEPT
    assert items[:3] == [0, 1, 12]


class _Node:
    """In place of a link: what it was sent."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def request(self, op: int, request: int, answer: object, payload: Buffer = b"") -> None:
        assert op == Op.REPORT
        self.reports.append(json.loads(bytes(payload))["traffic"])

    def told(self) -> list[list[int]]:
        """Give the VDIs of each report so far, and forget them."""
        told = [[vdi["id"] for vdi in report["vdis"]] for report in self.reports]
        self.reports.clear()
        return told


class _Router:
    def __init__(self) -> None:
        self.client = "00000000000000000000000000000005"
        self.links: dict[int, _Node] = {}


async def test_each_second_one_daemon_hears_of_what_has_changed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    accounts = [Account(item, f"vm{item}", Traffic(), stalled=False) for item in range(3)]
    router = _Router()

    def rows() -> Iterator[Account]:
        yield from accounts

    async def seconds(count: int) -> None:
        await trio.sleep(REPORT_S * count)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Reporter(cast(Router, router), "host:1:/mnt", rows).run)
        await trio.sleep(REPORT_S * 2.5)  # From here on always between two reports.
        one = router.links[4] = _Node()
        await seconds(1)
        assert one.told() == [[0, 1, 2]], "a daemon that knows nothing hears all"
        accounts[1].traffic.write.add(5, 4096)
        await seconds(2)
        assert one.told() == [[1], []], "no news is told, too: time goes on"
        accounts[0] = accounts[0]._replace(name="renamed")
        await seconds(1)
        assert one.told() == [[0]]
        two = router.links[2] = _Node()
        await seconds(1)
        router.links.pop(4)
        await seconds(1)
        told = one.told() + two.told()
        assert [0, 1, 2] in told, "another one whose turn it is hears all"
        accounts += [Account(item, f"vm{item}", Traffic(), stalled=False) for item in range(3, 60)]
        await seconds(1)
        told = two.told()
        assert [vdi for vdis in told for vdi in vdis] == list(range(3, 60))
        assert max(map(len, told)) == ROWS_AT_ONCE
        nursery.cancel_scope.cancel()
