"""Making objects: empty ones, and copies of others, in the event loop.

Always holds:
- An object that is made anew is a suspect until its content is whole.
- Whoever inherits from what it was before has its own copies first (sharing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sheepfs.core.errors import NoSpaceError, RetryableError, SheepError, UsageError
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.disk import Disk, make_directory, write_all
from storaged.store.entry import OK, SUSPECT, OpenFile, StoredObject
from storaged.store.format import EMPTY_TABLE, META_SIZE
from storaged.store.parts import OnParts, Parts
from storaged.store.sharing import Copy, Sharing
from storaged.store.writer import Writer


class Maker(OnParts):
    """Makes objects. Loop only; blocks for cold bases."""

    def __init__(self, parts: Parts, sharing: Sharing, writer: Writer) -> None:
        super().__init__(parts)
        self._sharing = sharing
        self._writer = writer

    def create(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        version: int,
        pool: int,
        pg: int,
        base: int | None,
    ) -> None:
        """See ObjectStore.write; `create` is True."""
        self._health.check()
        end = offset + len(data)
        if not 0 <= offset <= end <= OBJECT_SIZE:
            raise UsageError(f"range {offset}+{len(data)} is not within an object")
        covered = -(-end // BLOCK_SIZE) * BLOCK_SIZE - offset // BLOCK_SIZE * BLOCK_SIZE
        with self._making(oid, version, pool, pg, base, covered) as (entry, file):
            if data:
                self._writer.fill(entry, file, offset, data, version)

    def create_punched(
        self, oid: int, offset: int, length: int, version: int, pool: int, pg: int, base: int
    ) -> None:
        """See ObjectStore.punch; with a base."""
        self._health.check()
        if not 0 <= offset < offset + length <= OBJECT_SIZE:
            raise UsageError(f"range {offset}+{length} is not within an object")
        with self._making(oid, version, pool, pg, base, 2 * BLOCK_SIZE) as (entry, file):
            self._writer.zero(entry, file, offset, length, version)

    @contextmanager
    def _making(
        self, oid: int, version: int, pool: int, pg: int, base: int | None, need_bytes: int
    ) -> Iterator[tuple[StoredObject, OpenFile]]:
        """Void an object, make it a copy of `base`, and trust it after the body."""
        if oid not in self._marks.marked:
            raise RetryableError(f"object {format_oid(oid)} is not marked as dirty")
        entry = self._catalog.objects.get(oid)
        if entry is not None and entry.linked:
            self._sharing.before_removal(entry)
        copy = None
        if base is not None:
            if base == oid:
                raise UsageError(f"object {format_oid(oid)} as a copy of itself")
            copy = self._sharing.copy_of(base)
            need_bytes += len(copy.own) * BLOCK_SIZE
        freed = entry.blocks * BLOCK_SIZE if entry is not None else 0
        self._space.check(max(0, need_bytes + META_SIZE - freed))
        if entry is not None and (entry.pool, entry.pg) != (pool, pg):
            self._writer.delete(oid)
            entry = None
        made = entry is None
        entry = self.make(oid, pool, pg) if entry is None else entry
        # Until the new content is whole, a thread that compares the object must not see it.
        entry.state = SUSPECT
        try:
            yield entry, self._void(entry, version, copy)
        except SheepError:
            if made and self._health.failed is None:
                self._writer.delete(oid)
            raise
        entry.state = OK

    def make(self, oid: int, pool: int, pg: int) -> StoredObject:
        """Make an empty object file and its entry; nothing of it is durable yet."""
        entry = StoredObject(oid, pool, pg)
        try:
            try:
                fd = self._disk.open(entry.path, create=True)
            except FileNotFoundError:
                for made in make_directories(self._disk, pool, pg):
                    self._tracker.directory_changed(made)
                fd = self._disk.open(entry.path, create=True)
        except OSError as error:
            raise self._writer.refused(error, f"creation of {format_oid(oid)}") from error
        self._tracker.directory_changed(entry.directory)
        self._files.evict()
        self._files.adopt(entry, fd, bytearray(EMPTY_TABLE))
        entry.state = SUSPECT
        self._catalog.add(entry)
        return entry

    def _void(self, entry: StoredObject, version: int, copy: Copy | None) -> OpenFile:
        """Make an object read as zeros, or as a copy, whatever it held; give its open file.

        Who inherited from it has been given its own blocks before.
        """
        self._tracker.changing(entry)
        file = entry.file
        if file is None:
            try:
                fd = self._disk.open(entry.path, create=True)
            except OSError as error:
                raise self._writer.refused(error, f"write to {format_oid(entry.oid)}") from error
            self._tracker.directory_changed(entry.directory)
            self._files.evict()
            file = self._files.adopt(entry, fd, bytearray(EMPTY_TABLE))
        file.sequence += 1
        try:
            self._disk.truncate(file.fd, 0)
            file.table[:] = EMPTY_TABLE
            file.overlay = None
            self._catalog.grow(entry, -entry.blocks)
            if copy is not None:
                for number, block in copy.own:
                    write_all(self._disk, file.fd, block, number * BLOCK_SIZE)
                self._catalog.grow(entry, len(copy.own))
                file.table[:] = copy.table
                file.overlay = copy.overlay
            bases = () if file.overlay is None else tuple(file.overlay.bases)
            if bases or entry.bases:
                self._catalog.set_bases(entry, bases)
            entry.version = version
            entry.lineage = 0
            entry.used = True
            # Now, while it can still be refused, rather than at a flush on a full disk.
            self._files.write_meta(entry, file)
            entry.changed = True
        except OSError as error:
            raise self._writer.broken(entry, error) from error
        finally:
            file.sequence += 1
        return file

    def inherit(self, oid: int, pool: int, pg: int, copy: Copy) -> None:
        """See ObjectStore.inherit."""
        self._health.check()
        self._space.check(META_SIZE + len(copy.own) * BLOCK_SIZE)
        entry = self._catalog.objects.get(oid)
        if entry is not None:
            raise UsageError(f"object {format_oid(oid)} is there already")
        if oid not in self._marks.marked:
            raise RetryableError(f"object {format_oid(oid)} is not marked as dirty")
        entry = self.make(oid, pool, pg)
        try:
            self._void(entry, 0, copy)
        except NoSpaceError:
            if self._health.failed is None:
                self._writer.delete(oid)
            raise


def make_directories(disk: Disk, pool: int, pg: int) -> list[str]:
    """Make the directories of a placement group; give those that got a new name (OSError)."""
    changed = []
    if make_directory(disk, f"objects/{pool}"):
        changed.append("objects")
    if make_directory(disk, f"objects/{pool}/{pg:04x}"):
        changed.append(f"objects/{pool}")
    return changed
