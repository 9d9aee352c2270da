"""Fetching: pulling an object that no client waits for, at the pace that clients leave.

Always holds:
- An object is held only while what was fetched is put in place: clients' changes go on.
- What changed while it was fetched is asked for before that; a copy of mixed versions is never
  taken for level.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sheepfs.core.errors import ObjectNotFoundError, RetryableError, UnreachableError
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.wire import FLAG_YIELD, Header
from sheepfs.net.link import Link
from storaged.recovery.pacing import PIECE, cost
from storaged.recovery.pulling import Pulling
from storaged.store.entry import StoredObject
from storaged.store.patch import PatchBuilder

FINAL_TRIES = 4
"""How often what changed while an object was fetched is asked for, before it is held for that."""
YIELD_S = 0.05
YIELD_PATIENCE_S = 10.0
"""How often, and how long, a source that yields to clients is asked for the same piece."""


class Fetching(Pulling):
    """Fetches objects from peers, for one node."""

    async def fetch(self, oid: int, pool: int, pg: int) -> bool:
        """Pull an object that no client waits for, in pieces at their pace, held at the end only.

        Pieces may be of different versions: then what changed meanwhile is asked for as one more.

        Returns:
            False if it is changed faster than it can be fetched, or its group changed.

        Raises:
            SheepError: the source could not give it now.
        """
        replica, store = self._replica, self._replica.store
        group = replica.map.pools[pool][pg]
        link = self._source(pg, group)
        inherited = False
        if store.get(oid) is None:
            await replica.take(oid)
            try:
                inherited = await self._inherit(link, oid, pool, pg)
            finally:
                replica.release(oid)
        before = store.get(oid)
        made = before if inherited else None
        hashes = await self._hashes(oid)
        builder = PatchBuilder(hashes)
        async with self._unless_gone(oid, pool, pg, made):
            header, is_whole = await self._gather(link, oid, pool, pg, hashes, builder)
        for _ in range(FINAL_TRIES):
            if not is_whole:
                async with self._unless_gone(oid, pool, pg, made):
                    header, body = await self._ask(link, oid, pool, pg, builder.digests)
                await _add(builder, body)
            await replica.take(oid)
            try:
                current = replica.map.pools[pool][pg]
                if store.get(oid) is not before or current.changed != group.changed:
                    return False
                is_whole = header.version >= replica.level_of(pool, pg).missed.get(oid, 0)
                if is_whole:
                    await self._apply(link.node, oid, pool, pg, header, builder, False)
                    return True
            finally:
                replica.release(oid)
        return False

    @asynccontextmanager
    async def _unless_gone(
        self, oid: int, pool: int, pg: int, made: StoredObject | None
    ) -> AsyncIterator[None]:
        """A sync member is asked in the block: if it does not have the object, none is left here.

        Args:
            made: what was made here to be patched, unless the object was here before.
        """
        replica, store = self._replica, self._replica.store
        try:
            yield
        except ObjectNotFoundError:
            await replica.take(oid)
            try:
                if made is not None and store.get(oid) is made:
                    store.delete(oid)  # It never was an object.
                if oid not in replica.fresh_of(pool, pg):
                    await self._not_there(oid, pool, pg)
            finally:
                replica.release(oid)
            raise

    async def _gather(
        self, link: Link, oid: int, pool: int, pg: int, hashes: bytes, builder: PatchBuilder
    ) -> tuple[Header, bool]:
        """Ask for all pieces of an object; give the last's header and whether all are of one."""
        size = self._replica.pacer.piece_bytes
        versions = set()
        for offset in range(0, OBJECT_SIZE, size):
            header, body = await self._ask_in_turn(link, oid, pool, pg, hashes, offset, size)
            versions.add((header.version, header.span))
            await _add(builder, body)
        return header, len(versions) == 1

    async def _ask_in_turn(
        self, link: Link, oid: int, pool: int, pg: int, hashes: bytes, offset: int, size: int
    ) -> tuple[Header, bytes]:
        """Ask for a piece when it is this node's turn, and the source's."""
        pacer = self._replica.pacer
        give_up = trio.current_time() + YIELD_PATIENCE_S
        while True:
            await pacer.turn(size)
            used = 0
            try:
                header, body = await self._ask(
                    link, oid, pool, pg, hashes, FLAG_YIELD, offset=offset, span=size
                )
                used = cost(size, len(body))
                return header, body
            except UnreachableError:
                raise
            except RetryableError:
                if trio.current_time() > give_up or link.lost:
                    raise
            finally:
                pacer.give_back(size - used)
            await trio.sleep(YIELD_S)


async def _add(builder: PatchBuilder, body: bytes) -> None:
    """Add a piece: a small one here, as a thread would take longer."""
    if len(body) <= 2 * PIECE:
        builder.add(body)
    else:
        await trio.to_thread.run_sync(builder.add, body)
