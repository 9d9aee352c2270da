"""What a node does with each request on its objects: the table of operations and their handlers.

Always holds:
- Every request passes the gate at the moment it is carried out, also when it had to wait.
- Requests on one object are carried out in the order in which they came; while an object is
  `held` (being marked, pulled or laundered) they queue.
- A write applies only on the version it names; a later version already there means that it was
  applied before (a retry), since each version builds on the one before.
- A copy is made of a base that is exactly at the version which the holder names.
- Who waits for another object while it holds one waits for a limited time only.
- A joining node trusts none of its objects until they were compared with a sync member (`fresh`),
  and takes no change before it knows which holders were fenced while it was away (`guard`).
"""

from __future__ import annotations

import json
import logging
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import trio
from xxhash import xxh3_128_hexdigest

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    ObjectNotFoundError,
    ProtocolError,
    RecoveringError,
    SheepError,
    Status,
)
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    OBJECT_SIZE,
    describe_oid,
    is_map_object,
    layer_of,
    pool_of,
)
from sheepfs.core.wire import BASE, FLAG_COPY, FLAG_CREATE, HEADER_SIZE, Buffer, Header, Op
from storaged.logic.catchup import Fresh
from storaged.logic.gate import Gate, Refusal, Role, check_token, check_write_token
from storaged.store.entry import CORRUPT, StoredObject, sibling
from storaged.store.format import blocks_in
from storaged.store.objects import ObjectStore, Sources

log = logging.getLogger(__name__)

HASH_TABLE_SIZE = 8192
HOLD_PATIENCE_S = 2.0
"""How long a request that needs a second object waits for whoever holds that."""


class Client(Protocol):
    """The connection that a request came from (storaged.server)."""

    def reply(
        self, header: Header, payload: Buffer = b"", status: Status = Status.OK, **fields: int
    ) -> None:
        """Queue the reply to a request."""
        ...

    def acknowledge(self, header: Header) -> None:
        """Reply OK to a change."""
        ...

    def hold(self, size_bytes: int) -> None:
        """Count memory held for the client."""
        ...


class Puller(Protocol):
    """Brings an object level with a sync member's (storaged.recovery)."""

    async def pull(self, oid: int, pool: int, pg: int, source: int | None = None) -> None:
        """Make the local copy equal to a sync member's. Raises SheepError if none can give it."""
        ...


class _Request(NamedTuple):
    client: Client
    header: Header
    payload: bytes


class Counters:
    """Events since the start, shown in STATUS."""

    def __init__(self) -> None:
        self.corrupt_blocks = 0
        self.repaired_blocks = 0
        self.restored_objects = 0
        """Objects that were missing here and came back from a peer."""
        self.laundered_objects = 0
        self.pulled_objects = 0
        self.pulled_bytes = 0


