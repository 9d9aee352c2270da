"""Objects put together from several data directories without their daemons.

Always holds: what `Salvaged` gives was checked against the newest good copy's table; what it does
not give it names (storaged.logic.rescue says which copy gives what).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sheepfs.core.errors import UsageError
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE
from storaged.logic.rescue import Assembly, Candidate, is_outdated, ranking
from storaged.store.format import block_sum
from storaged.store.offline import OfflineDirectory, StoredCopy


class Place(NamedTuple):
    """A copy and the directory that it is in."""

    directory: OfflineDirectory
    copy: StoredCopy


@dataclass(slots=True)
class Salvaged:
    """An object as far as it could be had.

    Attributes:
        blocks: block number -> its data; blocks of zeros are not in it.
        lost: blocks that no copy gives.
        unverified: blocks in `blocks` that match no table: written after the last flush, or
            damaged, in a copy that is marked dirty.
        outdated: a newer copy is there, and its table is unreadable.
        version: of the copy that won; 0: there is no readable copy.
        changed: when that copy's file was changed last, in seconds since 1970.
        problems: what is wrong with copies that are damaged, one line for each.
        copies: how many there are, readable or not.
    """

    blocks: dict[int, memoryview] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)
    outdated: bool = False
    version: int = 0
    changed: float = 0.0
    problems: list[str] = field(default_factory=list)
    copies: int = 0

    def content(self) -> bytearray:
        """Give the object's 4 MiB; what is lost reads as zeros."""
        data = bytearray(OBJECT_SIZE)
        for number, block in self.blocks.items():
            data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = block
        return data


class Salvage:
    """The objects of one cluster, from some of its data directories."""

    def __init__(self, directories: Sequence[OfflineDirectory]) -> None:
        """Raises UsageError if the directories belong to several clusters."""
        clusters = {d.superblock.cluster: d.path for d in directories}
        if len(clusters) > 1:
            text = ", ".join(f"{path} is of {cluster}" for cluster, path in clusters.items())
            raise UsageError(f"the directories belong to different clusters: {text}")
        self.directories = directories

    def oids(self) -> list[int]:
        """Give the ids of all objects of which there is a file, in order."""
        return sorted({oid for directory in self.directories for oid in directory.oids()})

    def object(self, oid: int) -> Salvaged:
        """Put an object together; `version` is 0 if there is no readable copy."""
        places = [
            Place(directory, copy)
            for directory in self.directories
            for copy in directory.copies(oid)
        ]
        candidates = [
            Candidate(p.copy.version, p.copy.lineage, p.copy.suspect, p.copy.table is not None)
            for p in places
        ]
        order = [places[number] for number in ranking(candidates)]
        result = Salvaged(copies=len(places), outdated=is_outdated(candidates))
        result.problems = [_line(p, p.copy.problem) for p in places if p.copy.problem]
        if not order or order[0].copy.table is None:
            return result
        best = order[0]
        result.version, result.changed = best.copy.version, best.copy.changed
        self._assemble(order, best.copy.table or (), result)
        return result

    def _assemble(self, order: Sequence[Place], table: tuple[int, ...], result: Salvaged) -> None:
        assembly = Assembly(table)
        own: dict[int, memoryview] = {}
        for place in order:
            wanted = assembly.lacking
            if not wanted:
                return
            found = place.directory.blocks(place.copy, wanted)
            taken = assembly.offer({i: block_sum(block) for i, block in found.items()})
            result.blocks |= {i: found[i] for i in taken}
            if place is order[0]:
                own = found
                if assembly.lacking and not place.copy.suspect:
                    result.problems.append(_line(place, _blocks(assembly.lacking)))
        if order[0].copy.suspect:
            result.unverified = [i for i in assembly.lacking if i in own]
            result.blocks |= {i: own[i] for i in result.unverified}
        result.lost = [i for i in assembly.lacking if i not in result.blocks]


def _line(place: Place, problem: str) -> str:
    return f"{place.directory.path / place.copy.path}: {problem}"


def _blocks(numbers: Iterable[int]) -> str:
    some = list(numbers)
    text = ", ".join(map(str, some[:8])) + (", …" if len(some) > 8 else "")
    return f"checksum mismatch in block {text}"
