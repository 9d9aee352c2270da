"""A data directory's disk that cannot be written to: for looking at what a daemon left.

Always holds: no system call here changes a file, a name or a time of the directory, where the
kernel lets us choose (`O_NOATIME` needs the owner's or root's rights).
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import NoReturn

from storaged.store.disk import FileDisk


class ReadOnlyDisk(FileDisk):
    """A `FileDisk` whose every change is refused with EROFS."""

    def __init__(self, root: Path) -> None:
        """Open `root`, which must exist (OSError)."""
        super().__init__(root)
        self.unlisted: dict[str, str] = {}
        """Directories that could not be listed, and why: what is in them is not known."""

    def open(self, path: str, *, create: bool = False, truncate: bool = False) -> int:
        """Open for reading."""
        if create or truncate:
            _refuse()
        return self._open(path, os.O_RDONLY)

    def listdir(self, path: str) -> list[str]:
        """Names in a directory; none, and a note in `unlisted`, if it cannot be listed."""
        try:
            fd = self._open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                return os.listdir(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self.unlisted[path] = error.strerror or str(error)
            return []

    def lock(self, path: str) -> int:
        """Share the lock with other readers; BlockingIOError if a daemon has it."""
        fd = self._open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def changed(self, fd: int) -> float:
        """When a file was changed last, in seconds since 1970."""
        return os.fstat(fd).st_mtime

    def close_if_open(self, fd: int) -> None:
        """Close a descriptor, unless it is -1."""
        if fd >= 0:
            os.close(fd)

    def punch(self, fd: int, offset: int, length: int, /) -> None:
        """Refused."""
        _refuse()

    def rename(self, old: str, new: str) -> None:
        """Refused."""
        _refuse()

    def unlink(self, path: str) -> None:
        """Refused."""
        _refuse()

    def mkdir(self, path: str) -> None:
        """Refused."""
        _refuse()

    def _open(self, path: str, flags: int) -> int:
        flags |= os.O_CLOEXEC
        try:
            return os.open(path, flags | os.O_NOATIME, dir_fd=self._root_fd)
        except PermissionError:
            return os.open(path, flags, dir_fd=self._root_fd)


def _refuse() -> NoReturn:
    raise OSError(errno.EROFS, "this directory is only looked at")
