"""What the mount asks of the cluster, so that the FUSE side can be built and tested alone.

`sheepfs.cluster.Cluster` and the in-memory fake of the tests pass the same conformance tests
(tests/backend_conformance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sheepfs.core.wire import Buffer

ReadDone = Callable[[int, Sequence[Buffer]], None]
"""Called once with (errno or 0, buffers that concatenate to the bytes read)."""
Done = Callable[[int], None]
"""Called once with errno or 0."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `stat` shows of a VDI; times in seconds since 1970, sizes in bytes.

    `id` is the VDI's id: it never changes and is never reused, so it serves as inode number
    (the mount's root is inode 1; ids start at 2).
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


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes of the cluster as `df` shows them, divided by the default number of copies."""

    total: int
    free: int


class OpenVolume(Protocol):
    """One open VDI of this mount, shared by all its file handles.

    The first change (write, punch, resize, lock) attaches it: one writer in the whole cluster.
    The `done` callbacks may be called before the method returns; they never raise. Reads and
    writes beyond the end: reads are cut at `size`; writes grow the file.
    """

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
        """Become the VDI's one writer. Raises HeldElsewhereError (EBUSY) at once if another is."""
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
    """All VDIs of the cluster. Errors are SheepError; `to_errno` turns them into errno."""

    async def list(self) -> Sequence[Attributes]:
        """All VDIs by name; records that cannot be shown as files are left out (and logged)."""
        ...

    async def lookup(self, name: str) -> Attributes:
        """Raises VdiNotFoundError."""
        ...

    async def get(self, vdi: int) -> Attributes:
        """Attributes by id. Raises VdiNotFoundError."""
        ...

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        """Make an empty VDI. Raises VdiExistsError, UsageError (bad name)."""
        ...

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename; an existing `new` is deleted if `replace`, else VdiExistsError."""
        ...

    async def delete(self, name: str) -> None:
        """Delete. Raises HeldElsewhereError while another mount holds it."""
        ...

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        """Change what `chmod`, `chown` and `touch` change; it is kept in etcd."""
        ...

    async def open(self, vdi: int) -> OpenVolume:
        """Open for a file handle; the same object for all handles of this mount."""
        ...

    async def capacity(self) -> Capacity:
        """For `df`."""
        ...
