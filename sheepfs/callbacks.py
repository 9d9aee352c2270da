"""Callback-style completion, and the bridges between it and async functions.

The data path completes by callback with an errno (0: done), so that no task is needed for each
request; what is not on the data path awaits the same operations with `completion`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TypeAlias

import trio

from sheepfs.backend import OpenVolume
from sheepfs.core.errors import SheepError
from sheepfs.core.wire import Buffer, Header
from sheepfs.net.link import Link

Completed: TypeAlias = Callable[[int], None]
"""Called once with errno or 0."""


class OperationError(SheepError):
    """A callback-style operation failed; the cause is in the log."""

    def __init__(self, code: int) -> None:
        super().__init__(f"failed with {errno.errorcode.get(code, code)}")
        self.errno = code  # type: ignore[misc]


def countdown(parts: int, done: Completed) -> Completed:
    """Give a callback to be called `parts` times; then `done` gets the first error."""
    failed = 0

    def part_done(code: int) -> None:
        nonlocal parts, failed
        failed = failed or code
        parts -= 1
        if not parts:
            done(failed)

    return part_done


async def completion(start: Callable[[Completed], None]) -> None:
    """Await a callback-style operation; its errno becomes an OperationError."""
    finished = trio.Event()
    outcome: list[int] = []

    def done(code: int) -> None:
        outcome.append(code)
        finished.set()

    start(done)
    await finished.wait()
    if outcome[0]:
        raise OperationError(outcome[0])


async def read_bytes(volume: OpenVolume, offset: int, length: int) -> bytes:
    """Await a volume's read. Raises OperationError."""
    parts: list[bytes] = []

    def start(done: Completed) -> None:
        def read(code: int, buffers: Sequence[Buffer]) -> None:
            parts.append(b"".join(buffers))
            done(code)

        volume.read(offset, length, read)

    await completion(start)
    return parts[0]


def ignore_answer(link: Link, header: Header | None, payload: memoryview | None) -> None:
    """For requests that may fail without harm, or whose effect shows elsewhere."""
