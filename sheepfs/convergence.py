"""After a holder's unclean end: making all replicas of its VDI equal, behind the first reads.

Always holds:
- Until this is complete every object is opened before its first read, and a detach is not clean:
  the next holder begins again. A holder that left early must not hide what may differ (I2).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import trio

from sheepfs.core.errors import SheepError
from sheepfs.core.geometry import MAP_ENTRIES_PER_BLOCK, data_object
from sheepfs.replication import Replicator
from sheepfs.vdimap import PAGES_PER_OBJECT, VdiMap

log = logging.getLogger(__name__)

PARALLEL_OPENS = 8


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
            continue
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
