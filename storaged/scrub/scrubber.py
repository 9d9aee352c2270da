"""Scrubbing: this node's background check of what it has, by a schedule and at a limited rate.

What it decides is in `storaged.logic.scrub`; its two passes are `selfcheck` (every byte of this
node's copies) and `agreement` (all members of a group).

Always holds:
- One object at a time; clients come first (`allowed_rate`).
- How far a pass has come survives a restart, but for the last minute (`scrub.json`).
- What was not repaired is tried again now and then, and named in STATUS and SCRUB until it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import trio

from sheepfs.core.errors import DiskError, NoSpaceError, ProtocolError, UsageError
from sheepfs.core.geometry import pg_of, pool_of
from sheepfs.core.metadata import ScrubRecord
from sheepfs.core.wire import Buffer, Header
from sheepfs.net.catalog import Catalog
from storaged.logic.scrub import (
    END_OF_GROUP,
    Activity,
    Groups,
    Kind,
    Pass,
    Policy,
    Position,
    Schedule,
    allowed_rate,
    policy_of,
)
from storaged.logic.scrubstate import UNEQUAL, Findings, decode, encode
from storaged.operations.replica import Replica
from storaged.recovery.pulling import Peers
from storaged.scrub.agreement import Agreement
from storaged.scrub.selfcheck import RETRY_S, SelfCheck
from storaged.server import ClientConnection, json_object
from storaged.settings import Setting

log = logging.getLogger(__name__)

NOTE = "scrub.json"
SAVE_EVERY_S = 60.0
WAIT_S = 5.0
"""How long to wait for this node to have caught up."""
SHOWN = 100
"""Problems in one answer to SCRUB."""


class Scrubber:
    """All scrubbing of one daemon."""

    def __init__(
        self, replica: Replica, peers: Peers, catalog: Catalog, setting: Setting[ScrubRecord]
    ) -> None:
        self._replica = replica
        self._setting = setting
        self._findings = Findings()
        self._schedule = Schedule.fresh(replica.node, trio.current_time(), self._policy())
        self._selfcheck = SelfCheck(replica, peers, self._findings)
        self._agreement = Agreement(replica, peers, catalog, self._findings, self._pace)
        self._activity = Activity()
        self._wanted = trio.Event()
        self._compare_again_at = trio.current_time()
        self._free_at = self._paced_at = self._saved_at = trio.current_time()
        self._saved = b""
        self._rate = 0.0

    def _policy(self) -> Policy:
        found = self._setting.value
        return policy_of(found.enabled, found.rate, found.light_days, found.deep_days)

    # -- working ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Scrub until cancelled; a failed disk ends the daemon."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._setting.run)
            nursery.start_soon(self._follow_setting)
            try:
                await self._load()
                while True:
                    await self._work()
            except DiskError as error:
                self._replica.disk_failed(error)

    async def _follow_setting(self) -> None:
        while True:
            await self._setting.changed.wait()
            self._wake()

    def _wake(self) -> None:
        self._wanted.set()
        self._wanted = trio.Event()

    async def _work(self) -> None:
        """Do what is due; returns when something else may be, or after a wait."""
        wanted = self._wanted
        now, policy = trio.current_time(), self._policy()
        if policy.enabled:
            await self._try_again(now)
        kind = self._schedule.next(now, policy)
        if kind is not None and not self._may_work():
            with trio.move_on_after(WAIT_S):
                await wanted.wait()
            return
        if kind is not None:
            await (self._compare if kind is Kind.LIGHT else self._check)(
                self._schedule.passes[kind]
            )
            await self._save()
            return
        await self._save()
        wait_s = float("inf")
        if policy.enabled:
            dues = (self._schedule.due_in_s(kind, now, policy) for kind in Kind)
            wait_s = min(*dues, max(0.0, self._next_try() - now))
        with trio.move_on_after(wait_s):
            await wanted.wait()

    def _may_work(self) -> bool:
        """Tell whether this node has all it should have: catching up goes first."""
        pools = self._replica.map.pools.values()
        node = self._replica.node
        joins = any(node in group.joining for groups in pools for group in groups)
        return self._replica.is_known and not joins

    def _is_interrupted(self, kind: Kind, number: int) -> bool:
        now = trio.current_time()
        return (
            self._schedule.next(now, self._policy()) is not kind
            or self._schedule.passes[kind].number != number
            or now >= self._next_try()
        )

    async def _check(self, work: Pass) -> None:
        """Go on with a deep pass."""
        number = work.number
        store = self._replica.store
        for pool, pg in work.left_of(self._groups(self._selfcheck.is_mine)):
            here = work.position
            done = here.oid if here is not None and here[:2] == (pool, pg) else -1
            found = store.list(pool, pg, len(self._replica.map.pools[pool]))
            for oid in sorted(copy.oid for copy in found if copy.oid > done):
                await self._pace(await self._selfcheck.check(oid, pool, pg))
                work.advance(number, Position(pool, pg, oid))
                await self._save_now_and_then()
                if self._is_interrupted(Kind.DEEP, number):
                    return
            work.advance(number, Position(pool, pg, END_OF_GROUP))
            await trio.lowlevel.checkpoint()
        self._finish(Kind.DEEP, number)

    async def _compare(self, work: Pass) -> None:
        """Go on with a light pass."""
        number = work.number
        left_out: list[tuple[int, int]] = []
        left_to_holders: set[int] = set()
        for pool, pg in work.left_of(self._groups(self._agreement.is_mine)):
            result = await self._agreement.compare(pool, pg)
            left_to_holders |= result.left_to_holders
            if not result.is_complete:
                left_out.append((pool, pg))
            work.advance(number, Position(pool, pg, END_OF_GROUP))
            await self._save_now_and_then()
            if self._is_interrupted(Kind.LIGHT, number):
                return
        for pool, pg in list(left_out):
            if self._agreement.is_mine(pool, pg):
                result = await self._agreement.compare(pool, pg)
                left_to_holders |= result.left_to_holders
                if not result.is_complete:
                    continue
            left_out.remove((pool, pg))
        self._findings.left_out = len(left_out)
        self._findings.left_to_holders = len(left_to_holders)
        self._finish(Kind.LIGHT, number)

    def _finish(self, kind: Kind, number: int) -> None:
        if self._schedule.passes[kind].finish(number, trio.current_time()):
            log.info("the %s pass is complete", kind)

    def _groups(self, is_mine: Callable[[int, int], bool]) -> Groups:
        pools = self._replica.map.pools
        return [(c, n) for c in sorted(pools) for n in range(len(pools[c])) if is_mine(c, n)]

    async def _pace(self, read_bytes: int) -> None:
        """Wait as long as reading so much is to take; what took time itself counts."""
        now = trio.current_time()
        self._activity.observe(self._replica.counters.client_requests, now)
        rate = allowed_rate(self._policy().rate, self._activity.per_second)
        self._free_at = max(self._free_at, self._paced_at) + read_bytes / rate
        await trio.sleep_until(self._free_at)
        passed = max(1e-6, trio.current_time() - self._paced_at)
        weight = min(1.0, passed / 5)
        self._rate += weight * (read_bytes / passed - self._rate)
        self._paced_at = trio.current_time()

    # -- what could not be repaired ---------------------------------------------------------

    def _unequal(self) -> list[int]:
        problems = self._findings.problems
        return [oid for oid, problem in problems.items() if problem.what == UNEQUAL]

    def _next_try(self) -> float:
        again = self._compare_again_at if self._unequal() else float("inf")
        return min(self._selfcheck.next_retry(), again)

    async def _try_again(self, now: float) -> None:
        await self._selfcheck.retry(now)
        if now < self._compare_again_at:
            return
        self._compare_again_at = now + RETRY_S
        for oid in self._unequal():
            group = self._group_of(oid)
            if group is None or not self._agreement.is_mine(*group):
                # Another member compares this group now.
                self._findings.solved(oid, UNEQUAL)
            else:
                await self._agreement.compare(*group, only=[oid])

    def _group_of(self, oid: int) -> tuple[int, int] | None:
        groups = self._replica.map.pools.get(pool_of(oid))
        return (pool_of(oid), pg_of(oid, len(groups))) if groups else None

    # -- what survives ----------------------------------------------------------------------

    async def _load(self) -> None:
        data = await trio.to_thread.run_sync(self._replica.store.note, NOTE)
        if not data:
            return
        try:
            schedule, found = decode(data, trio.current_time(), time.time())
        except ProtocolError as error:
            log.warning("%s is damaged, all passes begin anew: %s", NOTE, error)
            return
        self._schedule.passes = schedule.passes
        for name in ("checked_objects", "checked_bytes", "found", "repaired", "problems"):
            setattr(self._findings, name, getattr(found, name))

    async def _save_now_and_then(self) -> None:
        if trio.current_time() >= self._saved_at + SAVE_EVERY_S:
            await self._save()

    async def _save(self) -> None:
        """Keep how far this is, if that is not what was kept last. Raises DiskError."""
        now = trio.current_time()
        state = encode(self._schedule, self._findings, now, time.time())
        self._saved_at = now
        if state == self._saved:
            return
        try:
            await trio.to_thread.run_sync(self._replica.store.write_note, NOTE, state)
            self._saved = state
        except NoSpaceError as error:
            log.debug("%s is not kept: %s", NOTE, error)

    # -- telling ----------------------------------------------------------------------------

    def handle(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        """SCRUB: begin passes now, if any are named; tell how scrubbing stands."""
        start = json_object(payload).get("start", []) if payload else []
        try:
            kinds = [Kind(kind) for kind in start]
        except (TypeError, ValueError) as error:
            raise UsageError(f"start is a list of light and deep: {error}") from error
        self.start(kinds)
        client.reply_json(header, self.status(SHOWN))

    def start(self, kinds: Iterable[Kind]) -> None:
        """Begin passes now, anew if they are under way."""
        for kind in kinds:
            self._schedule.passes[kind].begin()
            self._selfcheck.retry_now()
            self._compare_again_at = trio.current_time()
            self._wake()

    def status(self, shown: int = 0) -> dict[str, Any]:
        """Tell how scrubbing stands, with so many of the problems."""
        now, policy, found = trio.current_time(), self._policy(), self._findings
        groups = {
            Kind.LIGHT: self._groups(self._agreement.is_mine),
            Kind.DEEP: self._groups(self._selfcheck.is_mine),
        }
        running = [kind for kind in Kind if self._schedule.passes[kind].position is not None]
        problems = list(found.problems.values())
        return {
            "enabled": policy.enabled,
            "limit": policy.rate,
            "rate": self._rate if running and policy.enabled else 0.0,
            "passes": {
                kind: {
                    "running": work.position is not None,
                    "progress": work.progress(groups[kind]),
                    "completed": work.completed,
                    "finished_s_ago": now - work.finished if work.completed else None,
                    "due_in_s": self._schedule.due_in_s(kind, now, policy),
                    "every_s": policy.intervals_s[kind],
                }
                for kind, work in self._schedule.passes.items()
            },
            "checked_objects": found.checked_objects,
            "checked_bytes": found.checked_bytes,
            "found": found.found,
            "repaired": found.repaired,
            "unrepairable": len(problems),
            "left_to_holders": found.left_to_holders,
            "left_out": found.left_out,
            "problems": [problem.as_json() for problem in problems[:shown]],
        }
