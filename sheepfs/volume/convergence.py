"""After a holder's unclean end: making all replicas of its VDI equal, behind the first reads.

Always holds:
- Until this is complete every object is opened before its first read, and a detach is not clean:
  the next holder begins again. A holder that left early must not hide what may differ (I2).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator

import trio

from sheepfs.core.errors import SheepError
from sheepfs.core.geometry import MAP_ENTRIES_PER_BLOCK, data_object
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.vdimap import PAGES_PER_OBJECT, VdiMap

log = logging.getLogger(__name__)

PARALLEL_OPENS = 8
AGAIN_S = 1.0


class Convergence:
    """What one holder does, once, about the unclean end of the holder before it.

    Attributes:
        pending: replicas may still differ.
        end_is_clear: set when nothing lies beyond the VDI's end. Something may, since the former
            holder had not saved its size: the VDI does not grow over it.
        ended: set when all replicas are equal, and when the holder lets the VDI go before that.
    """

    def __init__(self, pending: bool) -> None:
        self.pending = pending
        self.end_is_clear = trio.Event()
        self.ended = trio.Event()
        self._scope = trio.CancelScope()
        if not pending:
            self.stop()

    async def run(
        self,
        name: str,
        vdi_map: VdiMap,
        replicator: Replicator,
        clear_end: Callable[[], Awaitable[None]],
        sweep: Callable[[], Awaitable[None]],
    ) -> None:
        """Work until all is done, `stop` or another holder; what fails is tried again.

        Args:
            clear_end: makes holes of what is beyond the VDI's end (SheepError).
            sweep: has removed what no map names; called when all replicas are equal.
        """
        try:
            with self._scope:
                await _clear(name, replicator, clear_end)
                self.end_is_clear.set()
                while not await converge(vdi_map, replicator):
                    if replicator.fenced:
                        return
                    await trio.sleep(AGAIN_S)
                await sweep()
                await trio.lowlevel.checkpoint_if_cancelled()
                self.pending = False
        finally:
            self.end_is_clear.set()
            self.ended.set()

    def stop(self, *, pending: bool = True) -> None:
        """End it; whoever waits goes on and meets the holder's end.

        Args:
            pending: replicas may still differ, as far as this task has not made them equal.
        """
        self._scope.cancel()
        self.pending = self.pending and pending
        self.end_is_clear.set()
        self.ended.set()


async def _clear(
    name: str, replicator: Replicator, clear_end: Callable[[], Awaitable[None]]
) -> None:
    told = False
    while True:
        try:
            return await clear_end()
        except SheepError as error:
            if replicator.fenced:
                return
            if not told:
                log.error("%s cannot grow, its end is not clear yet: %s", name, error)
                told = True
            await trio.sleep(AGAIN_S)


async def converge(vdi_map: VdiMap, replicator: Replicator) -> bool:
    """Open every object that the map names; tells whether all replicas are equal now.

    Objects created meanwhile are equal from the start.

    Durability: what was levelled is in the next flush. Cancellation: safe at any point.
    """
    good = True
    for number in _stored_pages(vdi_map.existing):
        try:
            oids = await _named_in(vdi_map, number)
        except SheepError as error:
            log.error("VDI %d: page %d of the map: %s", replicator.vdi, number, error)
            good = False
        else:
            good = await _open_all(replicator, oids) and good
        if replicator.fenced:
            return False
    return good


def _stored_pages(existing: int) -> Iterator[int]:
    for map_index in range(existing.bit_length()):
        if existing >> map_index & 1:
            yield from range(map_index * PAGES_PER_OBJECT, (map_index + 1) * PAGES_PER_OBJECT)


async def _named_in(vdi_map: VdiMap, number: int) -> list[int]:
    base = number * MAP_ENTRIES_PER_BLOCK
    if number not in vdi_map.pages:
        await vdi_map.load(base)
    page = vdi_map.pages[number]
    return [data_object(layer, base + entry) for entry, layer in enumerate(page) if layer]


async def _open_all(replicator: Replicator, oids: list[int]) -> bool:
    queue = iter(oids)
    good = True

    async def worker() -> None:
        nonlocal good
        for oid in queue:
            good = await _open(replicator, oid) and good

    async with trio.open_nursery() as nursery:
        for _ in range(min(PARALLEL_OPENS, len(oids))):
            nursery.start_soon(worker)
    return good


async def _open(replicator: Replicator, oid: int) -> bool:
    known = oid in replicator.objects
    state = replicator.state(oid)
    try:
        await replicator.open(state)
    except SheepError as error:
        log.error("VDI %d: %s", replicator.vdi, error)
        return False
    if not known and not replicator.in_use(state):
        # Who wants it asks for its version again; a large VDI's states would fill the memory.
        replicator.objects.pop(oid, None)
    return True
