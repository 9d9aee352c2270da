"""A progress bar with rate and time left, for what takes longer than a second."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

AFTER_S = 1.0

Moved = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


@contextlib.contextmanager
def progress(
    title: str, total_bytes: int | None, quiet: bool, things: bool = False
) -> Iterator[Moved]:
    """Show a bar on a terminal (standard error); elsewhere nothing.

    Args:
        total_bytes: None when it is not known before the end.
        things: it is no bytes that are counted.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if not things:
        counts = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total_bytes)
    began = time.monotonic()
    shown = False

    def moved(count: int) -> None:
        nonlocal shown
        bar.update(task, advance=count)
        if not shown and time.monotonic() - began > AFTER_S:
            shown = True
            bar.start()

    try:
        yield moved
    finally:
        if shown:
            bar.stop()


@contextlib.contextmanager
def counting(title: str, total: int, unit: str, quiet: bool) -> Iterator[Moved]:
    """Show how many of `total` things are done; the function given takes how many are in all."""
    if quiet or not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
