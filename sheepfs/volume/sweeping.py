"""Removing what a former holder made and did not get into the map before it died.

Always holds:
- Only objects of this VDI's open layer and of its map, made before this attach, are removed; in
  those layers nobody else writes, and this holder knows the whole map.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import trio

from sheepfs.core.errors import (
    ObjectNotFoundError,
    ProtocolError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import (
    copies_of,
    index_of,
    is_map_object,
    layer_of,
)
from sheepfs.core.wire import Op
from sheepfs.net.groups import plain_errors
from sheepfs.replication.replicator import SEQUENCE_BITS, Replicator
from sheepfs.volume.vdimap import VdiMap

log = logging.getLogger(__name__)

PARALLEL_LISTS = 8
CALL_TIMEOUT_S = 5.0


async def find_orphans(
    replicator: Replicator, vdi_map: VdiMap, layer: int, map_layer: int
) -> dict[int, int]:
    """Give object id -> version of objects that the map, all of which is loaded, does not name.

    Their replicas are made equal, since a deletion is of one version: not all members may have got
    the object, or all that was written to it.

    Raises:
        SheepError: a group's members cannot be asked, or do not become equal.
    """
    found: dict[int, int] = {}
    pools = replicator.router.map.pools
    queue = iter(
        [
            (wanted, copies_of(wanted), pg)
            for wanted in {layer, map_layer}
            for pg in range(len(pools[copies_of(wanted)]))
        ]
    )

    async def worker() -> None:
        for wanted, pool, pg in queue:
            found.update(await _list(replicator, pool, pg, wanted))

    with plain_errors():
        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL_LISTS):
                nursery.start_soon(worker)

    def is_orphan(oid: int, version: int) -> bool:
        return version >> SEQUENCE_BITS < replicator.generation and not _is_named(
            vdi_map, oid, layer, map_layer
        )

    orphans: dict[int, int] = {}
    for oid, version in found.items():
        if not is_orphan(oid, version):
            continue
        state = replicator.state(oid)
        with suppress(ObjectNotFoundError):
            await replicator.open(state)
            # A client may have made it anew meanwhile.
            if is_orphan(oid, state.version):
                orphans[oid] = state.version
    return orphans


def _is_named(vdi_map: VdiMap, oid: int, layer: int, map_layer: int) -> bool:
    if is_map_object(oid):
        return layer_of(oid) != map_layer or bool(vdi_map.existing >> index_of(oid) & 1)
    return layer_of(oid) != layer or vdi_map.names(oid)


async def _list(replicator: Replicator, pool: int, pg: int, layer: int) -> dict[int, int]:
    """List a layer's objects of one group, as (id, version), at all its sync members.

    What the former holder was about to make may be on one of them alone.

    Raises:
        SheepError: none of them tells (the last one's reason).
    """
    found: dict[int, int] = {}
    told = 0
    problem: SheepError = UnreachableError(f"no member of group {pg} of pool {pool} can be asked")
    for node in replicator.router.map.pools[pool][pg].sync:
        link = replicator.router.link(node)
        if link is None:
            continue
        try:
            rows = await link.call_json(
                Op.LIST,
                pool=pool,
                pg=pg,
                version=layer,
                epoch=replicator.router.map.epoch,
                timeout_s=CALL_TIMEOUT_S,
            )
            objects = [(int(row[0]), int(row[1])) for row in rows]
        except SheepError as error:
            problem = error
            continue
        except (TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"node {node} sent a bad list: {error}") from error
        told += 1
        for oid, version in objects:
            if layer_of(oid) == layer:
                found[oid] = max(version, found.get(oid, 0))
    if not told:
        raise problem
    return found
