"""A node checks its own copies, object by object, and mends them from a `sync` member.

Always holds:
- Only groups in which this node is a `sync` member; what it has yet to learn, recovery sees to.
- Damage counts when two looks found the same. What could not be mended is tried again once before
  it is called unrepairable: members that mend the same object at the same time refuse each other.
- What was mended is durable before it counts as repaired.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    ObjectNotFoundError,
    SheepError,
)
from sheepfs.core.geometry import OBJECT_SIZE, describe_oid, layer_of
from storaged.logic.scrubstate import DAMAGED, Findings, Problem
from storaged.operations.replica import Replica
from storaged.recovery.pulling import Peers
from storaged.store.entry import CORRUPT, SUSPECT
from storaged.store.objects import Checked

log = logging.getLogger(__name__)

AGAIN_S = 5.0
RETRY_S = 300.0
"""How often it is tried to mend what could not be mended."""


@dataclass(slots=True)
class _Open:
    """Damage that is not mended yet."""

    pool: int
    pg: int
    due: float
    tries: int = 1


class SelfCheck:
    """Checks the copies of one node."""

    def __init__(self, replica: Replica, peers: Peers, findings: Findings) -> None:
        self.findings = findings
        self._replica = replica
        self._peers = peers
        self._open: dict[int, _Open] = {}

    def is_mine(self, pool: int, pg: int) -> bool:
        """Tell whether this node is a sync member of a group, as far as it knows."""
        return self._replica.node in self._replica.sync_members(pool, pg)

    async def check(self, oid: int, pool: int, pg: int) -> int:
        """Check an object, and mend it if need be; gives the bytes that were read.

        Raises:
            DiskError: the disk failed; the daemon must end.
        """
        findings = self.findings
        try:
            entry = self._replica.store.get(oid)
            if entry is not None and entry.state == SUSPECT:
                await self._resolve(oid, pool, pg)
            found = await self._look(oid)
            if found is None:
                return 0
            findings.checked_objects += 1
            findings.checked_bytes += found.read_bytes
            if found.is_good:
                findings.solved(oid, DAMAGED)
                self._open.pop(oid, None)
            elif self.is_mine(pool, pg):
                await self._mend(oid, pool, pg, found)
            return found.read_bytes
        except DiskError as error:
            if self._replica.store.has_failed:
                raise
            # Clients that meet this end the daemon; a check in the background does not.
            log.info("%s: %s", describe_oid(oid), error)
            damage = self._opened(oid, pool, pg)
            if damage.tries > 1:
                damage.due = trio.current_time() + RETRY_S
                self._report(Problem(oid, DAMAGED, f"it cannot be read: {error}"))
        except SheepError as error:
            log.debug("%s is not checked now: %s", describe_oid(oid), error)
        return OBJECT_SIZE

    async def retry(self, now: float) -> None:
        """Try again to mend what is due. Raises DiskError (as `check`)."""
        for oid in self.findings.problems.keys() - self._open.keys():
            problem = self.findings.problems[oid]
            entry = self._replica.store.get(oid)
            if problem.what == DAMAGED:
                if entry is None or not self.is_mine(entry.pool, entry.pg):
                    self.findings.solved(oid, DAMAGED)
                else:
                    # Known from a former run.
                    self._open[oid] = _Open(entry.pool, entry.pg, now, 2)
        for oid, damage in list(self._open.items()):
            if damage.due <= now:
                damage.due = now + RETRY_S
                if self._replica.store.get(oid) is None or not self.is_mine(damage.pool, damage.pg):
                    self.findings.solved(oid, DAMAGED)
                    del self._open[oid]
                else:
                    await self.check(oid, damage.pool, damage.pg)

    def next_retry(self) -> float:
        """Give when `retry` has something to do, in monotonic seconds."""
        return min((damage.due for damage in self._open.values()), default=float("inf"))

    def retry_now(self) -> None:
        """Have the next `retry` try everything."""
        for damage in self._open.values():
            damage.due = float("-inf")

    async def _look(self, oid: int) -> Checked | None:
        """Check an object twice if the first look finds damage; None: there is nothing to check."""
        found = await self._look_once(oid)
        if found is None or found.is_good:
            return found
        again = await self._look_once(oid)
        if again is None:
            return None
        return Checked(
            tuple(block for block in found.blocks if block in again.blocks),
            found.is_header_bad and again.is_header_bad,
            found.read_bytes + again.read_bytes,
        )

    async def _look_once(self, oid: int) -> Checked | None:
        store = self._replica.store
        try:
            return await trio.to_thread.run_sync(store.check, oid)
        except ObjectNotFoundError:
            # Deleted meanwhile; if not, its group's comparison finds that it is missing.
            return None
        except CorruptError as error:
            log.info("%s: %s", describe_oid(oid), error)
        entry = store.get(oid)
        return Checked((), True, 0) if entry is not None and entry.state == CORRUPT else None

    async def _resolve(self, oid: int, pool: int, pg: int) -> None:
        """Learn from a peer what a suspect holds; the only copy waits for who uses it (I8)."""
        if self.is_mine(pool, pg) and len(self._replica.map.pools[pool][pg].sync) > 1:
            await self._replica.trust(oid, pool, pg)
            await self._replica.flush_store(layer_of(oid))

    async def _mend(self, oid: int, pool: int, pg: int, found: Checked) -> None:
        replica, findings = self._replica, self.findings
        group = replica.map.pools[pool][pg]
        is_only = (*group.members, *group.away) == (replica.node,)
        what = f"blocks {', '.join(map(str, found.blocks[:8]))}" if found.blocks else "header"
        if oid not in self._open and oid not in findings.problems:
            findings.found += 1
            replica.counters.corrupt_blocks += len(found.blocks)
            log.warning("%s: damage in %s; mending it", describe_oid(oid), what)
        damage = self._opened(oid, pool, pg)
        try:
            if is_only:
                raise CorruptError("there is no other copy")
            await replica.level(oid, pool, pg)
            await replica.flush_store(layer_of(oid))
            after = await self._look_once(oid)
            if after is None or after.is_good:
                findings.repaired += 1
                findings.solved(oid, DAMAGED)
                self._open.pop(oid, None)
                log.warning("%s: %s mended", describe_oid(oid), what)
        except CorruptError as error:
            others = [node for node in group.sync if node != replica.node]
            if is_only or (damage.tries > 1 and others and all(map(self._peers.link, others))):
                damage.due = trio.current_time() + RETRY_S
                detail = str(error) if is_only else "no member has a good copy"
                self._report(Problem(oid, DAMAGED, f"{what}: {detail}", found.blocks))
        except SheepError as error:
            if replica.store.has_failed:
                raise
            # Where nobody else has it, it is being deleted, or its group's comparison tells.
            log.info("%s: cannot be mended yet: %s", describe_oid(oid), error)

    def _opened(self, oid: int, pool: int, pg: int) -> _Open:
        """Note that an object's damage is tried to be mended (once more)."""
        now = trio.current_time()
        damage = self._open.get(oid)
        if damage is None:
            # Not all members at the same time: they would refuse each other again.
            due = now + AGAIN_S * (1 + self._replica.node % 4 / 4)
            damage = self._open[oid] = _Open(pool, pg, due)
        else:
            damage.tries += 1
            damage.due = max(damage.due, now + AGAIN_S)
        return damage

    def _report(self, problem: Problem) -> None:
        if self.findings.add(problem):
            log.error("%s cannot be repaired: %s", describe_oid(problem.oid), problem.detail)
