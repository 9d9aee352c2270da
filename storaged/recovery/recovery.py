"""Catching up: bring this node's copies level with members that stayed, then join.

Always holds:
- Strays (objects that the sync member does not have) go to quarantine, they are not deleted (I4).
- `joined` is told to the leader only after everything patched is durable.
- What is copied leaves the reserve of the disk alone, and some room for clients above it (I14).
- Which holders were fenced is learnt beside all that: a change must not wait for other groups.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import trio
import trio.lowlevel

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.errors import (
    CorruptError,
    NoSpaceError,
    ObjectNotFoundError,
    ProtocolError,
    RecoveringError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid
from sheepfs.core.wire import Op
from sheepfs.logs import fields
from storaged.logic.catchup import Level, Listed, Plan, plan, waves
from storaged.logic.progress import Group, Progress
from storaged.operations.replica import Replica
from storaged.recovery.fetching import Fetching
from storaged.recovery.pulling import PULL_TIMEOUT_S, RETRY_DELAY_S, Peers
from storaged.store.format import META_SIZE

log = logging.getLogger(__name__)

PARALLEL_GROUPS = 4
REPORT_BYTES = 256 << 20
REPORT_EVERY_S = 3.0
"""So much is pulled, or so long it takes, between two reports: groups that are done need not wait
for all others, and each report is a new map for everybody."""
MARK_AT_ONCE = 64
WAITING_RETRY_S = 1.0
PAUSED = "paused"
NO_ROOM = "the disk is full up to the reserve"
ROOM_FOR_CLIENTS = 64 << 20
"""Recovery stops this far above the reserve, or at a hundredth of a smaller disk."""


@dataclass(frozen=True, slots=True)
class JoinedGroup:
    """A group that this node caught up with, as of the group's change in epoch `changed`."""

    pool: int
    pg: int
    changed: int


