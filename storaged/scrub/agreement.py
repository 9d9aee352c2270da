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

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import trio

from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    NotMemberError,
    ObjectNotFoundError,
    RetryableError,
    SheepError,
    StaleEpochError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid, layer_of
from sheepfs.net.catalog import Catalog, Roots
from storaged.logic.scrub import (
    Alarm,
    Copies,
    Copy,
    Level,
    ages_differ,
    are_equal,
    hold_the_same,
    judge,
    must_read,
)
from storaged.logic.scrubstate import UNEQUAL, Findings, Problem
from storaged.operations.replica import Replica
from storaged.recovery.pulling import Peers
from storaged.scrub.mapreading import MapReading
from storaged.scrub.members import Group, Members, NotNowError
from storaged.store.format import META_SIZE, TABLE_SIZE

log = logging.getLogger(__name__)

SECOND_LOOK_S = 10.0
AT_ONCE = 64
"""Objects that differ, judged together."""


@dataclass(slots=True)
class Compared:
    """What comparing a group came to."""

    is_complete: bool = True
    left_to_holders: set[int] = field(default_factory=set)


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
        self._catalog = catalog
        self._members = Members(replica, peers)
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
        group = Group(pool, pg, self._replica.map.pools[pool][pg])
        try:
            doubtful = await self._doubtful(group, only, result)
            for first in range(0, len(doubtful), AT_ONCE):
                await self._settle(group, doubtful[first : first + AT_ONCE], result)
        except (NotNowError, SheepError) as error:
            if isinstance(error, DiskError) and self._replica.store.has_failed:
                raise
            log.debug("group %d of pool %d is not compared now: %s", pg, pool, error)
            result.is_complete = False
        return result

    async def _doubtful(
        self, group: Group, only: Iterable[int] | None, result: Compared
    ) -> list[int]:
        """Give the objects whose copies seem to differ."""
        lists = {node: await self._members.list(group, node) for node in group.members.sync}
        everything = {oid for found in lists.values() for oid in found}
        oids = sorted(everything if only is None else only)
        doubtful = []
        for oid in oids:
            if len({found.get(oid) for found in lists.values()}) > 1:
                doubtful.append(oid)
            else:
                try:
                    copies = await self._members.look(group, oid)
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

    async def _settle(self, group: Group, oids: list[int], result: Compared) -> None:
        """Judge objects that seem to differ."""
        first = {oid: await self._members.look(group, oid) for oid in oids}
        first = {oid: copies for oid, copies in first.items() if not are_equal(copies)}
        for oid in set(oids) - first.keys():
            self.findings.solved(oid, UNEQUAL)
        # What changes at every look is being written.
        first = {
            oid: found
            for oid, found in first.items()
            if await self._members.look(group, oid) == found
        }
        if not first:
            return
        await trio.sleep(SECOND_LOOK_S / 2)
        families = await self._catalog.all_roots()
        owners = {oid: await self._owner(families, oid) for oid in first}
        await trio.sleep(SECOND_LOOK_S / 2)
        for oid, copies in first.items():
            if await self._members.look(group, oid) != copies:
                continue
            roots = owners[oid]
            if roots is None:
                # No map names it: who makes or removes it knows what becomes of it.
                self.findings.solved(oid, UNEQUAL)
            elif ages_differ(copies) and not _is_settled(roots):
                result.left_to_holders.add(oid)
            else:
                await self._resolve(group, oid, copies)

    async def _resolve(self, group: Group, oid: int, copies: Copies) -> None:
        if must_read(copies):
            copies = {
                node: await self._members.read(group, oid, node, c) for node, c in copies.items()
            }
        verdict = judge(copies)
        if isinstance(verdict, Alarm):
            self._report(oid, verdict.why)
        if verdict is None or isinstance(verdict, Alarm):
            return
        what = ", ".join(f"node {node}: {_words(copy)}" for node, copy in sorted(copies.items()))
        is_damage = not hold_the_same(copies)
        if is_damage and oid not in self.findings.problems:
            self.findings.found += len(verdict.behind)
            log.warning("%s: copies differ (%s)", describe_oid(oid), what)
        try:
            await self._level(group, oid, verdict)
        except (CorruptError, ObjectNotFoundError) as error:
            self._report(oid, f"node {verdict.source} cannot give its copy: {error}")
            return
        if are_equal(await self._members.look(group, oid)):
            self.findings.solved(oid, UNEQUAL)
            if is_damage:
                self.findings.repaired += len(verdict.behind)
                log.warning(
                    "%s: made equal to the copy of node %d", describe_oid(oid), verdict.source
                )

    async def _level(self, group: Group, oid: int, verdict: Level) -> None:
        for node in verdict.behind:
            try:
                await self._members.repair(group, oid, node, verdict.source)
            except CorruptError:
                # A member that mends its copy at this moment says so, too.
                await trio.sleep(SECOND_LOOK_S)
                await self._members.repair(group, oid, node, verdict.source)

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


def _is_settled(roots: Roots) -> bool:
    """Tell whether nobody changes what a family's maps name, and its replicas are equal."""
    return not roots.building and all(root.settled for root in roots.maps)


def _words(copy: Copy) -> str:
    return copy if isinstance(copy, str) else f"version {copy.version:x}"
