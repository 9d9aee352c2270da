"""A VDI rebuilt from data directories: its bytes into a sparse file, and what is missing of them.

Always holds: what is written was checked against a checksum, or is told apart; what is not known
is a hole that the report names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE, data_object, describe_oid
from sheepfs_tools.progress import Moved
from storaged.logic.rescue import ranges
from storaged.store.salvage import Salvage, Salvaged
from storaged.store.storedmap import StoredMap


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, end) of the image, and what is the matter with them."""

    start: int
    end: int
    why: str


@dataclass(slots=True)
class Rescued:
    """Outcome; bytes.

    Attributes:
        data: written.
        missing: holes in the file that are none in the VDI, as far as is known.
        doubtful: written, and perhaps not what was flushed last.
        problems: damaged copies, one line for each; others made up for what is not in `missing`.
    """

    name: str
    map: int
    file: str
    size: int
    data: int = 0
    missing: list[Range] = field(default_factory=list)
    doubtful: list[Range] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every byte is there and proven."""
        return not self.missing and not self.doubtful


def write_image(
    salvage: Salvage, vdi_map: StoredMap, fd: int, result: Rescued, moved: Moved
) -> None:
    """Write all that can be had of a map's objects to an empty file (OSError)."""
    os.ftruncate(fd, result.size)
    result.problems += vdi_map.problems
    for start, end in vdi_map.lost:
        _note(result.missing, result.size, start, end, OBJECT_SIZE, "its part of the map is lost")
    for start, end in vdi_map.unverified:
        why = "its part of the map may not be the newest"
        _note(result.doubtful, result.size, start, end, OBJECT_SIZE, why)
    for index, layer in vdi_map.entries():
        found = salvage.object(data_object(layer, index))
        result.problems += found.problems
        _write_object(fd, index, layer, found, result)
        moved(OBJECT_SIZE)
    result.missing = merged(result.missing)
    result.doubtful = merged(result.doubtful)


def _write_object(fd: int, index: int, layer: int, found: Salvaged, result: Rescued) -> None:
    what = describe_oid(data_object(layer, index))
    if not found.version:
        why = f"no copy of {what}" if not found.copies else f"no readable copy of {what}"
        _note(result.missing, result.size, index, index + 1, OBJECT_SIZE, why)
        return
    first = index * (OBJECT_SIZE // BLOCK_SIZE)
    for start, end in ranges(found.lost):
        why = f"damaged in every copy of {what}"
        _note(result.missing, result.size, first + start, first + end, BLOCK_SIZE, why)
    for start, end in ranges(found.unverified):
        why = f"matches no checksum of {what}, marked dirty"
        _note(result.doubtful, result.size, first + start, first + end, BLOCK_SIZE, why)
    if found.outdated:
        why = f"a newer copy of {what} is unreadable"
        _note(result.doubtful, result.size, index, index + 1, OBJECT_SIZE, why)
    for start, end in ranges(sorted(found.blocks)):
        offset = (first + start) * BLOCK_SIZE
        data = b"".join(found.blocks[number] for number in range(start, end))
        _write_all(fd, data[: max(result.size - offset, 0)], offset)
        result.data += max(min(len(data), result.size - offset), 0)


def _note(where: list[Range], size: int, start: int, end: int, unit: int, why: str) -> None:
    if start * unit < size:
        where.append(Range(start * unit, min(end * unit, size), why))


def merged(found: Sequence[Range]) -> list[Range]:
    """Sort ranges, and join neighbours of the same reason."""
    result: list[Range] = []
    for one in sorted(found, key=lambda r: (r.start, r.end)):
        if result and result[-1].end >= one.start and result[-1].why == one.why:
            last = result.pop()
            one = Range(last.start, max(last.end, one.end), one.why)
        result.append(one)
    return result


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
