"""Restore: what stands behind `sheepctl vdi restore`.

Always holds:
- No VDI is touched before the whole stream is proven good.
- An increment goes only on what its base was, to the bit: a VDI on whose snapshot of that identity
  nothing was written. A restore that fails leaves the VDI as that snapshot.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import trio

from sheepfs.backend import OpenVolume
from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.names import check_tag
from sheepfs_tools.progress import Moved, progress
from sheepfs_tools.transfer.access import (
    CHUNK,
    Access,
    Found,
    VolumeWriter,
    check_new,
    parse_name,
)
from sheepfs_tools.transfer.backup_stream import (
    BackupError,
    BackupHeader,
    Data,
    Part,
    Reader,
    Totals,
    Zeros,
)
from sheepfs_tools.transfer.files import (
    file_errors,
    is_seekable,
    open_input,
    read_at,
    read_stream,
    say,
    spool,
    spool_file,
)
from sheepfs_tools.transfer.images import incoming

ORIGIN = "sheepfs.origin"
"""Attribute of a restored snapshot: which snapshot, of which cluster, it is equal to."""


@dataclass(frozen=True, slots=True)
class Restored:
    """Outcome of a restore; bytes."""

    what: ClassVar[str] = "restored"
    name: str
    tag: str
    since: str
    """The base's tag in the VDI; empty for a full restore."""
    size: int
    data: int
    zeros: int


async def restore(
    access: Access, file: str, name: str, *, copies: int | None = None, quiet: bool = False
) -> Restored:
    """Make a VDI of a full backup, or bring one from an increment's base to its snapshot.

    The result has a snapshot with the backup's tag, on which the next increment can go.

    Args:
        file: path, or `-` for standard input.
        copies: of a new VDI; None: as many as the original had.

    Raises:
        BackupError: the stream is not whole; nothing was touched.
        UsageError, SheepError: it does not fit; the VDI is as it was.
    """
    with open_input(file) as fd:
        seekable = is_seekable(fd)
        with nullcontext((fd, "")) if seekable else spool_file() as (source, folder):
            if seekable:
                header, totals = await _verify(source, file, quiet)
            else:
                say(f"{file} is a pipe: it is kept in {folder} until all of it is proven good")
                header, totals = await _spool_and_verify(fd, source, folder, file)
            stream = _Verified(source, file, header, totals, quiet)
            if header.base_identity:
                if copies is not None:
                    raise UsageError("an increment changes a VDI: --copies cannot be chosen")
                return await _restore_increment(access, stream, name)
            return await _restore_full(access, stream, name, copies)


@dataclass(frozen=True, slots=True)
class _Verified:
    """A stream that was read once from end to end, in a file."""

    fd: int
    file: str
    header: BackupHeader
    totals: Totals
    quiet: bool

    async def apply(self, volume: OpenVolume, name: str) -> None:
        """Write all records and make them durable."""
        writer = VolumeWriter(volume, name)
        async with _reading(self.fd, self.file, name, self.quiet) as parts:
            async for part in parts:
                if isinstance(part, Data):
                    await writer.write(part.offset, part.data)
                elif isinstance(part, Zeros):
                    await volume.punch(part.offset, part.length)
                elif part not in (self.header, self.totals):
                    raise BackupError(f"{self.file} was replaced while it was read")
        await writer.flush()


@asynccontextmanager
async def _reading(
    fd: int, file: str, title: str, quiet: bool
) -> AsyncIterator[AsyncIterator[Part]]:
    """Parse a file from its start to its end. Iterating raises BackupError."""

    async def parts(moved: Moved) -> AsyncGenerator[Part]:
        reader = Reader()
        offset = 0
        with _naming(file):
            with file_errors(file):
                while data := await read_at(fd, offset, CHUNK):
                    offset += len(data)
                    # One by one: what a few bytes unpack to is not held all at once.
                    for part in reader.feed(data):
                        yield part
                    moved(len(data))
            reader.finish()

    with progress(title, os.fstat(fd).st_size or None, quiet) as moved:
        async with aclosing(parts(moved)) as result:
            yield result


@contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except BackupError as error:
        raise type(error)(f"{file}: {error}") from error


async def _verify(fd: int, file: str, quiet: bool) -> tuple[BackupHeader, Totals]:
    found: list[BackupHeader | Totals] = []
    async with _reading(fd, file, f"checking {file}", quiet) as parts:
        found += [part async for part in parts if isinstance(part, BackupHeader | Totals)]
    header, totals = found
    if not isinstance(header, BackupHeader) or not isinstance(totals, Totals):
        raise BackupError(f"{file} is not understood")
    check_tag(header.tag)
    return header, totals


async def _spool_and_verify(
    fd: int, target: int, folder: str, file: str
) -> tuple[BackupHeader, Totals]:
    """Keep a pipe in a file, and stop at the first byte that is wrong."""
    reader = Reader()
    async with aclosing(read_stream(fd)) as stream:
        with _naming(file):
            async for data in stream:
                for _ in reader.feed(data):
                    pass
                await spool(target, folder, data)
            reader.finish()
    return await _verify(target, file, True)


async def _restore_full(
    access: Access, stream: _Verified, name: str, copies: int | None
) -> Restored:
    header = stream.header
    name = await check_new(access, name)
    copies = header.copies if copies is None else copies
    async with incoming(access, name, header.size, copies) as temporary:
        async with access.open(temporary) as volume:
            await stream.apply(volume, name)
        await access.snapshot(temporary, header.tag, {ORIGIN: header.identity})
    return _outcome(stream, name, "")


def _outcome(stream: _Verified, name: str, since: str) -> Restored:
    header, totals = stream.header, stream.totals
    return Restored(name, header.tag, since, header.size, totals.data, totals.zeros)


async def _restore_increment(access: Access, stream: _Verified, name: str) -> Restored:
    header = stream.header
    vdi, tag = parse_name(name)
    if tag:
        raise UsageError(f"{name} is a snapshot: those never change; give the VDI's name")
    found = await access.find(vdi)
    base = await _find_base(access, found, header)
    began = False
    try:
        async with access.open(found.name) as volume:
            await volume.attach()
            now = await access.image(await access.find(found.name))
            if not await now.is_same_map(await access.image(base)):
                raise UsageError(
                    f"{found.name} was written to since {base}; the increment fits only on what"
                    f" that is: sheepctl vdi rollback {base} makes it so, and loses what was"
                    " written"
                )
            began = True
            if header.size != volume.size:
                await volume.resize(header.size)
            await stream.apply(volume, found.name)
            await access.snapshot(found.name, header.tag, {ORIGIN: header.identity})
    except BaseException as error:
        if began:
            with trio.CancelScope(shield=True):
                await _take_back(access, base, error)
        raise
    return _outcome(stream, found.name, base.tag)


async def _take_back(access: Access, base: Found, error: BaseException) -> None:
    try:
        await access.rollback(base.name, base.tag)
    except SheepError as problem:
        say(
            f"{base.name} is neither {base} nor the new state: sheepctl vdi rollback {base} makes"
            f" it the former (it failed just now: {problem})"
        )
        error.add_note(str(problem))


async def _find_base(access: Access, found: Found, header: BackupHeader) -> Found:
    """Find the snapshot that an increment builds on, by its identity, not its name.

    Raises:
        UsageError: there is none, or one of the backup's own name exists.
    """
    snapshots = await access.snapshots(found)
    if any(snapshot.tag == header.tag for snapshot in snapshots):
        raise UsageError(f"{found.name} has a snapshot {header.tag!r} already")
    base = header.base_identity
    fitting = [
        snapshot
        for snapshot in snapshots
        if base
        in (
            f"{access.cluster}/{snapshot.vdi}/{snapshot.snapshot}",
            snapshot.attributes.get(ORIGIN),
        )
    ]
    if not fitting:
        raise UsageError(
            f"{found.name} has no snapshot that is {header.name}@{header.base_tag} (id"
            f" {header.base_snapshot} of cluster {header.cluster}), on which this increment"
            " builds: restore that backup first"
        )
    return max(fitting, key=lambda snapshot: snapshot.snapshot)
