"""The disk seam: every system call that the store makes on its data directory.

Always holds:
- Paths are relative to the data directory; nothing outside it is reached.
- What was written is on stable storage only after `fdatasync`, a new or removed name only after
  `fsync_dir`, everything after `syncfs`. `rename` is atomic.
- Implementations may be called from several threads at once.

`FileDisk` is the real one. The tests' FaultyDisk loses power, tears, rots, fills and fails, and
passes the same conformance tests (tests/store/test_store_disk.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sheepfs.core.errors import DiskError, NoSpaceError, SheepError
from sheepfs.core.wire import Buffer

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE. Source: linux/falloc.h."""
_Target = TypeVar("_Target", int, str)
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskSpace(NamedTuple):
    """Size of the file system and what an ordinary user may still write, in bytes."""

    total: int
    free: int


class Disk(Protocol):
    """What the store needs of a disk. Every method raises OSError as the kernel does."""

    def open(self, path: str, *, create: bool = False, truncate: bool = False) -> int:
        """Open for reading and writing; give a descriptor."""
        ...

    def close(self, fd: int, /) -> None:
        """Close a descriptor."""
        ...

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        """Read; fewer bytes only at the end of the file. May block."""
        ...

    def pread_nowait(self, fd: int, buffer: bytearray, offset: int, /) -> int:
        """Fill `buffer` from memory; give the bytes got. Raises BlockingIOError when cold."""
        ...

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        """Write; give the bytes written, which may be fewer."""
        ...

    def punch(self, fd: int, offset: int, length: int, /) -> None:
        """Make a range read as zeros and give its space back; the file's size stays."""
        ...

    def truncate(self, fd: int, size: int, /) -> None:
        """Cut or grow the file to `size` bytes."""
        ...

    def fdatasync(self, fd: int, /) -> None:
        """Make a file's content and size durable."""
        ...

    def drop_cache(self, fd: int, /) -> None:
        """Have what is durable of a file read from the disk the next time, where that can be."""
        ...

    def fsync_dir(self, path: str) -> None:
        """Make a directory's entries durable."""
        ...

    def syncfs(self) -> None:
        """Make everything on the file system durable."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what had it."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file."""
        ...

    def mkdir(self, path: str) -> None:
        """Make one directory. Raises FileExistsError."""
        ...

    def listdir(self, path: str) -> list[str]:
        """Names in a directory."""
        ...

    def space(self) -> DiskSpace:
        """Ask the file system how full it is."""
        ...

    def lock(self, path: str) -> int:
        """Lock a file for this process until its descriptor closes; BlockingIOError if held."""
        ...


class FileDisk:
    """A directory of a real file system."""

    def __init__(self, root: Path) -> None:
        """Open `root`, which must exist (OSError)."""
        self._root = os.fspath(root)
        # One descriptor for the life of the store: syncfs(2) reports a write-back error once to
        # each descriptor that was open when it happened, so a fresh one could miss it.
        self._root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int64,
        ]

    def __del__(self) -> None:
        fd = getattr(self, "_root_fd", -1)
        if fd >= 0:
            os.close(fd)

    # Straight to the system call: a Python frame here would cost a tenth of a 4 KiB write.
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    truncate = staticmethod(os.ftruncate)
    fdatasync = staticmethod(os.fdatasync)

    def open(self, path: str, *, create: bool = False, truncate: bool = False) -> int:
        """See Disk."""
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT
        if truncate:
            flags |= os.O_TRUNC
        return os.open(path, flags, 0o600, dir_fd=self._root_fd)

    def pread_nowait(self, fd: int, buffer: bytearray, offset: int, /) -> int:
        """See Disk; a file system without RWF_NOWAIT always looks cold."""
        try:
            return os.preadv(fd, (buffer,), offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise BlockingIOError(errno.EAGAIN, "no RWF_NOWAIT here") from error
            raise

    def punch(self, fd: int, offset: int, length: int, /) -> None:
        """See Disk; where holes cannot be punched, zeros are written."""
        if self._libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EOPNOTSUPP:
            raise OSError(number, os.strerror(number))
        write_all(self, fd, bytes(length), offset)

    def drop_cache(self, fd: int, /) -> None:
        """See Disk."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fsync_dir(self, path: str) -> None:
        """See Disk."""
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def syncfs(self) -> None:
        """See Disk."""
        if self._libc.syncfs(self._root_fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def rename(self, old: str, new: str) -> None:
        """See Disk."""
        os.rename(old, new, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)

    def unlink(self, path: str) -> None:
        """See Disk."""
        os.unlink(path, dir_fd=self._root_fd)

    def mkdir(self, path: str) -> None:
        """See Disk."""
        os.mkdir(path, 0o700, dir_fd=self._root_fd)

    def listdir(self, path: str) -> list[str]:
        """See Disk."""
        return os.listdir(os.path.join(self._root, path))

    def space(self) -> DiskSpace:
        """See Disk."""
        stat = os.fstatvfs(self._root_fd)
        return DiskSpace(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)

    def lock(self, path: str) -> int:
        """See Disk."""
        fd = self.open(path, create=True)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd


def write_all(disk: Disk, fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data`, however many calls it takes (OSError)."""
    done = disk.pwrite(fd, data, offset)
    while done < len(data):
        step = disk.pwrite(fd, memoryview(data)[done:], offset + done)
        if step <= 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        done += step


def read_file(disk: Disk, path: str) -> bytes:
    """Give a whole small file (OSError, FileNotFoundError)."""
    fd = disk.open(path)
    try:
        pieces = []
        offset = 0
        while piece := disk.pread(fd, 1 << 20, offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)
    finally:
        disk.close(fd)


def must_succeed(sync: Callable[[_Target], None], target: _Target) -> None:
    """Sync; what fails here is lost data even if the kernel calls it "no space" (OSError EIO)."""
    try:
        sync(target)
    except OSError as error:
        raise OSError(errno.EIO, f"sync failed ({error.strerror or error})") from error


def replace_file(disk: Disk, path: str, data: Buffer) -> None:
    """Replace a file of the top directory durably: after a crash it is the old or the new one.

    Raises:
        OSError: ENOSPC is only raised when the old file is still in place.
    """
    temporary = "tmp/" + path
    fd = disk.open(temporary, create=True, truncate=True)
    try:
        write_all(disk, fd, data, 0)
        disk.fdatasync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, path)
    must_succeed(disk.fsync_dir, "")


def make_directory(disk: Disk, path: str) -> bool:
    """Make one directory if it is not there; tell whether it was made."""
    try:
        disk.mkdir(path)
    except FileExistsError:
        return False
    return True


def disk_error(error: OSError, what: str) -> SheepError:
    """Give what an OSError means to the cluster: a full disk, or a failed one."""
    if error.errno in _NO_SPACE:
        return NoSpaceError(f"{what}: the disk is full")
    return DiskError(f"{what}: {error.strerror or error}")


class Health:
    """Whether the disk can still be trusted; one failed write is for good (I5)."""

    def __init__(self) -> None:
        self.failed: DiskError | None = None

    def check(self) -> None:
        """Raise DiskError once the disk has failed."""
        if self.failed is not None:
            raise DiskError(str(self.failed))

    def fail(self, error: OSError, what: str) -> DiskError:
        """Record that writing failed; the data may be gone, so nothing is ever retried."""
        if self.failed is None:
            self.failed = DiskError(f"{what}: {error.strerror or error}; the disk is out of use")
        return DiskError(str(self.failed))
