"""The object store of one node: replicas as self-describing files on one disk.

Always holds:
- An object that was flushed, and not marked in the dirty log since, is on stable storage as
  its table says. One that was marked when the store stopped uncleanly is a *suspect*: it
  serves nothing until a patch, `launder` or a write with `create`.
- Every byte given out was checked against its checksum (I11).
- After one failed write or sync every call raises DiskError (I5).

Threads: the event loop's thread calls everything; the methods that say "Blocks" are meant for
worker threads and may run beside the loop. Nobody writes, punches or deletes an object while
an `unshare` or `launder` of it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from sheepfs.core.errors import DiskError, NoSpaceError, SheepError
from sheepfs.core.geometry import BLOCKS_PER_OBJECT, format_oid, layer_of, pg_of
from sheepfs.core.wire import Buffer
from storaged.store import startup
from storaged.store.checker import Checked
from storaged.store.directory import DataDirectory
from storaged.store.disk import disk_error
from storaged.store.entry import OK, SUSPECT, ObjectInfo, StoredObject
from storaged.store.flush import FlushJob
from storaged.store.format import Sources
from storaged.store.level import PatchJob
from storaged.store.patch import Difference, Patch
from storaged.store.sharing import Copy

__all__ = ["Checked", "FlushJob", "ObjectInfo", "ObjectStore", "Sources", "StoredObject", "Usage"]
log = logging.getLogger(__name__)


class Usage(NamedTuple):
    """Space in bytes; `free` is what may still be written above the reserve."""

    total: int
    free: int
    used_by_objects: int
    objects: int
    quarantined: int


class ObjectStore(DataDirectory):
    """All that is done with the objects of one data directory."""

    def get(self, oid: int) -> StoredObject | None:
        """Give what is known of an object: version, lineage, `suspect`. Raises DiskError."""
        if self._health.failed is not None:
            self._health.check()
        return self._catalog.objects.get(oid)

    def read(self, oid: int, offset: int, length: int, *, wait: bool) -> list[Buffer] | None:
        """Read a range of an object, checked.

        Args:
            wait: False is for the loop and gives None where the disk would have to be waited
                for; call again with True in a thread. True blocks.

        Returns:
            Buffers that concatenate to `length` bytes.

        Raises:
            ObjectNotFoundError: there is no such object.
            RecoveringError: it is a suspect.
            CorruptError: checksums do not match (`blocks` says which; a peer has them).
            DiskError: the disk failed to read.
            RetryableError: it is written to without a pause.
            UsageError: the range is empty or not within 4 MiB.
        """
        return self._reader.read(oid, offset, length, wait=wait)

    def is_marked(self, oid: int) -> bool:
        """Tell whether an object is marked in the dirty log, so that it may be written to."""
        return oid in self._marks.marked

    def mark(self, oids: Sequence[int]) -> None:
        """Mark objects in the dirty log, durably. Blocks. Raises NoSpaceError, DiskError."""
        self._marks.mark(oids)

    def write(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        version: int,
        *,
        create: bool = False,
        pool: int = 0,
        pg: int = 0,
        base: int | None = None,
    ) -> None:
        """Write to a marked object; what the caller checked about versions stands.

        With `create` whatever the object held is void (`data` may be empty then): bytes not
        written read as zeros, the lineage is 0, a suspect or corrupt object is a good one.
        With `base` too, it becomes a copy of that good object, which has the same kind and
        index, and the range is written to the copy; blocks until the base's table was read.

        **Durability**: none before the next flush. **Ordering**: seen by every later call.

        Raises:
            RetryableError: the object is not marked (any more); `mark` and try again.
            ObjectNotFoundError, RecoveringError, CorruptError: as `read`; not with `create`.
            NoSpaceError: only the reserve is left. Nothing has changed, unless the system ran
                out of space itself half-way: the object is a suspect then.
            DiskError: the disk failed; the store is out of use.
        """
        if create:
            self._maker.create(oid, offset, data, version, pool, pg, base)
        else:
            self._writer.write(oid, offset, data, version)

    def punch(
        self,
        oid: int,
        offset: int,
        length: int,
        version: int,
        *,
        pool: int = 0,
        pg: int = 0,
        base: int | None = None,
    ) -> None:
        """Make a range of a marked object read as zeros and give its space back.

        With `base` whatever the object held is void, and it becomes a copy of that one first.

        Raises: as `write`.
        """
        if base is not None:
            self._maker.create_punched(oid, offset, length, version, pool, pg, base)
        else:
            self._writer.punch(oid, offset, length, version)

    def dependents(self, oid: int) -> Sequence[int]:
        """Give the objects that inherit blocks from `oid`, perhaps with some that no longer do."""
        return self._sharing.dependents(oid)

    def unshare(self, oid: int, base: int) -> None:
        """Give a marked object its own copy of all it inherits from `base`, durably. Blocks.

        Nobody else changes the object meanwhile. Afterwards `base` may go or change without it.
        `delete`, `quarantine`, `write`, `punch` and a patch of `base` do the same for all that
        have not been unshared, and block for it.

        Raises:
            RetryableError: the object is not marked (any more); nothing changed.
            NoSpaceError: the disk is full; nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        self._sharing.unshare(oid, base)

    def compose(self, oid: int, sources: Sources, trusted: Collection[int]) -> Copy:
        """Find what of a peer's object local objects have, for `inherit`. Blocks.

        Args:
            sources: the peer's `layout`.
            trusted: objects that are level with the peer's; others are not inherited from.

        Raises DiskError.
        """
        return self._sharing.composed(oid, sources, trusted)

    def inherit(self, oid: int, copy: Copy, *, pool: int, pg: int) -> None:
        """Make an absent, marked object of what `compose` found.

        It is a suspect of version 0 then: `digests` and a patch make it equal to the peer's.

        Raises:
            UsageError: the object is there.
            RetryableError, NoSpaceError, DiskError: as `write` with `create`.
        """
        self._maker.inherit(oid, pool, pg, copy)

    def is_open(self, oid: int) -> bool:
        """Tell whether an object's table is in memory."""
        entry = self._catalog.objects.get(oid)
        return entry is not None and entry.file is not None

    def can_be_copied(self, oid: int) -> bool:
        """Tell whether a copy of a good object can be made without waiting for the disk.

        If not, it is not open, or has blocks of its own that a flush must make known first.
        """
        entry = self._catalog.objects.get(oid)
        file = None if entry is None else entry.file
        return file is not None and (file.overlay is None or file.overlay.pending == {})

    def sums(self, oid: int) -> bytes:
        """Give the 8 KiB table of a good object; blocks unless it is open. Raises: as `read`."""
        return self._reader.sums(oid)

    def layout(self, oid: int) -> Sources:
        """Tell where the blocks of a good object lie; blocks unless it is open.

        Raises: as `read`.
        """
        return self._reader.layout(oid)

    def delete(self, oid: int) -> None:
        """Remove an object, if it is there; durable with the next flush.

        Blocks if others inherit from it. Raises DiskError, and NoSpaceError (nothing changed).
        """
        self._writer.delete(oid)

    def digests(self, oid: int) -> bytes:
        """Give 8 KiB: the checksum of each block as it is on disk, 0 for zeros. Blocks.

        Of an absent object all are 0. Raises DiskError.
        """
        return self._leveller.digests(oid)

    def difference(
        self,
        oid: int,
        digests: bytes,
        first: int = 0,
        end: int = BLOCKS_PER_OBJECT,
        *,
        salvage: bool = False,
    ) -> Difference:
        """Compare an object with another copy's `digests`, from block `first` to before `end`.

        Blocks. Raises: as `read`; with `salvage`, blocks that are damaged are named instead.
        """
        return self._leveller.difference(oid, digests, first, end, salvage=salvage)

    def begin_patch(self, oid: int, patch: Patch, *, pool: int, pg: int) -> PatchJob:
        """Start to make a marked object, new if absent, equal to a source's.

        Run the job in a thread, then `end_patch`, or `leave_patch`. Nobody else changes the object
        meanwhile. Durable when flushed.

        Raises:
            RetryableError: the object is not marked (any more); nothing changed.
            NoSpaceError: only the reserve is left, and it would take more; nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        return self._leveller.begin_patch(oid, patch, pool, pg)

    def end_patch(self, job: PatchJob) -> None:
        """Make what a job has written the object's content.

        Raises:
            NoSpaceError: the file system is full, whatever the reserve. A new object is gone
                again, another is a suspect.
            DiskError: the disk failed; the store is out of use.
        """
        self._leveller.end_patch(job)

    def leave_patch(self, job: PatchJob) -> None:
        """Give up a patch that may have been half written: the object is a suspect."""
        self._leveller.leave(job)

    def extents(self, oid: int) -> bytes:
        """Give the 128-byte bitmap of blocks that may hold data. May block. Raises: as `read`."""
        return self._reader.bitmap(oid)

    def check(self, oid: int) -> Checked:
        """Check all of a good object: its data, and its header and table, on the disk. Blocks.

        Raises: as `read`.
        """
        return self._checker.check(oid)

    def verify(self, oid: int) -> list[int]:
        """Give the blocks whose data on disk is not what the table says. Blocks.

        Suspects are checked too: an empty list says that data and table belong together.
        Raises: as `read`, but RecoveringError.
        """
        return self._checker.verify(oid)

    @property
    def failure(self) -> DiskError | None:
        """Why the store is out of use, once the disk has failed (I5)."""
        return self._health.failed

    @property
    def has_failed(self) -> bool:
        """Whether the disk has failed: the store is out of use then (I5)."""
        return self._health.failed is not None

    def quarantine(self, oid: int) -> None:
        """Move an object out of the way, if it is there; durable with the next flush.

        What it inherits is copied to it, and to others what they inherit from it. Blocks then.

        Raises:
            DiskError: the disk failed; the store is out of use.
        """
        self._health.check()
        entry = self._catalog.objects.get(oid)
        if entry is None:
            return
        if entry.linked:
            self._sharing.before_removal(entry)
            try:
                self._sharing.on_its_own(entry)
            except NoSpaceError as error:
                log.error("object %s is quarantined incomplete: %s", format_oid(oid), error)
        try:
            if entry.changed and entry.file is not None:
                self._files.write_meta(entry, entry.file)
            self._disk.rename(entry.path, startup.quarantine_path(self._disk, entry))
        except OSError as error:
            raise self._health.fail(error, f"quarantine of {format_oid(oid)}") from error
        self._tracker.directory_changed("quarantine")
        self._writer.forget(entry)
        self._quarantined += 1

    def launder(self, oid: int, lineage: int) -> None:
        """Take what the disk holds of an object as the truth, under a new lineage. Blocks.

        Durable on return. Raises ObjectNotFoundError, DiskError, and CorruptError if it inherits
        blocks and its header does not say any more from where.
        """
        self._leveller.launder(oid, lineage)

    def list(self, pool: int, pg: int, pg_count: int = 0) -> list[ObjectInfo]:
        """Give all objects of a placement group.

        Args:
            pg_count: number of PGs of the pool; if given, files in the wrong PG are left out.
        """
        self._health.check()
        group = self._catalog.group(pool, pg)
        return [e.info() for e in group if not pg_count or pg_of(e.oid, pg_count) == pg]

    def of_layer(self, layer: int) -> Sequence[int]:
        """Give the ids of all objects of a layer."""
        return [e.oid for e in self._catalog.everything() if layer_of(e.oid) == layer]

    def inventory(self, layers: Collection[int] | None) -> Sequence[tuple[int, int, int, int]]:
        """Give (id, version, blocks in its own file, blocks of data) of all or some layers. Blocks.

        What an object that cannot be read inherits is not counted.
        """
        found = []
        for entry in self._catalog.everything():
            if layers is None or layer_of(entry.oid) in layers:
                data = entry.blocks
                if entry.bases:
                    with suppress(SheepError):
                        data = int.from_bytes(self._reader.bitmap(entry.oid)).bit_count()
                found.append((entry.oid, entry.version, entry.blocks, data))
        return found

    def suspects(self) -> Sequence[int]:
        """Give the ids of all objects to be resolved with peers (corrupt headers included)."""
        return [entry.oid for entry in self._catalog.everything() if entry.state != OK]

    def begin_flush(self, layer: int | None) -> FlushJob | None:
        """Start a flush of a layer's objects (None: of all); None if all is durable.

        Run the job in a thread, then `end_flush`. A flush covers what another, still running,
        covers too. Raises DiskError.
        """
        self._health.check()
        return self._tracker.begin(layer)

    def end_flush(self, job: FlushJob) -> FlushJob | None:
        """Record that `job.run` has succeeded. Raises DiskError if it has not.

        Returns:
            A second job, to be run and ended likewise: only then the flush is complete.
        """
        return self._tracker.end(job)

    @property
    def needs_trim(self) -> bool:
        """Whether the dirty log is due for `trim_marks`."""
        return self._marks.needs_trim

    def trim_marks(self) -> None:
        """Forget the marks of clean objects. Blocks; safe beside writes. Raises DiskError."""
        self._marks.trim(self._must_stay_marked)

    def usage(self) -> Usage:
        """Give how full the disk is and how much of it objects use. Raises DiskError."""
        try:
            total, free = self._space.look()
        except OSError as error:
            raise disk_error(error, "usage") from error
        return Usage(
            total, free, self._catalog.used_bytes, len(self._catalog.objects), self._quarantined
        )

    def _must_stay_marked(self) -> set[int]:
        objects = self._catalog.objects
        stay = self._tracker.unclean()
        for oid in self._marks.marked:
            entry = objects.get(oid)
            if entry is not None and entry.state == SUSPECT:
                stay.add(oid)
        return stay
