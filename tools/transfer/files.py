"""Files of import, export and backup: written whole or not at all; other formats by qemu-img.

Blocking calls run in threads. A read that may wait for ever (a pipe) is left behind when cancelled.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from subprocess import CompletedProcess
from typing import Any

import trio

from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.wire import Buffer
from sheepfs_tools.sizes import format_size
from sheepfs_tools.transfer.access import CHUNK

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
STREAM = "-"
"""The file name that means standard input or output."""
_MAGIC = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"<<<": "vdi",
    b"vhdxfile": "vhdx",
}
_SPOOL_RESERVE = 64 << 20


def spool_directory() -> str:
    """Give the directory for large temporary files: $TMPDIR, or /var/tmp, which is on disk."""
    return os.environ.get("TMPDIR") or "/var/tmp"


def say(text: str) -> None:
    """Tell the user something that is no error."""
    print(f"sheepctl: note: {text}", file=sys.stderr)


def absolute(path: str) -> str:
    """Give a path that qemu-img takes for a path: `a:b` alone would name a protocol."""
    return os.path.abspath(path)


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """Say in one sentence what is wrong with a file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SheepError(f"{error.filename or path}: {error.strerror}") from error


# -- output ---------------------------------------------------------------------------------


async def write_all(fd: int, data: Buffer) -> None:
    """Write to a file or pipe in a thread."""

    def run() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    await trio.to_thread.run_sync(run, abandon_on_cancel=True)


async def write_at(fd: int, offset: int, data: Buffer) -> None:
    """Write to a place of a file in a thread."""

    def run() -> None:
        view, at = memoryview(data), offset
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done

    await trio.to_thread.run_sync(run)


def check_target(path: str, force: bool) -> None:
    """Refuse a file that exists (without `force`) or can never be replaced by a new one."""
    with file_errors(path), suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path} is no regular file")
        if not force:
            raise UsageError(f"{path} exists: --force replaces it")


@asynccontextmanager
async def new_file(path: str) -> AsyncIterator[tuple[int, str]]:
    """Make a file that appears under its name when the block ends well, durable; else not at all.

    Yields:
        A descriptor open for reading and writing, and the temporary name.
    """
    folder, base = os.path.split(absolute(path))
    with file_errors(path):
        fd, temporary = tempfile.mkstemp(dir=folder, prefix=f".{base[:100]}.", suffix=".part")
        try:
            yield fd, temporary
            await trio.to_thread.run_sync(os.fsync, fd)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            await trio.to_thread.run_sync(_rename_durably, temporary, path, folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)


def _rename_durably(temporary: str, path: str, folder: str) -> None:
    os.replace(temporary, path)
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def check_stdout() -> int:
    """Give standard output's descriptor; refuse to send a disk to a terminal (UsageError)."""
    if sys.stdout.isatty():
        raise UsageError("standard output is a terminal: redirect it to a file or a program")
    sys.stdout.flush()
    return sys.stdout.fileno()


# -- input ----------------------------------------------------------------------------------


@contextmanager
def open_input(path: str) -> Iterator[int]:
    """Open a file to be read; `-` is standard input."""
    if path == STREAM:
        if sys.stdin.isatty():
            raise UsageError("standard input is a terminal: redirect it from a file or a program")
        yield sys.stdin.fileno()
        return
    with file_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise UsageError(f"{path} is a directory")
            yield fd
        finally:
            os.close(fd)


def is_seekable(fd: int) -> bool:
    """Tell whether a descriptor is a regular file or a disk: it can be read twice."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


async def read_at(fd: int, offset: int, length: int) -> bytes:
    """Read from a place of a file in a thread; shorter only at its end."""

    def run() -> bytes:
        parts = []
        at, left = offset, length
        while left and (data := os.pread(fd, left, at)):
            parts.append(data)
            at, left = at + len(data), left - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return await trio.to_thread.run_sync(run)


async def read_stream(fd: int) -> AsyncGenerator[bytes]:
    """Give what comes from a pipe in pieces of 4 MiB; the last one may be shorter."""

    def run() -> bytes:
        parts = []
        left = CHUNK
        while left and (data := os.read(fd, left)):
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    while data := await trio.to_thread.run_sync(run, abandon_on_cancel=True):
        yield data


@contextmanager
def spool_file() -> Iterator[tuple[int, str]]:
    """Open a temporary file without a name (gone whatever happens); give it and where it is."""
    folder = spool_directory()
    with file_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        yield file.fileno(), folder


async def spool(fd: int, folder: str, data: bytes) -> None:
    """Append to the spool file, unless that would fill the disk (SheepError)."""
    status = os.fstatvfs(fd)
    free = status.f_bavail * status.f_frsize
    if free < len(data) + _SPOOL_RESERVE:
        raise SheepError(
            f"{folder} has only {format_size(free)} free; what comes from a pipe is kept there"
            " until all of it is proven good: set TMPDIR to a directory with more space,"
            " or give the backup as a file"
        )
    await write_all(fd, data)


# -- qemu-img -------------------------------------------------------------------------------


def guess_format(path: str, fd: int) -> str:
    """Give the format of a disk image by its name; refuse a raw one that looks like another.

    The contents alone never decide: a guest chooses what stands at the start of its raw disk.
    """
    suffix = os.path.splitext(path)[1].lstrip(".").lower()
    if suffix in FORMATS:
        return suffix
    if not is_seekable(fd):
        return "raw"
    start = os.pread(fd, 64, 0)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise UsageError(
                f"{path} looks like {name}: say --format {name}, or --format raw to take its"
                " bytes as they are"
            )
    return "raw"


async def qemu_img(*arguments: str) -> bytes:
    """Run qemu-img; give its output. Raises SheepError with its last line."""
    try:
        done: CompletedProcess[bytes] = await trio.run_process(
            ["qemu-img", *arguments], capture_stdout=True, capture_stderr=True, check=False
        )
    except FileNotFoundError as error:
        raise SheepError(
            "formats other than raw need qemu-img: install the package qemu-utils"
        ) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise SheepError(lines[-1] if lines else f"qemu-img ended with {done.returncode}")
    return done.stdout


async def check_foreign(path: str, image_format: str) -> None:
    """Refuse an image that names other files: it could make any file of this host a disk."""
    told = await qemu_img("info", "--output=json", "-U", "-f", image_format, absolute(path))
    info: dict[str, Any] = json.loads(told)
    own = info.get("format-specific", {}).get("data", {})
    other = info.get("full-backing-filename") or info.get("backing-filename")
    other = other or own.get("data-file")
    if image_format == "vmdk":
        extents = [e.get("filename", "") for e in own.get("extents", ())]
        same = absolute(path)
        other = other or next((e for e in extents if absolute(e) != same), None)
    if other:
        raise UsageError(
            f"{path} takes data from another file, {other}: make it whole first, with"
            f" qemu-img convert -O {image_format}"
        )


async def convert(source: str, from_format: str, target: str, to_format: str) -> None:
    """Convert a disk image; zeros become holes. Nothing of it is durable yet."""
    await qemu_img(
        *("convert", "-f", from_format, "-O", to_format),
        *(absolute(source), absolute(target)),
    )
