"""Backup: what stands behind `sheepctl vdi backup`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

import trio

from sheepfs.core.errors import UsageError
from sheepfs.layers.image import Change, Image
from sheepfs.pipeline import in_order
from sheepfs_tools.progress import progress
from sheepfs_tools.transfer.access import (
    IN_FLIGHT,
    Access,
    Found,
    chunks,
    parse_name,
)
from sheepfs_tools.transfer.backup_stream import (
    BackupHeader,
    Writer,
    pack,
)
from sheepfs_tools.transfer.files import (
    STREAM,
    check_stdout,
    check_target,
    new_file,
    write_all,
)
from sheepfs_tools.transfer.images import read_exactly

_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class BackedUp:
    """Outcome of a backup; bytes."""

    what: ClassVar[str] = "backed up"
    source: str
    since: str
    file: str
    data: int
    """Of the snapshot, before compression."""
    zeros: int
    length: int
    """Of the stream."""


async def backup(
    access: Access,
    source: str,
    file: str,
    *,
    since: str | None = None,
    compress: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> BackedUp:
    """Write a snapshot (`NAME@TAG`), or what changed since another one, to a file or `-`.

    Raises:
        VdiNotFoundError, UsageError, SheepError: no file was made.
    """
    found = await _find_snapshot(access, source)
    base = await _find_snapshot(access, since) if since is not None else None
    if base is not None and (base.vdi != found.vdi or base.snapshot == found.snapshot):
        raise UsageError(f"--since {base}: this is no other snapshot of {found.name}")
    header = BackupHeader(
        cluster=access.cluster,
        name=found.name,
        vdi=found.vdi,
        tag=found.tag,
        snapshot=found.snapshot,
        size=found.size,
        copies=found.copies,
        created=found.created,
        base_tag=base.tag if base else "",
        base_snapshot=base.snapshot if base else 0,
    )
    image = await access.image(found)
    older = await access.image(base) if base else None
    total = found.allocated if older is None else None
    writer = Writer(header)
    with progress(str(found), total or None, quiet) as moved:

        async def send(fd: int) -> int:
            length = 0
            batch = bytearray()
            async with _records(image, older, writer, compress) as records:
                async for done, record in records:
                    batch += record
                    # Many small changes make many small records: not a write for each.
                    if len(batch) >= _BATCH:
                        await write_all(fd, batch)
                        length += len(batch)
                        batch = bytearray()
                    moved(done)
            await write_all(fd, batch)
            return length + len(batch)

        if file == STREAM:
            length = await send(check_stdout())
        else:
            check_target(file, force)
            async with new_file(file) as (fd, _):
                length = await send(fd)
    totals = writer.totals()
    base_name = str(base) if base else ""
    return BackedUp(str(found), base_name, file, totals.data, totals.zeros, length)


async def _find_snapshot(access: Access, text: str) -> Found:
    name, tag = parse_name(text)
    if not tag:
        raise UsageError(f"{text} names no snapshot: give NAME@TAG")
    return await access.find(name, tag)


@asynccontextmanager
async def _records(
    image: Image, older: Image | None, writer: Writer, compress: bool
) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
    """Give (bytes of the image, record of the stream), read ahead."""

    async def changes() -> AsyncGenerator[Change]:
        if older is None:
            async with aclosing(image.extents()) as extents:
                async for start, end in extents:
                    for first, last in chunks(start, end):
                        yield Change(first, last, True)
        else:
            async with aclosing(image.changes(older)) as found:
                async for change in found:
                    if not change.is_data:
                        yield change
                        continue
                    for first, last in chunks(change.start, change.end):
                        yield Change(first, last, True)

    async def read(change: Change) -> tuple[Change, bytes, bytes]:
        if not change.is_data:
            return change, b"", b""
        data = await read_exactly(image, change.start, change.end)
        # Several at the same time: zlib uses as many cores as there are.
        packed = await trio.to_thread.run_sync(pack, data) if compress else b""
        return change, data, packed

    async def records(
        pieces: AsyncIterator[tuple[Change, bytes, bytes]],
    ) -> AsyncGenerator[tuple[int, bytes]]:
        yield 0, writer.header()
        async for change, data, packed in pieces:
            if change.is_data:
                yield len(data), writer.data(change.start, data, packed)
            else:
                yield 0, writer.zeros(change.start, change.end - change.start)
        yield 0, writer.end()

    async with (
        in_order(read, changes(), IN_FLIGHT) as pieces,
        aclosing(records(pieces)) as result,
    ):
        yield result
