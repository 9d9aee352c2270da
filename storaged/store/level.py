"""Levelling: making one replica equal to another by moving only the blocks that differ.

The node that is behind sends the checksums of what its disk really holds (`digests`), the source
answers with what differs (`difference`), and the node patches its copy (`patch`).

Always holds:
- Nothing is believed from a table that may be old: `digests` reads the data.
- A patched object is unclean and marked: after a crash half-way it is a suspect again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sheepfs.core.errors import CorruptError, ProtocolError, RetryableError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.catalog import Catalog
from storaged.store.disk import Disk, Health, disk_error, write_all
from storaged.store.entry import OK, SUSPECT, OpenFile, StoredObject
from storaged.store.files import OpenFiles
from storaged.store.flush import FlushTracker
from storaged.store.format import (
    BITMAP_SIZE,
    EMPTY_TABLE,
    SUMS,
    TABLE_SIZE,
    block_sums,
    blocks_in,
    runs,
)
from storaged.store.reader import Reader, disk_sums
from storaged.store.space import SpaceGuard

_CHUNK = 256
_TRIES = 64
_ALL = SUMS[BLOCKS_PER_OBJECT]


class Difference(NamedTuple):
    """What a source has that another copy does not.

    Attributes:
        differs: bitmap of blocks to change; of these, `zero` are zeros at the source and the
            others are in `blocks`, in order.
    """

    version: int
    lineage: int
    differs: bytes
    zero: bytes
    blocks: list[Buffer]


class Patch(NamedTuple):
    """A checked difference, ready to be applied: the table to come and the blocks' new data."""

    version: int
    lineage: int
    table: bytes
    differs: frozenset[int]
    data: memoryview


