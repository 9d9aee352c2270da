"""Replacing whole objects: what peers send, what an operator or the cluster declares true.

Always holds:
- A replaced object is the old or the new one after a crash, and the new one is durable before
  it is shown (I2).
- Nothing is deleted here: what is in the way of recovery goes to quarantine (I4).
"""

from __future__ import annotations

import itertools
import logging

from sheepfs.core.errors import NoSpaceError, UsageError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from sheepfs.core.wire import Buffer
from storaged.store.catalog import Catalog
from storaged.store.disk import Disk, Health, disk_error, must_succeed, write_all
from storaged.store.entry import OK, StoredObject
from storaged.store.files import OpenFiles
from storaged.store.format import (
    BITMAP_SIZE,
    META_OFFSET,
    META_SIZE,
    SUMS,
    TABLE_SIZE,
    Header,
    block_sums,
    blocks_in,
    encode_meta,
    runs,
)
from storaged.store.reader import disk_sums
from storaged.store.space import SpaceGuard
from storaged.store.writer import make_directories

log = logging.getLogger(__name__)
_CHUNK = 256


class Replacer:
    """Installs and launders objects. Threads only; the caller lets nobody write meanwhile."""

    def __init__(
        self,
        disk: Disk,
        health: Health,
        catalog: Catalog,
        files: OpenFiles,
        space: SpaceGuard,
        cluster: int,
    ) -> None:
        self._disk = disk
        self._health = health
        self._catalog = catalog
        self._files = files
        self._space = space
        self._cluster = cluster
        self._serial = itertools.count()
        self._settled: set[tuple[int, int]] = set()

    def install(self, header: Header, bitmap: Buffer, data: Buffer) -> None:
        """See ObjectStore.install; `header.blocks` and `header.cluster` are computed here."""
        self._health.check()
        numbers = blocks_in(bitmap) if len(bitmap) == BITMAP_SIZE else []
        if len(bitmap) != BITMAP_SIZE or len(data) != len(numbers) * BLOCK_SIZE:
            raise UsageError(f"object {format_oid(header.oid)}: data does not fit its bitmap")
        self._space.check(len(data) + META_SIZE)
        sums = [0] * BLOCKS_PER_OBJECT
        for number, entry_sum in zip(numbers, block_sums(memoryview(data)), strict=True):
            sums[number] = entry_sum
        new = StoredObject(
            header.oid,
            header.pool,
            header.pg,
            header.version,
            header.lineage,
            BLOCKS_PER_OBJECT - sums.count(0),
        )
        temporary = f"tmp/{format_oid(new.oid)}.{next(self._serial)}"
        try:
            self._write(temporary, new, sums, numbers, memoryview(data))
        except OSError as error:
            raise self._abandoned(temporary, error) from error
        self._publish(temporary, new)

    def launder(self, oid: int, lineage: int) -> None:
        """See ObjectStore.launder."""
        self._health.check()
        entry = self._catalog.objects.get(oid)
        if entry is None:
            raise self._catalog.refusal(oid)
        try:
            fd = self._disk.open(entry.path)
        except OSError as error:
            raise disk_error(error, f"object {format_oid(oid)}") from error
        self._files.drop(entry)
        table = bytearray(TABLE_SIZE)
        file = self._files.adopt(entry, fd, table)
        try:
            for first in range(0, BLOCKS_PER_OBJECT, _CHUNK):
                sums = disk_sums(self._disk, fd, first, _CHUNK)
                SUMS[_CHUNK].pack_into(table, first * 8, *sums)
        except OSError as error:
            self._files.drop(entry)
            raise disk_error(error, f"read of object {format_oid(oid)}") from error
        blocks = BLOCKS_PER_OBJECT - SUMS[BLOCKS_PER_OBJECT].unpack(table).count(0)
        self._catalog.grow(entry, blocks - entry.blocks)
        entry.lineage = lineage
        try:
            self._files.write_meta(entry, file)
            self._disk.fdatasync(fd)
            self._sync_names(entry)
        except OSError as error:
            raise self._health.fail(error, f"object {format_oid(oid)}") from error
        entry.state = OK

    def _write(
        self, path: str, new: StoredObject, sums: list[int], numbers: list[int], data: memoryview
    ) -> None:
        """Write a complete object file and sync it (OSError)."""
        fd = self._disk.open(path, create=True, truncate=True)
        try:
            positions = {number: i * BLOCK_SIZE for i, number in enumerate(numbers)}
            for start, end, is_data in runs(sums):
                if is_data:
                    piece = data[positions[start] : positions[start] + (end - start) * BLOCK_SIZE]
                    write_all(self._disk, fd, piece, start * BLOCK_SIZE)
            header = Header(
                new.oid, new.version, new.lineage, new.pool, new.pg, new.blocks, self._cluster
            )
            table = SUMS[BLOCKS_PER_OBJECT].pack(*sums)
            write_all(self._disk, fd, encode_meta(header, table), META_OFFSET)
            # The file is not in use yet, but a failed sync speaks of the whole disk (I5).
            must_succeed(self._disk.fdatasync, fd)
        finally:
            self._disk.close(fd)

    def _publish(self, temporary: str, new: StoredObject) -> None:
        """Give a synced file its name, durably, and show it."""
        old = self._catalog.objects.get(new.oid)
        try:
            make_directories(self._disk, new.pool, new.pg)
            self._disk.rename(temporary, new.path)
            self._sync_names(new)
            if old is not None and old.path != new.path:
                self._disk.unlink(old.path)
                self._disk.fsync_dir(old.directory)
        except OSError as error:
            raise self._health.fail(error, f"object {format_oid(new.oid)}") from error
        if old is not None:
            # Unflushed changes of the replaced object are void.
            old.changed = False
            self._files.drop(old)
        self._catalog.add(new)

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

    def _abandoned(self, temporary: str, error: OSError) -> Exception:
        cause = disk_error(error, temporary)
        try:
            self._disk.unlink(temporary)
        except OSError as second:
            log.warning("%s stays until the next start: %s", temporary, second)
        if isinstance(cause, NoSpaceError):
            return cause
        return self._health.fail(error, temporary)
