"""Flushing: which objects and directories are not yet on stable storage, and making them so.

Always holds:
- An object is unclean from before its first change until a sync that began after its last
  change has succeeded; a flush covers every unclean object of its layer, those included that
  another flush, still under way, covers too (I1).
- An unclean object is marked in the dirty log. A deleted one stays unclean until its directory
  is synced: after a power cut the file may be back, half written.
- What an overlay inherits is made durable with it, also from objects of other layers.
- An overlay that has new blocks of its own needs two syncs, one before its header names them
  (entry.py): `end` then gives the second job.
"""

from __future__ import annotations

from collections.abc import Sequence

from sheepfs.core.errors import RetryableError
from sheepfs.core.geometry import format_oid, layer_of
from storaged.store.dirtylog import DirtyLog
from storaged.store.disk import Disk, Health
from storaged.store.entry import OpenFile, StoredObject
from storaged.store.files import OpenFiles

_SYNC_ALL = 16
"""With more files and directories than this, one syncfs is cheaper than syncing each."""


class FlushJob:
    """One flush: made in the loop by `begin`, run in a thread, ended in the loop."""

    def __init__(
        self,
        disk: Disk,
        health: Health,
        objects: Sequence[tuple[StoredObject, int]],
        files: Sequence[OpenFile],
        directories: dict[str, int],
        pending: Sequence[tuple[StoredObject, dict[int, int], list[int]]],
    ) -> None:
        self._disk = disk
        self._health = health
        self.objects = objects
        self.files = files
        self.directories = directories
        self.pending = pending

    def run(self) -> None:
        """Make all of it durable. Blocks.

        Raises:
            DiskError: a sync failed; the store is out of use for good (I5).
        """
        self._health.check()
        try:
            if len(self.files) + len(self.directories) > _SYNC_ALL:
                self._disk.syncfs()
                return
            for file in self.files:
                self._disk.fdatasync(file.fd)
            for directory in self.directories:
                self._disk.fsync_dir(directory)
        except OSError as error:
            raise self._health.fail(error, "flush") from error


class FlushTracker:
    """The unclean objects by layer, and the directories with new or removed names."""

    def __init__(self, disk: Disk, health: Health, marks: DirtyLog, files: OpenFiles) -> None:
        self._disk = disk
        self._health = health
        self._marks = marks
        self._files = files
        self._layers: dict[int, dict[int, StoredObject]] = {}
        self._changes: dict[int, int] = {}
        self._directories: dict[str, int] = {}
        self._clock = 0
        files.release = self.release

    def release(self, entry: StoredObject) -> bool:
        """Drop the entry's open file, unless that needs a sync first; tell whether it did."""
        with self._marks.lock:
            unclean = self._layers.get(layer_of(entry.oid), {}).get(entry.oid) is entry
            if unclean and not entry.synced:
                return False
            entry.file = None
            entry.opened += 1
            return True

    def changing(self, entry: StoredObject) -> None:
        """Record that an entry is about to change for the first time since its last flush.

        Only from here on does its open file stay open.

        Raises:
            RetryableError: it is not marked; mark it and try again. Nothing may be changed.
        """
        with self._marks.lock:
            if not self._marks.use(entry.oid):
                raise RetryableError(f"object {format_oid(entry.oid)} is not marked as dirty")
            self._layers.setdefault(layer_of(entry.oid), {})[entry.oid] = entry
            self._clock += 1
            self._changes[entry.oid] = self._clock
            entry.synced = False
        entry.changed = True

    def directory_changed(self, path: str) -> None:
        """Record that names were added to or removed from a directory. Loop only."""
        with self._marks.lock:
            self._clock += 1
            self._directories[path] = self._clock

    def unclean(self) -> set[int]:
        """Give the ids of all unclean objects. The caller holds the dirty log's lock."""
        return {oid for objects in self._layers.values() for oid in objects}

    def begin(self, layer: int | None) -> FlushJob | None:
        """Write headers and tables of what changed and give the job that syncs; None if clean.

        Raises:
            DiskError: writing failed; the store is out of use.
        """
        with self._marks.lock:
            if layer is None:
                entries = [e for objects in self._layers.values() for e in objects.values()]
            else:
                entries = self._with_bases(self._layers.get(layer, {}))
        if not entries and not self._directories:
            return None
        return self._job(entries)

    def _with_bases(self, objects: dict[int, StoredObject]) -> list[StoredObject]:
        """Add the unclean objects that these inherit from. The caller holds the lock."""
        found = dict(objects)
        for entry in objects.values():
            for base in entry.bases:
                unclean = self._layers.get(layer_of(base), {}).get(base)
                if unclean is not None:
                    found[base] = unclean
        return list(found.values())

    def _job(self, entries: Sequence[StoredObject], is_second: bool = False) -> FlushJob:
        files = []
        pending = []
        try:
            for entry in entries:
                file = entry.file
                if file is None:
                    continue  # Evicted, so synced already; its directory may still need it.
                if entry.changed:
                    self._files.write_meta(entry, file)
                files.append(file)
                overlay = file.overlay
                if overlay is None:
                    continue
                if overlay.pending and not is_second:
                    pending.append((entry, overlay.pending, list(overlay.pending)))
                elif overlay.pending is None:
                    overlay.pending = {}
        except OSError as error:
            raise self._health.fail(error, "flush") from error
        with self._marks.lock:
            objects = [(entry, self._changes.get(entry.oid, 0)) for entry in entries]
        return FlushJob(self._disk, self._health, objects, files, dict(self._directories), pending)

    def end(self, job: FlushJob) -> FlushJob | None:
        """Record that a job has succeeded: what did not change meanwhile is clean. Loop only.

        Returns:
            A job that must follow before what was flushed is durable.

        Raises:
            DiskError: the job failed.
        """
        self._health.check()
        again = []
        for entry, pending, blocks in job.pending:
            for block in blocks:
                pending.pop(block, None)
            file = entry.file
            if file is not None and file.overlay is not None and file.overlay.pending is pending:
                entry.changed = True
                again.append(entry)
        # First: who pins an object later says then that it changes.
        pinned = self._files.all_pinned()
        with self._marks.lock:
            for entry, change in job.objects:
                unchanged = not entry.changed and self._changes.get(entry.oid) == change
                if unchanged and entry not in pinned:
                    file = entry.file
                    if file is None or file.overlay is None or not file.overlay.pending:
                        self._remove(entry)
        for directory, change in job.directories.items():
            if self._directories.get(directory) == change:
                del self._directories[directory]
        if again:
            return self._job(again, is_second=True)
        self._files.evict_clean()
        return None

    def _remove(self, entry: StoredObject) -> None:
        objects = self._layers.get(layer_of(entry.oid))
        if objects is not None and objects.get(entry.oid) is entry:
            del objects[entry.oid]
            self._changes.pop(entry.oid, None)
            if not objects:
                del self._layers[layer_of(entry.oid)]
