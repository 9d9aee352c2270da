"""What the members of a group have of an object, and having one take another's copy.

Always holds:
- Every answer of one comparison is of the group as it was when the comparison began.
- Whether data matches its table is told of the version that was looked at, or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import trio
from xxhash import xxh3_128_hexdigest

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    ProtocolError,
    RecoveringError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid, layer_of
from sheepfs.core.wire import FLAG_FORWARD, Op
from sheepfs.net.link import Link
from storaged.logic.scrub import BAD, MISSING, Copy, State
from storaged.operations.replica import Replica
from storaged.recovery.pulling import Peers
from storaged.store.format import TABLE_SIZE

CALL_TIMEOUT_S = 10.0
_WANT_DIGEST = 1
"""Flag of STAT."""


class NotNowError(Exception):
    """Not all members can be asked as members of one group."""


@dataclass(frozen=True, slots=True)
class Group:
    """A placement group as it is while it is compared."""

    pool: int
    pg: int
    members: PlacementGroup


class Members:
    """Asks the `sync` members of groups that this node is one of."""

    def __init__(self, replica: Replica, peers: Peers) -> None:
        self._replica = replica
        self._peers = peers

    def _fields(self, group: Group, oid: int = 0) -> dict[str, int]:
        epoch = self._replica.map.epoch
        return {"pool": group.pool, "pg": group.pg, "oid": oid, "epoch": epoch}

    def _link(self, group: Group, node: int) -> Link:
        """Give the link to a member; the group is the one that was asked before."""
        if self._replica.map.pools[group.pool][group.pg] != group.members:
            raise NotNowError("the group has changed")
        link = self._peers.link(node)
        if link is None:
            raise UnreachableError(f"node {node} cannot be reached")
        return link

    async def list(self, group: Group, node: int) -> dict[int, tuple[int, int]]:
        """Give object -> (version, lineage) of all that a member has of the group.

        Raises:
            NotNowError: the group has changed.
            SheepError: the member does not answer, or is none any more. So for all methods.
        """
        if node == self._replica.node:
            count = len(self._replica.map.pools[group.pool])
            found = self._replica.store.list(group.pool, group.pg, count)
            return {o.oid: (o.version, o.lineage) for o in found}
        rows = await self._link(group, node).call_json(
            Op.LIST, timeout_s=CALL_TIMEOUT_S, **self._fields(group)
        )
        try:
            return {int(oid): (int(version), int(lineage)) for oid, version, lineage, *_ in rows}
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"node {node} sent a bad list: {error}") from error

    async def look(self, group: Group, oid: int) -> dict[int, Copy]:
        """Ask every member what it has of an object."""
        copies: dict[int, Copy] = {}
        for node in group.members.sync:
            try:
                if node == self._replica.node:
                    copies[node] = await self._look_here(group, oid)
                    continue
                header, table = await self._link(group, node).call(
                    Op.SUMS, b"", timeout_s=CALL_TIMEOUT_S, **self._fields(group, oid)
                )
                if len(table) != TABLE_SIZE:
                    raise ProtocolError(f"node {node} sent a table of {len(table)} bytes")
                digest = xxh3_128_hexdigest(table).encode()
                copies[node] = State(header.version, header.span, digest)
            except ObjectNotFoundError:
                copies[node] = MISSING
            except CorruptError:
                copies[node] = BAD
        return copies

    async def _look_here(self, group: Group, oid: int) -> Copy:
        store = self._replica.store
        entry = store.get(oid)
        if entry is not None and entry.suspect:
            await self._replica.trust(oid, group.pool, group.pg)
        if not store.is_open(oid):
            await trio.to_thread.run_sync(store.sums, oid)
        entry = store.get(oid)
        if entry is None:
            return MISSING
        if not store.is_open(oid):
            raise RecoveringError(f"{describe_oid(oid)} is busy")
        digest = xxh3_128_hexdigest(store.sums(oid)).encode()
        return State(entry.version, entry.lineage, digest)

    async def read(self, group: Group, oid: int, node: int, copy: Copy) -> Copy:
        """Find out whether the data of a copy is what its table says."""
        if not isinstance(copy, State):
            return copy
        if node == self._replica.node:
            version, digest = await self._read_here(oid)
        else:
            header, body = await self._link(group, node).call(
                Op.STAT,
                b"",
                flags=_WANT_DIGEST,
                timeout_s=CALL_TIMEOUT_S,
                **self._fields(group, oid),
            )
            try:
                version, digest = header.version, str(json.loads(body)["digest"])
            except (ValueError, KeyError, TypeError) as error:
                raise ProtocolError(f"node {node} answered STAT badly: {error!r}") from error
        if version != copy.version:
            raise RecoveringError(f"{describe_oid(oid)} is being changed")
        return copy._replace(is_good=digest.encode() == copy.table)

    async def _read_here(self, oid: int) -> tuple[int, str]:
        """Give the version of this node's copy and the digest of its data, at one moment."""
        replica = self._replica
        await replica.take(oid)
        try:
            digests = await trio.to_thread.run_sync(replica.store.digests, oid)
            entry = replica.store.get(oid)
            return entry.version if entry else 0, xxh3_128_hexdigest(digests)
        finally:
            replica.release(oid)

    async def repair(self, group: Group, oid: int, node: int, source: int) -> None:
        """Have a member take the source's copy, durably; a newer one of its own stays.

        Raises:
            CorruptError: the source's copy is damaged, or being mended.
        """
        if node == self._replica.node:
            await self._replica.level(oid, group.pool, group.pg, source)
            await self._replica.flush_store(layer_of(oid))
            return
        link = self._link(group, node)
        fields = self._fields(group, oid)
        await link.call(
            Op.REPAIR, b"", flags=FLAG_FORWARD, span=source, timeout_s=CALL_TIMEOUT_S, **fields
        )
        await link.call(
            Op.FLUSH,
            b"",
            version=layer_of(oid),
            timeout_s=CALL_TIMEOUT_S,
            **self._fields(group, oid),
        )
