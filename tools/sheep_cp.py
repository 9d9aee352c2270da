"""Copy a virtual disk (or any file) without touching its holes: the program `sheep-cp`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator

CHUNK = 4 << 20
"""One object: a copy in pieces of this size never reads or writes an object twice."""


class CopyError(Exception):
    """The text says what cannot be copied and what to do."""


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


def copy_ranges(
    source: int, target: int, ranges: list[tuple[int, int]], moved: Callable[[int], None]
) -> None:
    """Copy ranges; chunks of zeros are left as holes in `target`, which is empty there.

    Args:
        moved: called with the number of bytes done since the last call.
    """
    for start, end in ranges:
        offset = start
        while offset < end:
            # Up to the next chunk border, so that requests stay aligned whatever the range.
            want = min(CHUNK - offset % CHUNK, end - offset)
            data = os.pread(source, want, offset)
            if not data:
                return
            view = memoryview(b"" if is_zero(data) else data)
            at = offset
            while view:
                written = os.pwrite(target, view, at)
                view, at = view[written:], at + written
            offset += len(data)
            moved(len(data))


@contextlib.contextmanager
def progress(title: str, total_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; elsewhere nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.update(task, advance=count)


def copy(source: str, target: str, no_clobber: bool, force: bool, quiet: bool) -> bool:
    """Copy `source` to `target` and make it durable.

    A copy that fails or is interrupted leaves no target behind that was not there before.

    Returns:
        False if `no_clobber` and the target exists.

    Raises:
        CopyError, OSError: see the text.
    """
    if os.path.isdir(target):
        target = os.path.join(target, os.path.basename(source))
    with contextlib.ExitStack() as stack:
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, source_fd)
        status = os.fstat(source_fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise CopyError(f"{source} is neither a file nor a disk")
        size = os.lseek(source_fd, 0, os.SEEK_END)
        if os.path.exists(target):
            if no_clobber:
                return False
            if os.path.samefile(source, target):
                raise CopyError(f"{source} and {target} are the same file")
            if not force:
                raise CopyError(f"{target} exists: -f overwrites it, -n skips it")
        created = not os.path.exists(target)
        mode = stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else 0o644
        target_fd = os.open(
            target, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if created else 0) | os.O_CLOEXEC, mode
        )
        stack.callback(os.close, target_fd)
        try:
            if stat.S_ISREG(os.fstat(target_fd).st_mode):
                # Empty it first: only then are the holes of the copy holes.
                os.ftruncate(target_fd, 0)
                os.ftruncate(target_fd, size)
            else:
                raise CopyError(f"{target} is no regular file")
            ranges = list(data_ranges(source_fd, size))
            total = sum(end - start for start, end in ranges)
            with progress(os.path.basename(target), total, quiet) as moved:
                copy_ranges(source_fd, target_fd, ranges, moved)
            os.fsync(target_fd)
        except BaseException:
            if created:
                os.unlink(target)
            raise
    return True


def parser() -> argparse.ArgumentParser:
    """Give the command line."""
    result = argparse.ArgumentParser(
        prog="sheep-cp",
        description="Copy a virtual disk, its holes staying holes. The copy is on stable storage"
        " when the program returns.",
        epilog="example: sheep-cp ~/debian-12.raw /mnt/vdis/vm2.raw",
    )
    result.add_argument("source", help="file, or block device, to copy")
    result.add_argument("target", help="file to make, or a directory to make it in")
    result.add_argument("-n", "--no-clobber", action="store_true", help="skip an existing target")
    result.add_argument("-f", "--force", action="store_true", help="overwrite an existing target")
    result.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    result.add_argument(
        "--reflink",
        choices=("auto", "never", "always"),
        nargs="?",
        const="always",
        default="auto",
        help="share data with the source: auto (where possible), never, always",
    )
    return result


def main() -> int:
    """Entry point. Exit codes: 0 copied (or skipped by -n), 1 failed, 2 wrong usage."""
    arguments = parser().parse_args()
    if arguments.reflink == "always":
        print(
            "sheep-cp: --reflink=always: this version has no clones yet;"
            " leave the option out to copy the data",
            file=sys.stderr,
        )
        return 1
    try:
        copy(
            arguments.source,
            arguments.target,
            arguments.no_clobber,
            arguments.force,
            arguments.quiet,
        )
    except KeyboardInterrupt:
        print("\nsheep-cp: interrupted", file=sys.stderr)
        return 130
    except CopyError as error:
        print(f"sheep-cp: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or f"{arguments.source} to {arguments.target}"
        print(f"sheep-cp: {where}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
