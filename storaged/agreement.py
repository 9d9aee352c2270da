"""Comparing the replicas of a placement group, as its first `sync` member.

Always holds:
- Versions tell most: where they are equal, so must be the tables of checksums, whatever is being
  written. Where they differ, or a copy is missing, it counts only if two looks with time between
  them found the same, and a map names the object: members differ for moments while clients write,
  create and delete.
- A holder has the say over the versions of what it holds, and over what a holder left that died:
  these are counted, and left alone.
- Nothing that was deleted comes back (I4). A map names an object only while all members have it:
  it is stored when they have it durably, and stored without it before they are told to delete. So
  what a map names between two looks that both lack it was lost.
- What becomes newer meanwhile stays as it is (FLAG_FORWARD).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import trio
from xxhash import xxh3_128_hexdigest

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    NotMemberError,
    ObjectNotFoundError,
    ProtocolError,
    RecoveringError,
    RetryableError,
    SheepError,
    StaleEpochError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid, layer_of
from sheepfs.core.wire import FLAG_FORWARD, Op
from sheepfs.net.catalog import Catalog, Roots
from sheepfs.net.link import Link
from storaged.logic.scrub import (
    BAD,
    MISSING,
    Alarm,
    Copies,
    Copy,
    Level,
    State,
    ages_differ,
    are_equal,
    judge,
    must_read,
)
from storaged.logic.scrubstate import UNEQUAL, Findings, Problem
from storaged.mapreading import MapReading
from storaged.recovery import Peers
from storaged.replica import Replica
from storaged.store.format import META_SIZE, TABLE_SIZE

log = logging.getLogger(__name__)

SECOND_LOOK_S = 10.0
CALL_TIMEOUT_S = 10.0
AT_ONCE = 64
"""Objects that differ, judged together."""
_WANT_DIGEST = 1


class _NotNowError(Exception):
    """Not all members can be asked at the moment."""


@dataclass(slots=True)
class Compared:
    """What comparing a group came to."""

    is_complete: bool = True
    left_to_holders: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Group:
    pool: int
    pg: int
    members: PlacementGroup


class Agreement:
    """Compares this node's groups with their other members.

    Args:
        pace: waits as long as reading so many bytes is to take.
    """

    def __init__(
        self,
        replica: Replica,
        peers: Peers,
        catalog: Catalog,
        findings: Findings,
        pace: Callable[[int], Awaitable[None]],
    ) -> None:
        self.findings = findings
        self._replica = replica
        self._peers = peers
        self._catalog = catalog
        self._maps = MapReading(replica, peers)
        self._pace = pace

    def is_mine(self, pool: int, pg: int) -> bool:
        """Tell whether this node is the one that compares a group."""
        sync = self._replica.sync_members(pool, pg)
        return len(sync) > 1 and sync[0] == self._replica.node

    async def compare(self, pool: int, pg: int, only: Iterable[int] | None = None) -> Compared:
        """Compare all objects of a group, or some; repair what can be repaired.

        Raises:
            DiskError: this node's disk failed; the daemon must end.
        """
        result = Compared()
        if not self.is_mine(pool, pg):
            return Compared(is_complete=False)
        group = _Group(pool, pg, self._replica.map.pools[pool][pg])
        try:
            doubtful = await self._doubtful(group, only, result)
            for first in range(0, len(doubtful), AT_ONCE):
                await self._settle(group, doubtful[first : first + AT_ONCE], result)
        except (_NotNowError, SheepError) as error:
            if isinstance(error, DiskError) and self._replica.store.has_failed:
                raise
            log.debug("group %d of pool %d is not compared now: %s", pg, pool, error)
            result.is_complete = False
        return result

    async def _doubtful(
        self, group: _Group, only: Iterable[int] | None, result: Compared
    ) -> list[int]:
        """Give the objects whose copies seem to differ."""
        lists = {node: await self._list(group, node) for node in group.members.sync}
        everything = {oid for found in lists.values() for oid in found}
        oids = sorted(everything if only is None else only)
        doubtful = []
        for oid in oids:
            if len({found.get(oid) for found in lists.values()}) > 1:
                doubtful.append(oid)
            else:
                try:
                    copies = await self._look(group, oid)
                except (StaleEpochError, NotMemberError, UnreachableError):
                    raise
                except RetryableError as error:
                    log.debug("%s is not compared now: %s", describe_oid(oid), error)
                    result.is_complete = False
                    continue
                await self._pace(len(copies) * (META_SIZE + TABLE_SIZE))
                if are_equal(copies):
                    self.findings.solved(oid, UNEQUAL)
                elif not ages_differ(copies):
                    # Else it was written between two answers.
                    doubtful.append(oid)
        return doubtful

    async def _settle(self, group: _Group, oids: list[int], result: Compared) -> None:
        """Judge objects that seem to differ."""
        first = {oid: await self._look(group, oid) for oid in oids}
        first = {oid: copies for oid, copies in first.items() if not are_equal(copies)}
        for oid in set(oids) - first.keys():
            self.findings.solved(oid, UNEQUAL)
        # What changes at every look is being written.
        first = {
            oid: found for oid, found in first.items() if await self._look(group, oid) == found
        }
        if not first:
            return
        await trio.sleep(SECOND_LOOK_S / 2)
        families = await self._catalog.all_roots()
        owners = {oid: await self._owner(families, oid) for oid in first}
        await trio.sleep(SECOND_LOOK_S / 2)
        for oid, copies in first.items():
            if await self._look(group, oid) != copies:
                continue
            roots = owners[oid]
            if roots is None:
                # No map names it: who makes or removes it knows what becomes of it.
                self.findings.solved(oid, UNEQUAL)
            elif ages_differ(copies) and not _is_settled(roots):
                result.left_to_holders.add(oid)
            else:
                await self._resolve(group, oid, copies)

    async def _resolve(self, group: _Group, oid: int, copies: Copies) -> None:
        if must_read(copies):
            copies = {node: await self._read(group, oid, node, c) for node, c in copies.items()}
        verdict = judge(copies)
        if isinstance(verdict, Alarm):
            self._report(oid, verdict.why)
        if verdict is None or isinstance(verdict, Alarm):
            return
        what = ", ".join(f"node {node}: {_words(copy)}" for node, copy in sorted(copies.items()))
        if oid not in self.findings.problems:
            self.findings.found += len(verdict.behind)
            log.warning("%s: copies differ (%s)", describe_oid(oid), what)
        try:
            await self._level(group, oid, verdict)
        except (CorruptError, ObjectNotFoundError) as error:
            self._report(oid, f"node {verdict.source} cannot give its copy: {error}")
            return
        if are_equal(await self._look(group, oid)):
            self.findings.repaired += len(verdict.behind)
            self.findings.solved(oid, UNEQUAL)
            log.warning("%s: made equal to the copy of node %d", describe_oid(oid), verdict.source)

    async def _level(self, group: _Group, oid: int, verdict: Level) -> None:
        for node in verdict.behind:
            try:
                await self._repair(group, oid, node, verdict.source)
            except CorruptError:
                # A member that mends its copy at this moment says so, too.
                await trio.sleep(SECOND_LOOK_S)
                await self._repair(group, oid, node, verdict.source)

    def _report(self, oid: int, why: str) -> None:
        if self.findings.add(Problem(oid, UNEQUAL, why)):
            log.error("%s: copies differ, and are left as they are: %s", describe_oid(oid), why)

    async def _owner(self, families: Mapping[int, Roots], oid: int) -> Roots | None:
        """Give the family of which a map names an object."""
        layer = layer_of(oid)
        for roots in families.values():
            if layer in roots.layers:
                for root in roots.maps:
                    if await self._maps.names(root.map, root.maps, oid, root.settled):
                        return roots
        return None

    # -- asking members ---------------------------------------------------------------------

    def _fields(self, group: _Group, oid: int = 0) -> dict[str, int]:
        epoch = self._replica.map.epoch
        return {"pool": group.pool, "pg": group.pg, "oid": oid, "epoch": epoch}

    def _link(self, group: _Group, node: int) -> Link:
        """Give the link to a member; the group is the one that was asked before."""
        if self._replica.map.pools[group.pool][group.pg] != group.members:
            raise _NotNowError("the group has changed")
        link = self._peers.link(node)
        if link is None:
            raise UnreachableError(f"node {node} cannot be reached")
        return link

    async def _list(self, group: _Group, node: int) -> dict[int, tuple[int, int]]:
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

    async def _look(self, group: _Group, oid: int) -> dict[int, Copy]:
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

    async def _look_here(self, group: _Group, oid: int) -> Copy:
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

    async def _read(self, group: _Group, oid: int, node: int, copy: Copy) -> Copy:
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

    async def _repair(self, group: _Group, oid: int, node: int, source: int) -> None:
        """Have a member take the source's copy, durably."""
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


def _is_settled(roots: Roots) -> bool:
    """Tell whether nobody changes what a family's maps name, and its replicas are equal."""
    return not roots.building and all(root.settled for root in roots.maps)


def _words(copy: Copy) -> str:
    return copy if isinstance(copy, str) else f"version {copy.version:x}"
