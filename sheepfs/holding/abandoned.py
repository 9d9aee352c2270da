"""VDIs whose holder died: a mount makes their replicas equal soon, without being asked.

Always holds:
- Whoever wants such a VDI has it at once: who levels it gives way (`Volume.level`).
- A holder that lost only its lease is left alone: it goes on without etcd (I10), and storage nodes
  know that it is there.
- What could not be levelled is tried again, by whichever mount comes first.
"""

from __future__ import annotations

import logging

import trio

from sheepfs.cluster import Cluster
from sheepfs.core.errors import HeldElsewhereError, SheepError, VdiNotFoundError
from sheepfs.core.wire import Op
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

PAUSE_S = 2.0
"""Before each look: who restarts a VM goes first, and many changes make one look."""
POLL_S = 30.0
ASKED = 5
"""Nodes that are asked whether a VDI is in use: each attach tells all of them."""
ASK_TIMEOUT_S = 1.0
PARALLEL = 4


async def level_abandoned(cluster: Cluster) -> None:
    """Level what dead holders left, now and whenever one dies. Runs until cancelled."""
    slots = trio.CapacityLimiter(PARALLEL)
    busy: set[int] = set()

    async def work(vdi: int) -> None:
        try:
            async with slots:
                if await is_in_use(cluster, vdi):
                    log.info("VDI %d: its holder has no lease, and is alive", vdi)
                else:
                    await level(cluster, vdi)
        except (VdiNotFoundError, HeldElsewhereError):
            pass
        except SheepError as error:
            log.warning("VDI %d is not levelled yet: %s", vdi, error)
        finally:
            busy.discard(vdi)

    async with (
        trio.open_nursery() as nursery,
        cluster.store.watch(cluster.keys.locks, POLL_S) as hints,
    ):
        async for _ in hints:
            await trio.sleep(PAUSE_S)
            try:
                found = await abandoned(cluster)
            except SheepError as error:
                log.debug("VDIs cannot be listed: %s", error)
                continue
            for vdi in found:
                if vdi not in busy:
                    busy.add(vdi)
                    nursery.start_soon(work, vdi)


async def abandoned(cluster: Cluster) -> list[int]:
    """Give the VDIs that nobody holds and whose last holder did not let go. Raises SheepError."""
    held, _ = await cluster.store.list(cluster.keys.locks)
    locks = {kv.key for kv in held}
    return [
        record.id
        for _, record, _ in await cluster.catalog.vdis()
        if not record.clean and cluster.keys.lock(record.id) not in locks
    ]


async def is_in_use(cluster: Cluster, vdi: int) -> bool:
    """Tell whether storage nodes hear of a mount that holds a VDI, whatever etcd knows."""
    answers = 0
    for link in list(cluster.router.links.values()):
        try:
            found = await link.call_json(Op.STATUS, {"holder": vdi}, timeout_s=ASK_TIMEOUT_S)
            holder = found["holder"]
        except (SheepError, KeyError, TypeError) as error:
            log.debug("node %d does not tell who holds VDI %d: %s", link.node, vdi, error)
            continue
        if holder and holder != cluster.router.client:
            return True
        answers += 1
        if answers == ASKED:
            break
    return False


async def level(cluster: Cluster, vdi: int) -> None:
    """Make a VDI's replicas equal and remove what its last holder left behind.

    Raises: HeldElsewhereError, SheepError.
    """
    async with cluster.opened(vdi) as volume:
        if isinstance(volume, Volume):
            await volume.level()
