"""Take a VDI from its holder: what `sheepctl vdi unlock --force` does.

Always holds: the lock goes only after every node that serves has refused the holder's token for
good (I6); so whoever attaches next can never meet a write of the old holder.
"""

from __future__ import annotations

import trio

from sheepfs.connecting import fetch_map
from sheepfs.core.errors import UsageError
from sheepfs.core.kv import Delete, Transaction, Unchanged
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.groups import plain_errors
from sheepfs.net.router import Router
from sheepfs_tools.sheepctl.session import Session


async def unlock(session: Session, vdi: int) -> None:
    """Fence the holder of `vdi` at every node, then remove its lock.

    Raises:
        UnreachableError: a node that may serve neither answers nor was voted out; the lock stays.
        UsageError: the lock changed hands meanwhile.
    """
    key = session.keys.lock(vdi)
    lock = await session.store.get(key)
    if lock is None:
        return
    router = Router(session.config.cluster, lambda: fetch_map(session.store, session.keys))
    first = await fetch_map(session.store, session.keys)
    if first is not None:
        router.take_map(first)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            await nursery.start(router.run)
            # A token is its lock's create_revision; the next lock's is higher than this one, as
            # removing the lock takes a revision too.
            await fence_everywhere(router, vdi, lock.create_revision + 1)
            nursery.cancel_scope.cancel()
    done = await session.store.commit(
        Transaction([Unchanged(key, lock.mod_revision)], [Delete(key)])
    )
    if done is None and await session.store.get(key) is not None:
        raise UsageError("another mount took the VDI meanwhile: look again with sheepctl vdi info")
