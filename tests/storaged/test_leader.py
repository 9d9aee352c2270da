from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd, FakeServer
from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.errors import UnreachableError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Transaction
from sheepfs.core.metadata import (
    AcceptedLoss,
    ClusterConfig,
    NodeWish,
    Record,
)
from storaged.membership.leader import Leader
from storaged.membership.membership import ALIVE_TTL_S, Announcer
from storaged.recovery.recovery import JoinedGroup

KEYS = Keys("test")
CONFIG = ClusterConfig("c" * 32, pg_count=8)


class Daemon:
    """The part of a storage daemon that is under test, with its own way to etcd."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        self.cluster = cluster
        self.node = node
        self.store = FakeEtcd(cluster.server)
        self.scope = trio.CancelScope()
        self.announcer = Announcer(self.store, KEYS, node, f"host-{node}", f"zone-{node}", 1.0)
        self.maps: list[ClusterMap] = []
        self.leader = Leader(
            self.store,
            KEYS,
            CONFIG,
            self.announcer,
            self.ping,
            self.maps.append,
            wall=lambda: 1e9,
        )
        self.is_silent = False

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.announcer.run)
                nursery.start_soon(self.leader.run)

    async def ping(self, address: str, incarnation: int) -> bool:
        await trio.sleep(0.001)
        return await self.cluster.answer(address, incarnation)

    def kill(self) -> None:
        """Like SIGKILL: the lease lives on, the port refuses."""
        self.scope.cancel()
        if self.cluster.running.get(f"host-{self.node}") is self:
            del self.cluster.running[f"host-{self.node}"]


class Cluster:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.server = FakeServer()
        self.server.commit(Transaction([], [Put(KEYS.config, CONFIG.encode())]))
        self.running: dict[str, Daemon] = {}
        self._nursery = nursery

    def start(self, node: int) -> Daemon:
        daemon = Daemon(self, node)
        self.running[f"host-{node}"] = daemon
        self._nursery.start_soon(daemon.run)
        return daemon

    async def answer(self, address: str, incarnation: int) -> bool:
        daemon = self.running.get(address)
        if daemon is None:
            return False
        if daemon.is_silent:
            await trio.sleep_forever()
        return daemon.announcer.incarnation == incarnation

    @property
    def map(self) -> ClusterMap:
        found = self.server.keys.get(KEYS.map)
        return ClusterMap.decode(found.value) if found else ClusterMap(0, CONFIG.cluster)

    def leaders(self) -> list[Daemon]:
        return [d for d in self.running.values() if d.leader.is_leader]

    def states(self) -> dict[int, NodeState]:
        return {n: node.state for n, node in self.map.nodes.items()}

    async def want_pool(self, copies: int) -> None:
        await self.server.client().commit(Transaction([], [Put(KEYS.pool(copies), b"")]))

    def report_joined(self) -> None:
        """Let every node that runs say that it has caught up with everything it joins."""
        current = self.map
        for daemon in self.running.values():
            groups = [
                JoinedGroup(copies, pg, group.changed)
                for copies, pgs in current.pools.items()
                for pg, group in enumerate(pgs)
                if daemon.node in group.joining
            ]
            for leading in self.leaders():
                leading.leader.joined(daemon.node, daemon.announcer.incarnation, groups)

    async def settle(self, nodes: int) -> None:
        def is_settled() -> bool:
            self.report_joined()
            states = list(self.states().values())
            return states.count(NodeState.ACTIVE) == nodes

        await until(is_settled)


async def until(condition: Callable[[], bool], deadline_s: float = 30.0) -> float:
    """Wait for a condition; gives the seconds that it took."""
    start = trio.current_time()
    with trio.fail_after(deadline_s):
        while not condition():
            await trio.sleep(0.01)
    return trio.current_time() - start


@asynccontextmanager
async def cluster_of(count: int) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        for copies in (2, 3):
            await cluster.want_pool(copies)
        for node in range(1, count + 1):
            cluster.start(node)
        await cluster.settle(count)
        yield cluster
        nursery.cancel_scope.cancel()


def the_leader(cluster: Cluster) -> Daemon:
    (leader,) = cluster.leaders()
    return leader


def a_follower(cluster: Cluster) -> Daemon:
    return next(d for d in cluster.running.values() if not d.leader.is_leader)


async def test_three_daemons_elect_one_leader_and_all_become_sync(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        assert len(cluster.leaders()) == 1
        assert all(set(g.sync) == {1, 2, 3} for g in cluster.map.pools[3])


async def test_every_map_that_is_committed_is_published(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        epochs = [m.epoch for m in the_leader(cluster).maps]
        assert epochs == list(range(1, cluster.map.epoch + 1))


async def test_a_killed_follower_that_is_reported_is_voted_out_at_once(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim = a_follower(cluster)
        victim.kill()
        the_leader(cluster).leader.report(victim.node, victim.announcer.incarnation)
        took = await until(lambda: cluster.states()[victim.node] is NodeState.DOWN)
        assert took < 0.1
        assert all(victim.node not in g.members for g in cluster.map.pools[3])


async def test_a_killed_follower_that_nobody_reports_is_found_by_pings(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim = a_follower(cluster)
        victim.kill()
        assert await until(lambda: cluster.states()[victim.node] is NodeState.DOWN) < 1.2


async def test_a_killed_leader_is_replaced_and_voted_out_well_below_a_second(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim = the_leader(cluster)
        victim.kill()
        assert await until(lambda: cluster.states()[victim.node] is NodeState.DOWN) < 0.5
        assert len(cluster.leaders()) == 1


async def test_a_new_leader_does_not_let_in_again_what_the_old_one_saw_die(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(4) as cluster:
        victim, old = a_follower(cluster), the_leader(cluster)
        victim.kill()
        await until(lambda: cluster.states()[victim.node] is NodeState.DOWN)
        old.kill()
        await until(lambda: cluster.states()[old.node] is NodeState.DOWN)
        new = the_leader(cluster)
        await trio.sleep(3)
        assert all(m.nodes[victim.node].state is NodeState.DOWN for m in new.maps[1:])


async def test_a_new_leader_votes_out_together_who_died_together(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        old = the_leader(cluster)
        dead = next(d for d in cluster.running.values() if d is not old)
        epoch = cluster.map.epoch
        for daemon in (dead, old):
            daemon.kill()
        await until(lambda: list(cluster.states().values()).count(NodeState.DOWN) == 2)
        assert cluster.map.epoch == epoch + 1, "one map for both"


async def test_a_leader_told_of_one_dead_node_finds_the_other(autojump_clock: MockClock) -> None:
    async with cluster_of(4) as cluster:
        leading = the_leader(cluster)
        dead, other = [d for d in cluster.running.values() if d is not leading][:2]
        epoch = cluster.map.epoch
        for daemon in (dead, other):
            daemon.kill()
        leading.leader.report(dead.node, dead.announcer.incarnation)
        await until(lambda: list(cluster.states().values()).count(NodeState.DOWN) == 2)
        assert cluster.map.epoch == epoch + 1, "one map for both"


async def test_who_would_leave_a_group_to_a_silent_node_is_not_voted_out_before_that_one_is_judged(
    autojump_clock: MockClock,
) -> None:
    """A host vanishes, then another daemon's lease ends: together they may be all that has data."""
    async with cluster_of(4) as cluster:
        leading = the_leader(cluster)
        dead, vanished = [d for d in cluster.running.values() if d is not leading][:2]
        before = cluster.map
        rest = {leading.node, *(d.node for d in cluster.running.values())}
        rest -= {dead.node, vanished.node}
        assert not all(rest & set(group.sync) for group in before.pools[2]), "a group of these two"
        vanished.is_silent = True
        vanished.scope.cancel()
        dead.kill()
        await until(lambda: list(cluster.states().values()).count(NodeState.DOWN) == 2)
        assert cluster.map.epoch == before.epoch + 1, "one map for both"
        for old, new in zip(before.pools[2], cluster.map.pools[2], strict=True):
            if set(old.sync) == {dead.node, vanished.node}:
                assert set(new.sync) == set(old.sync)


