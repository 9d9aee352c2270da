"""Reading: every byte is checked against the object's table before anyone sees it (I11).

Always holds:
- A mismatch is damage only if no write to the object was under way or came between: the
  sequence number of the open file tells. Otherwise the read is done again.
- A hole is zeros because the table says so; the disk is not asked.
- An inherited block is checked against the heir's table, whatever its base says of itself. One
  whose base is gone is damaged, never zeros (I3).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    RetryableError,
    SheepError,
    UsageError,
)
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, OBJECT_SIZE, format_oid, layer_of
from sheepfs.core.wire import Buffer
from storaged.store.catalog import Catalog
from storaged.store.disk import Disk, Health, disk_error
from storaged.store.entry import OpenFile, Overlay, StoredObject
from storaged.store.files import OpenFiles
from storaged.store.format import SUMS, Sources, bitmap_of, block_sum, block_sums, mismatches, runs

log = logging.getLogger(__name__)
_ZEROS = memoryview(bytes(OBJECT_SIZE))
_TRIES = 64
"""Reads of one range overtaken by writes before the reader is told to come again."""
HOLE = -1
MISSING = -1
"""Stands for the checksum of an inherited block whose base is gone; no block has it."""


class Reader:
    """Reads objects. Every method but `read(wait=False)` may be called from any thread."""

    def __init__(self, disk: Disk, health: Health, catalog: Catalog, files: OpenFiles) -> None:
        self._disk = disk
        self._health = health
        self._catalog = catalog
        self._files = files

    def read(self, oid: int, offset: int, length: int, *, wait: bool) -> list[Buffer] | None:
        """See ObjectStore.read."""
        entry = self._catalog.objects.get(oid)
        if entry is None or entry.state or self._health.failed is not None:
            raise self._catalog.refusal(oid)
        end = offset + length
        if not 0 <= offset < end <= OBJECT_SIZE:
            raise UsageError(f"range {offset}+{length} is not within an object")
        first = offset // BLOCK_SIZE
        count = -(-end // BLOCK_SIZE) - first
        entry.used = True
        pieces: list[Buffer]
        if wait:
            pieces = self.read_blocks(entry, first, count)
        else:
            file = entry.file
            if file is None:
                self._files.evict()
                return None
            sums = SUMS[count].unpack_from(file.table, first * 8)
            if length == BLOCK_SIZE and count == 1 and (block := self._cached(file, first, sums)):
                return [block]
            try:
                found = self._pieces(file, first, sums, False)
            except OSError as error:
                raise self.failed(oid, error) from error
            if found is None:
                return None
            pieces, bad = found
            if bad:
                raise self._corrupt(entry, bad)
        skip = offset - first * BLOCK_SIZE
        surplus = (first + count) * BLOCK_SIZE - end
        if skip:
            pieces[0] = pieces[0][skip:]
        if surplus:
            pieces[-1] = pieces[-1][:-surplus]
        return pieces

    def _cached(self, file: OpenFile, number: int, sums: tuple[int, ...]) -> bytearray | None:
        """Give one good block from the page cache: the most frequent read, by the shortest way.

        None: it takes more than that (a hole, a cold or bad block, an error).
        """
        block = bytearray(BLOCK_SIZE)
        try:
            self._disk.pread_nowait(file.fd, block, number * BLOCK_SIZE)
        except OSError:
            return None
        # A hole's sum is 0, which is no block's digest; a short read does not match either.
        return block if xxh3_64_intdigest(block) == sums[0] != 0 else None

    def read_blocks(self, entry: StoredObject, first: int, count: int) -> list[Buffer]:
        """Read whole blocks. Blocks. Raises as ObjectStore.read does."""
        oid = entry.oid
        for _ in range(_TRIES):
            file = entry.file or self._files.acquire(entry)
            sequence = file.sequence
            sums = SUMS[count].unpack_from(file.table, first * 8)
            try:
                found = self._pieces(file, first, sums, True)
            except OSError as error:
                raise self.failed(oid, error) from error
            if found is not None:
                pieces, bad = found
                if not bad:
                    return pieces
                if self.settled(entry, file, sequence):
                    raise self._corrupt(entry, bad)
            current = self._catalog.objects.get(oid)
            if current is None or current.state or self._health.failed is not None:
                raise self._catalog.refusal(oid)
            entry = current
        raise RetryableError(f"object {format_oid(oid)} changes too fast to be read")

    def bitmap(self, oid: int) -> bytes:
        """See ObjectStore.extents."""
        return bitmap_of(SUMS[BLOCKS_PER_OBJECT].unpack(self.sums(oid)))

    def sums(self, oid: int) -> bytes:
        """See ObjectStore.sums."""
        return bytes(self._good(oid)[1].table)

    def layout(self, oid: int) -> Sources:
        """See ObjectStore.layout."""
        overlay = self._good(oid)[1].overlay
        if overlay is None:
            return Sources(bytes(BLOCKS_PER_OBJECT), ())
        return Sources(bytes(overlay.sources), tuple(map(layer_of, overlay.bases)))

    def _good(self, oid: int) -> tuple[StoredObject, OpenFile]:
        entry = self._catalog.objects.get(oid)
        if entry is None or entry.state or self._health.failed is not None:
            raise self._catalog.refusal(oid)
        return entry, entry.file or self._files.acquire(entry)

    def _pieces(
        self, file: OpenFile, first: int, sums: tuple[int, ...], wait: bool
    ) -> tuple[list[Buffer], list[int]] | None:
        """Read blocks from `first` on; give them and the numbers of those that do not match.

        None: not all is in memory and `wait` is False. Raises OSError.
        """
        if file.overlay is not None:
            return self._overlay_pieces(file, file.overlay, first, sums, wait)
        if 0 not in sums:
            data = self._fetch(file.fd, first, len(sums), wait)
            if data is None:
                return None
            bad = mismatches(data, sums)
            return [data], [first + i for i in bad] if bad else bad
        pieces: list[Buffer] = []
        wrong: list[int] = []
        for start, end, is_data in runs(sums):
            if not is_data:
                pieces.append(_ZEROS[: (end - start) * BLOCK_SIZE])
                continue
            data = self._fetch(file.fd, first + start, end - start, wait)
            if data is None:
                return None
            wrong += [first + start + i for i in mismatches(data, sums[start:end])]
            pieces.append(data)
        return pieces, wrong

    def _overlay_pieces(
        self, file: OpenFile, overlay: Overlay, first: int, sums: tuple[int, ...], wait: bool
    ) -> tuple[list[Buffer], list[int]] | None:
        """Do what `_pieces` does for blocks of which some lie in other objects' files."""
        sources = overlay.sources[first : first + len(sums)]
        places = [source if entry else HOLE for source, entry in zip(sources, sums, strict=True)]
        pieces: list[Buffer] = []
        wrong: list[int] = []
        for start, end, place in stretches(places):
            if place == HOLE:
                pieces.append(_ZEROS[: (end - start) * BLOCK_SIZE])
                continue
            holder = file if not place else self.base_file(overlay.bases[place - 1], wait)
            if holder is None:
                if not wait:
                    return None
                wrong += range(first + start, first + end)
                continue
            data = self._fetch(holder.fd, first + start, end - start, wait)
            if data is None:
                return None
            wrong += [first + start + i for i in mismatches(data, sums[start:end])]
            pieces.append(data)
        return pieces, wrong

    def base_file(self, oid: int, wait: bool) -> OpenFile | None:
        """Give a base's file, of which only the descriptor counts; may block with `wait`.

        Returns:
            None if it is not open already and `wait` is False, or it is gone.

        Raises:
            OSError: it cannot be opened.
        """
        entry = self._catalog.objects.get(oid)
        if entry is None:
            return None
        entry.used = True
        file = entry.file
        if file is not None or not wait:
            return file
        try:
            return self._files.acquire(entry)
        except ObjectNotFoundError:
            return None
        except SheepError:
            # What its own header says does not matter to who inherits its blocks.
            return OpenFile(self._disk.open(entry.path), bytearray(), self._disk.close)

    def raw(self, fd: int, overlay: Overlay | None, first: int, count: int) -> list[Buffer | None]:
        """Read blocks from wherever they lie, unchecked; None for each whose base is gone.

        Blocks. Raises OSError.
        """
        places = bytes(count) if overlay is None else overlay.sources[first : first + count]
        result: list[Buffer | None] = []
        for start, end, place in stretches(places):
            size = end - start
            holder: OpenFile | None = None
            if place and overlay is not None:
                holder = self.base_file(overlay.bases[place - 1], True)
                if holder is None:
                    result += [None] * size
                    continue
            source = fd if holder is None else holder.fd
            data = self._disk.pread(source, size * BLOCK_SIZE, (first + start) * BLOCK_SIZE)
            view = memoryview(data.ljust(size * BLOCK_SIZE, b"\0"))
            result += [view[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(size)]
        return result

    def disk_sums(self, fd: int, overlay: Overlay | None, first: int, count: int) -> list[int]:
        """Give the table entries that the data on disk should have; `MISSING` without a base.

        Blocks. Raises OSError.
        """
        if overlay is None:
            data = self._disk.pread(fd, count * BLOCK_SIZE, first * BLOCK_SIZE)
            return block_sums(memoryview(data.ljust(count * BLOCK_SIZE, b"\0")))
        blocks = self.raw(fd, overlay, first, count)
        return [MISSING if block is None else block_sum(block) for block in blocks]

    def _fetch(self, fd: int, first: int, count: int, wait: bool) -> memoryview | None:
        length = count * BLOCK_SIZE
        if wait:
            return memoryview(self._disk.pread(fd, length, first * BLOCK_SIZE))
        buffer = bytearray(length)
        try:
            if self._disk.pread_nowait(fd, buffer, first * BLOCK_SIZE) != length:
                return None
        except BlockingIOError:
            return None
        return memoryview(buffer)

    def settled(self, entry: StoredObject, file: OpenFile, sequence: int) -> bool:
        """Tell whether nothing was written since `sequence` was read."""
        return (
            not sequence & 1
            and file.sequence == sequence
            and entry.file is file
            and self._catalog.objects.get(entry.oid) is entry
        )

    def _corrupt(self, entry: StoredObject, bad: Sequence[int]) -> CorruptError:
        oid = entry.oid
        entry.damaged = True
        text = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        log.error("object %s: checksum mismatch in block %s", format_oid(oid), text)
        return CorruptError(f"object {format_oid(oid)}: checksum mismatch in block {text}", bad)

    def failed(self, oid: int, error: OSError) -> SheepError:
        """Give the error for a read that the disk refused, and log it."""
        log.error("object %s: read failed: %s", format_oid(oid), error)
        return disk_error(error, f"read of object {format_oid(oid)}")


def stretches(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Split a sequence into runs of equal numbers: (start, end, number), in order."""
    result = []
    start = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[start]:
            result.append((start, i, places[start]))
            start = i
    return result
