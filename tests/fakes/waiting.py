"""Waiting for a condition, with a deadline, instead of sleeping and hoping."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def wait_until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Wait until `condition()` is true; TooSlowError after the deadline."""
    with trio.fail_after(deadline_s):
        while not condition():
            await trio.sleep(0.005)
