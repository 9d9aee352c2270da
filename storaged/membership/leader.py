"""The leader: one daemon of the cluster judges who is there and writes the cluster map.

Always holds:
- Every change of the map is one transaction on condition that the `leader` key and the `map` key
  are as this leader last saw them. A leader that was paused, cut off or replaced changes nothing.
- The leader key hangs on the lease of the daemon's own `alive` key: both end together.
- A leader whose address refuses connections is replaced at once, by compare-and-swap; one that is
  silent, when its lease ends.
- A failure seldom comes alone: before a run is voted out all others are asked, so that runs that
  failed together are judged together. One after the other, the last of them would count as the only
  one that has everything (I8). Who is silent is waited for where a group would be left to it alone.
- After etcd was away for so long that leases may have ended, missing ones prove nothing until each
  daemon had the time to come back with a new one.
- An etcd whose map is older than the one that this daemon serves by is given no other.
- No decision is taken here: `storaged.logic.leader` decides, this is its eyes and hands.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import trio

from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.errors import ProtocolError, SheepError, UnreachableError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import AliveRecord, ClusterConfig, LeaderRecord
from sheepfs.logs import Complaint
from sheepfs.net.store import RETRY_S, LeaseGoneError, Store
from storaged.logic.leader import OUT_AFTER_S, Joined, as_in_map, decide, leaves_doubtful
from storaged.logic.reachability import Outcome, Reachability, Run
from storaged.membership.epochlog import log_changes, log_losses
from storaged.membership.membership import ALIVE_TTL_S, Announcer, refuse_older_map
from storaged.membership.seen import Seen, look
from storaged.recovery.recovery import JoinedGroup

log = logging.getLogger(__name__)

Ping = Callable[[str, int], Awaitable[bool]]
"""(address, incarnation) -> whether that run is there; UnreachableError if it can't be told."""

DECIDE_EVERY_S = 0.5
BATCH_S = 0.01
"""Hints and reports come in bursts: one decision for each burst."""
PING_EVERY_S = 1.0
PING_DEADLINE_S = 1.0
"""A refusal comes at once; longer than this is silence."""
ASK_ALL_S = 0.5
"""So long for all the others to answer, before a run is voted out."""
PARALLEL_PINGS = 64
FOLLOW_PING_S = 0.3
FOLLOW_PINGS_PER_S = 200
"""Of all followers together, so that a large cluster does not drown its leader."""
FOLLOW_POLL_S = 1.0
AWAY_S = ALIVE_TTL_S * 2 / 3
"""Without an answer of etcd for longer, a lease may have ended: it is renewed at a third."""


