"""Showing something again and again, with and without luck."""

from __future__ import annotations

import argparse

import pytest
import trio

from sheepfs.core.errors import UnreachableError
from sheepfs_tools.sheepctl.commandline.areas import interval_of
from sheepfs_tools.sheepctl.commandline.parser import build_parser
from sheepfs_tools.sheepctl.watch import watch


class Source:
    """Gives 1, 2, 3, …; fails where the script says so."""

    def __init__(self, *failures: int) -> None:
        self.looks = 0
        self._failures = failures
        self.shown: list[int] = []

    async def look(self) -> int:
        await trio.lowlevel.checkpoint()
        self.looks += 1
        if self.looks in self._failures:
            raise UnreachableError("etcd does not answer")
        return self.looks

    def show(self, found: int) -> int:
        self.shown.append(found)
        return found + 40


async def test_without_an_interval_it_is_shown_once_and_gives_the_exit_code() -> None:
    source = Source()
    assert await watch(None, source.look, source.show) == 41
    assert source.shown == [1]


async def test_a_look_that_fails_later_is_told_and_tried_again(
    autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(2, 3)
    with trio.move_on_after(9):
        await watch(2.0, source.look, source.show)
    assert source.shown == [1, 4, 5]
    assert capsys.readouterr().err == "sheepctl: etcd does not answer; trying again\n" * 2


async def test_a_first_look_that_fails_ends_it() -> None:
    source = Source(1)
    with pytest.raises(UnreachableError):
        await watch(2.0, source.look, source.show)


def test_watch_takes_seconds_or_none() -> None:
    parse = build_parser().parse_args
    assert parse(["cluster", "status"]).watch is None
    assert parse(["cluster", "status", "--watch"]).watch == 2
    assert parse(["node", "list", "--watch", "10"]).watch == 10


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", "100000"])
def test_a_time_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        interval_of(2.0)(text)
