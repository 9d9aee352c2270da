"""Copies of objects of earlier layers, and giving their heirs what they inherit.

Always holds:
- A copy is made of a base that is exactly at the version which the holder names; a joining member
  levels the base first, and a suspect is resolved first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    RecoveringError,
    SheepError,
    Status,
)
from sheepfs.core.geometry import BLOCK_SIZE, describe_oid, layer_of, pool_of
from sheepfs.core.wire import BASE, FLAG_CREATE, Buffer, Header, Op
from storaged.logic.gate import Refusal, Role
from storaged.operations.durability import Durability
from storaged.operations.requests import Client
from storaged.store.entry import sibling
from storaged.store.format import blocks_in
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)


class Copies(Durability):
    """What changes with FLAG_COPY, and deletes, need."""

    def _base_of(self, header: Header, payload: Buffer) -> int:
        """Give the object that a change with FLAG_COPY makes a copy of (Refusal)."""
        if header.op not in (Op.WRITE, Op.PUNCH) or header.flags & FLAG_CREATE:
            raise Refusal(Status.BAD_REQUEST, "only a write or a discard makes a copy")
        if len(payload) < BASE.size:
            raise Refusal(Status.BAD_REQUEST, "a copy names the layer that it is made of")
        (layer,) = BASE.unpack_from(payload)
        base = sibling(header.oid, layer)
        if layer_of(base) != layer or layer == layer_of(header.oid):
            raise Refusal(Status.BAD_REQUEST, f"no copy can be made of layer {layer:#x}")
        if pool_of(base) != header.pool:
            raise Refusal(Status.BAD_REQUEST, f"layer {layer:#x} is not of pool {header.pool}")
        self.gate.check_object(header._replace(oid=base))
        return base

    def _can_copy(
        self, client: Client, header: Header, payload: Buffer, role: Role, base: int
    ) -> bool:
        """Tell whether a base can be copied now; else answer, or see to what has to come first."""
        entry = self.store.get(base)
        work: Callable[[int], Any]
        level = self.level_of(header.pool, header.pg)
        if role is Role.JOINING and base not in level.fresh:
            if not level.is_complete:
                self._miss(client, header, payload)
                return False
            work = lambda oid: self._level_base(base, header.pool, header.pg)  # noqa: E731
        elif entry is None or entry.version != header.prev or entry.suspect:
            if self.is_held(base):
                work = lambda oid: self._await_free(base)  # noqa: E731
            elif entry is not None and entry.suspect:
                work = lambda oid: self.trust(base, header.pool, header.pg)  # noqa: E731
            else:
                version = entry.version if entry else 0
                client.reply(
                    header,
                    f"{describe_oid(base)}, to be copied, is at version {version:x}".encode(),
                    Status.STALE_OBJECT,
                    version=version,
                )
                return False
        elif not self.store.can_be_copied(base):
            work = lambda oid: self._prepare(base)  # noqa: E731
        else:
            return True
        self._after(work, client, header, payload)
        return False

    async def _level_base(self, base: int, pool: int, pg: int) -> None:
        await self.take(base)
        try:
            if base not in self.fresh_of(pool, pg):
                # If no sync member has it, the copy is refused as one of a stale base.
                with suppress(ObjectNotFoundError):
                    await self._bring_level(base, pool, pg)
        finally:
            self.release(base)

    async def trust(self, base: int, pool: int, pg: int) -> None:
        """Resolve an object if it is a suspect: a peer knows better, or it is the truth."""
        await self.take(base)
        try:
            entry = self.store.get(base)
            if entry is not None and entry.suspect:
                await self._resolve(base, pool, pg)
        finally:
            self.release(base)

    async def _await_free(self, oid: int) -> None:
        await self.take(oid)
        self.release(oid)

    async def _prepare(self, base: int) -> None:
        await self._warm(base)
        if self.store.is_open(base) and not self.store.can_be_copied(base):
            await self.flush_store(layer_of(base))

    async def _warm(self, oid: int) -> None:
        """Read an object's table into memory; whether it can be had, the next look tells."""
        with suppress(ObjectNotFoundError, CorruptError, RecoveringError):
            await trio.to_thread.run_sync(self.store.sums, oid)

    async def free(self, oid: int) -> None:
        """Give all that inherit blocks from an object their own copies, in threads.

        One that is busy for long is left out: `delete` sees to it. Raises NoSpaceError, DiskError.
        """

        def unshare(heir: int) -> None:
            self.store.mark([heir])
            self.store.unshare(heir, oid)

        for heir in self.store.dependents(oid):
            try:
                await self.take(heir)
            except RecoveringError:
                continue
            try:
                await trio.to_thread.run_sync(unshare, heir)
            finally:
                self.release(heir)

    async def _free_to_delete(self, oid: int) -> None:
        await self.free(oid)
        self._freed.add(oid)


def copy_map(store: ObjectStore, base: int, header: Header) -> None:
    """Make a map object with the data of another; few KiB.

    Inheriting would cost more: a VDI's map goes on changing, and each change of a block would
    first have to be copied to every snapshot since the last one.

    All or nothing: what was made half-way would be taken for done when the change is sent again.
    """
    oid = header.oid
    pieces = [
        (block * BLOCK_SIZE, store.read(base, block * BLOCK_SIZE, BLOCK_SIZE, wait=True) or ())
        for block in blocks_in(store.extents(base))
    ]
    store.write(oid, 0, b"", header.version, create=True, pool=header.pool, pg=header.pg)
    try:
        for at, piece in pieces:
            store.write(oid, at, b"".join(piece), header.version)
    except SheepError:
        with suppress(SheepError):
            store.delete(oid)
        raise