class Leveller:
    """Compares and patches objects; the caller lets nobody write to them meanwhile."""

    def __init__(
        self,
        disk: Disk,
        health: Health,
        catalog: Catalog,
        files: OpenFiles,
        reader: Reader,
        tracker: FlushTracker,
        space: SpaceGuard,
        make: Callable[[int, int, int], StoredObject],
    ) -> None:
        """`make(oid, pool, pg)` makes an empty object."""
        self._disk = disk
        self._health = health
        self._catalog = catalog
        self._files = files
        self._reader = reader
        self._tracker = tracker
        self._space = space
        self._make = make

    def digests(self, oid: int) -> bytes:
        """Give 8 KiB: the checksum of each block as it is on disk, 0 for zeros. Blocks."""
        entry = self._catalog.objects.get(oid)
        if entry is None:
            return EMPTY_TABLE
        table = bytearray(TABLE_SIZE)
        try:
            fd = self._disk.open(entry.path)
        except FileNotFoundError:
            return EMPTY_TABLE
        except OSError as error:
            raise disk_error(error, f"object {format_oid(oid)}") from error
        try:
            for first in range(0, BLOCKS_PER_OBJECT, _CHUNK):
                SUMS[_CHUNK].pack_into(table, first * 8, *disk_sums(self._disk, fd, first, _CHUNK))
        except OSError as error:
            raise disk_error(error, f"read of object {format_oid(oid)}") from error
        finally:
            self._disk.close(fd)
        return bytes(table)

    def difference(self, oid: int, digests: bytes) -> Difference:
        """Compare a good object with another copy's digests. Blocks. Raises as `read`."""
        for _ in range(_TRIES):
            entry = self._catalog.objects.get(oid)
            if entry is None or entry.state != OK or self._health.failed is not None:
                raise self._catalog.refusal(oid)
            file = entry.file or self._files.acquire(entry)
            sequence = file.sequence
            version, lineage = entry.version, entry.lineage
            mine = _ALL.unpack_from(file.table)
            theirs = _ALL.unpack(digests)
            differs = [i for i in range(BLOCKS_PER_OBJECT) if mine[i] != theirs[i]]
            wanted = [0] * BLOCKS_PER_OBJECT
            for i in differs:
                wanted[i] = mine[i]
            blocks: list[Buffer] = []
            for start, end, is_data in runs(wanted):
                if is_data:
                    blocks += self._reader.read_blocks(entry, start, end - start)
            if self._reader.settled(entry, file, sequence):
                zeros = [i for i in differs if not mine[i]]
                return Difference(version, lineage, bitmap(differs), bitmap(zeros), blocks)
        raise RetryableError(f"object {format_oid(oid)} changes too fast to be compared")

    def patch(self, oid: int, patch: Patch, pool: int, pg: int) -> None:
        """Apply a patch to a marked object, made if need be. Loop only; durable when flushed.

        Raises:
            RetryableError: the object is not marked (any more); nothing changed.
            NoSpaceError: only the reserve is left; nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        self._health.check()
        self._space.check(len(patch.data))
        entry = self._catalog.objects.get(oid)
        if entry is None:
            entry = self._make(oid, pool, pg)
        # First of all: an object that is not marked is refused untouched, and only an unclean
        # one's file stays open while a thread makes room for another.
        self._tracker.changing(entry)
        file = self._reopened(entry)
        entry.state = SUSPECT
        file.sequence += 1
        try:
            self._write(file, patch)
            blocks = BLOCKS_PER_OBJECT - _ALL.unpack(patch.table).count(0)
            file.table[:] = patch.table
            self._catalog.grow(entry, blocks - entry.blocks)
            entry.version, entry.lineage = patch.version, patch.lineage
        except OSError as error:
            raise self._health.fail(error, f"patch of {format_oid(oid)}") from error
        finally:
            file.sequence += 1
        entry.changed = entry.used = True
        entry.state = OK

    def _reopened(self, entry: StoredObject) -> OpenFile:
        """Give the open file; a fresh one where the header is damaged or the name is gone."""
        try:
            fd = self._disk.open(entry.path, create=True)
        except OSError as error:
            raise self._health.fail(error, f"open of {format_oid(entry.oid)}") from error
        # Changes through the former descriptor are in the page cache of the same file; if its
        # name was lost, the file opened now is a new one.
        table = bytearray(EMPTY_TABLE) if entry.file is None else entry.file.table
        self._files.drop(entry)
        self._tracker.directory_changed(entry.directory)
        return self._files.adopt(entry, fd, table)

    def _write(self, file: OpenFile, patch: Patch) -> None:
        sums = _ALL.unpack(patch.table)
        changed = [(1 + (not sums[i])) * (i in patch.differs) for i in range(BLOCKS_PER_OBJECT)]
        position = 0
        start = 0
        while start < BLOCKS_PER_OBJECT:
            kind = changed[start]
            end = start + 1
            while end < BLOCKS_PER_OBJECT and changed[end] == kind:
                end += 1
            length = (end - start) * BLOCK_SIZE
            if kind == 1:
                piece = patch.data[position : position + length]
                write_all(self._disk, file.fd, piece, start * BLOCK_SIZE)
                position += length
            elif kind == 2:
                self._disk.punch(file.fd, start * BLOCK_SIZE, length)
            start = end


def bitmap(numbers: Iterable[int]) -> bytes:
    """Give 128 bytes with the bits of these blocks set (the inverse of `blocks_in`)."""
    return sum(1 << i for i in numbers).to_bytes(BITMAP_SIZE, "little")


def make_patch(
    digests: bytes, version: int, lineage: int, differs: Buffer, zero: Buffer, data: Buffer
) -> Patch:
    """Check what a source answered and compute the table to come. Hashes; meant for a thread.

    Raises:
        ProtocolError: the parts do not fit each other.
    """
    if len(differs) != BITMAP_SIZE or len(zero) != BITMAP_SIZE:
        raise ProtocolError("a patch without its two bitmaps")
    numbers = blocks_in(differs)
    zeros = set(blocks_in(zero))
    filled = [i for i in numbers if i not in zeros]
    if not zeros <= set(numbers) or len(data) != len(filled) * BLOCK_SIZE:
        raise ProtocolError("a patch whose data does not fit its bitmaps")
    sums = list(_ALL.unpack(digests))
    view = memoryview(data)
    for i, found in zip(filled, block_sums(view), strict=True):
        if not found:
            raise CorruptError("a patch with a block of zeros that is not said to be one")
        sums[i] = found
    for i in zeros:
        sums[i] = 0
    return Patch(version, lineage, _ALL.pack(*sums), frozenset(numbers), view)
