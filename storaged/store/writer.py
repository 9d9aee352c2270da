"""Writing, in the event loop: into the page cache and the table in memory, never to a sync.

Always holds:
- Everything that can be refused is refused before the first byte changes.
- One pwrite for each request, whatever its alignment: the edges of a ragged range are read,
  checked and hashed together with the new bytes, but only the new bytes are written.
- A block whose table entry is 0 reads as zeros on disk too, so a ragged write may extend it.
- A ragged write to an inherited block writes the whole block to the object's own file.
- Who inherits a block that is to change has its own copy first (sharing.py).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.disk import disk_error, write_all
from storaged.store.entry import SUSPECT, OpenFile, Overlay, StoredObject
from storaged.store.format import SUMS, block_sum, block_sums
from storaged.store.parts import OnParts, Parts
from storaged.store.sharing import Sharing

log = logging.getLogger(__name__)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Writer(OnParts):
    """Changes objects. Loop only; no method blocks but for cold headers and cold edges."""

    def __init__(self, parts: Parts, sharing: Sharing) -> None:
        super().__init__(parts)
        self._sharing = sharing

    def write(self, oid: int, offset: int, data: Buffer, version: int) -> None:
        """See ObjectStore.write."""
        entry = self._catalog.objects.get(oid)
        if entry is None or entry.state or self._health.failed is not None:
            raise self._catalog.refusal(oid)
        file = entry.file
        if file is None:
            file = self._open(entry)
        length = len(data)
        end = offset + length
        if not 0 <= offset < end <= OBJECT_SIZE:
            raise UsageError(f"range {offset}+{length} is not within an object")
        first = offset // BLOCK_SIZE
        overlay = None
        if entry.linked:
            self._sharing.before_change(entry, range(first, -(-end // BLOCK_SIZE)))
            file = self._reopen(entry)
            offset, data = self._widened(entry, file, offset, data)
            length = len(data)
            overlay = file.overlay
        if (offset | length) % BLOCK_SIZE:
            new = self._ragged_sums(entry, offset, memoryview(data))
        elif length == BLOCK_SIZE:
            new = [block_sum(data)]
        else:
            new = block_sums(memoryview(data))
        entry.used = True
        self._apply(entry, file, first, new, offset, data, version, overlay)

    def fill(
        self, entry: StoredObject, file: OpenFile, offset: int, data: Buffer, version: int
    ) -> None:
        """Write to an object that was just made, whoever else may not see it yet."""
        offset, data = self._widened(entry, file, offset, data)
        new = self._ragged_sums(entry, offset, memoryview(data))
        self._apply(entry, file, offset // BLOCK_SIZE, new, offset, data, version, file.overlay)

    def punch(self, oid: int, offset: int, length: int, version: int) -> None:
        """See ObjectStore.punch."""
        entry = self._catalog.objects.get(oid)
        if entry is None or entry.state or self._health.failed is not None:
            raise self._catalog.refusal(oid)
        file = entry.file or self._open(entry)
        end = offset + length
        if not 0 <= offset < end <= OBJECT_SIZE:
            raise UsageError(f"range {offset}+{length} is not within an object")
        if entry.linked:
            first, end_block = offset // BLOCK_SIZE, -(-end // BLOCK_SIZE)
            self._sharing.before_change(entry, range(first, end_block))
            file = self._reopen(entry)
        self.zero(entry, file, offset, length, version)

    def zero(
        self, entry: StoredObject, file: OpenFile, offset: int, length: int, version: int
    ) -> None:
        """Make a range of an open object that nobody inherits from read as zeros."""
        end = offset + length
        first = offset // BLOCK_SIZE
        count = -(-end // BLOCK_SIZE) - first
        overlay = file.overlay
        old = SUMS[count].unpack_from(file.table, first * 8)
        new = [0] * count
        edges: list[tuple[int, Buffer]] = []
        own = count - old.count(0)
        for block in {first, first + count - 1}:
            start = max(offset, block * BLOCK_SIZE)
            stop = min(end, (block + 1) * BLOCK_SIZE)
            if stop - start == BLOCK_SIZE or not old[block - first]:
                continue
            kept = bytearray(self._reader.read_blocks(entry, block, 1)[0])
            kept[start % BLOCK_SIZE : start % BLOCK_SIZE + stop - start] = bytes(stop - start)
            new[block - first] = block_sum(kept)
            if not new[block - first]:
                continue
            if overlay is not None and overlay.sources[block]:
                edges.append((block * BLOCK_SIZE, kept))
            else:
                edges.append((start, bytes(stop - start)))
        if overlay is not None:
            own -= _inherited(overlay, first, count)
        file = self._begin(entry, file)
        entry.used = True
        file.sequence += 1
        try:
            for start, piece in edges:
                write_all(self._disk, file.fd, piece, start)
            self._punch_blocks(file, first, old, new)
            SUMS[count].pack_into(file.table, first * 8, *new)
            if file.overlay is not None:
                file.overlay.own(first, new)
            self._catalog.grow(entry, count - new.count(0) - own)
            entry.version = version
        except OSError as error:
            raise self.broken(entry, error) from error
        finally:
            file.sequence += 1

    def delete(self, oid: int) -> None:
        """See ObjectStore.delete."""
        self._health.check()
        entry = self._catalog.objects.get(oid)
        if entry is None:
            return
        if entry.linked:
            self._sharing.before_removal(entry)
        try:
            self._disk.unlink(entry.path)
        except FileNotFoundError:
            log.warning("object %s: its file was gone already", format_oid(oid))
        except OSError as error:
            raise self._health.fail(error, f"delete of {format_oid(oid)}") from error
        self.forget(entry)

    def forget(self, entry: StoredObject) -> None:
        """Drop an object whose file lost its name; its directory is synced by the next flush."""
        self._catalog.remove(entry)
        self._files.drop(entry)
        entry.changed = False
        self._tracker.directory_changed(entry.directory)

    def _open(self, entry: StoredObject) -> OpenFile:
        self._files.evict()
        return self._files.acquire(entry)

    def _reopen(self, entry: StoredObject) -> OpenFile:
        """Give the open file once more: others were opened and may have taken its place."""
        return entry.file or self._files.acquire(entry)

    def _widened(
        self, entry: StoredObject, file: OpenFile, offset: int, data: Buffer
    ) -> tuple[int, Buffer]:
        """Add to a range what it lacks of the inherited blocks at its edges."""
        overlay = file.overlay
        end = offset + len(data)
        if overlay is None or not (offset | end) % BLOCK_SIZE:
            return offset, data
        skip, rest = offset % BLOCK_SIZE, end % BLOCK_SIZE
        first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
        before: Buffer = b""
        after: Buffer = b""
        if skip and overlay.sources[first]:
            before = self._reader.read_blocks(entry, first, 1)[0][:skip]
        if rest and overlay.sources[last]:
            after = self._reader.read_blocks(entry, last, 1)[0][rest:]
        return offset - len(before), b"".join((before, data, after))

    def _begin(self, entry: StoredObject, file: OpenFile) -> OpenFile:
        """Make an entry unclean; give its open file, which a thread may have closed until now."""
        if not entry.changed:
            self._tracker.changing(entry)
            if entry.file is not file:
                return self._files.acquire(entry)
        return file

    def _apply(
        self,
        entry: StoredObject,
        file: OpenFile,
        first: int,
        new: list[int],
        offset: int,
        data: Buffer,
        version: int,
        overlay: Overlay | None = None,
    ) -> None:
        """Write `data` at `offset`; `new` are the entries of the blocks it touches.

        Args:
            overlay: the file's.
        """
        count = len(new)
        old = SUMS[count].unpack_from(file.table, first * 8)
        grown = old.count(0)
        empty = new.count(0)
        if overlay is not None:
            grown += _inherited(overlay, first, count)
        if grown and empty < count:
            self._space.take(grown * BLOCK_SIZE)
        if not entry.changed:
            file = self._begin(entry, file)
        length = len(data)
        file.sequence += 1
        try:
            if empty == count:
                self._punch_blocks(file, first, old, new)
            else:
                done = self._disk.pwrite(file.fd, data, offset)
                if done != length:
                    write_all(self._disk, file.fd, memoryview(data)[done:], offset + done)
            SUMS[count].pack_into(file.table, first * 8, *new)
            if overlay is not None and file.overlay is not None:
                file.overlay.own(first, new)
            # Version and data change within one window of the sequence: an export in a thread
            # must never pair the one with the other's past.
            entry.version = version
            if grown != empty:
                self._catalog.grow(entry, grown - empty)
        except OSError as error:
            if grown == count:
                self._undo(file, first, count)
                if error.errno in _NO_SPACE and self._health.failed is None:
                    raise disk_error(error, f"write to {format_oid(entry.oid)}") from error
            raise self.broken(entry, error) from error
        finally:
            file.sequence += 1

    def _ragged_sums(self, entry: StoredObject, offset: int, view: memoryview) -> list[int]:
        """Give the entries of the blocks that a write of `view` at `offset` touches."""
        end = offset + len(view)
        first, skip = divmod(offset, BLOCK_SIZE)
        last, rest = divmod(end, BLOCK_SIZE)
        if first == last:
            block = bytearray(self._reader.read_blocks(entry, first, 1)[0])
            block[skip:rest] = view
            return [block_sum(block)]
        sums = []
        start = 0
        if skip:
            start = BLOCK_SIZE - skip
            old = self._reader.read_blocks(entry, first, 1)[0]
            sums.append(block_sum(b"".join((old[:skip], view[:start]))))
        stop = len(view) - rest
        sums += block_sums(view[start:stop])
        if rest:
            old = self._reader.read_blocks(entry, last, 1)[0]
            sums.append(block_sum(b"".join((view[stop:], old[rest:]))))
        return sums

    def _punch_blocks(
        self, file: OpenFile, first: int, old: Sequence[int], new: Sequence[int]
    ) -> None:
        """Punch the span of blocks that become holes and are none yet (OSError)."""
        gone = [i for i, entry in enumerate(new) if not entry and old[i]]
        if gone:
            start, stop = gone[0], gone[-1] + 1
            self._disk.punch(file.fd, (first + start) * BLOCK_SIZE, (stop - start) * BLOCK_SIZE)

    def _undo(self, file: OpenFile, first: int, count: int) -> None:
        """Make blocks that were holes before a failed write holes again."""
        try:
            self._disk.punch(file.fd, first * BLOCK_SIZE, count * BLOCK_SIZE)
        except OSError as error:
            self._health.fail(error, "undoing a write")

    def refused(self, error: OSError, what: str) -> SheepError:
        """Give the error for a change that the disk refused before it began."""
        if error.errno in _NO_SPACE:
            return disk_error(error, what)
        return self._health.fail(error, what)

    def broken(self, entry: StoredObject, error: OSError) -> SheepError:
        """Give the error for a change that failed half-way: only peers know the object now."""
        entry.state = SUSPECT
        return self.refused(error, f"write to {format_oid(entry.oid)}")


def _inherited(overlay: Overlay, first: int, count: int) -> int:
    """Count the blocks of a range that lie in other objects."""
    return count - overlay.sources.count(0, first, first + count)