class Leader:
    """This daemon's part in leading: it follows the leader until it becomes it.

    Args:
        config: the cluster's fixed facts.
        announcer: this daemon's announcement, whose lease the leader key hangs on.
        ping: asks an address for a run (storaged.membership.ping).
        on_map: called with each map that this leader committed or found.
        out_after_s: how long a node may be down before it is given up; asked at each decision.
        served: the epoch that this daemon serves by; an etcd whose map is older went back.
        wall: seconds since 1970, read once; stamps `down_since`.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        config: ClusterConfig,
        announcer: Announcer,
        ping: Ping,
        on_map: Callable[[ClusterMap], None],
        *,
        out_after_s: Callable[[], float] = lambda: OUT_AFTER_S,
        served: Callable[[], int] = lambda: 0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.is_leader = False
        """Whether this daemon leads, as far as it knows."""
        self.known_leader: LeaderRecord | None = None
        """Who leads, as last read."""
        self._store = store
        self._keys = keys
        self._config = config
        self._announcer = announcer
        self._ping = ping
        self._on_map = on_map
        self._out_after_s = out_after_s
        self._served = served
        self._wall = wall
        self._revision = 0
        self._nodes = 0
        self._epoch = 0
        self._grace_until = -1.0
        self._answered = math.inf
        """When etcd answered last."""
        self._complaint = Complaint()
        self._reach = Reachability()
        self._addresses: dict[Run, str] = {}
        self._pinging: set[Run] = set()
        self._ping_limit = trio.CapacityLimiter(PARALLEL_PINGS)
        self._asked_about: frozenset[Run] = frozenset()
        """Runs that are gone, and all others have been asked since."""
        self._joined: dict[Joined, None] = {}
        self._reported: set[Run] = set()
        self._seen = Seen(ClusterMap(0, config.cluster))
        self._at_rest: object = None
        """What was judged last, if nothing was to be changed."""
        self._wake = trio.Event()
        self._urgent = trio.Event()

    def report(self, node: int, incarnation: int) -> None:
        """Take somebody's word that a run cannot be reached; it is pinged at once."""
        self._reported.add((node, incarnation))
        self._urgent.set()

    def joined(self, node: int, incarnation: int, groups: list[JoinedGroup]) -> None:
        """Take a node's report that it has caught up with groups (ignored unless leading)."""
        if self.is_leader:
            for group in groups:
                report = Joined(node, incarnation, group.pool, group.pg, group.changed)
                self._joined[report] = None
            self._wake.set()

    async def run(self) -> None:
        """Follow and lead in turn until cancelled."""
        # One reading of the wall clock, so that its jumps never move a decision (I13).
        self._started_wall = self._wall() - trio.current_time()
        while True:
            await self._follow()
            await self._lead()

    # --- following -----------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Return once this daemon holds the leader key, at `_revision`."""
        async with trio.open_nursery() as nursery:
            self._wake.set()
            nursery.start_soon(self._hint, self._keys.leader, FOLLOW_POLL_S)
            found: KeyValue | None = None
            while True:
                pause_s = max(FOLLOW_PING_S, self._nodes / FOLLOW_PINGS_PER_S)
                try:
                    if self._wake.is_set():
                        self._wake = trio.Event()
                        found = await self._store.get(self._keys.leader)
                        self._note_answer()
                    if await self._try_to_win(found):
                        break
                except UnreachableError as error:
                    self._complain("membership stands still: %s", error)
                    pause_s = RETRY_S
                except ProtocolError as error:
                    self._complain("cannot follow the leader: %s", error)
                with trio.move_on_after(pause_s):
                    await self._wake_or_report()
            nursery.cancel_scope.cancel()

    async def _wake_or_report(self) -> None:
        """Wait for a hint, or for a report about the leader."""
        async with trio.open_nursery() as nursery:

            async def reported() -> None:
                while True:
                    await self._urgent.wait()
                    self._urgent = trio.Event()
                    reports, self._reported = self._reported, set()
                    leader = self.known_leader
                    if leader and (leader.node, leader.incarnation) in reports:
                        nursery.cancel_scope.cancel()

            nursery.start_soon(reported)
            await self._wake.wait()
            nursery.cancel_scope.cancel()

    async def _try_to_win(self, found: KeyValue | None) -> bool:
        me = self._announcer
        self.known_leader = None if found is None else LeaderRecord.decode(found.value)
        leader = self.known_leader
        if not me.lease:
            return False
        if found is None or leader is None:
            return await self._claim(0)
        if leader.node == me.node:
            if leader.incarnation == me.incarnation and found.lease == me.lease:
                # A claim whose reply was lost.
                self._revision = found.mod_revision
                return True
            return await self._claim(found.mod_revision)
        with trio.move_on_after(PING_DEADLINE_S), suppress(UnreachableError):
            if not await self._ping(leader.address, leader.incarnation):
                log.warning("leader %d at %s is gone", leader.node, leader.address)
                if await self._claim(found.mod_revision):
                    now = trio.current_time()
                    self._reach.note((leader.node, leader.incarnation), Outcome.DEAD, now, now)
                    return True
        return False

    async def _claim(self, revision: int) -> bool:
        """Take the leader key if it is still as seen (revision 0: not there)."""
        me = self._announcer
        record = LeaderRecord(me.node, me.incarnation, me.address)
        put = Put(self._keys.leader, record.encode(), me.lease)
        won = None
        with suppress(LeaseGoneError):
            won = await self._store.commit(
                Transaction([Unchanged(self._keys.leader, revision)], [put])
            )
        if won is None:
            self._wake.set()
            await trio.sleep(BATCH_S)
            return False
        self._revision = won
        self.known_leader = record
        return True

    # --- leading -------------------------------------------------------------------------------

    async def _lead(self) -> None:
        """Lead until the leader key is another's."""
        log.info("node %d leads the cluster", self._announcer.node)
        self.is_leader = True
        try:
            async with trio.open_nursery() as nursery:
                for key in (
                    *(self._keys.alive, self._keys.pools, self._keys.leader),
                    *(self._keys.wishes, self._keys.accepted_loss, self._keys.settings),
                ):
                    nursery.start_soon(self._hint, key)
                nursery.start_soon(self._ping_all)
                nursery.start_soon(self._ping_reported)
                while await self._look_and_decide():
                    with trio.move_on_after(DECIDE_EVERY_S):
                        await self._wake.wait()
                        await trio.sleep(BATCH_S)
                nursery.cancel_scope.cancel()
        finally:
            self.is_leader = False
            self._joined.clear()
            self._addresses.clear()
            self._reach = Reachability()
            self._asked_about = frozenset()
        log.warning("node %d leads no longer", self._announcer.node)

    async def _look_and_decide(self) -> bool:
        """Do one round; tells whether this daemon still leads."""
        self._wake = trio.Event()
        served = self._served()
        try:
            seen = await look(self._store, self._keys, self._seen, self._revision, self._complain)
            self._note_answer()
            if seen is None:
                return False
            refuse_older_map(seen.map.epoch, served)
            self._seen = seen
            await self._decide(seen)
        except UnreachableError as error:
            self._complain("membership stands still: %s", error)
        except ProtocolError as error:
            self._complain("cannot lead: %s", error)
        return True

    async def _decide(self, seen: Seen) -> None:
        self._publish(seen.map)
        alive = dict(seen.alive)
        if trio.current_time() < self._grace_until:
            alive = {**as_in_map(seen.map), **alive}
        self._addresses = {
            (record.id, record.incarnation): record.address
            for record in alive.values()
            if record.id != self._announcer.node
        }
        self._reach.forget_all_but(self._addresses)
        voted_out = [
            (node.id, node.incarnation)
            for node in seen.map.nodes.values()
            if node.state is NodeState.DOWN and node.id != self._announcer.node
        ]
        if not await self._ask_all(seen.map, alive):
            self._at_rest = None
            return
        taken = list(self._joined)
        unreachable = self._reach.unreachable(voted_out)
        judged = (seen, alive, unreachable)
        if not taken and judged == self._at_rest:
            return
        following = decide(
            seen.map,
            alive,
            unreachable,
            seen.pools,
            self._config.pg_count,
            taken,
            self._started_wall + trio.current_time(),
            self._out_after_s(),
            seen.wishes,
            seen.accepted,
            seen.patience,
        )
        is_news = following is not None or seen.accepted_revision
        if is_news and not await self._commit(seen, following):
            self._wake.set()  # Look again: who leads, and what is the map?
            return
        # While somebody is down, time alone may change the decision.
        is_all_up = all(node.state is not NodeState.DOWN for node in seen.map.nodes.values())
        self._at_rest = judged if following is None and is_all_up else None
        if following is not None:
            log_changes(seen.map, following)
            log_losses(seen, following)
            self._publish(following)
        for report in taken:
            self._joined.pop(report, None)

    async def _commit(self, seen: Seen, following: ClusterMap | None) -> bool:
        """Put the next map, if there is one, if all is as it was seen; tells whether it was."""
        conditions = [
            Unchanged(self._keys.leader, self._revision),
            Unchanged(self._keys.map, seen.map_revision),
        ]
        changes: list[Put | Delete] = []
        if following is not None:
            changes.append(Put(self._keys.map, following.encoded))
        if seen.accepted_revision:
            # It was acted upon, or came too late: it never counts for another map.
            conditions.append(Unchanged(self._keys.accepted_loss, seen.accepted_revision))
            changes.append(Delete(self._keys.accepted_loss))
        return await self._store.commit(Transaction(conditions, changes)) is not None

    def _publish(self, cluster_map: ClusterMap) -> None:
        self._nodes = len(cluster_map.nodes)
        if cluster_map.epoch > self._epoch:
            self._epoch = cluster_map.epoch
            self._on_map(cluster_map)

    def _note_answer(self) -> None:
        """See whether etcd was away: answers that came late tell of it as errors do."""
        now = trio.current_time()
        if now - self._answered > AWAY_S:
            # Each daemon notices within a call's deadline, and tries again every second.
            self._grace_until = now + ALIVE_TTL_S
        self._answered = now

    def _complain(self, message: str, error: SheepError) -> None:
        """Log what lasts, but not at every round (I12)."""
        if self._complaint.due():
            log.warning(message, error)

    # --- eyes ----------------------------------------------------------------------------------

    async def _hint(self, prefix: str, poll_s: float = 5.0) -> None:
        async with self._store.watch(prefix, poll_s) as hints:
            async for _ in hints:
                self._wake.set()

    async def _ping_all(self) -> None:
        while True:
            next_round = trio.current_time() + (PING_EVERY_S if self._addresses else 0.05)
            async with trio.open_nursery() as nursery:
                for run in self._addresses:
                    nursery.start_soon(self._ping_one, run)
            await trio.sleep_until(next_round)

    async def _ask_all(self, current: ClusterMap, alive: Mapping[int, AliveRecord]) -> bool:
        """If a run of the map is newly gone, ping all others, and wait for that.

        Returns:
            False if one that is silent has to be judged first; that takes some pings more.
        """
        runs = {(record.id, record.incarnation) for record in alive.values()}
        runs -= self._reach.unreachable()
        gone = frozenset(
            (node.id, node.incarnation)
            for node in current.nodes.values()
            if node.state is not NodeState.DOWN and (node.id, node.incarnation) not in runs
        )
        if not gone <= self._asked_about:
            asked = trio.current_time()
            others = self._addresses.keys() - gone
            with trio.move_on_after(ASK_ALL_S):
                async with trio.open_nursery() as nursery:
                    for run in others:
                        nursery.start_soon(self._ping_one, run)
            out = self._reach.unreachable()
            silent = {r for r in others - out if not self._reach.has_answered(r, asked)}
            if leaves_doubtful(current, {n for n, _ in gone | out}, {n for n, _ in silent}):
                return False
        self._asked_about = gone
        return True

    async def _ping_reported(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._urgent.wait()
                self._urgent = trio.Event()
                reports, self._reported = self._reported, set()
                for run in reports & self._addresses.keys():
                    nursery.start_soon(self._ping_one, run)
                await trio.sleep(BATCH_S)

    async def _ping_one(self, run: Run) -> None:
        address = self._addresses.get(run)
        if run in self._pinging or address is None:
            return
        self._pinging.add(run)
        try:
            async with self._ping_limit:
                sent = trio.current_time()
                outcome = Outcome.SILENT
                with trio.move_on_after(PING_DEADLINE_S), suppress(UnreachableError):
                    is_there = await self._ping(address, run[1])
                    outcome = Outcome.ALIVE if is_there else Outcome.DEAD
            if self._reach.note(run, outcome, sent, trio.current_time()):
                log.info("ping: node %d at %s is %s", run[0], address, outcome.value)
                self._wake.set()
        finally:
            self._pinging.discard(run)
