"""What the mount asks of the cluster, so that the FUSE side can be built and tested alone.

`sheepfs.cluster.Cluster` and the in-memory fake of the tests pass the same conformance tests
(tests/backend_conformance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sheepfs.core.traffic import Traffic
from sheepfs.core.wire import Buffer

OnChange = Callable[[int], None]
"""Called with the id of a VDI that another mount or a tool changed.

In the thread of the event loop; it never waits and never raises.
"""
ReadDone = Callable[[int, Sequence[Buffer]], None]
"""Called once with (errno or 0, buffers that concatenate to the bytes read)."""
Done = Callable[[int], None]
"""Called once with errno or 0."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` shows of a VDI or snapshot; times in seconds since 1970, sizes in bytes.

    `id` never changes and is never reused, so it serves as inode number (the mount's root is
    inode 1; ids start at 2). VDIs and snapshots have ids of one counter. `name` is the file's:
    `vm1.raw`, and `vm1@daily.raw` for its snapshot `daily` (`names.snapshot_file`).
    """

    id: int
    name: str
    size: int
    allocated: int
    mode: int
    uid: int
    gid: int
    modified: float
    changed: float
    read_only: bool = False
    """A snapshot: its content never changes and its mode has no write bits."""
    family: int = 0
    """Files of one family may share data; 0: not known. An empty VDI joins that of the first
    file that it takes data from (`copy_range`)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes of the cluster as `df` shows them, divided by the default number of copies."""

    total: int
    free: int


class OpenVolume(Protocol):
    """One open VDI or snapshot of this mount, shared by all its file handles.

    The first change (write, punch, resize, lock) attaches it: one writer in the whole cluster.
    The `done` callbacks may be called before the method returns; they never raise. Reads and
    writes beyond the end: reads are cut at `size`; writes grow the file.
    """

    traffic: Traffic
    """What was done through this mount; whoever serves requests counts them."""

    @property
    def read_only(self) -> bool:
        """A snapshot: whatever would change or attach it fails with ReadOnlyError (EROFS)."""
        ...

    @property
    def size(self) -> int:
        """Current size in bytes."""
        ...

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read; buffers are only valid during the callback."""
        ...

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """Write; acknowledged when every current member of the PGs accepted it (I7)."""
        ...

    def flush(self, done: Done) -> None:
        """Make every write completed before this call durable on every member (I1)."""
        ...

    async def attach(self) -> None:
        """Become the VDI's one writer.

        Raises:
            HeldElsewhereError: another mount is (EBUSY); told at once.
            ReadOnlyError: it is a snapshot.
        """
        ...

    async def detach(self) -> None:
        """Flush and let other mounts attach, while the file stays open."""
        ...

    async def punch(self, offset: int, length: int) -> None:
        """Give back the space of a range; it reads as zeros. The size stays."""
        ...

    async def resize(self, size: int) -> None:
        """Cut or grow; what is beyond a cut is gone and reads as zeros when grown again."""
        ...

    async def seek_data(self, offset: int) -> int | None:
        """Give the first offset >= `offset` that may hold data; None if none before the end."""
        ...

    async def seek_hole(self, offset: int) -> int:
        """Give the first offset >= `offset` in a hole; the end of the file counts as one."""
        ...

    def attributes(self) -> Attributes:
        """Current attributes, with sizes not yet written to etcd."""
        ...

    async def close(self) -> None:
        """One file handle less; the last one flushes and detaches."""
        ...


class Namespace(Protocol):
    """All VDIs of the cluster and their snapshots. Errors are SheepError, made errno by `to_errno`.

    A snapshot is found, opened and listed like a VDI, by its own name and id. It outlives its VDI,
    whose name nothing else can take as long as there are snapshots of it.
    """

    on_change: list[OnChange]
    """Called when a size or other attribute was changed by another than this namespace, and
    `get` and open volumes already give the new ones. Calls for changes of its own do no harm."""

    async def list(self) -> Sequence[Attributes]:
        """All VDIs and snapshots by name; what cannot be shown as a file is left out (logged)."""
        ...

    async def lookup(self, name: str) -> Attributes:
        """Raises VdiNotFoundError."""
        ...

    async def get(self, vdi: int) -> Attributes:
        """Attributes by id. Raises VdiNotFoundError."""
        ...

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        """Make an empty VDI. Raises VdiExistsError, UsageError (bad name, one with '@')."""
        ...

    async def snapshot(self, vdi: int, tag: str) -> Attributes:
        """Keep the VDI as it is now, wherever it is attached.

        It is one moment of the VDI, as a power failure would leave it after a flush: all writes
        completed before the call are in it, and none without those that were complete before it
        was made.

        Raises:
            VdiExistsError: it has a snapshot of that tag.
            UsageError: bad tag; `vdi` is a snapshot itself.
            VdiNotFoundError: there is no such VDI.
        """
        ...

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename; an existing `new` is deleted if `replace`, else VdiExistsError.

        Snapshots are renamed with their VDI. A snapshot's own name may change its tag alone.

        Raises:
            UsageError: bad name; a snapshot would become a VDI, or another VDI's snapshot.
        """
        ...

    async def delete(self, name: str) -> None:
        """Delete a VDI or snapshot.

        Raises:
            HeldElsewhereError: another mount holds it.
            SheepError: the snapshot is protected (EPERM).
        """
        ...

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        """Change what `chmod`, `chown` and `touch` change; it is kept in etcd.

        Raises:
            ReadOnlyError: a write bit in the mode, or `modified`, of a snapshot.
        """
        ...

    async def get_user_attributes(self, vdi: int) -> dict[str, str]:
        """Give what users keep with a VDI or snapshot (`user.*` without the prefix), a copy."""
        ...

    async def set_user_attribute(self, vdi: int, name: str, value: str | None) -> None:
        """Set one of them; None removes it, and does nothing if there is none.

        Raises:
            UsageError: a bad name, or more in all than `names.check_attributes` takes.
        """
        ...

    async def open(self, vdi: int) -> OpenVolume:
        """Open for a file handle; the same object for all handles of this mount."""
        ...

    async def copy_range(
        self,
        source: OpenVolume,
        source_offset: int,
        target: OpenVolume,
        target_offset: int,
        length: int,
    ) -> int:
        """Make a range of `target` equal to one of `source`, holes included; `target` may grow.

        Whole objects at the same offset in both are shared, whatever their number, if the two
        are of one family, or `target` is empty and joins it. All else (edges, other offsets and
        families) is copied. Both are volumes of this namespace; they may be the same one.

        Returns:
            Bytes done from the start of the range: at least 1 except at or beyond the end of
            `source`, and often fewer than `length`, since what has to be copied is done in
            pieces, so that no call takes long.

        Raises:
            ReadOnlyError: `target` is a snapshot.
            HeldElsewhereError: another mount holds `target`. (`source` may be held anywhere.)
            UsageError: the ranges overlap in one VDI, or `target` would be too large.

        Durability: like writes, durable with the next flush of `target`.
        Cancellation: any part of the target's range may have been made equal, none is torn.
        Ordering: sees all that was written to `source` before the call. What is written to either
            range during the call may be in the result or not, each block of 4 KiB as a whole.
        """
        ...

    async def capacity(self) -> Capacity:
        """For `df`."""
        ...

    def metrics(self) -> Iterable[str]:
        """Give the mount's metrics in pieces (sheepfs.core.exposition); it takes no time."""
        ...
