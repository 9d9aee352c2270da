"""The pace of catching up; what it does is tested with whole clusters."""

from __future__ import annotations

from typing import cast

import trio
from trio.testing import MockClock

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.errors import RetryableError, SheepError
from storaged.operations.replica import Replica
from storaged.recovery.pulling import RETRY_DELAY_S, Peers
from storaged.recovery.recovery import Recovery


class Stuck(Recovery):
    """Never done; the map changes while it works."""

    def __init__(self) -> None:
        super().__init__(cast(Replica, None), cast(Peers, None), self._told)
        self.rounds = 0

    async def _told(self, groups: object) -> None: ...

    async def _guard(self) -> None: ...

    def _joining(self) -> list[tuple[int, int, PlacementGroup]]:
        return []

    async def _round(self) -> bool:
        self.rounds += 1
        await trio.lowlevel.checkpoint()
        if self.rounds == 1:
            self.map_changed()
        assert self.rounds < 100, "it goes round without a pause"
        return False

    async def _try_to_pull(
        self, oid: int, pool: int, pg: int, source: int | None, exact: bool
    ) -> SheepError | None:
        self.rounds += 1
        await trio.lowlevel.checkpoint()
        assert self.rounds < 1000, "it asks without a pause"
        return RetryableError("not yet")


async def test_a_group_that_cannot_be_joined_yet_is_tried_now_and_then(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    recovery = Stuck()
    nursery.start_soon(recovery.run)
    recovery.map_changed()
    await trio.sleep(10.5 * RETRY_DELAY_S)
    assert 10 <= recovery.rounds <= 13
    recovery.map_changed()
    before = recovery.rounds
    await trio.testing.wait_all_tasks_blocked()
    assert recovery.rounds == before + 1


async def test_an_object_that_cannot_be_pulled_yet_is_asked_for_now_and_then(
    autojump_clock: MockClock,
) -> None:
    recovery = Stuck()
    recovery.map_changed()
    with trio.move_on_after(10.5 * RETRY_DELAY_S):
        await recovery.pull(1, 3, 0)
    assert recovery.rounds <= 12
