"""The dirty log: which objects may differ from their checksum tables after a crash.

Always holds:
- An object is marked, durably, before the first byte of it changes after it was clean (I2).
- A mark goes only when the object is clean: data, table and name are on stable storage.
- Marks outlive flushes, so a hot set costs no log writes (like DRBD's activity log).
- `lock` guards the step from clean to dirty against a trim: whoever makes an object dirty
  checks its mark and records it as unclean under the lock, and a trim decides under it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from sheepfs.core.errors import NoSpaceError
from storaged.store.disk import Disk, Health, disk_error
from storaged.store.recordlog import RecordLog

MAX_MARKS = 4096
MAX_BYTES = 1 << 20


class DirtyLog:
    """The set of marked objects and its file `dirty.log`. Thread-safe."""

    def __init__(self, disk: Disk, health: Health) -> None:
        self._log = RecordLog(disk, "dirty.log", b"SHEEPDRT", "<Q")
        self._health = health
        self._io_lock = threading.Lock()
        self.lock = threading.Lock()
        self.marked: set[int] = set()
        self._fresh: set[int] = set()
        """Marked, but not written to yet: the next trim keeps them, so that the writer that
        has just marked an object finds the mark."""
        self._floor = 0

    def load(self) -> tuple[set[int], bool]:
        """Give the objects marked when the store stopped, and whether marks may be missing.

        `reset` must follow. Raises OSError.
        """
        records, damaged = self._log.load()
        return {record[0] for record in records}, damaged

    def reset(self, oids: Iterable[int]) -> None:
        """Make the log hold exactly these objects, durably (OSError)."""
        with self._io_lock, self.lock:
            self.marked = set(oids)
            self._fresh.clear()
            self._log.rewrite((oid,) for oid in sorted(self.marked))
            self._floor = self._log.count

    def mark(self, oids: Sequence[int]) -> None:
        """Mark objects durably. Blocks.

        Raises:
            NoSpaceError: the log cannot grow; nothing is marked.
            DiskError: the disk failed; the store is out of use.
        """
        with self._io_lock:
            new = [oid for oid in dict.fromkeys(oids) if oid not in self.marked]
            self._health.check()
            if new:
                try:
                    self._log.append([(oid,) for oid in new])
                except OSError as error:
                    cause = disk_error(error, "dirty log")
                    if isinstance(cause, NoSpaceError):
                        raise cause from error
                    raise self._health.fail(error, "dirty log") from error
            with self.lock:
                self.marked.update(new)
                self._fresh.update(oids)

    def use(self, oid: int) -> bool:
        """Tell whether `oid` is marked as it becomes dirty. The caller holds `lock`."""
        self._fresh.discard(oid)
        return oid in self.marked

    @property
    def needs_trim(self) -> bool:
        """Whether the log has grown beyond its bound since the last trim."""
        size = self._log.count
        return size > 2 * self._floor and (size > MAX_MARKS or self._log.size_bytes > MAX_BYTES)

    def trim(self, unclean: Callable[[], set[int]]) -> None:
        """Forget the marks of objects that are clean. Blocks.

        Args:
            unclean: gives the objects whose marks must stay; called under `lock`.

        Raises:
            DiskError: the disk failed; the store is out of use.
        """
        with self._io_lock:
            self._health.check()
            with self.lock:
                # From here on, who wants to write to a forgotten object must mark it anew, and
                # waits for the new file. The old file, a superset, counts until the rename.
                self.marked &= unclean() | self._fresh
                self._fresh.clear()
                keep = sorted(self.marked)
            try:
                self._log.rewrite((oid,) for oid in keep)
            except OSError as error:
                # On a full disk the old file, with marks too many, stays in use.
                if not isinstance(disk_error(error, "dirty log"), NoSpaceError):
                    raise self._health.fail(error, "dirty log") from error
            self._floor = self._log.count

    def close(self) -> None:
        """Close the file."""
        with self._io_lock:
            self._log.close()
