"""Import, export and comparison of VDIs: what stands behind `sheepctl vdi import|export|diff`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar

import trio

from sheepfs.core.errors import HeldElsewhereError, SheepError, UsageError, VdiNotFoundError
from sheepfs.core.names import check_copies, check_vdi_size
from sheepfs.layers.image import Change
from sheepfs.pipeline import in_order
from sheepfs_tools.progress import Moved, progress
from sheepfs_tools.transfer.access import (
    IN_FLIGHT,
    Access,
    Found,
    OpenImage,
    Readable,
    VolumeWriter,
    check_new,
    chunks,
    incoming_name,
    parse_name,
    without_zeros,
)
from sheepfs_tools.transfer.file_copy import data_ranges
from sheepfs_tools.transfer.files import (
    FORMATS,
    STREAM,
    check_foreign,
    check_stdout,
    check_target,
    convert,
    file_errors,
    guess_format,
    is_seekable,
    new_file,
    open_input,
    qemu_img,
    read_at,
    read_stream,
    spool_directory,
    write_all,
    write_at,
)

_ZEROS = bytes(1 << 20)
Piece = tuple[int, bytes]
"""Offset and data."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Outcome of an import; bytes."""

    what: ClassVar[str] = "imported"
    name: str
    size: int
    data: int
    """Stored: zeros are not."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Outcome of an export; bytes."""

    what: ClassVar[str] = "exported"
    source: str
    file: str
    format: str
    size: int
    data: int


@dataclass(frozen=True, slots=True)
class Differences:
    """What may differ between two snapshots; bytes."""

    older: str
    newer: str
    older_size: int
    newer_size: int
    changes: list[Change]
    data: int
    """Changed to data."""
    zeros: int
    """Changed to zeros."""


# -- new VDIs -------------------------------------------------------------------------------


@asynccontextmanager
async def incoming(access: Access, name: str, size: int, copies: int) -> AsyncIterator[str]:
    """Make a VDI that gets its name when the block ends well; otherwise nothing is left of it.

    Yields:
        Its name until then.
    """
    check_copies(copies)
    check_vdi_size(size)
    temporary = incoming_name(name)
    try:
        await access.create(temporary, size, copies)
        yield temporary
        with trio.CancelScope(shield=True):
            await access.rename(temporary, name)
    except BaseException as error:
        with trio.CancelScope(shield=True):
            try:
                with suppress(VdiNotFoundError):
                    await access.delete(temporary)
            except SheepError as problem:
                error.add_note(f"{temporary} could not be deleted: {problem}")
        raise


async def import_image(
    access: Access,
    file: str,
    name: str,
    *,
    image_format: str | None = None,
    copies: int = 3,
    quiet: bool = False,
) -> Imported:
    """Make a VDI of a disk image.

    Args:
        file: path, or `-` for standard input (raw only).
        image_format: one of `FORMATS`; None: by the file's suffix.

    Raises:
        VdiExistsError, UsageError, SheepError: nothing was made.
    """
    if image_format is not None and image_format not in FORMATS:
        raise UsageError(f"format {image_format!r}: use one of {', '.join(FORMATS)}")
    name = await check_new(access, name)
    with open_input(file) as fd:
        if file == STREAM and image_format not in (None, "raw"):
            raise UsageError(f"{image_format} cannot be read from a pipe: give a file")
        image_format = image_format or guess_format(file, fd)
        if image_format == "raw":
            return await _import_raw(access, fd, file, name, copies, quiet)
    await check_foreign(file, image_format)
    with tempfile.TemporaryDirectory(prefix="sheepctl-", dir=spool_directory()) as folder:
        raw = os.path.join(folder, "image.raw")
        try:
            await convert(file, image_format, raw, "raw")
        except SheepError as error:
            raise SheepError(
                f"{file} could not be made raw in {folder} (TMPDIR chooses where): {error}"
            ) from error
        with open_input(raw) as fd:
            return await _import_raw(access, fd, file, name, copies, quiet)


async def _import_raw(
    access: Access, fd: int, file: str, name: str, copies: int, quiet: bool
) -> Imported:
    size, total = 0, None
    ranges: list[tuple[int, int]] | None = None
    if is_seekable(fd):
        size = os.lseek(fd, 0, os.SEEK_END)
        with file_errors(file):
            ranges = list(data_ranges(fd, size))
        total = sum(end - start for start, end in ranges)
    async with (
        incoming(access, name, size, copies) as temporary,
        access.open(temporary) as volume,
    ):
        writer = VolumeWriter(volume, name)
        stored = end = 0
        with progress(name, total, quiet) as moved:
            async with _file_pieces(fd, file, ranges) as pieces:
                async for offset, data in pieces:
                    end = offset + len(data)
                    for start, part in without_zeros(offset, data):
                        await writer.write(start, part)
                        stored += len(part)
                    moved(len(data))
            await writer.settle()
            if ranges is None:
                size = end
                check_vdi_size(size)
                await volume.resize(size)
            await writer.flush()
    return Imported(name, size, stored)


