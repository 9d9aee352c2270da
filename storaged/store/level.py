"""Levelling: making one replica equal to another by moving only the blocks that differ.

The node that is behind sends the checksums of what its disk really holds (`digests`), the source
answers with what differs (`difference`), and the node patches its copy (`begin_patch`).

Always holds:
- Nothing is believed from a table that may be old: `digests` reads the data.
- A patched object is unclean and marked: after a crash half-way it is a suspect again.
- What a patch changes is the object's own from then on; what it leaves may stay inherited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sheepfs.core.errors import (
    CorruptError,
    NoSpaceError,
    RetryableError,
    SheepError,
)
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.disk import Disk, disk_error, write_all
from storaged.store.entry import CORRUPT, OK, SUSPECT, OpenFile, Overlay, StoredObject
from storaged.store.format import (
    EMPTY_TABLE,
    META_SIZE,
    SUMS,
    TABLE_SIZE,
    SourcesLostError,
    runs,
)
from storaged.store.parts import OnParts, Parts
from storaged.store.patch import UNKNOWN_SUM, Difference, Patch, nothing_but_damage
from storaged.store.reader import MISSING
from storaged.store.sharing import Sharing

log = logging.getLogger(__name__)
_CHUNK = 256
_TRIES = 64
_ALL = SUMS[BLOCKS_PER_OBJECT]


class PatchJob:
    """One patch: made in the loop by `begin_patch`, run in a thread, ended in the loop."""

    def __init__(
        self, disk: Disk, entry: StoredObject, file: OpenFile, patch: Patch, is_new: bool
    ) -> None:
        self._disk = disk
        self.entry = entry
        self.file = file
        self.patch = patch
        self.is_new = is_new
        self.error: OSError | None = None

    def run(self) -> None:
        """Write the blocks that change. Blocks; `end_patch` tells how it went."""
        fd = self.file.fd
        try:
            for start, end, data in self.patch.steps:
                if data is None:
                    self._disk.punch(fd, start * BLOCK_SIZE, (end - start) * BLOCK_SIZE)
                else:
                    write_all(self._disk, fd, data, start * BLOCK_SIZE)
        except OSError as error:
            self.error = error


def _growth(entry: StoredObject, patch: Patch) -> int:
    """Give the bytes that an object takes more when it is patched, at most.

    None where a change is taken back that another member had no room for: on a full disk, too,
    that must not wait.
    """
    held = entry.blocks
    if entry.file is not None and entry.file.overlay is not None:
        sources = enumerate(entry.file.overlay.sources)
        held += sum(1 for i, source in sources if source and i not in patch.differs)
    return min(patch.size, max(0, patch.blocks - held) * BLOCK_SIZE)


class Leveller(OnParts):
    """Compares and patches objects; the caller lets nobody write to them meanwhile."""

    def __init__(
        self,
        parts: Parts,
        sharing: Sharing,
        make: Callable[[int, int, int], StoredObject],
        remove: Callable[[int], None],
    ) -> None:
        """`make(oid, pool, pg)` makes an empty object, `remove(oid)` removes one."""
        super().__init__(parts)
        self._sharing = sharing
        self._make = make
        self._remove = remove
        self._settled: set[tuple[int, int]] = set()

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
            overlay = self._files.overlay_of(entry, fd)
            for first in range(0, BLOCKS_PER_OBJECT, _CHUNK):
                sums = self._reader.disk_sums(fd, overlay, first, _CHUNK)
                if MISSING in sums:
                    sums = [0 if entry_sum == MISSING else entry_sum for entry_sum in sums]
                SUMS[_CHUNK].pack_into(table, first * 8, *sums)
        except SourcesLostError:
            return EMPTY_TABLE
        except OSError as error:
            raise disk_error(error, f"read of object {format_oid(oid)}") from error
        finally:
            self._disk.close(fd)
        return bytes(table)

    def difference(
        self,
        oid: int,
        digests: bytes,
        first: int = 0,
        end: int = BLOCKS_PER_OBJECT,
        *,
        salvage: bool = False,
    ) -> Difference:
        """Compare blocks of a good object with another copy's digests. Blocks. Raises as `read`.

        Args:
            salvage: leave out what is damaged and name it, instead of raising CorruptError.
        """
        for _ in range(_TRIES):
            entry = self._catalog.objects.get(oid)
            if entry is not None and entry.state == CORRUPT and salvage:
                return nothing_but_damage(entry.version, entry.lineage, first, end)
            if entry is None or entry.state != OK or self._health.failed is not None:
                raise self._catalog.refusal(oid)
            file = entry.file or self._files.acquire(entry)
            sequence = file.sequence
            version, lineage = entry.version, entry.lineage
            sums = SUMS[end - first]
            mine = sums.unpack_from(file.table, first * 8)
            theirs = sums.unpack_from(digests, first * 8)
            differs = [i for i, a, b in zip(range(first, end), mine, theirs, strict=True) if a != b]
            wanted = [a if a != b else 0 for a, b in zip(mine, theirs, strict=True)]
            blocks: list[Buffer] = []
            damaged: dict[int, int] = {}
            for at, stop, is_data in runs(wanted):
                if not is_data:
                    continue
                start = first + at
                try:
                    blocks += self._reader.read_blocks(entry, start, stop - at)
                except CorruptError:
                    if not salvage:
                        raise
                    for i in range(start, first + stop):
                        try:
                            blocks += self._reader.read_blocks(entry, i, 1)
                        except CorruptError:
                            damaged[i] = mine[i - first]
            if self._reader.settled(entry, file, sequence):
                good = [i for i in differs if i not in damaged] if damaged else differs
                zeros = [i for i in good if not mine[i - first]]
                return Difference(version, lineage, good, zeros, damaged, blocks)
        raise RetryableError(f"object {format_oid(oid)} changes too fast to be compared")

    def begin_patch(self, oid: int, patch: Patch, pool: int, pg: int) -> PatchJob:
        """Make an object, or one that is there, ready to be patched. Loop only.

        Raises:
            RetryableError: the object is not marked (any more); nothing changed.
            NoSpaceError: only the reserve is left, and it would take more; nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        self._health.check()
        entry = self._catalog.objects.get(oid)
        need = patch.size + META_SIZE if entry is None else _growth(entry, patch)
        if need:
            self._space.check(need)
        # First of all: an object that is not marked is refused untouched, and only an unclean
        # one's file stays open while a thread makes room for another.
        is_new = entry is None
        if entry is None:
            entry = self._make(oid, pool, pg)
        elif entry.linked:
            self._sharing.before_change(entry, sorted(patch.differs))
        self._tracker.changing(entry)
        file = self._reopened(entry)
        entry.state = SUSPECT
        file.sequence += 1
        self._files.pin(entry)
        return PatchJob(self._disk, entry, file, patch, is_new)

    def end_patch(self, job: PatchJob) -> None:
        """Make what a job has written the object's content. Loop only; durable when flushed.

        Raises:
            NoSpaceError: the file system is full, whatever the reserve: a new object is gone
                again, another is a suspect.
            DiskError: the disk failed; the store is out of use.
        """
        entry, file, patch = job.entry, job.file, job.patch
        try:
            if job.error is not None:
                raise job.error
            self._tell_own(file, patch)
            own = patch.blocks
            if file.overlay is not None:
                own -= BLOCKS_PER_OBJECT - file.overlay.sources.count(0)
            file.table[:] = patch.table
            self._catalog.grow(entry, own - entry.blocks)
            self._relink(entry, file)
            entry.version, entry.lineage = patch.version, patch.lineage
            entry.damaged = patch.damaged
            # A new file gets its full length by this: a read must not end within a block.
            self._files.write_meta(entry, file)
        except OSError as error:
            problem = self._refused(error, f"patch of {format_oid(entry.oid)}")
            if job.is_new and self._health.failed is None:
                self._remove(entry.oid)
            raise problem from error
        finally:
            self.leave(job)
        entry.changed = entry.used = True
        entry.state = OK

    def leave(self, job: PatchJob) -> None:
        """Let go of an object; as long as its patch has not ended it is a suspect. Loop only."""
        job.file.sequence += 1
        self._files.unpin(job.entry)

    def _refused(self, error: OSError, what: str) -> SheepError:
        """Give the error for what the disk did not take: a full one goes on working (I14)."""
        problem = disk_error(error, what)
        return problem if isinstance(problem, NoSpaceError) else self._health.fail(error, what)

    def _reopened(self, entry: StoredObject) -> OpenFile:
        """Give the open file; a fresh one where the header is damaged or the name is gone."""
        try:
            fd = self._disk.open(entry.path, create=True)
            try:
                overlay = self._files.overlay_of(entry, fd)
            except SourcesLostError:
                # `digests` gave nothing but zeros, so the patch has all there is.
                self._disk.truncate(fd, 0)
                overlay = None
        except OSError as error:
            raise self._refused(error, f"open of {format_oid(entry.oid)}") from error
        # Changes through the former descriptor are in the page cache of the same file; if its
        # name was lost, the file opened now is a new one.
        table = bytearray(EMPTY_TABLE) if entry.file is None else entry.file.table
        self._files.drop(entry)
        self._tracker.directory_changed(entry.directory)
        return self._files.adopt(entry, fd, table, overlay)

    def _relink(self, entry: StoredObject, file: OpenFile) -> None:
        bases = () if file.overlay is None else file.overlay.used()
        if bases or entry.bases:
            self._catalog.set_bases(entry, bases)

    def _tell_own(self, file: OpenFile, patch: Patch) -> None:
        """Record that changed blocks are the object's own, and inherited zeros are holes (OSError).

        What is inherited from a base that is gone counts as zeros in `digests`.
        """
        overlay = file.overlay
        if overlay is None:
            return
        sums = _ALL.unpack(patch.table)
        for i, source in enumerate(overlay.sources):
            if source and (i in patch.differs or not sums[i]):
                if i not in patch.differs:
                    self._disk.punch(file.fd, i * BLOCK_SIZE, BLOCK_SIZE)
                overlay.own(i, (sums[i],))

    def launder(self, oid: int, lineage: int) -> None:
        """See ObjectStore.launder. Blocks."""
        self._health.check()
        entry = self._catalog.objects.get(oid)
        if entry is None:
            raise self._catalog.refusal(oid)
        try:
            fd = self._disk.open(entry.path)
            # Of a plain object without a header there is only the data. Of an overlay without
            # its sources there is nothing to be had: what it inherited is not zeros (I3).
            overlay = self._files.overlay_of(entry, fd)
        except OSError as error:
            raise disk_error(error, f"object {format_oid(oid)}") from error
        self._files.drop(entry)
        table = bytearray(TABLE_SIZE)
        file = self._files.adopt(entry, fd, table, overlay)
        try:
            for first in range(0, BLOCKS_PER_OBJECT, _CHUNK):
                sums = self._reader.disk_sums(fd, overlay, first, _CHUNK)
                if MISSING in sums:
                    log.error("%s: blocks that it inherits are gone", format_oid(oid))
                    sums = [
                        UNKNOWN_SUM if entry_sum == MISSING else entry_sum for entry_sum in sums
                    ]
                SUMS[_CHUNK].pack_into(table, first * 8, *sums)
        except OSError as error:
            self._files.drop(entry)
            raise disk_error(error, f"read of object {format_oid(oid)}") from error
        whole = _ALL.unpack(table)
        blocks = BLOCKS_PER_OBJECT - whole.count(0)
        if overlay is not None:
            self._drop_zeros(file, overlay, whole)
            blocks -= BLOCKS_PER_OBJECT - overlay.sources.count(0)
        self._catalog.grow(entry, blocks - entry.blocks)
        self._relink(entry, file)
        entry.lineage = lineage
        try:
            self._files.write_meta(entry, file)
        except OSError as error:
            raise self._refused(error, f"object {format_oid(oid)}") from error
        try:
            self._files.sync(entry)
            self._sync_names(entry)
        except OSError as error:
            raise self._health.fail(error, f"object {format_oid(oid)}") from error
        entry.state = OK

    def _drop_zeros(self, file: OpenFile, overlay: Overlay, sums: Sequence[int]) -> None:
        """Make inherited blocks of zeros holes of the object's own."""
        for i, source in enumerate(overlay.sources):
            if source and not sums[i]:
                try:
                    self._disk.punch(file.fd, i * BLOCK_SIZE, BLOCK_SIZE)
                except OSError as error:
                    raise self._health.fail(error, "launder") from error
                overlay.own(i, (0,))

    def _sync_names(self, entry: StoredObject) -> None:
        """Make the name of an object's file durable, and those of the directories above it.

        The directories may be there and not be durable yet: the loop makes them too, and leaves
        them to the next flush. Once synced here they stay (OSError).
        """
        self._disk.fsync_dir(entry.directory)
        if (entry.pool, entry.pg) not in self._settled:
            self._disk.fsync_dir(f"objects/{entry.pool}")
            self._disk.fsync_dir("objects")
            self._settled.add((entry.pool, entry.pg))
