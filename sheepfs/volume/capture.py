"""Freezing an attached VDI: a copy of its map that names what was written so far.

Always holds:
- Changes are held up only until those under way are complete (one round trip); not for a flush
  and not for etcd.
- What the copy names is durable before anybody learns of it.
- When it fails at any point nothing is lost: the holder goes on with the next open layer.
Source: docs/snapshots.md.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from sheepfs.callbacks import OperationError, completion
from sheepfs.core.errors import CorruptError, FencedError
from sheepfs.core.geometry import describe_oid, map_object
from sheepfs.core.wire import Buffer, Op
from sheepfs.net.groups import plain_errors
from sheepfs.replication.changes import ObjectState
from sheepfs.replication.replicator import Replicator

if TYPE_CHECKING:
    from sheepfs.volume.mapping import MapOwner


@dataclass(frozen=True, slots=True)
class Captured:
    """A VDI at one moment. Sizes in bytes."""

    size: int
    map: int
    """The layer id of the map's copy; 0: none was asked for."""
    maps: int
    """Bit i is set when map object i exists."""
    allocated: int
    layer: int
    """The VDI's open layer from then on."""


COPY_TRIES = 5

Begin = Callable[[int], Awaitable[tuple[int, int]]]
"""`await begin(open layer)`: (next open layer, layer id for the map's copy; 0: no copy)."""
Commit = Callable[[Captured], Awaitable[None]]


async def capture(volume: MapOwner, begin: Begin, commit: Commit) -> None:
    """Do what `Volume.capture` promises; the volume is attached, and no other capture runs."""
    replicator, flusher = volume.replicator, volume.flusher
    if replicator is None or flusher is None:
        raise FencedError(f"{volume.name} was let go meanwhile")
    upcoming, target = await begin(volume.open_layer)
    # What can be flushed with nobody waiting need not be flushed while flushes wait.
    await completion(flusher.flush)
    async with flusher.paused():
        try:
            await volume.hold_changes()
            volume.open_layer = upcoming
            frozen = volume.captured(target)
            pages = flusher.begin()
        finally:
            volume.release_changes()
        await flusher.store(pages)
        # Storing the pages may have made map objects.
        frozen = dataclasses.replace(frozen, maps=volume.captured(target).maps)
        if target:
            await copy_maps(replicator, volume.record.map, target, frozen.maps)
            await replicator.unflushed.make_durable()
    await commit(frozen)


async def copy_maps(replicator: Replicator, source: int, target: int, maps: int) -> None:
    """Copy all map objects of one layer id to another of the same family and pool.

    Durability: with the next flush. Raises: SheepError.
    """
    with plain_errors():
        async with trio.open_nursery() as nursery:
            for index in range(maps.bit_length()):
                if maps >> index & 1:
                    nursery.start_soon(_copy_map, replicator, source, target, index)


async def _copy_map(replicator: Replicator, source: int, target: int, index: int) -> None:
    state = replicator.state(map_object(target, index))
    await copy_in_place(replicator, state, map_object(source, index), Op.WRITE, 0, 0, b"")
    replicator.objects.pop(state.oid, None)


async def copy_in_place(
    replicator: Replicator,
    state: ObjectState,
    base: int,
    op: int,
    offset: int,
    span: int,
    data: Buffer,
) -> None:
    """Make an object as a changed copy of `base`, by each replica on its own.

    Raises:
        SheepError: no replica can give the base; or no space.
    """
    tries: dict[int, int] = {}
    while True:
        base_state = replicator.state(base)
        await replicator.open(base_state)
        try:
            await completion(
                lambda done, base_state=base_state: replicator.make_copy(  # type: ignore[misc]
                    state, base_state, op, offset, span, data, done
                )
            )
        except OperationError as error:
            if error.errno != errno.ESTALE:
                raise
            # A member whose copy is damaged repairs it; where none can, the version stays.
            tries[base_state.version] = tries.get(base_state.version, 0) + 1
            if tries[base_state.version] == COPY_TRIES:
                raise CorruptError(f"{describe_oid(base)}: no replica can copy it") from error
            replicator.distrust(base_state)
            continue
        return
