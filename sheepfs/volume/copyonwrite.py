"""The first change of an object that a frozen layer owns: a copy in the open layer is changed.

Always holds:
- Until the copy is complete on all members, reads go to the old object and later changes of the
  same index wait: what nobody was told is done is seen by nobody.
- The frozen object is never changed; its replicas are level before they are copied.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import trio

from sheepfs.callbacks import Completed, completion
from sheepfs.core.errors import SheepError, to_errno
from sheepfs.core.geometry import BLOCK_SIZE, data_object, pool_of, tag_of
from sheepfs.core.wire import FLAG_CREATE, Buffer, Op
from sheepfs.replication.changes import ObjectState
from sheepfs.replication.objects import ObjectReader
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.capture import copy_in_place
from sheepfs.volume.vdimap import VdiMap

log = logging.getLogger(__name__)


class CopyOnWrite:
    """Copies objects for one holder.

    Args:
        failed: told of an object that some members may have made, and of its version.
    """

    def __init__(
        self,
        replicator: Replicator,
        reader: ObjectReader,
        vdi_map: VdiMap,
        nursery: trio.Nursery,
        failed: Callable[[int, int], None],
    ) -> None:
        self.copied = 0
        """Frozen objects that this VDI's map does not name any more since it was attached."""
        self._replicator = replicator
        self._reader = reader
        self._map = vdi_map
        self._nursery = nursery
        self._failed = failed
        self._waiting: dict[int, list[Callable[[], None]]] = {}

    @property
    def busy(self) -> bool:
        """Whether copies are under way."""
        return bool(self._waiting)

    def wait_for(self, index: int, again: Callable[[], None]) -> bool:
        """If the object is being copied, have `again` called after that; else False."""
        waiting = self._waiting.get(index)
        if waiting is None:
            return False
        waiting.append(again)
        return True

    def change(
        self, index: int, target: int, op: int, within: int, span: int, data: Buffer,
        done: Completed,
    ) -> None:  # fmt: skip
        """Copy the object of `index` to layer `target` and change the copy.

        The map's page is loaded, and the object not being copied (`wait_for`).
        """
        self._waiting[index] = []
        losses = self._replicator.unflushed.losses
        self._nursery.start_soon(self._run, index, target, op, within, span, data, done, losses)

    async def _run(
        self, index: int, target: int, op: int, within: int, span: int, data: Buffer,
        done: Completed, losses: int,
    ) -> None:  # fmt: skip
        source = self._map.get(index) or 0
        base = data_object(source, index)
        state = self._replicator.state(data_object(target, index))
        code = 0
        try:
            if pool_of(base) == pool_of(state.oid) and tag_of(source) == tag_of(target):
                await copy_in_place(self._replicator, state, base, op, within, span, data)
            else:
                await self._copy_over(state, base, op, within, span, data)
        except SheepError as error:
            code = to_errno(error)
            log.warning("VDI %d: object %d: %s", self._replicator.vdi, index, error)
        if self._replicator.unflushed.losses != losses:
            code = errno.EIO  # The map goes back to what it named before.
        if code:
            self._failed(state.oid, state.version)
        else:
            self._map.replace(index, target)
            self.copied += 1
        waiting = self._waiting.pop(index)
        done(code)
        for again in waiting:
            again()

    async def _copy_over(
        self, state: ObjectState, base: int, op: int, within: int, span: int, data: Buffer
    ) -> None:
        """The old object lies on other nodes (another number of copies): read and write it."""
        replicator = self._replicator
        await replicator.open(replicator.state(base))
        state.ready = True

        async def send(op: int, offset: int, span: int, payload: Buffer, flags: int = 0) -> None:
            await completion(
                lambda done: replicator.change(state, op, offset, span, payload, done, flags)
            )

        await send(Op.WRITE, 0, 0, b"", FLAG_CREATE)
        for start, end in _runs(await self._reader.extents(base)):
            data_there = await self._reader.fetch(base, start, end - start)
            await send(Op.WRITE, start, end - start, data_there)
        if span:
            await send(op, within, span, data)


def _runs(extents: bytes) -> list[tuple[int, int]]:
    """Give the byte ranges [start, end) of the blocks whose bit is set."""
    bits = int.from_bytes(extents, "little")
    runs = []
    start = 0
    while bits >> start:
        rest = bits >> start
        start += (rest & -rest).bit_length() - 1
        free = ~(bits >> start)
        end = start + (free & -free).bit_length() - 1
        runs.append((start * BLOCK_SIZE, end * BLOCK_SIZE))
        start = end
    return runs
