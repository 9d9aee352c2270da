"""Checking copies: is what the disk holds what it should hold?

Always holds:
- A mismatch is damage only if nothing was written to the object meanwhile, as everywhere
  (reader.py).
- `check` asks the disk, not the page cache, but for what is not flushed yet; and what was not in
  use stays so: neither its file nor its pages push out those that clients use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from sheepfs.core.errors import RetryableError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from storaged.store.entry import OpenFile, StoredObject
from storaged.store.format import META_SIZE, SUMS
from storaged.store.parts import OnParts

_CHUNK = 256
"""Blocks read at once."""
_TRIES = 64
_CHUNK_TRIES = 4
"""Reads of one piece overtaken by writes before the object is looked up again."""


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        blocks: numbers of the blocks whose data is not what the table says.
        is_header_bad: header or table on disk are not those that the object has.
        read_bytes: what was read for it, holes left out.
    """

    blocks: tuple[int, ...]
    is_header_bad: bool
    read_bytes: int

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.blocks or self.is_header_bad)


class Checker(OnParts):
    """Checks objects. Its methods block, and may be called from any thread."""

    def check(self, oid: int) -> Checked:
        """See ObjectStore.check."""
        for _ in range(_TRIES):
            entry = self._catalog.objects.get(oid)
            if entry is None or entry.state or self._health.failed is not None:
                raise self._catalog.refusal(oid)
            found = self._look(entry)
            if found is not None:
                return found
        raise RetryableError(f"object {format_oid(oid)} changes too fast to be checked")

    def _look(self, entry: StoredObject) -> Checked | None:
        opened = entry.opened
        file = self._files.peek(entry)
        is_open = entry.file is file

        def settled(sequence: int) -> bool:
            if is_open:
                return self._reader.settled(entry, file, sequence)
            return (
                entry.file is None
                and entry.opened == opened
                and self._catalog.objects.get(entry.oid) is entry
            )

        try:
            if not entry.changed:
                self._disk.drop_cache(file.fd)
            # Of a file that was opened just now both have been checked.
            is_header_bad = is_open and not self._files.is_as_written(entry, file)
            blocks = self._bad_blocks(file, settled)
            if not is_open:
                self._disk.drop_cache(file.fd)
        except OSError as error:
            raise self._reader.failed(entry.oid, error) from error
        if blocks is None:
            return None
        data = BLOCKS_PER_OBJECT - SUMS[BLOCKS_PER_OBJECT].unpack(file.table).count(0)
        return Checked(tuple(blocks), is_header_bad, data * BLOCK_SIZE + META_SIZE)

    def verify(self, oid: int) -> list[int]:
        """See ObjectStore.verify."""
        for _ in range(_TRIES):
            self._health.check()
            entry = self._catalog.objects.get(oid)
            if entry is None:
                raise self._catalog.refusal(oid)
            file = entry.file or self._files.acquire(entry)
            try:
                bad = self._bad_blocks(file, partial(self._reader.settled, entry, file))
            except OSError as error:
                raise self._reader.failed(oid, error) from error
            if bad is not None:
                return bad
        raise RetryableError(f"object {format_oid(oid)} changes too fast to be checked")

    def _bad_blocks(self, file: OpenFile, settled: Callable[[int], bool]) -> list[int] | None:
        """Give the blocks that do not match; None if something was written (OSError)."""
        bad: list[int] = []
        for first in range(0, BLOCKS_PER_OBJECT, _CHUNK):
            for _ in range(_CHUNK_TRIES):
                sequence = file.sequence
                sums = SUMS[_CHUNK].unpack_from(file.table, first * 8)
                found = self._reader.disk_sums(file.fd, file.overlay, first, _CHUNK)
                wrong = [first + i for i in range(_CHUNK) if found[i] != sums[i]]
                if not wrong or settled(sequence):
                    break
            else:
                return None
            bad += wrong
        return bad
