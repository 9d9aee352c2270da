"""The open object files: opened on first use, closed by a second-chance rule.

Always holds:
- Any thread may open a file and close clean ones; only the event loop closes one with
  unflushed data. Who changes an object makes it unclean first and looks at `entry.file` then.
- A file with unflushed data is closed only after fdatasync: a descriptor opened later could
  miss a write-back error that happened in between (I5).
- Headers are put together and written under one lock: of two threads that write one, the later
  one writes what is newer.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    RecoveringError,
    RetryableError,
)
from sheepfs.core.geometry import BLOCKS_PER_OBJECT, format_oid
from storaged.store.disk import Disk, Health, disk_error, write_all
from storaged.store.entry import (
    CORRUPT,
    OK,
    SUSPECT,
    OpenFile,
    Overlay,
    StoredObject,
    open_overlay,
)
from storaged.store.format import (
    META_OFFSET,
    META_SIZE,
    Header,
    SourcesLostError,
    decode_header,
    decode_meta,
    encode_meta,
)

log = logging.getLogger(__name__)
_SCAN = 64
"""Entries looked at for one that can be closed without a sync."""
_MAX_OPEN = 8192


def default_limit() -> int:
    """Give how many object files to keep open: 1,024, or less if the process may open few."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MAX_OPEN
    return max(16, min(_MAX_OPEN, soft // 4))


class OpenFiles:
    """Cache of open files. The soft limit may be doubled by files with unflushed data."""

    def __init__(
        self,
        disk: Disk,
        health: Health,
        cluster: int,
        limit: int,
        vanished: Callable[[StoredObject], None],
    ) -> None:
        """`vanished` is told of an object whose file is not there any more."""
        self._disk = disk
        self._health = health
        self._cluster = cluster
        self._limit = limit
        self._vanished = vanished
        self._lock = threading.Lock()
        self._meta_lock = threading.Lock()
        self._open: dict[int, StoredObject] = {}
        self._pinned: set[StoredObject] = set()
        self.release: Callable[[StoredObject], bool] = lambda entry: False
        """Drops an entry's file unless it is unclean; set by the flush tracker."""

    def acquire(self, entry: StoredObject) -> OpenFile:
        """Give the entry's open file; open it and check its header if need be. May block.

        Raises:
            ObjectNotFoundError: the file is gone.
            CorruptError: its header or table is damaged; the entry says so from now on.
            RecoveringError: its header is not the one the store knows; now a suspect.
            DiskError: it cannot be read.
        """
        for _ in range(16):
            file = entry.file
            if file is not None:
                return file
            opened = entry.opened
            try:
                file, header = self._load(entry)
            except CorruptError as error:
                with self._lock:
                    if entry.opened != opened or entry.file is not None:
                        continue  # Perhaps another thread wrote the header meanwhile.
                    if entry.state == OK:
                        entry.state = CORRUPT
                log.error("%s", error)
                raise CorruptError(str(error), range(BLOCKS_PER_OBJECT)) from error
            with self._lock:
                if entry.opened != opened or entry.file is not None:
                    continue  # Another thread was faster; what was read may be old by now.
                if header.version != entry.version:
                    entry.state = SUSPECT
                    expected, entry.version = entry.version, header.version
                    entry.lineage = header.lineage
                    raise RecoveringError(
                        f"object {format_oid(entry.oid)} has version {header.version:#x} on disk,"
                        f" {expected:#x} was expected"
                    )
                self._publish(entry, file)
            self.evict_clean()
            return file
        raise RetryableError(f"object {format_oid(entry.oid)} is opened by too many at once")

    def peek(self, entry: StoredObject) -> OpenFile:
        """Give the entry's open file, or one for the caller alone if it is not open. Blocks.

        Raises: as `acquire`.
        """
        file = entry.file
        if file is not None:
            return file
        with suppress(CorruptError):
            file, header = self._load(entry)
            if (header.version, header.lineage) == (entry.version, entry.lineage):
                return file
        # The longer way finds out whether somebody else has changed it meanwhile.
        return self.acquire(entry)

    def is_as_written(self, entry: StoredObject, file: OpenFile) -> bool:
        """Tell whether header and table on disk are those in memory, or about to be. Blocks.

        Raises:
            OSError: they cannot be read.
        """
        with self._meta_lock:
            if entry.changed:
                return True
            sequence = file.sequence
            meta = self._disk.pread(file.fd, META_SIZE, META_OFFSET)
            try:
                header, table, _ = decode_meta(entry.oid, self._cluster, meta)
                is_good = (header.version, header.lineage) == (entry.version, entry.lineage)
                is_good = is_good and table == file.table
            except CorruptError:
                is_good = False
            # Who changes an object says so first.
            return is_good or entry.changed or entry.file is not file or file.sequence != sequence

    def adopt(
        self, entry: StoredObject, fd: int, table: bytearray, overlay: Overlay | None = None
    ) -> OpenFile:
        """Make `fd` the entry's open file."""
        file = OpenFile(fd, table, self._disk.close, overlay)
        with self._lock:
            self._publish(entry, file)
        return file

    def drop(self, entry: StoredObject) -> None:
        """Forget the entry's open file; nothing is written."""
        with self._lock:
            if self._open.get(entry.oid) is entry:
                del self._open[entry.oid]
            entry.file = None
            entry.opened += 1

    def all_pinned(self) -> set[StoredObject]:
        """Give the objects that a thread is changing."""
        with self._lock:
            return set(self._pinned)

    @contextmanager
    def pinned(self, entry: StoredObject) -> Iterator[None]:
        """Keep an unclean entry unclean, and its file open, while a thread changes the object.

        A flush that ends meanwhile may have begun before the change was complete.
        """
        self.pin(entry)
        try:
            yield
        finally:
            self.unpin(entry)

    def pin(self, entry: StoredObject) -> None:
        """Begin what `pinned` does."""
        with self._lock:
            self._pinned.add(entry)

    def unpin(self, entry: StoredObject) -> None:
        """End what `pin` began."""
        with self._lock:
            self._pinned.discard(entry)

    def evict(self) -> None:
        """Close files that were not used lately until the limit holds. Loop only.

        Raises:
            DiskError: there were only files with unflushed data, and a sync failed.
        """
        self.evict_clean()
        while len(self._open) > 2 * self._limit:
            with self._lock:
                entry = next((e for e in self._open.values() if e not in self._pinned), None)
            if entry is None:
                return
            self.sync(entry)
            self.drop(entry)

    def evict_clean(self) -> None:
        """Close files that were not used lately and need no sync, to the limit. Any thread."""
        # At most once around: who has just opened a file must find it open.
        for _ in range(min(_SCAN, len(self._open))):
            with self._lock:
                if len(self._open) <= self._limit:
                    return
                entry = self._open.pop(next(iter(self._open)))
                if entry.used or entry in self._pinned or not self.release(entry):
                    entry.used = False
                    self._open[entry.oid] = entry

    def sync(self, entry: StoredObject) -> None:
        """Make an open entry's file durable. Blocks. Raises DiskError."""
        file = entry.file
        if file is None:
            return
        try:
            if entry.changed:
                self.write_meta(entry, file)
            self._disk.fdatasync(file.fd)
            if file.overlay is not None and file.overlay.pending:
                # What was written is durable now, and the header may say so.
                file.overlay.pending = {}
                self.write_meta(entry, file)
                self._disk.fdatasync(file.fd)
            entry.synced = True
        except OSError as error:
            raise self._health.fail(error, f"sync of {format_oid(entry.oid)}") from error

    def write_meta(self, entry: StoredObject, file: OpenFile) -> None:
        """Write header and table as they are in memory (OSError)."""
        with self._meta_lock:
            header = Header(
                entry.oid,
                entry.version,
                entry.lineage,
                entry.pool,
                entry.pg,
                entry.blocks,
                self._cluster,
            )
            sources = None if file.overlay is None else file.overlay.on_disk()
            meta = encode_meta(header, file.table, sources)
            write_all(self._disk, file.fd, meta, META_OFFSET)
            entry.changed = False

    def overlay_of(self, entry: StoredObject, fd: int) -> Overlay | None:
        """Give where an object's blocks lie, also that of one whose table is damaged. Blocks.

        Args:
            fd: its file, read if it is not open already.

        Raises:
            OSError: it cannot be read.
            SourcesLostError: it is an overlay, and its sources are unreadable.
        """
        file = entry.file
        if file is not None:
            return file.overlay
        try:
            meta = self._disk.pread(fd, META_SIZE, META_OFFSET)
            return open_overlay(entry.oid, decode_header(entry.oid, self._cluster, meta)[1])
        except SourcesLostError:
            raise
        except CorruptError:
            return None

    def close(self) -> None:
        """Close all files; nothing is written."""
        with self._lock:
            for entry in self._open.values():
                entry.file = None
            self._open.clear()

    def _publish(self, entry: StoredObject, file: OpenFile) -> None:
        entry.file = file
        entry.opened += 1
        entry.used = True
        self._open[entry.oid] = entry

    def _load(self, entry: StoredObject) -> tuple[OpenFile, Header]:
        try:
            fd = self._disk.open(entry.path)
        except FileNotFoundError:
            self._vanished(entry)
            raise ObjectNotFoundError(f"object {format_oid(entry.oid)}: its file is gone") from None
        except OSError as error:
            raise disk_error(error, f"object {format_oid(entry.oid)}") from error
        file = OpenFile(fd, bytearray(), self._disk.close)
        try:
            meta = self._disk.pread(fd, META_SIZE, META_OFFSET)
            header, file.table, sources = decode_meta(entry.oid, self._cluster, meta)
            file.overlay = open_overlay(entry.oid, sources)
        except OSError as error:
            raise disk_error(error, f"object {format_oid(entry.oid)}") from error
        return file, header
