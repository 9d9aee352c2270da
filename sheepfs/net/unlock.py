"""Take a VDI from its holder by force.

Always holds:
- The lock goes only after every node that serves has refused the holder's token for good (I6); so
  whoever attaches next never meets a write of the old holder.
- With the lock goes the generation: a holder that hung does not take its lock back when it wakes.
"""

from __future__ import annotations

import dataclasses

from sheepfs.core.errors import HeldElsewhereError, ProtocolError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import LockRecord
from sheepfs.net.attach import Fence
from sheepfs.net.catalog import Backoff, Catalog
from sheepfs.net.store import Store
from sheepfs.net.tokens import read_floor


async def force_unlock(store: Store, keys: Keys, vdi: int, fence: Fence) -> str | None:
    """Take a VDI away from its holder; the next one finds it unclean.

    Returns:
        Who held it; None when nobody did.

    Raises:
        VdiNotFoundError: it was deleted meanwhile.
        HeldElsewhereError: another one holds it since.
        UnreachableError: etcd does not answer.
        SheepError: what `fence` raised; the lock stays.
    """
    lock = await store.get(keys.lock(vdi))
    if lock is None:
        return None
    # Above the holder's, and below the next one's: that the lock goes takes a revision, too.
    token = (await read_floor(store, keys)).token(lock.create_revision + 1)
    await fence(vdi, token)
    owner = _owner(lock.value)
    catalog = Catalog(store, keys)
    backoff = Backoff()
    while True:
        name, record, revision = await catalog.find(vdi)
        floor = await read_floor(store, keys)
        now = await store.get(lock.key)
        if now is None and record.clean:
            return owner  # It let go by itself.
        if now is not None and now.mod_revision != lock.mod_revision:
            holder = _owner(now.value)
            raise HeldElsewhereError(
                f"VDI {name!r} is held by {holder} since a moment ago: unlock it again to take it"
                " from that one",
                holder,
            )
        taken = dataclasses.replace(record, generation=floor.generation_after(record.generation))
        changes: list[Put | Delete] = [Put(keys.vdi(name), taken.encode())]
        if now is not None:
            changes.append(Delete(lock.key))
        conditions = [
            Unchanged(keys.vdi(name), revision),
            Unchanged(lock.key, 0 if now is None else now.mod_revision),
            floor.unchanged,
        ]
        if await store.commit(Transaction(conditions, changes)) is not None:
            return owner
        await backoff.wait()


def _owner(lock: bytes) -> str:
    try:
        return LockRecord.decode(lock).owner
    except ProtocolError:
        return "another version of sheepfs"
