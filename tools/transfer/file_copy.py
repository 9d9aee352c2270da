"""The data of one file to another: shared where that is possible, else copied without its holes.

Sharing is asked for in two ways:
- ioctl FICLONE, where the file system has it (XFS, Btrfs); FUSE has none.
- copy_file_range(2) within one sheepfs mount. The mount shares what can be shared and copies what
  cannot, and does not tell which. Whole objects are shared between files of one family, and an
  empty file joins the family of what is copied to it first; the mount shows families as extended
  attribute `sheepfs.family` (not listed). So after the first object the attribute tells whether
  the rest will be shared too, and `always` costs at most the copy of one object to find out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator

from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.progress import progress

CHUNK = OBJECT_SIZE
"""A copy in pieces of this size never reads or writes an object twice."""
FAMILY = "sheepfs.family"
SHEEPFS = "fuse.sheepfs"
_FICLONE = 0x40049409
_MOST = 1 << 62
"""Length for copy_file_range(2) that means all of the file."""
_NOT_OFFERED = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM}
)
"""What the kernel says where it has no way to share or copy between the two files."""

Moved = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class CloneError(OSError):
    """The data cannot be shared."""


class ReadError(OSError):
    """The source cannot be read."""


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges [start, end) of a file that may hold data, in order."""
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            # A file system without SEEK_DATA: all of it is data.
            yield offset, size_bytes
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(end, size_bytes)
        offset = end


def is_zero(data: bytes) -> bool:
    """Tell whether a buffer holds zeros alone."""
    return not data or (data[0] == 0 and data == bytes(len(data)))


def copy_ranges(source: int, target: int, ranges: list[tuple[int, int]], moved: Moved) -> None:
    """Copy ranges; chunks of zeros are left as holes in `target`, which is empty there.

    Raises:
        ReadError: the source cannot be read.
        OSError: the target cannot be written.
    """
    for start, end in ranges:
        offset = start
        while offset < end:
            # Up to the next chunk border, so that requests stay aligned whatever the range.
            want = min(CHUNK - offset % CHUNK, end - offset)
            try:
                data = os.pread(source, want, offset)
            except OSError as error:
                raise ReadError(error.errno, error.strerror) from error
            if not data:
                return
            view = memoryview(b"" if is_zero(data) else data)
            at = offset
            while view:
                written = os.pwrite(target, view, at)
                view, at = view[written:], at + written
            offset += len(data)
            moved(len(data))


def is_on_sheepfs(fd: int) -> bool:
    """Tell whether a file is in a sheepfs mount."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0] == SHEEPFS
    return False


def _clone_by_ioctl(source: int, target: int, size: int) -> int:
    """Share all of a file with FICLONE; give the errno if that is not offered."""
    try:
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            # A file system that has clones gives this if the target is longer.
            if error.errno != errno.EINVAL or os.fstat(target).st_size <= size:
                raise
            os.ftruncate(target, size)
            fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        return error.errno or errno.EOPNOTSUPP
    return 0


def _same_family(source: int, target: int) -> bool:
    try:
        return os.getxattr(source, FAMILY) == os.getxattr(target, FAMILY)
    except OSError:
        return False


def _copy_within(source: int, target: int, start: int, end: int, moved: Moved) -> None:
    while start < end:
        count = os.copy_file_range(source, target, min(end - start, _MOST), start, start)
        if not count:
            return
        start += count
        moved(count)


def copy_within_mount(
    source: int, target: int, size: int, *, must_share: bool, moved: Moved
) -> None:
    """Copy within one sheepfs mount to an empty file; the target's size is the caller's business.

    Raises:
        CloneError: data would be copied, and `must_share`.
        OSError: see copy_file_range(2).
    """
    first = next(data_ranges(source, size), None)
    if first is None:
        moved(size)
        return
    start = first[0] // OBJECT_SIZE * OBJECT_SIZE
    moved(start)
    if must_share:
        border = min(start + OBJECT_SIZE, size)
        _copy_within(source, target, start, border, moved)
        if not _same_family(source, target):
            raise CloneError(
                errno.EOPNOTSUPP, "the cluster cannot share data between the two files"
            )
        start = border
    _copy_within(source, target, start, size, moved)


def fill(source: int, target: int, size: int, reflink: str, title: str, quiet: bool) -> None:
    """Make `target` equal to the first `size` bytes of `source`.

    A failure leaves it as it was, if it was not touched yet, or empty.

    Args:
        source: descriptor of a file or block device.
        target: descriptor of a regular file.
        reflink: `always`, `auto` or `never`.
        title: names the progress bar.

    Raises:
        CloneError: `always`, and data cannot be shared.
        ReadError: the source cannot be read.
        OSError: the target cannot be written.
    """
    within = False
    if reflink != "never":
        refused = _clone_by_ioctl(source, target, size)
        if not refused:
            os.ftruncate(target, size)
            return
        within = os.fstat(source).st_dev == os.fstat(target).st_dev and is_on_sheepfs(target)
        if reflink == "always" and not within:
            raise CloneError(refused, os.strerror(refused))
    try:
        # Empty it first: only then are holes of the copy holes, and can it join a family.
        os.ftruncate(target, 0)
        if not (within and _try_within(source, target, size, reflink, title, quiet)):
            os.ftruncate(target, size)
            ranges = list(data_ranges(source, size))
            with progress(title, sum(end - start for start, end in ranges), quiet) as moved:
                copy_ranges(source, target, ranges, moved)
        os.ftruncate(target, size)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(target, 0)
        raise


def _try_within(source: int, target: int, size: int, reflink: str, title: str, quiet: bool) -> bool:
    """Copy within the mount; False if the kernel has no way to and the caller may copy bytes."""
    must_share = reflink == "always"
    try:
        with progress(title, size, quiet) as moved:
            copy_within_mount(source, target, size, must_share=must_share, moved=moved)
    except CloneError:
        raise
    except OSError as error:
        if must_share:
            raise CloneError(error.errno, error.strerror) from error
        if error.errno not in _NOT_OFFERED:
            raise
        return False
    return True
