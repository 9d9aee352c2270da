"""Comparing and mending: what peers and holders ask to find out whether copies are equal."""

from __future__ import annotations

import json
import logging
import struct

import trio
from xxhash import xxh3_128_hexdigest

from sheepfs.core.errors import (
    ProtocolError,
    SheepError,
    Status,
)
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, OBJECT_SIZE, describe_oid, layer_of
from sheepfs.core.wire import FLAG_FORWARD, FLAG_SALVAGE, FLAG_YIELD, Buffer, Header, Op
from storaged.logic.gate import Refusal, check_token
from storaged.operations.copies import Copies
from storaged.operations.requests import Client
from storaged.store.entry import CORRUPT
from storaged.store.objects import Sources
from storaged.store.patch import Difference

log = logging.getLogger(__name__)


HASH_TABLE_SIZE = 8192
AWAIT_S = 0.5
"""How long STAT waits for a version."""
_COUNT = struct.Struct("<H")


class Comparing(Copies):
    """STAT, EXTENTS, SUMS, LAYOUT, PULL, REPAIR, LIST."""

    def _stat(self, client: Client, header: Header, payload: Buffer) -> None:
        check_token(header, self.tokens)
        self.gate.check_sync(header)
        entry = self.store.get(header.oid)
        if entry is not None and entry.suspect:
            self._when_trusted(client, header, payload)
            return
        if (entry.version if entry else 0) < header.version:
            self._nursery.start_soon(self._stat_in_time, client, header)
            return
        if entry is None:
            raise Refusal(Status.NOT_FOUND, f"{describe_oid(header.oid)} is not here")
        if header.flags:
            self.hold(header.oid)
            self._nursery.start_soon(self._stat_with_digest, client, header)
            return
        client.reply(header, version=entry.version, span=entry.lineage)

    async def _stat_in_time(self, client: Client, header: Header) -> None:
        """A peer waits for a change that is on its way to this node, too; but not for ever."""
        with trio.move_on_after(AWAIT_S):
            while self._version(header.oid) < header.version:
                await self.awaited.setdefault(header.oid, trio.Event()).wait()
        self.arrived(header.oid)  # Others who wait look again, too.
        self.handle(client, header._replace(version=0), b"")

    def arrived(self, oid: int) -> None:
        """Whoever waits for a change of an object looks again."""
        event = self.awaited.pop(oid, None)
        if event is not None:
            event.set()

    async def _stat_with_digest(self, client: Client, header: Header) -> None:
        """The digest is of the data on disk, not of what the table says of it."""
        oid = header.oid
        try:
            digests = await trio.to_thread.run_sync(self.store.digests, oid)
            entry = self.store.get(oid)
            lineage = entry.lineage if entry else 0
            digest = xxh3_128_hexdigest(digests)
            body = json.dumps({"digest": digest, "lineage": lineage}).encode()
            client.reply(header, body, version=self._version(oid), span=lineage)
        except SheepError as error:
            self.fail(client, header, error)
        finally:
            self.release(oid)

    def _tables(self, client: Client, header: Header, payload: Buffer) -> None:
        """EXTENTS: which blocks hold data. SUMS: their checksums. LAYOUT: where they lie."""
        check_token(header, self.tokens)
        self.gate.check_sync(header)
        oid = header.oid
        entry = self.store.get(oid)
        if entry is None:
            raise Refusal(Status.NOT_FOUND, f"{describe_oid(oid)} is not here")
        if entry.suspect:
            self._when_trusted(client, header, payload)
        elif not self.store.is_open(oid):
            self._after(self._warm, client, header, payload)
        else:
            if header.op == Op.LAYOUT:
                body = encode_layout(self.store.layout(oid))
            else:
                body = self.store.sums(oid) if header.op == Op.SUMS else self.store.extents(oid)
            client.reply(header, body, version=entry.version, span=entry.lineage)

    def _pull(self, client: Client, header: Header, payload: Buffer) -> None:
        """A peer sends the hashes of its blocks and gets those that differ, in a range."""
        self.gate.check_sync(header)
        end = header.offset + (header.span or OBJECT_SIZE)
        if (header.offset | end) % BLOCK_SIZE or end > OBJECT_SIZE:
            raise Refusal(Status.BAD_REQUEST, "a pull of no range of blocks")
        if len(payload) != HASH_TABLE_SIZE:
            raise Refusal(Status.BAD_REQUEST, "a pull carries 8192 bytes of block hashes")
        entry = self.store.get(header.oid)
        if entry is None:
            raise Refusal(Status.NOT_FOUND, f"{describe_oid(header.oid)} is not here")
        salvage = header.flags & FLAG_SALVAGE
        if entry.suspect and not (salvage and entry.state == CORRUPT):
            self._when_trusted(client, header, payload)
            return
        if header.flags & FLAG_YIELD:
            # Whoever yields asks again for what was changed meanwhile: clients' changes go on.
            self._nursery.start_soon(self._export_in_turn, client, header, bytes(payload))
            return
        self.hold(header.oid)
        self._nursery.start_soon(self._export, client, header, bytes(payload))

    async def _export_in_turn(self, client: Client, header: Header, hashes: bytes) -> None:
        try:
            if not await self.pacer.turn_to_serve(header.span):
                raise Refusal(Status.BUSY, "clients come first")
            self.gate.check_sync(header)
        except Refusal as refusal:
            self._refuse(client, header, refusal)
        else:
            await self._export(client, header, hashes)

    async def _export(self, client: Client, header: Header, hashes: bytes) -> None:
        oid = header.oid
        yields = bool(header.flags & FLAG_YIELD)

        def export() -> tuple[Difference, bytes]:
            first = header.offset // BLOCK_SIZE
            end = first + (header.span or OBJECT_SIZE) // BLOCK_SIZE
            salvage = bool(header.flags & FLAG_SALVAGE)
            found = self.store.difference(oid, hashes, first, end, salvage=salvage)
            return found, found.encode()

        try:
            found, body = await trio.to_thread.run_sync(export)
            if yields:
                self.pacer.served(header.span, len(body))
            client.reply(header, body, version=found.version, span=found.lineage)
        except SheepError as error:
            self.fail(client, header, error)
        finally:
            if not yields:
                self.release(oid)

    def _repair(self, client: Client, header: Header, payload: Buffer) -> None:
        """This copy was found missing, bad or behind: level it with node `span` (0: any)."""
        check_token(header, self.tokens)
        self.gate.check(header)
        self.gate.check_object(header)
        self.hold(header.oid)
        self._nursery.start_soon(self._repair_for, client, header)

    async def _repair_for(self, client: Client, header: Header) -> None:
        oid = header.oid
        missing = self.store.get(oid) is None
        exact = not header.flags & FLAG_FORWARD
        try:
            await self._bring_level(oid, header.pool, header.pg, header.span or None, exact=exact)
            client.reply(header, version=self._version(oid))
            if missing:
                self.counters.restored_objects += 1
                log.error("%s: was missing here; restored from a peer", describe_oid(oid))
        except SheepError as error:
            level = self.level_of(header.pool, header.pg)
            joins = self.node in self.map.pools[header.pool][header.pg].joining
            if joins and exact and not level.is_complete:
                # The holder need not wait: this copy is not taken for level before it was copied.
                level.lack(oid)
                client.reply(header, version=self._version(oid))
            else:
                self.fail(client, header, error)
        finally:
            self.release(oid)

    def _list(self, client: Client, header: Header, payload: Buffer) -> None:
        """Objects and versions of one group (of one layer, if named); pool 0: the tokens."""
        if header.pool == 0:
            if header.epoch > self.map.epoch:
                raise Refusal(Status.BUSY, f"this node only knows epoch {self.map.epoch}")
            client.reply(header, json.dumps(self.tokens).encode())
            return
        self.gate.check_sync(header)
        found = self.store.list(header.pool, header.pg, len(self.map.pools[header.pool]))
        layer = header.version
        rows = [
            [o.oid, o.version, o.lineage, int(o.suspect or o.damaged), o.allocated]
            for o in found
            if not layer or layer_of(o.oid) == layer
        ]
        client.reply(header, json.dumps(rows, separators=(",", ":")).encode())


def encode_layout(layout: Sources) -> bytes:
    """Give the reply to LAYOUT: u16 number of bases, their layers (u64), 1024 source bytes."""
    count = len(layout.layers)
    return _COUNT.pack(count) + struct.pack(f"<{count}Q", *layout.layers) + layout.sources


def decode_layout(body: Buffer) -> Sources:
    """Read a reply to LAYOUT (ProtocolError)."""
    try:
        (count,) = _COUNT.unpack_from(body)
        layers = struct.unpack_from(f"<{count}Q", body, _COUNT.size)
    except struct.error as error:
        raise ProtocolError(f"not a layout: {error}") from error
    sources = bytes(memoryview(body)[_COUNT.size + 8 * count :])
    if len(sources) != BLOCKS_PER_OBJECT or max(sources) > count:
        raise ProtocolError("a layout whose sources are none of its bases")
    return Sources(sources, layers)
