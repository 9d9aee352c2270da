"""Copying a range from one VDI to another: whole objects are shared, the rest is copied.

Always holds:
- Only objects of frozen layers are shared; a source that still writes to one of the range is
  frozen first.
- The target's map counts as one that is being made until it is stored. Then the source's record is
  looked at once more: if the source is gone by then, or nobody could tell any more that the map
  was being made, the shares are taken back, since reclaim may not have seen them (snapshots.md).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sheepfs.backend import OpenVolume
from sheepfs.callbacks import completion, read_bytes
from sheepfs.core.errors import ReadOnlyError, UsageError, VdiNotFoundError
from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE
from sheepfs.net.store import LeaseGoneError
from sheepfs.volume.frozen import FrozenVolume
from sheepfs.volume.volume import Volume

if TYPE_CHECKING:
    from sheepfs.cluster import Cluster

COPY_AT_ONCE = 16 << 20
"""Bytes really copied by one call: the caller asks again for the rest."""

Shareable = Volume | FrozenVolume


async def copy_range(
    cluster: Cluster, source: OpenVolume, source_offset: int, target: OpenVolume,
    target_offset: int, length: int,
) -> int:  # fmt: skip
    """See `sheepfs.backend.Namespace.copy_range`."""
    length = min(length, source.size - source_offset)
    if length <= 0:
        return 0
    if target.read_only or not isinstance(target, Volume):
        raise ReadOnlyError("a snapshot cannot be changed")
    if target_offset + length > MAX_VDI_SIZE:
        raise UsageError(f"a VDI has at most {MAX_VDI_SIZE} bytes")
    if source is target and abs(source_offset - target_offset) < length:
        raise UsageError("the ranges overlap")
    await target.attach()
    if source_offset == target_offset and source is not target:
        assert isinstance(source, Volume | FrozenVolume)
        head = -source_offset % OBJECT_SIZE
        if head:
            length = min(length, head)
        elif done := await _share(cluster, source, target, source_offset, length):
            return done
    return await _copy(source, source_offset, target, target_offset, min(length, COPY_AT_ONCE))


async def _share(
    cluster: Cluster, source: Shareable, target: Volume, offset: int, length: int
) -> int:
    """Share whole objects from `offset` on; gives the bytes done, 0 if there is none to share."""
    end = offset + length
    first, last = offset // OBJECT_SIZE, end // OBJECT_SIZE
    if end % OBJECT_SIZE and end == source.size and target.size <= end:
        # Beyond the end an object is zeros: it may be shared whole.
        last += 1
    if first == last or not await _join_family(cluster, target, source):
        return 0
    async with cluster.snapshots.taking_over(target) as finish:
        entries = await _frozen_entries(cluster, source, first, last)
        if not entries:
            return 0
        replaced = await target.share(entries, min(end, (first + len(entries)) * OBJECT_SIZE))
        await completion(target.flush)
        try:
            await cluster.check_exists(source.record.id)
            await finish()
        except (VdiNotFoundError, LeaseGoneError):
            await target.share(replaced, target.size)
            raise
    await target.drop(replaced)
    return min(end, (first + len(entries)) * OBJECT_SIZE) - offset


async def _copy(
    source: OpenVolume, source_offset: int, target: Volume, target_offset: int, length: int
) -> int:
    """Copy bytes, piece by piece; holes stay holes."""
    position, end = source_offset, source_offset + length
    while position < end:
        data = await source.seek_data(position)
        start = min(end, end if data is None else data)
        if start > position:
            await _clear(target, target_offset + position - source_offset, start - position)
            position = start
        if position < end:
            stop = min(await source.seek_hole(position), end, position + OBJECT_SIZE)
            piece = await read_bytes(source, position, stop - position)
            at = target_offset + position - source_offset
            await completion(partial(target.write, at, piece))
            position = stop
    return length


async def _clear(target: Volume, offset: int, length: int) -> None:
    """Make a range a hole; the file grows over it."""
    if offset < target.size:
        await target.punch(offset, min(length, target.size - offset))
    if offset + length > target.size:
        await target.resize(offset + length)


async def _join_family(cluster: Cluster, target: Volume, source: Shareable) -> bool:
    """Tell whether two may share objects; an empty target joins the source's family."""
    if target.record.family == source.record.family:
        return True
    if not target.is_empty:
        return False
    await cluster.snapshots.join_family(target, source.record)
    return True


async def _frozen_entries(
    cluster: Cluster, source: Shareable, first: int, last: int
) -> dict[int, int]:
    """Give index -> layer for sharing, from `first` on, as far as all are frozen."""
    if isinstance(source, FrozenVolume):
        return await source.entries(first, last)
    vdi = source.record.id
    if source.attachment is None and await cluster.holding.is_held(vdi):
        await cluster.freeze(vdi)
    if source.attachment is None:
        await source.look_again()
        _, stored, _ = await cluster.catalog.find(vdi)
        opened = {stored.layer, stored.next}
    else:
        opened = {source.open_layer}
    entries = await source.entries(first, last)
    if source.open_layer in entries.values() or len(entries) < last - first:
        await cluster.freeze(vdi)
        opened = {source.open_layer}
        entries = await source.entries(first, last)
    return _before(entries, opened)


def _before(entries: dict[int, int], layers: set[int]) -> dict[int, int]:
    """Give the entries, in order, up to the first of one of these layers."""
    result = {}
    for index, layer in entries.items():
        if layer in layers:
            break
        result[index] = layer
    return result
