"""What import, export, backup and restore ask of a cluster, and how they move data.

`Access` is all they know of it, so that they can be tried without one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import trio

from sheepfs.backend import OpenVolume
from sheepfs.callbacks import Completed, completion
from sheepfs.core.errors import NoSpaceError, SheepError, VdiExistsError, VdiNotFoundError
from sheepfs.core.geometry import BLOCK_SIZE, OBJECT_SIZE
from sheepfs.core.names import (
    MAX_NAME_BYTES,
    check_vdi_name,
    full_name,
    split_name,
)
from sheepfs.core.wire import Buffer
from sheepfs.layers.image import Image

CHUNK = OBJECT_SIZE
"""Pieces end at object borders: no object is read or written twice."""
IN_FLIGHT = 8
"""Chunks read ahead, and chunks being written."""
_MIN_HOLE = 64 << 10
"""Shorter runs of zeros between data are written: one request less."""
_ZEROS = bytes(CHUNK)


@dataclass(frozen=True, slots=True)
class Found:
    """A VDI (`tag` empty, `snapshot` 0) or one of its snapshots. Sizes in bytes."""

    name: str
    """The VDI's full name, `vm1.raw`."""
    tag: str
    vdi: int
    snapshot: int
    size: int
    copies: int
    allocated: int
    created: float
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}@{self.tag}" if self.tag else self.name


class Access(Protocol):
    """A cluster, for one command."""

    @property
    def cluster(self) -> str:
        """The cluster's unique id."""
        ...

    async def find(self, name: str, tag: str = "") -> Found:
        """Find by the name as given (`vm1` or `vm1.raw`). Raises VdiNotFoundError."""
        ...

    async def snapshots(self, found: Found) -> Sequence[Found]:
        """All snapshots of a VDI."""
        ...

    async def image(self, found: Found) -> Image:
        """Open a snapshot, or a VDI's map as it was last flushed.

        Of a VDI whose last holder did not detach the replicas are made equal first (I2).
        """
        ...

    async def create(self, name: str, size: int, copies: int) -> None:
        """Make an empty VDI. Raises VdiExistsError, UsageError."""
        ...

    async def rename(self, old: str, new: str) -> None:
        """Rename. Raises VdiExistsError."""
        ...

    async def delete(self, name: str) -> None:
        """Delete a VDI and all its snapshots at once: nothing goes to the trash."""
        ...

    async def snapshot(self, name: str, tag: str, attributes: Mapping[str, str]) -> None:
        """Make a snapshot, also of a VDI that this access has open and attached."""
        ...

    async def rollback(self, name: str, tag: str) -> None:
        """Make a VDI, which nobody has open, what its snapshot is."""
        ...

    def open(self, name: str) -> AbstractAsyncContextManager[OpenVolume]:
        """Open a VDI; the block's end closes it (and so flushes and detaches), also when cancelled.

        So the end is shielded: what comes behind it deletes the VDI, or rolls it back.
        """
        ...


def parse_name(text: str) -> tuple[str, str]:
    """Give (VDI, tag) for `NAME[@TAG]`; `vm1@daily`, `vm1@daily.raw` and `vm1.raw@daily` agree."""
    name, tag = split_name(text)
    return full_name(name) if tag else name, tag


async def check_new(access: Access, name: str) -> str:
    """Give the full name for a VDI to be made.

    Raises:
        VdiExistsError: there is one already.
        UsageError: no VDI can have the name.
    """
    name = full_name(name)
    check_vdi_name(name)
    with suppress(VdiNotFoundError):
        found = await access.find(name)
        raise VdiExistsError(f"there is a VDI {found.name!r} already")
    return name


def incoming_name(name: str) -> str:
    """Give the name of a VDI until it is complete; left behind by a crash, it tells what it is."""
    token = secrets.token_hex(4)
    marked = f"incoming-{token}-{name}"
    fits = len(marked.encode(errors="surrogateescape")) <= MAX_NAME_BYTES
    return marked if fits else f"incoming-{token}.raw"


# -- data -----------------------------------------------------------------------------------


def chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Split the range [start, end) at object borders."""
    while start < end:
        stop = min(end, start - start % CHUNK + CHUNK)
        yield start, stop
        start = stop


def without_zeros(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the parts of a chunk, with their offsets, that are not zeros at 4 KiB granularity."""
    if data == _ZEROS[: len(data)]:
        return
    with memoryview(data) as view:
        for first, last in _data_runs(view):
            yield offset + first, data if last - first == len(data) else bytes(view[first:last])


def _data_runs(data: memoryview) -> Iterator[tuple[int, int]]:
    run_start = run_end = -1
    for start in range(0, len(data), BLOCK_SIZE):
        # Looking at one byte first settles nearly every block that holds data.
        if not data[start]:
            block = data[start : start + BLOCK_SIZE]
            if block == _ZEROS[: len(block)]:
                continue
        if run_start < 0:
            run_start = start
        elif start - run_end >= _MIN_HOLE:
            yield run_start, run_end
            run_start = start
        run_end = min(start + BLOCK_SIZE, len(data))
    if run_start >= 0:
        yield run_start, run_end


class VolumeWriter:
    """Writes to a volume, several chunks in flight; an error comes with a later call."""

    def __init__(self, volume: OpenVolume, name: str) -> None:
        self._volume = volume
        self._name = name
        self._slots = trio.Semaphore(IN_FLIGHT)
        self._code = 0

    async def write(self, offset: int, data: bytes) -> None:
        """Start a write of up to 4 MiB. Raises SheepError if an earlier one failed."""
        await self._slots.acquire()
        self._check()
        self._volume.write(offset, data, self._done)

    def _done(self, code: int) -> None:
        self._code = self._code or code
        self._slots.release()

    async def settle(self) -> None:
        """Wait until all writes are accepted. Raises SheepError if one failed."""
        for _ in range(IN_FLIGHT):
            await self._slots.acquire()
        for _ in range(IN_FLIGHT):
            self._slots.release()
        self._check()

    async def flush(self) -> None:
        """Wait for all writes and make them durable. Raises SheepError."""
        await self.settle()
        await completion(self._volume.flush)

    def _check(self) -> None:
        if self._code:
            error = NoSpaceError if self._code == NoSpaceError.errno else SheepError
            raise error(f"{self._name} cannot be written: {os.strerror(self._code)}")


class Readable(Protocol):
    """What can be exported: `sheepfs.layers.image.Image`, `OpenImage`."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Read. Raises SheepError."""
        ...

    def extents(self) -> AsyncGenerator[tuple[int, int]]:
        """Give the ranges [start, end) that may hold data, in order."""
        ...


class OpenImage:
    """An attached volume as what can be exported: nobody changes it meanwhile."""

    def __init__(self, volume: OpenVolume) -> None:
        self._volume = volume
        self.size = volume.size

    async def read(self, offset: int, length: int) -> bytes:
        """Read. Raises SheepError."""
        parts: list[bytes] = []

        def start(done: Completed) -> None:
            def take(code: int, buffers: Sequence[Buffer]) -> None:
                # The buffers are valid during this call only.
                parts.extend(bytes(part) for part in buffers)
                done(code)

            self._volume.read(offset, length, take)

        await completion(start)
        return b"".join(parts)

    async def extents(self) -> AsyncGenerator[tuple[int, int]]:
        """Give the ranges [start, end) that may hold data, in order."""
        end = 0
        # A volume that names data at or past its end would be asked for ever.
        while end < self.size and (start := await self._volume.seek_data(end)) is not None:
            end = await self._volume.seek_hole(start)
            yield start, end
