"""Threads that give way: they do the work, tell how it went, and leave all others as they are."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio

from storaged import background


def niceness() -> tuple[int, int]:
    return threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0)


async def test_the_work_is_done_in_a_thread_that_gives_way_and_nothing_else_does() -> None:
    before = niceness()
    thread, nice = await background.run_sync(niceness)
    assert thread != before[0]
    assert nice == background.NICENESS
    assert niceness() == before
    assert (await trio.to_thread.run_sync(niceness))[1] == before[1]


async def test_errors_come_through_and_cancelling_waits_for_the_end() -> None:
    with pytest.raises(ZeroDivisionError):
        await background.run_sync(lambda: 1 // 0)
    go_on, began, ended = threading.Event(), trio.Event(), []
    token = trio.lowlevel.current_trio_token()

    def work() -> None:
        token.run_sync_soon(began.set)
        go_on.wait(5)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(background.run_sync, work)
        await began.wait()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert ended == [True]


async def test_where_no_priority_may_be_changed_the_work_is_done_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("setpriority")

    monkeypatch.setattr(os, "setpriority", refuse)
    with ThreadPoolExecutor(1, initializer=background._give_way) as threads:
        monkeypatch.setattr(background, "_threads", threads)
        assert await background.run_sync(lambda: "done") == "done"