class Replica:
    """The operations on one node's objects."""

    def __init__(
        self,
        store: ObjectStore,
        node: int,
        incarnation: int,
        nursery: trio.Nursery,
        on_disk_error: Callable[[SheepError], None],
    ) -> None:
        self.store = store
        self.node = node
        self.incarnation = incarnation
        self.map = ClusterMap(0, "")
        self.gate = Gate(self.map, node, incarnation)
        self.tokens = store.tokens()
        self.fresh = Fresh()
        self._guarded: dict[tuple[int, int], int] = {}
        self.counters = Counters()
        self.puller: Puller | None = None
        self._nursery = nursery
        self._on_disk_error = on_disk_error
        self._held: dict[int, deque[_Request]] = {}
        self._released: dict[int, trio.Event] = {}
        self._freed: set[int] = set()
        """Objects whose heirs have their own copies, about to be deleted."""
        self._to_mark: list[int] = []
        self._mark_wanted = trio.Event()
        self._flushes: list[_Request] = []
        self._flush_wanted = trio.Event()
        self.handlers: dict[int, Callable[[Client, Header, Buffer], None]] = {
            Op.READ: self._read,
            Op.WRITE: self._change,
            Op.PUNCH: self._change,
            Op.DELETE: self._change,
            Op.FLUSH: self._flush,
            Op.STAT: self._stat,
            Op.EXTENTS: self._extents,
            Op.SUMS: self._tables,
            Op.LAYOUT: self._tables,
            Op.PULL: self._pull,
            Op.REPAIR: self._repair,
            Op.LIST: self._list,
            Op.FENCE: self._fence,
        }

    async def run(self) -> None:
        """Mark and flush for all requests; runs as long as the daemon."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._marker)
            nursery.start_soon(self._flusher)

    def set_map(self, cluster_map: ClusterMap) -> None:
        """Take a newer map."""
        self.map = cluster_map
        self.gate = Gate(cluster_map, self.node, self.incarnation)
        for pool, pgs in cluster_map.pools.items():
            for pg, group in enumerate(pgs):
                if self.node not in group.joining:
                    self.fresh.forget(pool, pg)

    def fresh_of(self, pool: int, pg: int) -> set[int]:
        """Objects of a group that are level since this node began to join it."""
        return self.fresh.of(pool, pg, self.map.pools[pool][pg].changed)

    # -- dispatch ---------------------------------------------------------------------------

    def handle(self, client: Client, header: Header, payload: Buffer) -> None:
        """Carry out one request, now or when its object is free; always ends in one reply."""
        held = self._held.get(header.oid)
        if held is not None and header.op != Op.READ:
            self._queue(held, client, header, payload)
            return
        try:
            self.handlers[header.op](client, header, payload)
        except Refusal as refusal:
            self._refuse(client, header, refusal)
        except SheepError as error:
            self.fail(client, header, error)

    def _queue(
        self, held: deque[_Request], client: Client, header: Header, payload: Buffer
    ) -> None:
        client.hold(HEADER_SIZE + len(payload))
        held.append(_Request(client, header, bytes(payload)))

    def _refuse(self, client: Client, header: Header, refusal: Refusal) -> None:
        body: Buffer = str(refusal).encode()
        if refusal.status is Status.STALE_EPOCH:
            body = self.map.encoded
        client.reply(header, body, refusal.status, epoch=self.map.epoch)

    def fail(self, client: Client, header: Header, error: SheepError) -> None:
        """Answer a request with an error; a failed disk ends the daemon."""
        if isinstance(error, DiskError):
            self._on_disk_error(error)
        client.reply(header, str(error).encode(), error.status, version=self._version(header.oid))

    def _version(self, oid: int) -> int:
        try:
            entry = self.store.get(oid)
        except SheepError:
            return 0
        return entry.version if entry else 0

    # -- holding objects --------------------------------------------------------------------

    def hold(self, oid: int) -> None:
        """Make later requests on an object wait until `release`."""
        self._held.setdefault(oid, deque())

    def is_held(self, oid: int) -> bool:
        """Tell whether requests on an object are waiting for something."""
        return oid in self._held

    async def take(self, oid: int) -> None:
        """Hold an object that nobody else holds. Raises RecoveringError if that takes too long."""
        with trio.move_on_after(HOLD_PATIENCE_S):
            while oid in self._held:
                await self._released.setdefault(oid, trio.Event()).wait()
        if oid in self._held:
            raise RecoveringError(f"{describe_oid(oid)} is busy")
        self.hold(oid)

    def release(self, oid: int) -> None:
        """Carry out what waited for the object; one of them may hold it again."""
        for client, header, payload in self._let_go(oid):
            client.hold(-HEADER_SIZE - len(payload))
            self.handle(client, header, payload)

    def fail_held(self, oid: int, error: SheepError) -> None:
        """Answer what waited for the object with an error."""
        for client, header, payload in self._let_go(oid):
            client.hold(-HEADER_SIZE - len(payload))
            self.fail(client, header, error)

    def _let_go(self, oid: int) -> Iterable[_Request]:
        released = self._released.pop(oid, None)
        if released is not None:
            released.set()
        return self._held.pop(oid, ())

    def _after(
        self, work: Callable[[int], Any], client: Client, header: Header, payload: Buffer
    ) -> None:
        """Hold the object, let `work(oid)` (async) run, then carry out the request again."""
        oid = header.oid
        self.hold(oid)
        self._queue(self._held[oid], client, header, payload)

        async def task() -> None:
            try:
                await work(oid)
            except SheepError as error:
                log.warning("object %s: %s", describe_oid(oid), error)
                self.fail_held(oid, error)
            else:
                self.release(oid)

        self._nursery.start_soon(task)

    # -- reads ------------------------------------------------------------------------------

    def _read(self, client: Client, header: Header, payload: Buffer) -> None:
        check_token(header, self.tokens)
        self.gate.check_sync(header)
        check_range(header)
        try:
            data = self.store.read(header.oid, header.offset, header.span, wait=False)
        except RecoveringError:
            self._when_trusted(client, header, payload)
            return
        except CorruptError as error:
            self._corrupt(header.oid, header, error)
            raise
        if data is None:
            client.hold(header.span)
            self._nursery.start_soon(self._cold_read, client, header)
        else:
            client.reply(header, as_buffer(data))

    async def _cold_read(self, client: Client, header: Header) -> None:
        def read() -> Buffer:
            data = self.store.read(header.oid, header.offset, header.span, wait=True)
            return as_buffer(b"" if data is None else data)

        try:
            client.reply(header, await trio.to_thread.run_sync(read))
        except SheepError as error:
            if isinstance(error, CorruptError):
                self._corrupt(header.oid, header, error)
            self.fail(client, header, error)
        finally:
            client.hold(-header.span)

    def _corrupt(self, oid: int, header: Header, error: CorruptError) -> None:
        """A bad block: the reader goes to another replica, and this copy mends itself (I11)."""
        if self.is_held(oid):
            return
        self.counters.corrupt_blocks += len(error.blocks)
        log.error("%s: %s; repairing it from a peer", describe_oid(oid), error)
        self.hold(oid)
        self._nursery.start_soon(self._repair_held, oid, header.pool, header.pg)

    async def _repair_held(self, oid: int, pool: int, pg: int) -> None:
        try:
            await self._bring_level(oid, pool, pg)
        except SheepError as error:
            log.error("%s: no replica could repair it: %s", describe_oid(oid), error)
        self.release(oid)

    async def _bring_level(self, oid: int, pool: int, pg: int, source: int | None = None) -> None:
        if self.puller is None:
            raise RecoveringError("this node has no way to reach its peers yet")
        await self.puller.pull(oid, pool, pg, source)

    def _when_trusted(self, client: Client, header: Header, payload: Buffer) -> None:
        """Resolve a suspect, then carry out the request."""
        held = self._held.get(header.oid)
        if held is not None:
            self._queue(held, client, header, payload)
        else:
            self._after(
                lambda oid: self._resolve(oid, header.pool, header.pg), client, header, payload
            )

    async def _resolve(self, oid: int, pool: int, pg: int) -> None:
        """A peer that stayed knows better; if there is none, this copy is the truth (I8)."""
        if len(self.map.pools[pool][pg].sync) > 1:
            await self._bring_level(oid, pool, pg)
            return
        entry = self.store.get(oid)
        if entry is not None and entry.state == CORRUPT:
            raise CorruptError(f"{describe_oid(oid)}: the only copy has a damaged header")
        await self._launder(oid)

    async def _launder(self, oid: int) -> None:
        await trio.to_thread.run_sync(self.store.launder, oid, self.map.epoch)
        self.counters.laundered_objects += 1
        log.info("%s: was written when the node stopped; taken as it is", describe_oid(oid))

    # -- changes ----------------------------------------------------------------------------

    def _change(self, client: Client, header: Header, payload: Buffer) -> None:
        check_write_token(header, self.tokens)
        role = self.gate.check(header)
        oid = header.oid
        entry = self.store.get(oid)
        if (
            entry is not None
            and entry.version == header.prev
            and role is Role.SYNC
            and header.op == Op.WRITE
            and not (header.flags or entry.state)
            and len(payload) == header.span
            and self.store.is_marked(oid)
        ):
            # Nearly every write. What is not as simple is judged below.
            self.store.write(oid, header.offset, payload, header.version)
            client.acknowledge(header)
            return
        self._judge(client, header, payload, role, entry)

    def _judge(
        self,
        client: Client,
        header: Header,
        payload: Buffer,
        role: Role,
        entry: StoredObject | None,
    ) -> None:
        """Carry out a change, or find out what has to come first (docs/wire.md)."""
        if role is Role.JOINING and not self.is_guarded(header.pool, header.pg):
            raise Refusal(Status.BUSY, "this node has yet to learn who was fenced meanwhile")
        check_range(header)
        oid = header.oid
        if entry is None:
            self.gate.check_object(header)
        base = self._base_of(header, payload) if header.flags & FLAG_COPY else None
        create = base is not None or (bool(header.flags & FLAG_CREATE) and header.op == Op.WRITE)
        unknown = role is Role.JOINING and oid not in self.fresh_of(header.pool, header.pg)
        if create and not (entry and entry.version >= header.version and not entry.suspect):
            if base is not None and not self._can_copy(client, header, payload, role, base):
                return
        elif unknown and header.op == Op.DELETE and entry is not None:
            pass  # Whatever this copy holds, it is not to be kept.
        elif unknown and header.op != Op.DELETE:
            self._after(
                lambda oid: self._bring_level(oid, header.pool, header.pg), client, header, payload
            )
            return
        elif entry is None:
            if header.op == Op.DELETE:
                client.reply(header)
                return
            raise Refusal(Status.STALE_OBJECT, f"{describe_oid(oid)} is not here")
        elif entry.suspect:
            self._when_trusted(client, header, payload)
            return
        elif entry.version >= header.version:
            client.acknowledge(header)
            return
        elif entry.version != header.prev:
            client.reply(
                header,
                f"{describe_oid(oid)} is at version {entry.version:x}".encode(),
                Status.STALE_OBJECT,
                version=entry.version,
            )
            return
        if not self.store.is_marked(oid):
            self.hold(oid)
            self._queue(self._held[oid], client, header, payload)
            self._to_mark.append(oid)
            self._mark_wanted.set()
            return
        if header.op == Op.DELETE and oid not in self._freed and self.store.dependents(oid):
            self._after(self._free_to_delete, client, header, payload)
            return
        try:
            self._apply(header, payload, create, base)
        except CorruptError as error:
            if base is not None:
                self._corrupt(base, header, error)
            raise
        if role is Role.JOINING:
            self.fresh_of(header.pool, header.pg).add(oid)
        client.acknowledge(header)

    def _apply(self, header: Header, payload: Buffer, create: bool, base: int | None) -> None:
        oid, offset, version = header.oid, header.offset, header.version
        pool, pg = header.pool, header.pg
        if header.op == Op.WRITE:
            data = payload if base is None else memoryview(payload)[BASE.size :]
            if len(data) != header.span:
                raise Refusal(Status.BAD_REQUEST, "a write's payload is not as long as its span")
            if base is not None and is_map_object(oid):
                self._copy_map(base, header)
                return
            self.store.write(oid, offset, data, version, create=create, pool=pool, pg=pg, base=base)
        elif header.op == Op.PUNCH:
            self.store.punch(oid, offset, header.span, version, pool=pool, pg=pg, base=base)
        else:
            self._freed.discard(oid)
            self.store.delete(oid)

    def _copy_map(self, base: int, header: Header) -> None:
        """Copy a map object's data; few KiB.

        Inheriting would cost more: the VDI's map goes on changing, and each change of it would
        first have to be copied to every snapshot since the last one.
        """
        store, oid = self.store, header.oid
        store.write(oid, 0, b"", header.version, create=True, pool=header.pool, pg=header.pg)
        for block in blocks_in(store.extents(base)):
            at = block * BLOCK_SIZE
            data = as_buffer(store.read(base, at, BLOCK_SIZE, wait=True) or b"")
            store.write(oid, at, data, header.version)

    # -- copies -----------------------------------------------------------------------------

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
        if role is Role.JOINING and base not in self.fresh_of(header.pool, header.pg):
            work = lambda oid: self._level_base(base, header.pool, header.pg)  # noqa: E731
        elif entry is None or entry.version != header.prev or entry.suspect:
            if self.is_held(base):
                work = lambda oid: self._await_free(base)  # noqa: E731
            elif entry is not None and entry.suspect:
                work = lambda oid: self._trust_base(base, header.pool, header.pg)  # noqa: E731
            else:
                version = entry.version if entry else 0
                client.reply(
                    header,
                    f"{describe_oid(base)}, to be copied, is at version {version:x}".encode(),
                    Status.STALE_OBJECT,
                    version=version,
                )
                return False
        elif not self.store.is_open(base):
            work = lambda oid: self._warm(base)  # noqa: E731
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

    async def _trust_base(self, base: int, pool: int, pg: int) -> None:
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

    # -- marking ----------------------------------------------------------------------------

    async def _marker(self) -> None:
        """Mark objects dirty on disk before their first write; one fdatasync for all waiting."""
        while True:
            await self._mark_wanted.wait()
            self._mark_wanted = trio.Event()
            oids, self._to_mark = self._to_mark, []
            try:
                await trio.to_thread.run_sync(self.store.mark, oids)
            except SheepError as error:
                # A full disk is no failed one; `fail` tells them apart.
                for oid in oids:
                    self.fail_held(oid, error)
                continue
            for oid in oids:
                self.release(oid)

    # -- flush ------------------------------------------------------------------------------

    def _flush(self, client: Client, header: Header, payload: Buffer) -> None:
        check_token(header, self.tokens)
        self._flushes.append(_Request(client, header, b""))
        self._flush_wanted.set()

    async def _flusher(self) -> None:
        """Flush for everyone who asked before it began: concurrent flushes share one."""
        while True:
            await self._flush_wanted.wait()
            self._flush_wanted = trio.Event()
            flushes, self._flushes = self._flushes, []
            layers = {request.header.version for request in flushes}
            try:
                await self.flush_store(layers.pop() if len(layers) == 1 else None)
            except SheepError as error:
                for client, header, _ in flushes:
                    self.fail(client, header, error)
                continue
            for client, header, _ in flushes:
                client.reply(header)

    async def flush_store(self, layer: int | None) -> None:
        """Make every change applied before this call durable (of one layer, or all).

        Durability: all of it, on return. Raises DiskError, for good: the node must leave (I5).
        """
        job = self.store.begin_flush(layer or None)
        while job is not None:
            try:
                await trio.to_thread.run_sync(job.run)
            except SheepError as error:
                self._on_disk_error(error)
                raise
            job = self.store.end_flush(job)
        if self.store.needs_trim:
            await trio.to_thread.run_sync(self.store.trim_marks)

    # -- comparing and mending ---------------------------------------------------------------

    def _stat(self, client: Client, header: Header, payload: Buffer) -> None:
        check_token(header, self.tokens)
        self.gate.check_sync(header)
        entry = self.store.get(header.oid)
        if entry is None:
            raise Refusal(Status.NOT_FOUND, f"{describe_oid(header.oid)} is not here")
        if entry.suspect:
            self._when_trusted(client, header, payload)
            return
        if header.flags:
            self.hold(header.oid)
            self._nursery.start_soon(self._stat_with_digest, client, header)
            return
        client.reply(header, version=entry.version, span=entry.lineage)

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

    def _extents(self, client: Client, header: Header, payload: Buffer) -> None:
        check_token(header, self.tokens)
        self.gate.check_sync(header)
        client.reply(header, self.store.extents(header.oid))

    def _tables(self, client: Client, header: Header, payload: Buffer) -> None:
        """SUMS: the checksums of the object's blocks. LAYOUT: where they lie."""
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
            body = self.store.sums(oid)
            if header.op == Op.LAYOUT:
                body = encode_layout(self.store.layout(oid))
            client.reply(header, body, version=entry.version, span=entry.lineage)

    def _pull(self, client: Client, header: Header, payload: Buffer) -> None:
        """A peer sends the hashes of its blocks and gets those that differ."""
        self.gate.check_sync(header)
        if len(payload) != HASH_TABLE_SIZE:
            raise Refusal(Status.BAD_REQUEST, "a pull carries 8192 bytes of block hashes")
        entry = self.store.get(header.oid)
        if entry is None:
            raise Refusal(Status.NOT_FOUND, f"{describe_oid(header.oid)} is not here")
        if entry.suspect:
            self._when_trusted(client, header, payload)
            return
        self.hold(header.oid)
        self._nursery.start_soon(self._export, client, header, bytes(payload))

    async def _export(self, client: Client, header: Header, hashes: bytes) -> None:
        oid = header.oid
        try:
            found = await trio.to_thread.run_sync(self.store.difference, oid, hashes)
            body = b"".join((found.differs, found.zero, *found.blocks))
            client.reply(header, body, version=found.version, span=found.lineage)
        except SheepError as error:
            self.fail(client, header, error)
        finally:
            self.release(oid)

    def _repair(self, client: Client, header: Header, payload: Buffer) -> None:
        """A holder found this copy missing, bad or behind: level it with node `span` (0: any)."""
        check_token(header, self.tokens)
        self.gate.check(header)
        self.gate.check_object(header)
        self.hold(header.oid)
        self._nursery.start_soon(self._repair_for, client, header)

    async def _repair_for(self, client: Client, header: Header) -> None:
        oid = header.oid
        missing = self.store.get(oid) is None
        try:
            await self._bring_level(oid, header.pool, header.pg, header.span or None)
            client.reply(header, version=self._version(oid))
            if missing:
                self.counters.restored_objects += 1
                log.error("%s: was missing here; restored from a peer", describe_oid(oid))
        except SheepError as error:
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
            [o.oid, o.version, o.lineage, int(o.suspect), o.allocated]
            for o in found
            if not layer or layer_of(o.oid) == layer
        ]
        client.reply(header, json.dumps(rows, separators=(",", ":")).encode())

    # -- fencing ----------------------------------------------------------------------------

    def _fence(self, client: Client, header: Header, payload: Buffer) -> None:
        """From now on refuse every token of the VDI below this one, for good."""
        check_write_token(header, self.tokens)
        # In memory first: not one more old write while the disk is busy making it durable.
        self.tokens[header.vdi] = max(header.token, self.tokens.get(header.vdi, 0))
        self._nursery.start_soon(self._fence_durably, client, header)

    async def _fence_durably(self, client: Client, header: Header) -> None:
        try:
            await trio.to_thread.run_sync(self.store.set_token, header.vdi, header.token)
            client.reply(header)
        except SheepError as error:
            self.fail(client, header, error)

    def learn_tokens(self, tokens: dict[int, int]) -> dict[int, int]:
        """Take over the fences that a peer knows; give those that are new and to be kept."""
        new = {vdi: t for vdi, t in tokens.items() if t > self.tokens.get(vdi, 0)}
        self.tokens.update(new)
        return new

    def guard(self, pool: int, pg: int, changed: int) -> None:
        """From here on take changes of a group that this node joins: their fences are known."""
        self._guarded[pool, pg] = changed

    def is_guarded(self, pool: int, pg: int) -> bool:
        """Tell whether this node knows the fences of a group since it began to join it."""
        return self._guarded.get((pool, pg)) == self.map.pools[pool][pg].changed

    async def keep_tokens(self, tokens: dict[int, int]) -> None:
        """Make fences durable. Raises DiskError, NoSpaceError."""
        for vdi, token in tokens.items():
            await trio.to_thread.run_sync(self.store.set_token, vdi, token)


def check_range(header: Header) -> None:
    """Refuse a range outside the object."""
    if header.offset + header.span > OBJECT_SIZE:
        raise Refusal(
            Status.BAD_REQUEST, f"range {header.offset}+{header.span} is beyond the object's end"
        )


_COUNT = struct.Struct("<H")


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


def as_buffer(data: Buffer | Sequence[Buffer]) -> Buffer:
    """Join what the store gave in pieces."""
    if isinstance(data, list | tuple):
        return data[0] if len(data) == 1 else b"".join(data)
    return data  # type: ignore[return-value]
