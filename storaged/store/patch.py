"""What makes one copy of an object equal to another: a difference, and the patch made of it.

Its parts on the wire, in this order: three bitmaps (blocks that differ; of these, the zero ones;
blocks that are damaged at the source), the checksums of the damaged blocks, the data of those that
differ and are not zero.

Always holds:
- A damaged block comes without data and with the checksum it should have: the copy made by it
  refuses to be read there too, instead of giving something else (I11).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sheepfs.core.errors import CorruptError, ProtocolError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT
from sheepfs.core.wire import Buffer
from storaged.store.format import BITMAP_SIZE, SUMS, block_sums, blocks_in

UNKNOWN_SUM = 1
"""What stands for the checksum of a block of which nothing is known but that it is no hole."""
_ALL = SUMS[BLOCKS_PER_OBJECT]
_BITMAPS_SIZE = 3 * BITMAP_SIZE
_SUM_SIZE = 8


class Difference(NamedTuple):
    """What a source has that another copy does not.

    Attributes:
        differs: blocks to change, ascending; of these, `zero` are zeros at the source and the
            others are in `blocks`, in order.
        damaged: checksums of blocks that differ and cannot be read at the source.
    """

    version: int
    lineage: int
    differs: Sequence[int]
    zero: Sequence[int]
    damaged: Mapping[int, int]
    blocks: Sequence[Buffer]

    def encode(self) -> bytes:
        """Give the payload of a reply to PULL."""
        bitmaps = map(bitmap, (self.differs, self.zero, self.damaged))
        sums = SUMS[len(self.damaged)].pack(*(self.damaged[i] for i in sorted(self.damaged)))
        return b"".join((*bitmaps, sums, *self.blocks))


class Patch(NamedTuple):
    """A checked difference, ready to be applied: the table to come and what to write.

    Attributes:
        differs: all blocks that change.
        steps: what to do, in this order: (first block, end, their data or None for a hole).
        damaged: some blocks had no good copy at the source, and have none after this.
    """

    version: int
    lineage: int
    table: bytes
    differs: frozenset[int]
    steps: Sequence[tuple[int, int, memoryview | None]]
    damaged: bool

    @property
    def blocks(self) -> int:
        """How many blocks of the copy will be no zeros."""
        return BLOCKS_PER_OBJECT - _ALL.unpack(self.table).count(0)

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(len(data) for _, _, data in self.steps if data is not None)


def nothing_but_damage(version: int, lineage: int, first: int, end: int) -> Difference:
    """Give the difference to a copy whose header or table is damaged: nothing of it is known."""
    return Difference(version, lineage, (), (), dict.fromkeys(range(first, end), UNKNOWN_SUM), ())


class PatchBuilder:
    """Checks what a source answers, piece by piece, and computes the patch.

    A later piece replaces what an earlier one said of the same blocks.

    Args:
        digests: checksums of the blocks that the copy has.
    """

    def __init__(self, digests: bytes) -> None:
        self._sums = list(_ALL.unpack(digests))
        self._changed: set[int] = set()
        self._damaged: set[int] = set()
        self._steps: list[tuple[int, int, memoryview | None]] = []

    @property
    def digests(self) -> bytes:
        """Checksums of the blocks that the copy will have."""
        return _ALL.pack(*self._sums)

    def add(self, piece: Buffer) -> None:
        """Take the payload of a reply to PULL. Hashes: 40 us for each 256 KiB.

        Raises:
            ProtocolError: it does not fit itself or those before.
            CorruptError: a block of zeros is said to be none.
        """
        found = _decode(piece)
        sums = self._sums
        self._changed.update(found.differs)
        for i in found.zero:
            sums[i] = 0
        for i, value in found.damaged.items():
            sums[i] = value
        self._damaged.difference_update(found.differs)
        self._damaged.update(found.damaged)
        zeros = set(found.zero)
        filled = [i for i in found.differs if i not in zeros] if zeros else found.differs
        data = memoryview(found.blocks[0])
        for i, value in zip(filled, block_sums(data), strict=True):
            if not value:
                raise CorruptError("a patch with a block of zeros that is not said to be one")
            sums[i] = value
        position = 0
        for start, end in _stretches(filled):
            length = (end - start) * BLOCK_SIZE
            self._steps.append((start, end, data[position : position + length]))
            position += length
        self._steps += [(start, end, None) for start, end in _stretches(found.zero)]

    def patch(self, version: int, lineage: int) -> Patch:
        """Give the patch, which makes a copy of that version."""
        return Patch(
            version,
            lineage,
            self.digests,
            frozenset(self._changed),
            self._steps,
            bool(self._damaged),
        )


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Give (first, end) of the runs of numbers that follow each other."""
    found: list[tuple[int, int]] = []
    start = previous = -1
    for number in numbers:
        if number != previous + 1 or start < 0:
            if start >= 0:
                found.append((start, previous + 1))
            start = number
        previous = number
    if start >= 0:
        found.append((start, previous + 1))
    return found


def _decode(piece: Buffer) -> Difference:
    """Read a reply to PULL; its data is one buffer (ProtocolError)."""
    view = memoryview(piece)
    if len(view) < _BITMAPS_SIZE:
        raise ProtocolError("a patch without its bitmaps")
    differs, zero, damaged = (
        blocks_in(view[at : at + BITMAP_SIZE]) for at in range(0, _BITMAPS_SIZE, BITMAP_SIZE)
    )
    start = _BITMAPS_SIZE + _SUM_SIZE * len(damaged)
    filled = len(differs) - len(zero)
    if not set(zero) <= set(differs) or len(view) != start + filled * BLOCK_SIZE:
        raise ProtocolError("a patch whose data does not fit its bitmaps")
    sums = SUMS[len(damaged)].unpack_from(view, _BITMAPS_SIZE)
    if 0 in sums:
        raise ProtocolError("a patch with a damaged block of zeros")
    if not set(damaged).isdisjoint(differs):
        raise ProtocolError("a patch with a block that is both sent and damaged")
    named = dict(zip(damaged, sums, strict=True))
    return Difference(0, 0, differs, zero, named, [view[start:]])


def bitmap(numbers: Iterable[int]) -> bytes:
    """Give 128 bytes with the bits of these blocks set (the inverse of `blocks_in`)."""
    bits = bytearray(BITMAP_SIZE)
    for i in numbers:
        bits[i >> 3] |= 1 << (i & 7)
    return bytes(bits)
