"""What sheepctl prints: rich tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sheepfs_tools.sizes import format_size

COLOURS = {"ok": "green", "degraded": "yellow", "down": "red", "active": "green"}


def print_json(content: Any, *, in_one_line: bool = False) -> None:
    """Print JSON; keys keep their order."""
    json.dump(content, sys.stdout, indent=None if in_one_line else 2)
    sys.stdout.write("\n")


def printable(text: str) -> str:
    """Make a name from etcd harmless: no control character reaches the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns whose title starts with `>` stand to the right.

    Not on a terminal, lines are as long as they must be: pipes do not wrap.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            *(Text(printable(str(cell)), style=COLOURS.get(str(cell), "")) for cell in row)
        )
    Console(width=None if sys.stdout.isatty() else 500).print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print one fact a line, aligned."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {printable(str(value))}")


def print_verdict(verdict: str, reasons: Sequence[str]) -> None:
    """Print the health in one line: the verdict, then why."""
    from rich.console import Console
    from rich.text import Text

    line = Text("health: ").append(verdict, style=f"bold {COLOURS.get(verdict, '')}".strip())
    if reasons:
        line.append(" (" + printable("; ".join(reasons)) + ")")
    Console(soft_wrap=True).print(line)


def moment(seconds: float) -> str:
    """Give a point in time as people write it; nothing for 0 (not known)."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def time_of_day(seconds: float) -> str:
    """Give a point in time that is near."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def size_or_dash(value: object) -> str:
    """Give a size of a STATUS field that may be missing."""
    return format_size(value) if isinstance(value, int | float) else "-"
