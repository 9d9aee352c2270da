"""Sharing of blocks between objects: making copies, and giving heirs blocks of their own.

Always holds:
- Before a block changes on disk or its object goes, whoever inherits it has its own copy of it,
  with the bytes as they are, durably: data first, then the header that says so.
- Sources are resolved when a copy is made, so whoever inherits a block names its real holder, and
  reading through any number of copies is one look in one table.
- A block that an heir names is its holder's own by the holder's header on disk, too: else the
  holder, after a crash, could take the place for one of its own that it may write to.
- A block that is copied takes space even from the reserve: it makes deletes work (I14).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sheepfs.core.errors import (
    CorruptError,
    NoSpaceError,
    ObjectNotFoundError,
    RecoveringError,
    SheepError,
)
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.disk import disk_error, write_all
from storaged.store.entry import OpenFile, Overlay, StoredObject, sibling
from storaged.store.format import EMPTY_TABLE, MAX_BASES, SUMS, Sources
from storaged.store.parts import OnParts, Parts
from storaged.store.reader import stretches

log = logging.getLogger(__name__)
_ALL = SUMS[BLOCKS_PER_OBJECT]
_UNREADABLE = _ALL.pack(*[1] * BLOCKS_PER_OBJECT)
"""A table that no data fits: stands for one that is lost."""


class Copy(NamedTuple):
    """What a new object takes from others.

    Attributes:
        table: the checksums of its blocks.
        overlay: where they lie; None if it inherits nothing.
        own: (block number, bytes) of those that are to be written to its own file.
    """

    table: bytearray
    overlay: Overlay | None
    own: list[tuple[int, Buffer]]


class Sharing(OnParts):
    """Who inherits what. Its methods block; for which thread each is, it says."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        # The loop unshares what a thread is about to when it cannot wait for that.
        self._lock = threading.Lock()

    # -- making copies ----------------------------------------------------------------------

    def copy_of(self, base: int) -> Copy:
        """Give what a copy of a good object consists of. Raises as ObjectStore.read does."""
        entry = self._catalog.objects.get(base)
        if entry is None or entry.state or self._health.failed is not None:
            raise self._catalog.refusal(base)
        file = entry.file or self._files.acquire(entry)
        entry.used = True
        if file.overlay is not None and file.overlay.pending != {}:
            self._files.sync(entry)
            file.overlay.pending = {}
        sums = _ALL.unpack(file.table)
        bases = [base]
        if file.overlay is None:
            numbers = [1 if entry_sum else 0 for entry_sum in sums]
        else:
            bases += file.overlay.bases
            sources = file.overlay.sources
            numbers = [sources[i] + 1 if entry_sum else 0 for i, entry_sum in enumerate(sums)]
        try:
            return self._made_of(bytearray(file.table), numbers, bases)
        except OSError as error:
            raise disk_error(error, f"read of object {format_oid(base)}") from error

    def composed(self, oid: int, wanted: Sources, trusted: Iterable[int]) -> Copy:
        """Give as much of an object as the local bases that a peer's copy names hold.

        Args:
            trusted: those of the bases that are level with the peer's.
        """
        allowed = set(trusted)
        table = bytearray(EMPTY_TABLE)
        numbers = [0] * BLOCKS_PER_OBJECT
        bases: list[int] = []
        places: dict[int, int] = {}
        for number, layer in enumerate(wanted.layers, 1):
            base = sibling(oid, layer)
            entry = self._catalog.objects.get(base)
            if base not in allowed or base == oid or entry is None or entry.state:
                continue
            try:
                file = entry.file or self._files.acquire(entry)
            except SheepError as error:
                log.info("nothing is inherited from %s: %s", format_oid(base), error)
                continue
            overlay = file.overlay
            for i, source in enumerate(wanted.sources):
                if source != number:
                    continue
                holder = base
                if overlay is not None and overlay.sources[i]:
                    holder = overlay.bases[overlay.sources[i] - 1]
                if file.table[i * 8 : i * 8 + 8] == bytes(8) or holder == oid:
                    continue
                table[i * 8 : i * 8 + 8] = file.table[i * 8 : i * 8 + 8]
                if holder not in places:
                    bases.append(holder)
                    places[holder] = len(bases)
                numbers[i] = places[holder]
        try:
            return self._made_of(table, numbers, bases)
        except OSError as error:
            raise disk_error(error, f"read of what {format_oid(oid)} inherits") from error

    def _made_of(self, table: bytearray, numbers: Sequence[int], bases: Sequence[int]) -> Copy:
        """Drop the bases that nothing is taken from, and the least used of too many (OSError)."""
        uses = Counter(numbers)
        uses.pop(0, None)
        if not uses:
            return Copy(table, None, [])
        kept = [number for number, _ in uses.most_common(MAX_BASES)]
        rename = {number: place for place, number in enumerate(sorted(kept), 1)}
        own: list[tuple[int, Buffer]] = []
        if len(uses) > MAX_BASES:
            for i, number in enumerate(numbers):
                if number and number not in rename:
                    holder = self._reader.base_file(bases[number - 1], True)
                    if holder is None:
                        # Stays unreadable: the table says what should be there.
                        continue
                    data = self._disk.pread(holder.fd, BLOCK_SIZE, i * BLOCK_SIZE)
                    own.append((i, data.ljust(BLOCK_SIZE, b"\0")))
        sources = bytearray(rename.get(number, 0) for number in numbers)
        return Copy(table, Overlay(sources, [bases[n - 1] for n in sorted(kept)], None), own)

    # -- taking shares apart ----------------------------------------------------------------

    def dependents(self, oid: int) -> list[int]:
        """See ObjectStore.dependents."""
        return self._catalog.dependents(oid)

    def before_change(self, entry: StoredObject, blocks: Sequence[int]) -> None:
        """Give all that inherit these blocks of an object their own copies. Loop only.

        Raises: NoSpaceError, DiskError.
        """
        for heir in self._catalog.dependents(entry.oid):
            self._marks.mark([heir])
            self.unshare(heir, entry.oid, blocks)

    def before_removal(self, entry: StoredObject) -> None:
        """Give all that inherit from an object their own copies. Loop only.

        Raises: NoSpaceError, DiskError.
        """
        for heir in self._catalog.dependents(entry.oid):
            self._marks.mark([heir])
            self.unshare(heir, entry.oid)

    def on_its_own(self, entry: StoredObject) -> None:
        """Give an object its own copy of all that it inherits. Loop only.

        Raises: NoSpaceError, DiskError.
        """
        for base in entry.bases:
            self._marks.mark([entry.oid])
            self.unshare(entry.oid, base)

    def unshare(self, oid: int, base: int, blocks: Sequence[int] | None = None) -> None:
        """See ObjectStore.unshare; `blocks` limits it to some blocks."""
        self._health.check()
        entry = self._catalog.objects.get(oid)
        if entry is not None and base in entry.bases:
            with self._lock, self._files.pinned(entry):
                self._unshare(entry, base, blocks)

    def _unshare(self, entry: StoredObject, base: int, blocks: Sequence[int] | None) -> None:
        file = self._open(entry)
        overlay = file.overlay if file is not None else None
        if file is None or overlay is None or base not in overlay.bases:
            if blocks is None:
                self._catalog.set_bases(entry, tuple(b for b in entry.bases if b != base))
            return
        number = overlay.bases.index(base) + 1
        wanted = [
            i
            for i in (range(BLOCKS_PER_OBJECT) if blocks is None else blocks)
            if overlay.sources[i] == number
        ]
        # Before the first flush the header on disk may name any base.
        if wanted or overlay.pending is None or number in list(overlay.pending.values()):
            # Only an unclean object's file stays open.
            self._tracker.changing(entry)
            file = self._open(entry)
            if file is None or file.overlay is None:
                raise RecoveringError(f"object {format_oid(entry.oid)} went while it was copied to")
            self._take_over(entry, file, file.overlay, wanted)
        if blocks is None:
            overlay = file.overlay
            self._catalog.set_bases(entry, overlay.used() if overlay is not None else ())

    def _open(self, entry: StoredObject) -> OpenFile | None:
        """Open an heir; None if its own header is lost, and with it what it inherits."""
        for _ in range(2):
            try:
                return entry.file or self._files.acquire(entry)
            except RecoveringError:
                continue  # Its header is not the expected one, and is expected from now on.
            except CorruptError:
                return self._without_table(entry)
            except ObjectNotFoundError:
                return None
        raise RecoveringError(f"object {format_oid(entry.oid)} is not what it was a moment ago")

    def _without_table(self, entry: StoredObject) -> OpenFile | None:
        """Open an object whose table is damaged; peers may yet tell which blocks are good."""
        try:
            fd = self._disk.open(entry.path)
        except OSError as error:
            log.error("object %s: what it inherits is lost: %s", format_oid(entry.oid), error)
            return None
        try:
            overlay = self._files.overlay_of(entry, fd)
        except (OSError, CorruptError) as error:
            self._disk.close(fd)
            log.error("object %s: what it inherits is lost: %s", format_oid(entry.oid), error)
            return None
        return self._files.adopt(entry, fd, bytearray(_UNREADABLE), overlay)

    def _take_over(
        self, entry: StoredObject, file: OpenFile, overlay: Overlay, wanted: Sequence[int]
    ) -> None:
        """Copy inherited blocks to the own file, durably, then say so in the header."""
        copied: list[int] = []
        written = False
        try:
            for start, end, step in stretches([n - i for i, n in enumerate(wanted)]):
                first = start + step
                blocks = self._reader.raw(file.fd, overlay, first, end - start)
                for i, block in enumerate(blocks, first):
                    # What is gone already is left alone, and goes on being unreadable.
                    if block is not None:
                        write_all(self._disk, file.fd, block, i * BLOCK_SIZE)
                        copied.append(i)
            written = True
            self._disk.fdatasync(file.fd)
            file.sequence += 1
            try:
                for i in copied:
                    overlay.sources[i] = 0
                overlay.pending = {}
            finally:
                file.sequence += 1
            self._catalog.grow(entry, len(copied))
            self._files.write_meta(entry, file)
            self._disk.fdatasync(file.fd)
        except OSError as error:
            refused = disk_error(error, f"copy of blocks to {format_oid(entry.oid)}")
            if isinstance(refused, NoSpaceError) and not written:
                raise refused from error
            raise self._health.fail(error, f"copy of blocks to {format_oid(entry.oid)}") from error
