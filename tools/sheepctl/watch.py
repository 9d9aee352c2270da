"""Showing something again and again: on a terminal in place, elsewhere one after another."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from sheepfs.core.errors import SheepError, UsageError

CLEAR = "\x1b[H\x1b[2J\x1b[3J"
Shown = TypeVar("Shown")


def clear_screen() -> None:
    """Begin a new screen, if this is one."""
    if sys.stdout.isatty():
        sys.stdout.write(CLEAR)


async def watch(
    interval_s: float | None,
    look: Callable[[], Awaitable[Shown]],
    show: Callable[[Shown], int],
) -> int:
    """Look and show: once if `interval_s` is None, else until interrupted.

    Args:
        look: fetches; once it has worked, errors of a later look are shown and it is tried again.
        show: prints what was fetched and gives the exit code.

    Raises:
        SheepError: the first look failed.
    """
    found = await look()
    if interval_s is None:
        return show(found)
    while True:
        clear_screen()
        show(found)
        sys.stdout.flush()
        found = await _next(interval_s, look)


async def _next(interval_s: float, look: Callable[[], Awaitable[Shown]]) -> Shown:
    while True:
        await trio.sleep(interval_s)
        try:
            return await look()
        except* UsageError:
            raise
        except* SheepError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            print(f"sheepctl: {error}; trying again", file=sys.stderr, flush=True)