async def test_a_report_about_a_killed_leader_is_acted_upon_at_once(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim, other = the_leader(cluster), a_follower(cluster)
        victim.kill()
        other.leader.report(victim.node, victim.announcer.incarnation)
        assert await until(lambda: bool(cluster.leaders())) < 0.05


async def test_a_restarted_leader_replaces_its_former_self(autojump_clock: MockClock) -> None:
    async with cluster_of(1) as cluster:
        the_leader(cluster).kill()
        again = cluster.start(1)
        assert await until(lambda: again.leader.is_leader) < 0.5
        await until(lambda: cluster.map.nodes[1].incarnation == again.announcer.incarnation)
        assert all(g.sync == (1,) for g in cluster.map.pools[3])


async def test_a_killed_node_that_starts_again_joins_and_becomes_sync(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim = a_follower(cluster)
        victim.kill()
        cluster.start(victim.node)
        await until(lambda: cluster.states()[victim.node] is NodeState.RECOVERING)
        assert all(victim.node in g.joining for g in cluster.map.pools[3])
        await cluster.settle(3)
        assert all(set(g.sync) == {1, 2, 3} for g in cluster.map.pools[3])


async def test_a_clean_stop_is_seen_without_any_ping(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        leaving = a_follower(cluster)
        await leaving.announcer.withdraw()
        assert await until(lambda: cluster.states()[leaving.node] is NodeState.DOWN) < 0.1


async def test_a_wrong_report_votes_nobody_out(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        epoch = cluster.map.epoch
        for _ in range(20):
            for node, daemon in enumerate(cluster.running.values(), 1):
                the_leader(cluster).leader.report(node, daemon.announcer.incarnation)
            await trio.sleep(0.2)
        assert cluster.map.epoch == epoch


async def test_a_short_silence_is_forgiven_and_a_long_one_is_not(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        quiet, epoch = a_follower(cluster), cluster.map.epoch
        quiet.is_silent = True
        await trio.sleep(2.0)
        quiet.is_silent = False
        await trio.sleep(5.0)
        assert cluster.map.epoch == epoch
        quiet.is_silent = True
        assert await until(lambda: cluster.states()[quiet.node] is NodeState.DOWN) < 6
        quiet.is_silent = False
        await cluster.settle(3)


async def test_a_host_that_vanishes_is_voted_out_within_six_seconds(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        victim = the_leader(cluster)
        victim.is_silent = True
        victim.store.partition(silent=True)
        assert await until(lambda: cluster.states()[victim.node] is NodeState.DOWN) < 6


async def test_a_leader_cut_off_from_etcd_changes_nothing_when_it_is_back(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        old = the_leader(cluster)
        old.store.partition()
        await until(lambda: any(d is not old for d in cluster.leaders()))
        await until(lambda: cluster.states()[old.node] is NodeState.DOWN)
        epoch = cluster.map.epoch
        seen = len(old.maps)
        old.leader.report(1, 1)
        old.leader.joined(old.node, old.announcer.incarnation, [])
        await trio.sleep(2)
        assert (cluster.map.epoch, len(old.maps)) == (epoch, seen)
        old.store.heal()
        await until(lambda: len(cluster.leaders()) == 1)
        assert not old.leader.is_leader
        await cluster.settle(3)


async def test_a_decision_of_a_leader_that_was_replaced_meanwhile_is_not_committed(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(2) as cluster:
        old = the_leader(cluster)
        epoch = cluster.map.epoch
        commit = old.store.commit

        async def pause_then_commit(txn: Transaction) -> int | None:
            # As if the process were stopped between its decision and the transaction.
            usurper = Put(KEYS.leader, cluster.server.keys[KEYS.leader].value, 0)
            await cluster.server.client().commit(Transaction([], [usurper]))
            return await commit(txn)

        old.store.commit = pause_then_commit  # type: ignore[method-assign]
        cluster.start(3)
        await until(lambda: not old.leader.is_leader)
        assert cluster.map.epoch == epoch


async def test_after_an_outage_of_etcd_that_outlasts_all_leases_nothing_changes(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        before = cluster.map
        daemons = list(cluster.running.values())
        for daemon in daemons:
            daemon.store.partition()
        await trio.sleep(20)
        assert not [k for k in cluster.server.keys if k.startswith(KEYS.alive)]
        for delay_s, daemon in enumerate(daemons):
            daemon.store.heal()
            await trio.sleep(delay_s)
        await trio.sleep(20)
        assert len(cluster.leaders()) == 1
        assert cluster.map == before


async def test_no_map_is_made_in_an_etcd_that_has_lost_the_cluster(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        everything = [Delete(key) for key in cluster.server.keys]
        await cluster.server.client().commit(Transaction([], everything))
        await cluster.want_pool(3)
        await until(lambda: len(cluster.leaders()) == 1 and KEYS.leader in cluster.server.keys)
        await trio.sleep(20)
        assert KEYS.map not in cluster.server.keys


async def test_an_outage_of_etcd_that_ends_before_a_call_fails_changes_nothing_either(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        before = cluster.map
        answers_at = trio.current_time() + ALIVE_TTL_S + 0.5
        for delay_s, daemon in enumerate(cluster.running.values()):
            for name in ("get", "list", "commit", "grant", "keep_alive"):
                call, at = getattr(daemon.store, name), answers_at + delay_s

                async def late(*arguments: object, call: Any = call, at: float = at) -> object:
                    await trio.sleep_until(at)
                    return await call(*arguments)

                setattr(daemon.store, name, late)
        await trio.sleep(20)
        assert len(cluster.leaders()) == 1
        assert cluster.map == before


async def test_a_commit_whose_reply_was_lost_is_found_and_published(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(2) as cluster:
        leading = the_leader(cluster)
        leading.store.lose_next_reply()
        cluster.start(3)
        await until(lambda: 3 in cluster.map.nodes)
        await until(lambda: leading.maps[-1].epoch == cluster.map.epoch)
        assert leading.leader.is_leader


async def test_bad_records_in_etcd_stop_nobody(autojump_clock: MockClock) -> None:
    async with cluster_of(2) as cluster:
        bad = [Put(KEYS.alive + "9", b"garbage"), Put(KEYS.pools + "many", b"")]
        await cluster.server.client().commit(Transaction([], bad))
        cluster.start(3)
        await cluster.settle(3)


async def test_a_ping_that_proves_nothing_counts_as_silence(autojump_clock: MockClock) -> None:
    async with cluster_of(2) as cluster:
        leading = the_leader(cluster)
        epoch = cluster.map.epoch

        async def no_route(address: str, incarnation: int) -> bool:
            raise UnreachableError("no route to host")

        leading.leader._ping = no_route
        await trio.sleep(2)
        assert cluster.map.epoch == epoch
        await until(lambda: cluster.map.epoch > epoch)


# --- what operators want -------------------------------------------------------------------------


async def put(cluster: Cluster, key: str, record: Record) -> None:
    await cluster.server.client().commit(Transaction([], [Put(key, record.encode())]))


def named(cluster: Cluster, node: int) -> bool:
    groups = [g for groups in cluster.map.pools.values() for g in groups]
    return any(node in (*g.members, *g.away) for g in groups)


async def test_a_node_is_drained_and_removed_by_wishes_in_etcd(autojump_clock: MockClock) -> None:
    async with cluster_of(4) as cluster:
        leaving = a_follower(cluster)

        def is_empty() -> bool:
            cluster.report_joined()
            return not named(cluster, leaving.node)

        await put(cluster, KEYS.wish(leaving.node), NodeWish(leaving.node, draining=True))
        await until(is_empty)
        assert cluster.states()[leaving.node] is NodeState.DRAINING
        await put(cluster, KEYS.wish(leaving.node), NodeWish(leaving.node, removed=True))
        await until(lambda: leaving.node not in cluster.map.nodes)
        # Its daemon still runs, and is not let in again; nor by another leader.
        await trio.sleep(10)
        the_leader(cluster).kill()
        await trio.sleep(10)
        assert leaving.node not in cluster.map.nodes


async def test_a_wish_for_a_node_that_is_down_is_followed(autojump_clock: MockClock) -> None:
    async with cluster_of(4) as cluster:
        victim = a_follower(cluster)
        victim.kill()
        await until(lambda: cluster.states()[victim.node] is NodeState.DOWN)
        await put(cluster, KEYS.wish(victim.node), NodeWish(victim.node, removed=True))
        await until(lambda: victim.node not in cluster.map.nodes)
        await cluster.settle(3)
        assert all(len(g.sync) == 3 for g in cluster.map.pools[3])


async def test_a_leader_can_remove_itself(autojump_clock: MockClock) -> None:
    async with cluster_of(4) as cluster:
        old = the_leader(cluster)
        await put(cluster, KEYS.wish(old.node), NodeWish(old.node, draining=True))

        def is_empty() -> bool:
            cluster.report_joined()
            return not named(cluster, old.node)

        await until(is_empty)
        await put(cluster, KEYS.wish(old.node), NodeWish(old.node, removed=True))
        await until(lambda: old.node not in cluster.map.nodes)
        old.kill()
        await until(lambda: bool(cluster.leaders()))
        cluster.start(5)
        await cluster.settle(4)


async def test_a_wish_that_cannot_be_read_stops_nobody(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        bad = [Put(KEYS.wish(2), b"garbage"), Put(KEYS.accepted_loss, b"garbage")]
        await cluster.server.client().commit(Transaction([], bad))
        cluster.start(4)
        await cluster.settle(4)


async def lose_all_members(cluster: Cluster) -> int:
    """Kill all but one node, one after the other; gives the one that is left: it has nothing."""
    first, *others = list(cluster.running.values())[:3]
    for daemon in (*others, first):
        daemon.kill()
        await until(lambda daemon=daemon: cluster.states()[daemon.node] is NodeState.DOWN)  # type: ignore[misc]
    return next(iter(cluster.running.values())).node


def word(cluster: Cluster, node: int, epoch: int | None = None) -> AcceptedLoss:
    run = next(d for d in cluster.running.values() if d.node == node).announcer.incarnation
    waiting = {
        (copies, pg): (node, run)
        for copies, groups in cluster.map.pools.items()
        for pg, group in enumerate(groups)
        if node not in group.sync
    }
    return AcceptedLoss.of(cluster.map.epoch if epoch is None else epoch, waiting)


async def test_groups_go_on_by_an_operators_word_and_the_word_is_gone(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(4) as cluster:
        node = await lose_all_members(cluster)
        before = cluster.map
        assert any(node not in g.sync for g in before.pools[3])
        await put(cluster, KEYS.accepted_loss, word(cluster, node))
        await until(lambda: KEYS.accepted_loss not in cluster.server.keys)
        for old, new in zip(before.pools[3], cluster.map.pools[3], strict=True):
            assert new.sync == (node,)
            assert new.changed > old.changed or node in old.sync
        # The others come back: they join, whatever they have.
        for other in {1, 2, 3, 4} - {node}:
            cluster.start(other)
        await until(lambda: list(cluster.states().values()).count(NodeState.DOWN) == 0)
        assert all(g.sync == (node,) for g in cluster.map.pools[3])


async def test_a_word_given_on_an_older_map_does_nothing(autojump_clock: MockClock) -> None:
    async with cluster_of(4) as cluster:
        node = await lose_all_members(cluster)
        before = cluster.map
        changed = min(g.changed for g in before.pools[3] if node not in g.sync)
        await put(cluster, KEYS.accepted_loss, word(cluster, node, changed - 1))
        await until(lambda: KEYS.accepted_loss not in cluster.server.keys)
        await trio.sleep(3)
        assert [g.sync for g in cluster.map.pools[3]] == [g.sync for g in before.pools[3]]


async def test_a_word_does_nothing_once_a_node_with_the_data_is_back(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(4) as cluster:
        node = await lose_all_members(cluster)
        given = word(cluster, node)
        holders = {n for g in cluster.map.pools[3] for n in g.sync} - {node}
        for holder in holders:
            cluster.start(holder)
        await until(lambda: all(cluster.states()[n] is not NodeState.DOWN for n in holders))
        before = [g.sync for g in cluster.map.pools[3]]
        await put(cluster, KEYS.accepted_loss, given)
        await until(lambda: KEYS.accepted_loss not in cluster.server.keys)
        assert [g.sync for g in cluster.map.pools[3]] == before


# --- a leader that is paused ---------------------------------------------------------------------


class Pause:
    """Stops a leader's process at its next commit, and lets it go on when told."""

    def __init__(self, daemon: Daemon) -> None:
        self.began = trio.Event()
        self.over = trio.Event()
        self.outcome: list[int | None] = []
        self._commit = daemon.store.commit
        self._keep_alive = daemon.store.keep_alive
        self._daemon = daemon
        daemon.store.commit = self._paused  # type: ignore[method-assign]
        daemon.store.keep_alive = self._renew  # type: ignore[method-assign]

    async def _renew(self, lease: int) -> bool:
        if self.began.is_set():
            await self.over.wait()
        return await self._keep_alive(lease)

    async def _paused(self, txn: Transaction) -> int | None:
        self._daemon.is_silent = True
        self.began.set()
        await self.over.wait()
        self._daemon.is_silent = False
        self._daemon.store.commit = self._commit  # type: ignore[method-assign]
        self.outcome.append(await self._commit(txn))
        return self.outcome[-1]


async def test_a_leader_that_is_paused_finds_itself_replaced_and_does_no_harm(
    autojump_clock: MockClock,
) -> None:
    async with cluster_of(3) as cluster:
        old = the_leader(cluster)
        pause = Pause(old)
        cluster.start(4)
        await pause.began.wait()
        await until(lambda: any(d is not old for d in cluster.leaders()))
        new = next(d for d in cluster.leaders() if d is not old)
        await until(lambda: cluster.states()[old.node] is NodeState.DOWN)
        await until(lambda: 4 in cluster.map.nodes)
        before, published = cluster.map, len(old.maps)
        # It wakes, as sure as ever that it leads, with reports and a decision in its hands.
        assert old.leader.is_leader
        group = JoinedGroup(3, 0, before.pools[3][0].changed)
        old.leader.joined(4, 1, [group])
        old.leader.report(new.node, new.announcer.incarnation)
        pause.over.set()
        await until(lambda: not old.leader.is_leader)
        assert pause.outcome == [None]
        committed = {m.epoch: m for daemon in cluster.running.values() for m in daemon.maps}
        for late in old.maps[published:]:
            assert late == committed[late.epoch]
            assert late.epoch >= before.epoch
        assert cluster.leaders() == [new]
        await cluster.settle(4)


async def test_a_claim_whose_reply_was_lost_makes_one_leader(autojump_clock: MockClock) -> None:
    async with cluster_of(3) as cluster:
        for daemon in cluster.running.values():
            if not daemon.leader.is_leader:
                daemon.store.lose_next_reply()
        the_leader(cluster).kill()
        await until(lambda: len(cluster.leaders()) == 1)
        await trio.sleep(5)
        assert len(cluster.leaders()) == 1
        await until(lambda: list(cluster.states().values()).count(NodeState.DOWN) == 1)


async def test_reports_that_a_replaced_leader_took_are_given_to_the_new_one(
    autojump_clock: MockClock,
) -> None:
    """Who catches up says so again until the map shows it."""
    async with cluster_of(3) as cluster:
        old = the_leader(cluster)
        old.store.partition()
        await until(lambda: any(d is not old for d in cluster.leaders()))
        cluster.start(4)
        await until(lambda: 4 in cluster.map.nodes)
        old.store.heal()
        await cluster.settle(4)
        assert all(not g.joining for g in cluster.map.pools[3])
