"""Work that no client waits for, in threads that give way to whatever else wants a processor.

The usual worker threads are as good as the event loops of all daemons and mounts of the host: on
a busy machine each of them, copying 4 MiB into the page cache, delays requests by milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import trio

_R = TypeVar("_R")
NICENESS = 19
MAX_THREADS = 8


def _give_way() -> None:
    """Lower the priority of this thread alone, as Linux has it; without the right to, go on."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


_threads = ThreadPoolExecutor(MAX_THREADS, "background", _give_way)


async def run_sync(work: Callable[..., _R], *args: object) -> _R:
    """Call `work(*args)` in such a thread, as `trio.to_thread.run_sync` does in another.

    Cancellation: waits for the end of the work.
    """
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    future = _threads.submit(work, *args)
    future.add_done_callback(lambda _: token.run_sync_soon(ended.set))
    with trio.CancelScope(shield=True):
        await ended.wait()
    return future.result()
