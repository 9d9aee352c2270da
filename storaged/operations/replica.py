"""What a node does with each request on its objects: the table of operations, reads and changes.

Always holds:
- A write applies only on the version it names; a later version already there means that it was
  applied before (a retry), since each version builds on the one before.
- A joining node trusts none of its objects until they were compared with a sync member (`fresh`),
  and takes no change before it knows which holders were fenced while it was away (`guard`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from sheepfs.core.errors import (
    CorruptError,
    NoSpaceError,
    RecoveringError,
    SheepError,
    Status,
)
from sheepfs.core.geometry import OBJECT_SIZE, describe_oid, is_map_object
from sheepfs.core.wire import BASE, FLAG_COPY, FLAG_CREATE, Buffer, Header, Op
from sheepfs.logs import fields
from storaged.logic.gate import Refusal, Role, check_token, check_write_token
from storaged.operations.comparing import Comparing
from storaged.operations.copies import copy_map
from storaged.operations.requests import Client
from storaged.store.entry import StoredObject
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Change:
    """A change that is not as simple as nearly every write."""

    client: Client
    header: Header
    payload: Buffer
    role: Role
    entry: StoredObject | None
    """The object as it is here."""
    base: int | None
    """Object that it makes a copy of."""
    makes: bool
    """It makes the object, if that is not here."""
    is_unknown: bool
    """This node joins, and has yet to learn what its copy of the object is worth."""


class Replica(Comparing):
    """The operations on one node's objects."""

    def __init__(
        self,
        store: ObjectStore,
        node: int,
        incarnation: int,
        nursery: trio.Nursery,
        on_disk_error: Callable[[SheepError], None],
    ) -> None:
        super().__init__(store, node, incarnation, nursery, on_disk_error)
        self.holders: dict[int, str] = {}
        """VDI -> name of the client that fenced all others, as far as this run knows."""
        self.handlers = {
            Op.READ: self._read,
            Op.WRITE: self._change,
            Op.PUNCH: self._change,
            Op.DELETE: self._change,
            Op.FLUSH: self._flush,
            Op.STAT: self._stat,
            Op.EXTENTS: self._tables,
            Op.SUMS: self._tables,
            Op.LAYOUT: self._tables,
            Op.PULL: self._pull,
            Op.REPAIR: self._repair,
            Op.LIST: self._list,
            Op.FENCE: self._fence,
        }

    # -- reads ------------------------------------------------------------------------------

    def _read(self, client: Client, header: Header, payload: Buffer) -> None:
        self.counters.client_requests += 1
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
            self._nursery.start_soon(self._cold_read, client, header, client.received_ns)
        else:
            client.reply(header, as_buffer(data))

    async def _cold_read(self, client: Client, header: Header, received_ns: int) -> None:
        def read() -> Buffer:
            data = self.store.read(header.oid, header.offset, header.span, wait=True)
            return as_buffer(b"" if data is None else data)

        try:
            data = await trio.to_thread.run_sync(read)
            client.received_ns = received_ns
            client.reply(header, data)
        except SheepError as error:
            if isinstance(error, CorruptError):
                self._corrupt(header.oid, header, error)
            self.fail(client, header, error)
        finally:
            client.hold(-header.span)

    # -- changes ----------------------------------------------------------------------------

    def _change(self, client: Client, header: Header, payload: Buffer) -> None:
        self.counters.client_requests += 1
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
            if self.awaited:
                self.arrived(oid)
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
        change = _Change(
            client, header, payload, role, entry, base,
            makes=base is not None or (bool(header.flags & FLAG_CREATE) and header.op == Op.WRITE),
            is_unknown=role is Role.JOINING and oid not in self.fresh_of(header.pool, header.pg),
        )  # fmt: skip
        if not self._is_due(change):
            return
        if not self.store.is_marked(oid):
            self._mark_first(client, header, payload)
        elif header.op == Op.DELETE and oid not in self._freed and self.store.dependents(oid):
            self._after(self._free_to_delete, client, header, payload)
        else:
            self._carry_out(change)

    def _is_due(self, change: _Change) -> bool:
        """Tell whether a change fits this copy; else answer, or see to what has to come first."""
        client, header, entry = change.client, change.header, change.entry
        if change.makes and not (entry and entry.version >= header.version and not entry.suspect):
            return change.base is None or self._can_copy(
                client, header, change.payload, change.role, change.base
            )
        if change.is_unknown:
            if header.op != Op.DELETE:
                self._miss(client, header, change.payload)
                return False
            if entry is not None:
                return True  # Whatever this copy holds, it is not to be kept.
        if entry is None:
            if header.op != Op.DELETE:
                raise Refusal(Status.STALE_OBJECT, f"{describe_oid(header.oid)} is not here")
            client.reply(header)
            return False
        if entry.suspect:
            self._when_trusted(client, header, change.payload)
            return False
        if entry.version == header.prev:
            return True
        if entry.version >= header.version:
            # It was sent again: this copy has it, and perhaps more.
            client.acknowledge(header)
        else:
            client.reply(
                header,
                f"{describe_oid(header.oid)} is at version {entry.version:x}".encode(),
                Status.STALE_OBJECT,
                version=entry.version,
            )
        return False

    def _carry_out(self, change: _Change) -> None:
        client, header, role = change.client, change.header, change.role
        try:
            self._apply(header, change.payload, change.makes, change.base)
        except CorruptError as error:
            if change.base is not None:
                self._corrupt(change.base, header, error)
            raise
        except NoSpaceError:
            level = self.level_of(header.pool, header.pg)
            if role is not Role.JOINING or level.is_complete:
                raise
            # Clients need not suffer that this node cannot join for lack of space.
            level.fresh.discard(header.oid)
            self._miss(client, header, change.payload)
            return
        if role is Role.JOINING and not (change.is_unknown and header.op == Op.DELETE):
            # What was deleted unseen, a member that stayed may have yet.
            self.level_of(header.pool, header.pg).bring(header.oid)
        if self.awaited:
            self.arrived(header.oid)
        client.acknowledge(header)

    def _apply(self, header: Header, payload: Buffer, create: bool, base: int | None) -> None:
        oid, offset, version = header.oid, header.offset, header.version
        pool, pg = header.pool, header.pg
        if header.op == Op.WRITE:
            data = payload if base is None else memoryview(payload)[BASE.size :]
            if len(data) != header.span:
                raise Refusal(Status.BAD_REQUEST, "a write's payload is not as long as its span")
            if base is not None and is_map_object(oid):
                copy_map(self.store, base, header)
                return
            self.store.write(oid, offset, data, version, create=create, pool=pool, pg=pg, base=base)
        elif header.op == Op.PUNCH:
            self.store.punch(oid, offset, header.span, version, pool=pool, pg=pg, base=base)
        else:
            self._freed.discard(oid)
            self.store.delete(oid)

    # -- fencing ----------------------------------------------------------------------------

    def _fence(self, client: Client, header: Header, payload: Buffer) -> None:
        """From now on refuse every token of the VDI below this one, for good."""
        check_write_token(header, self.tokens)
        # In memory first: not one more old write while the disk is busy making it durable.
        self.tokens[header.vdi] = max(header.token, self.tokens.get(header.vdi, 0))
        self.holders[header.vdi] = client.name
        self._nursery.start_soon(self._fence_durably, client, header)

    async def _fence_durably(self, client: Client, header: Header) -> None:
        try:
            await trio.to_thread.run_sync(self.store.set_token, header.vdi, header.token)
            log.info(
                "VDI %d has a new holder: older ones are refused", header.vdi,
                extra=fields(event="fence", vdi=header.vdi, token=header.token),
            )  # fmt: skip
            client.reply(header)
        except SheepError as error:
            self.fail(client, header, error)

    def learn_tokens(self, tokens: dict[int, int]) -> dict[int, int]:
        """Take over the fences that a peer knows; give those that are new and to be kept."""
        new = {vdi: t for vdi, t in tokens.items() if t > self.tokens.get(vdi, 0)}
        self.tokens.update(new)
        return new

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


def as_buffer(data: Buffer | Sequence[Buffer]) -> Buffer:
    """Join what the store gave in pieces."""
    if isinstance(data, list | tuple):
        return data[0] if len(data) == 1 else b"".join(data)
    return data  # type: ignore[return-value]
