"""Nothing hangs while the cluster can serve: the check of liveness beside that of the data."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from sim.clients import SimClient
from sim.world import PORT, World

LOOK_EVERY_S = 1.0
PATIENCE_S = 20.0
"""How long a client and the cluster have been well before an operation that old is a failure..."""
ROUND_TRIPS = 300
"""... and as much longer as so many messages take on the slowest way."""


async def watch(world: World, clients: Sequence[SimClient]) -> None:
    """Fail the seed when an operation hangs; runs until cancelled."""
    well_since = trio.current_time()
    patience_s = PATIENCE_S + ROUND_TRIPS * world.network.farthest_s
    awake_since = dict.fromkeys(clients, well_since)
    while True:
        await trio.sleep(LOOK_EVERY_S)
        now = trio.current_time()
        if not can_serve(world):
            well_since = now
        for client in clients:
            if client.host.paused or not client.host.alive:
                awake_since[client] = now
            for began, what in client.under_way.values():
                if now - max(well_since, awake_since[client], began) > patience_s:
                    world.fail(AssertionError(f"{client.name}: {what} hangs since {began:.1f} s"))
                    return


def can_serve(world: World) -> bool:
    """Tell whether etcd, the network, and every member of every group are well."""
    found = world.map()
    if found is None or world.etcd.is_down or not world.network.is_well:
        return False
    if world.threads.delay_s or world.spoiled:
        return False
    if not all(client.is_well for client in world.clients.values()):
        return False
    well = {f"{n.name}:{PORT}" for n in world.nodes if n.is_up and not n.host.paused}
    return all(
        len(group.sync) >= found.needed(copies)
        and all(found.nodes[node].address in well for node in group.members)
        for copies, groups in found.pools.items()
        for group in groups
    )
