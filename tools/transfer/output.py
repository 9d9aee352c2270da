"""What import, export, backup, restore and diff print at their end."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TypeAlias

from sheepfs_tools.sheepctl.output import print_json, print_table, printable
from sheepfs_tools.sizes import format_size
from sheepfs_tools.transfer.backup import BackedUp
from sheepfs_tools.transfer.files import STREAM
from sheepfs_tools.transfer.images import Differences, Exported, Imported
from sheepfs_tools.transfer.restore import Restored

Outcome: TypeAlias = Imported | Exported | BackedUp | Restored | Differences


def report(outcome: Outcome, as_json: bool) -> None:
    """Print an outcome; on standard error if the data itself went to standard output."""
    file = sys.stdout
    if isinstance(outcome, Exported | BackedUp) and outcome.file == STREAM:
        file = sys.stderr
    if as_json:
        if file is sys.stdout:
            print_json(asdict(outcome))
        else:
            print(json.dumps(asdict(outcome)), file=file)
        return
    if isinstance(outcome, Differences) and outcome.changes:
        print_table(
            (">START", ">END", ">LENGTH", "IS NOW"),
            (
                (c.start, c.end, format_size(c.end - c.start), "data" if c.is_data else "zeros")
                for c in outcome.changes
            ),
        )
    print(printable(_sentence(outcome)), file=file)


def _sentence(outcome: Outcome) -> str:
    match outcome:
        case Imported():
            return (
                f"Imported {outcome.name}: {format_size(outcome.size)},"
                f" {format_size(outcome.data)} of data"
            )
        case Exported():
            return (
                f"Exported {outcome.source} to {outcome.file}: {format_size(outcome.size)},"
                f" {format_size(outcome.data)} of data"
            )
        case BackedUp():
            since = f" since {outcome.since}" if outcome.since else ""
            return (
                f"Backed up {outcome.source}{since} to {outcome.file}:"
                f" {format_size(outcome.data)} of data in {format_size(outcome.length)}"
            )
        case Restored():
            since = f" on {outcome.since}" if outcome.since else ""
            return (
                f"Restored {outcome.name}{since}: {format_size(outcome.data)} of data; it is"
                f" snapshot {outcome.tag} now"
            )
        case Differences():
            sizes = ""
            if outcome.older_size != outcome.newer_size:
                sizes = (
                    f"; its size was {format_size(outcome.older_size)} and is"
                    f" {format_size(outcome.newer_size)}"
                )
            return (
                f"From {outcome.older} to {outcome.newer}: {format_size(outcome.data)} of data"
                f" changed, {format_size(outcome.zeros)} became zeros{sizes}"
            )
