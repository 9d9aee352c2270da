"""What `sheepctl vdi unlock --force` does."""

from __future__ import annotations

import trio

from sheepfs.connecting import fetch_map
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.groups import plain_errors
from sheepfs.net.router import Router
from sheepfs.net.unlock import force_unlock
from sheepfs_tools.sheepctl.session import Session


async def unlock(session: Session, vdi: int) -> str | None:
    """Take `vdi` from its holder; give who that was.

    Raises:
        UnreachableError: a node that may serve neither answers nor was voted out; the lock stays.
        HeldElsewhereError: the lock changed hands meanwhile.
    """
    store, keys = session.store, session.keys
    router = Router(session.config.cluster, lambda: fetch_map(store, keys))
    first = await fetch_map(store, keys)
    if first is not None:
        router.take_map(first)

    async def fence(vdi: int, token: int) -> None:
        await fence_everywhere(router, vdi, token)

    with plain_errors():
        async with trio.open_nursery() as nursery:
            await nursery.start(router.run)
            owner = await force_unlock(store, keys, vdi, fence)
            nursery.cancel_scope.cancel()
    return owner
