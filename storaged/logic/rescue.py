"""Which copy of an object is the newest good one, and which copy gives each of its blocks. Pure.

Always holds:
- The newest version wins, of equal ones the later lineage, of these one that is not marked dirty.
- A block is good if it has the checksum that the winner's table names, in whatever copy it lies:
  equal checksums are equal bytes, also in an older copy, or in one whose header is lost.
- No block is given that was not found good; only of a winner that is marked dirty, what matches
  nowhere may be taken as it is: a write that came after its last flush. It is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """One copy of an object, as its header tells.

    Attributes:
        version, lineage: 0 if the header is lost.
        suspect: marked dirty: its data may be newer than its table.
        readable: header and table are good.
    """

    version: int
    lineage: int
    suspect: bool
    readable: bool


def ranking(candidates: Sequence[Candidate]) -> list[int]:
    """Give the places of all candidates, the best first; unreadable ones come last."""

    def worth(place: int) -> tuple[bool, int, int, bool]:
        one = candidates[place]
        return one.readable, one.version, one.lineage, not one.suspect

    return sorted(range(len(candidates)), key=worth, reverse=True)


def is_outdated(candidates: Sequence[Candidate]) -> bool:
    """Tell whether a copy that is newer than all readable ones is known, and unreadable."""
    readable = [c[:2] for c in candidates if c.readable]
    return any(c[:2] > max(readable, default=(0, 0)) for c in candidates if not c.readable)


class Assembly:
    """An object being put together: for each block that has data, the first good copy offered.

    Args:
        table: the winner's checksums; 0 for a block of zeros.
    """

    def __init__(self, table: Sequence[int]) -> None:
        self._table = table
        self._lacking = {i for i, entry in enumerate(table) if entry}

    @property
    def lacking(self) -> list[int]:
        """Blocks with data of which no good copy was offered yet, in order."""
        return sorted(self._lacking)

    def offer(self, sums: Mapping[int, int]) -> list[int]:
        """Take what is good of a copy; give the blocks that are taken, in order.

        Args:
            sums: block number -> checksum of what the copy holds there.
        """
        taken = sorted(i for i in self._lacking & sums.keys() if sums[i] == self._table[i])
        self._lacking.difference_update(taken)
        return taken


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Give the runs [start, end) of ascending numbers."""
    result: list[tuple[int, int]] = []
    for number in numbers:
        if result and result[-1][1] == number:
            result[-1] = (result[-1][0], number + 1)
        else:
            result.append((number, number + 1))
    return result