@asynccontextmanager
async def _file_pieces(
    fd: int, file: str, ranges: list[tuple[int, int]] | None
) -> AsyncIterator[AsyncIterator[Piece]]:
    """Read ranges of a file ahead, or a pipe (`ranges` None) as it comes."""
    if ranges is None:
        async with aclosing(_stream_pieces(fd)) as stream:
            yield stream
        return

    async def read(place: tuple[int, int]) -> Piece:
        start, end = place
        with file_errors(file):
            data = await read_at(fd, start, end - start)
        if len(data) != end - start:
            raise SheepError(f"{file} became shorter while it was read")
        return start, data

    async def places() -> AsyncGenerator[tuple[int, int]]:
        for start, end in ranges:
            for piece in chunks(start, end):
                yield piece

    async with in_order(read, places(), IN_FLIGHT) as pieces:
        yield pieces


async def _stream_pieces(fd: int) -> AsyncGenerator[Piece]:
    offset = 0
    async with aclosing(read_stream(fd)) as stream:
        async for data in stream:
            yield offset, data
            offset += len(data)


# -- export ---------------------------------------------------------------------------------


async def export_image(
    access: Access,
    source: str,
    file: str,
    *,
    image_format: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write a snapshot, or a VDI that nobody uses, to a file or to standard output (`-`, raw).

    The file appears under its name when it is whole and durable.

    Raises:
        HeldElsewhereError: the VDI is in use; a snapshot of it can be exported.
        VdiNotFoundError, UsageError, SheepError: no file was made.
    """
    if image_format is None:
        suffix = os.path.splitext(file)[1].lstrip(".").lower()
        image_format = suffix if suffix in FORMATS else "raw"
    if image_format not in FORMATS:
        raise UsageError(f"format {image_format!r}: use one of {', '.join(FORMATS)}")
    if file == STREAM:
        if image_format != "raw":
            raise UsageError(f"{image_format} cannot be written to a pipe: give a file")
        check_stdout()
    else:
        check_target(file, force)
        if image_format != "raw":
            await qemu_img("--version")
    name, tag = parse_name(source)
    found = await access.find(name, tag)
    if tag:
        image = await access.image(found)
        return await _export(image, found, file, image_format, quiet)
    async with access.open(found.name) as volume:
        try:
            # Held, so that the file is of one moment; refused at once if somebody else does.
            await volume.attach()
        except HeldElsewhereError as error:
            raise HeldElsewhereError(f"{error}; make a snapshot and export that") from error
        return await _export(OpenImage(volume), found, file, image_format, quiet)


async def _export(
    image: Readable, found: Found, file: str, image_format: str, quiet: bool
) -> Exported:
    with progress(str(found), found.allocated or None, quiet) as moved:
        if file == STREAM:
            data = await _export_stream(image, check_stdout(), moved)
        else:
            async with new_file(file) as (fd, temporary):
                if image_format == "raw":
                    data = await _export_raw(image, fd, moved)
                else:
                    folder, base = os.path.split(temporary)
                    with tempfile.NamedTemporaryFile(dir=folder, prefix=base + ".") as raw:
                        data = await _export_raw(image, raw.fileno(), moved)
                        await convert(raw.name, "raw", temporary, image_format)
    return Exported(str(found), file, image_format, image.size, data)


@asynccontextmanager
async def image_pieces(image: Readable) -> AsyncIterator[AsyncIterator[Piece]]:
    """Read all data of an image ahead, in order."""

    async def places() -> AsyncGenerator[tuple[int, int]]:
        async with aclosing(image.extents()) as ranges:
            async for start, end in ranges:
                for piece in chunks(start, end):
                    yield piece

    async def read(place: tuple[int, int]) -> Piece:
        return place[0], await read_exactly(image, *place)

    async with in_order(read, places(), IN_FLIGHT) as pieces:
        yield pieces


async def read_exactly(image: Readable, start: int, end: int) -> bytes:
    """Read the range [start, end). Raises SheepError also when less comes."""
    data = await image.read(start, end - start)
    if len(data) != end - start:
        raise SheepError(f"{len(data)} bytes instead of {end - start} at {start}")
    return data


async def _export_raw(image: Readable, fd: int, moved: Moved) -> int:
    os.ftruncate(fd, image.size)
    stored = 0
    async with image_pieces(image) as pieces:
        async for offset, data in pieces:
            for start, part in without_zeros(offset, data):
                await write_at(fd, start, part)
                stored += len(part)
            moved(len(data))
    return stored


async def _export_stream(image: Readable, fd: int, moved: Moved) -> int:
    position = stored = 0
    async with image_pieces(image) as pieces:
        async for offset, data in pieces:
            await _write_zeros(fd, offset - position)
            await write_all(fd, data)
            position = offset + len(data)
            stored += len(data)
            moved(len(data))
    await _write_zeros(fd, image.size - position)
    return stored


async def _write_zeros(fd: int, count: int) -> None:
    while count > 0:
        await write_all(fd, memoryview(_ZEROS)[:count])
        count -= len(_ZEROS)


# -- comparison -----------------------------------------------------------------------------


async def diff(access: Access, older: str, newer: str) -> Differences:
    """Compare two snapshots, or a snapshot and a VDI as it was last flushed; no data is read.

    Raises:
        VdiNotFoundError, SheepError.
    """
    found = [await access.find(*parse_name(text)) for text in (older, newer)]
    before, after = [await access.image(one) for one in found]
    changes: list[Change] = []
    data = zeros = 0
    async with aclosing(after.changes(before)) as ranges:
        async for change in ranges:
            changes.append(change)
            if change.is_data:
                data += change.end - change.start
            else:
                zeros += change.end - change.start
    return Differences(str(found[0]), str(found[1]), before.size, after.size, changes, data, zeros)
