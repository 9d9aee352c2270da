"""What this mount's VDIs did: kept for its metrics, and told to the daemons for `sheepctl top`.

Always holds:
- Figures only grow as long as the mount lives; those of a VDI outlast its being closed, up to
  `KEPT` VDIs.
- A report says what has changed since the last one to the same daemon; each daemon hears of the
  mounts whose turn falls on it, so that none hears of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import trio

from sheepfs.callbacks import ignore_answer
from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import Op
from sheepfs.net.link import Link, next_request
from sheepfs.net.router import Router

KEPT = 256
"""VDIs that are not open any more and whose figures are kept."""
REPORT_S = 1.0
ROWS_AT_ONCE = 16
"""VDIs in one message: some 0.2 ms of the event loop."""


class Account(NamedTuple):
    """One VDI or snapshot of this mount."""

    item: int
    name: str
    traffic: Traffic
    stalled: bool


class Accounts:
    """The mount's figures by VDI."""

    def __init__(self) -> None:
        self._traffic: dict[int, Traffic] = {}
        self._names: dict[int, str] = {}

    def open(self, item: int, name: str, in_use: Collection[int]) -> Traffic:
        """Give the figures of a VDI that is opened; those of the longest unused one may go."""
        traffic = self._traffic.pop(item, None) or Traffic()
        self._traffic[item] = traffic
        self._names[item] = name
        if len(self._traffic) > KEPT:
            unused = (other for other in self._traffic if other not in in_use and other != item)
            if (oldest := next(unused, None)) is not None:
                del self._traffic[oldest], self._names[oldest]
        return traffic

    def renamed(self, item: int, name: str) -> None:
        """From now on a VDI is shown under another name."""
        if item in self._names:
            self._names[item] = name

    def rows(self) -> Iterator[tuple[int, str, Traffic]]:
        """Give (id, name, figures) of all."""
        for item, traffic in list(self._traffic.items()):
            yield item, self._names[item], traffic


class Reporter:
    """Tells one daemon, every second, what has changed."""

    def __init__(self, router: Router, mount: str, rows: Callable[[], Iterator[Account]]) -> None:
        self._router = router
        self._mount = mount
        self._rows = rows
        self._link: Link | None = None
        self._told: dict[int, tuple[str, int]] = {}

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await trio.sleep(REPORT_S)
            link = self._whose_turn()
            if link is None:
                continue
            if link is not self._link:
                self._link = link
                self._told.clear()
            at = trio.current_time()
            changed = [row for row in self._rows() if self._is_news(row)]
            for first in range(0, max(1, len(changed)), ROWS_AT_ONCE):
                body = self._encode(at, changed[first : first + ROWS_AT_ONCE])
                link.request(Op.REPORT, next_request(), ignore_answer, body)
                await trio.lowlevel.checkpoint()

    def _whose_turn(self) -> Link | None:
        links = self._router.links
        if not links:
            return None
        nodes = sorted(links)
        return links[nodes[int(self._router.client, 16) % len(nodes)]]

    def _is_news(self, row: Account) -> bool:
        state = (row.name, row.traffic.total)
        if self._told.get(row.item) == state:
            return False
        self._told[row.item] = state
        return True

    def _encode(self, at: float, rows: list[Account]) -> bytes:
        """Also when there is no news: then that is the news."""
        vdis: list[dict[str, Any]] = [
            {"id": row.item, "name": row.name, **row.traffic.encode()} for row in rows
        ]
        content = {"client": self._router.client, "mount": self._mount, "at": at, "vdis": vdis}
        return json.dumps({"traffic": content}, separators=(",", ":")).encode()
