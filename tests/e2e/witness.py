"""What two hosts that want one VDI were told, and what must follow from it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e2e import stamping
from sheepfs_tools.local.processes import wait_for


def _rows(log: Path) -> Iterator[list[str]]:
    """Give the whole lines of a log, in words."""
    if log.exists():
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield line.split()


@dataclass
class Block:
    """What the writer knows of one block.

    Attributes:
        acknowledged: the number of the last write that was acknowledged; 0 if none was.
        later: numbers of writes after it, whose outcome is unknown.
    """

    acknowledged: int = 0
    later: tuple[int, ...] = ()

    @property
    def legal(self) -> set[int]:
        """What may be found in it."""
        return {self.acknowledged, *self.later}


class StampingWriter:
    """A process that writes stamped blocks and fsyncs, until an error (stamping.py)."""

    def __init__(self, path: Path, log: Path, first: int = 0) -> None:
        self._log = log
        argv = [sys.executable, stamping.__file__, path, log, "0", str(first)]
        self._process = subprocess.Popen([str(word) for word in argv])

    def synced_after(self, moment: float) -> float | None:
        """Give when the first fsync returned whose write was issued after a moment."""
        issued = False
        for row in _rows(self._log):
            issued = issued or (row[0] == "w" and float(row[3]) > moment)
            if issued and row[0] == "f":
                return float(row[1])
        return None

    def failed(self) -> tuple[int, float] | None:
        """Give errno and time of the error that ended it."""
        for row in _rows(self._log):
            if row[0] == "e":
                return int(row[1]), float(row[2])
        return None

    def longest_wait_s(self, since: float, until: float) -> float:
        """Give how long it waited at most for a write or fsync that was under way in between."""
        longest, before = 0.0, since
        for row in _rows(self._log):
            moment = float(row[-1])
            if row[0] in "dfe" and moment > since:
                longest = max(longest, moment - max(before, since))
                if moment > until:
                    break
            before = moment
        else:
            longest = max(longest, until - max(before, since))
        return longest

    def acknowledged_after(self, moment: float) -> list[int]:
        """Give the numbers of the writes issued after a moment, and acknowledged."""
        found, number = [], 0
        for row in _rows(self._log):
            if row[0] == "w":
                number = int(row[2]) if float(row[3]) > moment else 0
            elif row[0] == "d" and number:
                found.append(number)
        return found

    def blocks(self) -> dict[int, Block]:
        """Give what it knows of each block that it has written to."""
        found: dict[int, Block] = {}
        block = Block()
        for row in _rows(self._log):
            if row[0] == "w":
                block = found.setdefault(int(row[1]), Block())
                block.later = (*block.later, int(row[2]))
            elif row[0] == "d":
                block.acknowledged, block.later = block.later[-1], ()
        return found

    def kill(self) -> None:
        """End it, within a write perhaps."""
        self._process.kill()
        self._process.wait(60)


class Taker:
    """A process that takes the VDI when it can be had, on another mount (taking.py)."""

    def __init__(self, path: Path, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "e2e.taking", str(path), str(log)],
            stdin=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    @property
    def taken(self) -> float | None:
        """When it had the VDI; None before."""
        return next((float(row[1]) for row in _rows(self._log) if row[0] == "t"), None)

    def refusals(self) -> set[int]:
        """Give the errors of its attempts so far."""
        return {int(row[1]) for row in _rows(self._log) if row[0] == "x"}

    def _readings(self) -> list[dict[int, int]]:
        readings: list[dict[int, int]] = []
        reading: dict[int, int] = {}
        for row in _rows(self._log):
            if row[0] == "r":
                reading[int(row[1])] = int(row[2])
            elif row[0] == "n":
                readings.append(reading)
                reading = {}
        return readings

    def first_reading(self) -> dict[int, int]:
        """Give block -> number as they were when the VDI was taken."""
        wait_for(self._readings, 30, "the VDI that was taken to be read")
        return self._readings()[0]

    def read_again(self) -> dict[int, int]:
        """Give block -> number as they are now."""
        before = len(self._readings())
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wait_for(lambda: len(self._readings()) > before, 30, "the VDI to be read again")
        return self._readings()[-1]

    def let_go(self) -> None:
        """Close the VDI."""
        self._process.communicate(timeout=60)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(60)


def assert_nothing_lost(blocks: dict[int, Block], found: dict[int, int]) -> None:
    """Each block holds the last number that was acknowledged, or a later one."""
    for number, block in blocks.items():
        seen = found.get(number, 0)
        assert seen in block.legal, f"block {number} holds {seen}, and may hold {block.legal}"


def now() -> float:
    """The clock that the logs are kept by, in seconds."""
    return time.monotonic()