class Recovery(Fetching):
    """Catches up with groups, for one node."""

    def __init__(
        self,
        replica: Replica,
        peers: Peers,
        tell_joined: Callable[[list[JoinedGroup]], Awaitable[None]],
    ) -> None:
        super().__init__(replica, peers)
        self._tell_joined = tell_joined
        self._is_wanted = False
        """The map changed since the last round began."""
        self._to_keep: dict[int, int] = {}
        """Fences learned and not durable yet."""
        self._done: list[JoinedGroup] = []
        """Groups that are level and not reported yet."""
        self._unreported_bytes = 0
        self._reported = float("-inf")
        self._reporting = trio.Lock()
        self._busy = 0
        """Objects that are being pulled behind the clients' backs."""
        self._slot_free = trio.Event()
        self.progress = Progress()

    def map_changed(self) -> None:
        """A new map is there: perhaps there is something to join."""
        self._is_wanted = True
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Catch up whenever the map says that this node joins a group."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard)
            nursery.start_soon(self._recover)

    async def _guard(self) -> None:
        """Learn of groups to join who was fenced, as soon as the map names them."""
        while True:
            changed = self._changed
            unguarded = [g for g in self._joining() if not self._replica.is_guarded(*g[:2])]
            await self._learn_fences(unguarded)
            with trio.move_on_after(RETRY_DELAY_S if unguarded else float("inf")):
                await changed.wait()

    async def _recover(self) -> None:
        while True:
            while not self._is_wanted:
                await self._changed.wait()
            self._is_wanted = False
            while not await self._round():
                if not self._is_wanted:
                    with trio.move_on_after(
                        WAITING_RETRY_S if self.progress.waits else RETRY_DELAY_S
                    ):
                        await self._changed.wait()
                self._is_wanted = False

    def _joining(self) -> list[tuple[int, int, PlacementGroup]]:
        node = self._replica.node
        return [
            (copies, number, group)
            for copies, pgs in self._replica.map.pools.items()
            for number, group in enumerate(pgs)
            if node in group.joining
        ]

    async def _round(self) -> bool:
        """Catch up with all groups to join; tells whether nothing is left to do."""
        joining = self._joining()
        self._note(len(joining))
        self.progress.begin([_key(*group) for group in joining], trio.current_time())
        if not joining:
            return True
        await self._in_parallel(self._survey, joining)
        if self._replica.pacer.setting.paused:
            self.progress.waits = PAUSED
            return False
        if self.progress.waits == PAUSED:
            self.progress.waits = ""
        done = set(self._done)
        todo = [group for group in joining if JoinedGroup(*_key(*group)) not in done]
        await self._in_parallel(self._join, todo)
        if (
            len(self._done) >= len(joining)
            or trio.current_time() >= self._reported + REPORT_EVERY_S
        ):
            await self._report()
        # Not finished until the leader's next map says so.
        return False

    def _note(self, groups: int) -> None:
        """Say when catching up begins, and what it took when it ends."""
        progress, now = self.progress, trio.current_time()
        if groups and not progress.since:
            log.info("catching up begins", extra=fields(event="recovery-begun", groups=groups))
        elif progress.since and not groups:
            took = {"seconds": round(now - progress.since, 1)}
            took |= {"objects": progress.objects, "bytes": progress.bytes}
            log.info("catching up has ended", extra=fields(event="recovery-ended", **took))

    async def _in_parallel(
        self,
        work: Callable[[int, int, PlacementGroup], Awaitable[None]],
        groups: list[tuple[int, int, PlacementGroup]],
    ) -> None:
        """Do what can be done with each group; what clients write to comes first."""
        waiting = {(copies, number): (copies, number, group) for copies, number, group in groups}

        async def worker() -> None:
            while waiting:
                urgent = max(waiting, key=lambda at: len(self._replica.level_of(*at).missed))
                copies, number, group = waiting.pop(urgent)
                if not self._is_current(copies, number, group.changed):
                    continue
                try:
                    await work(copies, number, group)
                except SheepError as error:
                    log.debug("group %d of pool %d must wait: %s", number, copies, error)

        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL_GROUPS):
                nursery.start_soon(worker)

    def _is_current(self, copies: int, number: int, changed: int) -> bool:
        group = self._replica.map.pools[copies][number]
        return group.changed == changed and self._replica.node in group.joining

    async def _survey(self, copies: int, number: int, group: PlacementGroup) -> None:
        """Find out how much there is to do, for who asks how long it takes."""
        key = _key(copies, number, group)
        if key in self.progress.unknown():
            sizes, todo = await self._compare(copies, number, group)
            self.progress.found(key, len(todo.pull), sum(sizes.get(oid, 0) for oid in todo.pull))

    async def _join(self, copies: int, number: int, group: PlacementGroup) -> None:
        await self._catch_up(copies, number, group)
        level = self._replica.level_of(copies, number)
        if self._is_current(copies, number, group.changed) and not level.missed:
            level.is_complete = True
            self._done.append(JoinedGroup(copies, number, group.changed))
        if self._unreported_bytes >= REPORT_BYTES:
            await self._report()

    async def _report(self) -> None:
        """Make what was copied durable, then tell the leader of the groups that are level."""
        async with self._reporting:
            done, self._done = self._done, []
            self._unreported_bytes = 0
            self._reported = trio.current_time()
            if not done:
                return
            keep, self._to_keep = self._to_keep, {}
            try:
                await self._replica.keep_tokens(keep)
            except NoSpaceError as error:
                log.error("cannot join: %s", error)
                self._to_keep = {**keep, **self._to_keep}
                return
            await self._replica.flush_store(None)
            await self._tell_joined(done)

    async def _learn_fences(self, joining: list[tuple[int, int, PlacementGroup]]) -> None:
        """Before any change: a holder fenced while this node was away may still be writing (I6).

        The source must know the epoch in which this node joins: whoever attaches after its
        answer fences this node itself.
        """
        sources: dict[int, list[tuple[int, int, PlacementGroup]]] = {}
        for copies, number, group in joining:
            with suppress(UnreachableError):
                node = self._source(number, group).node
                sources.setdefault(node, []).append((copies, number, group))
        epoch = self._replica.map.epoch
        for node, groups in sources.items():
            link = self._peers.link(node)
            if link is None:
                continue
            try:
                known = await link.call_json(Op.LIST, epoch=epoch, timeout_s=PULL_TIMEOUT_S)
                tokens = {int(vdi): int(token) for vdi, token in known.items()}
            except (SheepError, AttributeError, TypeError, ValueError) as error:
                log.info("node %d does not tell its fences: %s", node, error)
                continue
            self._to_keep.update(self._replica.learn_tokens(tokens))
            for copies, number, group in groups:
                self._replica.guard(copies, number, group.changed)

    async def _compare(
        self, copies: int, number: int, group: PlacementGroup
    ) -> tuple[dict[int, int], Plan]:
        """Ask a sync member what it has; give the sizes of that, and what is to be done."""
        if not self._replica.is_guarded(copies, number):
            raise RecoveringError("the fences are not known yet")
        source = self._source(number, group)
        rows = await source.call_json(
            Op.LIST,
            pool=copies,
            pg=number,
            epoch=self._replica.map.epoch,
            timeout_s=PULL_TIMEOUT_S,
        )
        try:
            theirs = [Listed(int(o), int(v), int(li), bool(s)) for o, v, li, s, *_ in rows]
            sizes = {int(row[0]): int(row[4]) for row in rows}
        except (TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"node {source.node} sent a bad list: {error}") from error
        store = self._replica.store
        ours = store.list(copies, number, len(self._replica.map.pools[copies]))
        level = self._replica.level_of(copies, number)
        return sizes, plan(ours, theirs, level.fresh, level.missed)

    async def _catch_up(self, copies: int, number: int, group: PlacementGroup) -> None:
        sizes, todo = await self._compare(copies, number, group)
        if not self._is_current(copies, number, group.changed):
            raise RecoveringError("the group changed meanwhile")
        level = self._replica.level_of(copies, number)
        level.fresh.update(todo.equal)
        key = _key(copies, number, group)
        self.progress.found(key, len(todo.pull), sum(sizes.get(oid, 0) for oid in todo.pull))
        for wave in waves(todo.pull, level.missed):
            await self._pull_all(wave, sizes, key, level)
            if level.fresh.isdisjoint(wave):
                break  # The source went away: do not wait for each of its objects in turn.
        if missing := [oid for oid in todo.pull if oid not in level.fresh] or [*level.missed]:
            raise RecoveringError(f"{len(missing)} objects could not be pulled yet")
        store = self._replica.store
        for oid in todo.strays:
            if oid not in level.fresh and not self._replica.is_held(oid):
                await self._replica.free(oid)
            if oid not in level.fresh and not self._replica.is_held(oid):
                store.quarantine(oid)
                log.info("%s: no sync member has it; quarantined", describe_oid(oid))

    async def _pull_all(
        self, wave: list[int], sizes: dict[int, int], key: Group, level: Level
    ) -> None:
        """Pull objects, as many at once as may be, until one shows that it is of no use."""
        for first in range(0, len(wave), MARK_AT_ONCE):
            oids = wave[first : first + MARK_AT_ONCE]
            to_mark = [oid for oid in oids if not self._replica.store.is_marked(oid)]
            if to_mark:
                await trio.to_thread.run_sync(self._replica.store.mark, to_mark)
            async with trio.open_nursery() as nursery:
                for oid in oids:
                    if self._replica.pacer.setting.paused or not self._has_room(sizes.get(oid, 0)):
                        return
                    while self._busy >= self._replica.pacer.setting.parallel:
                        await self._slot_free.wait()
                    self._busy += 1
                    nursery.start_soon(self._pull_one, oid, sizes.get(oid, 0), key, level)

    async def _pull_one(self, oid: int, size_bytes: int, key: Group, level: Level) -> None:
        """Pull an object, unless a client's change has been faster."""
        counters = self._replica.counters
        before = counters.pulled_bytes
        try:
            while oid not in level.fresh and self._is_current(*key):
                if await self._pulled(oid, key):
                    self._unreported_bytes += counters.pulled_bytes - before
        except ObjectNotFoundError:
            log.debug("%s: is not there any more", describe_oid(oid))
        except SheepError as error:
            log.debug("%s: cannot be pulled yet: %s", describe_oid(oid), error)
        finally:
            if oid in level.fresh:
                moved = counters.pulled_bytes - before
                self.progress.done(key, size_bytes, moved, trio.current_time())
            self._busy -= 1
            self._slot_free.set()
            self._slot_free = trio.Event()

    async def _pulled(self, oid: int, key: Group) -> bool:
        """Try to pull an object; tells whether it was. Raises SheepError if it has to wait."""
        replica, (pool, pg, _) = self._replica, key
        try:
            if await self.fetch(oid, pool, pg):
                return True
        except UnreachableError:
            raise
        except RetryableError as error:
            log.debug("%s: %s", describe_oid(oid), error)
            await trio.sleep(RETRY_DELAY_S)
            return False
        except CorruptError as error:
            log.info("%s: %s; asking the other members", describe_oid(oid), error)
        # Its source is damaged, or it is written to faster than it can be fetched: clients' changes
        # of it must wait a while.
        if oid in replica.fresh_of(pool, pg) or replica.is_held(oid) or not self._is_current(*key):
            await trio.lowlevel.checkpoint()
            return False
        replica.hold(oid)
        try:
            problem = await self._try_to_pull(oid, pool, pg, None, False)
        finally:
            replica.release(oid)
        if problem is not None:
            raise problem
        return True

    def _has_room(self, size_bytes: int) -> bool:
        """Tell whether the disk has room for an object and for what clients write meanwhile."""
        usage = self._replica.store.usage()
        keep = min(ROOM_FOR_CLIENTS, usage.total // 100)
        room = usage.free >= size_bytes + META_SIZE + keep
        if room and self.progress.waits == NO_ROOM:
            self.progress.waits = ""
            log.warning("recovery goes on: there is room on the disk")
        elif not room and self.progress.waits != NO_ROOM:
            self.progress.waits = NO_ROOM
            log.error("recovery waits: %s", NO_ROOM)
        return room


def _key(copies: int, number: int, group: PlacementGroup) -> Group:
    return copies, number, group.changed


def parse_joined(content: object) -> list[JoinedGroup]:
    """Parse a JOINED request's list of [pool, pg, changed] (ProtocolError if it is none)."""
    try:
        return [JoinedGroup(int(p), int(g), int(c)) for p, g, c in content]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"not a list of joined groups: {error}") from error


def encode_joined(node: int, incarnation: int, groups: list[JoinedGroup]) -> bytes:
    """Give the payload of a JOINED request."""
    rows = [[g.pool, g.pg, g.changed] for g in groups]
    return json.dumps({"node": node, "incarnation": incarnation, "groups": rows}).encode()
