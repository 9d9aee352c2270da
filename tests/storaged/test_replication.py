"""Replicated changes through real daemons' insides: what every member must have, and when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fakes.static_cluster import StaticCluster, static_cluster
from fakes.waiting import wait_until
from sheepfs.callbacks import OperationError, completion
from sheepfs.core.errors import FencedError, RecoveringError, StaleObjectError
from sheepfs.core.geometry import OBJECT_SIZE, data_object, make_layer, pg_of
from sheepfs.core.metadata import RecoveryRecord
from sheepfs.core.wire import FLAG_CREATE, Op
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.router import Router
from sheepfs.replication.objects import ObjectReader
from sheepfs.replication.replicator import Replicator
from storaged.recovery.pacing import PIECE

VDI, LAYER = 2, make_layer(2, 2, 3)
OID = data_object(LAYER, 0)
BLOCK = 4096
OIDS = [data_object(LAYER, index) for index in range(12)]


class Holder:
    """A holder of one VDI, as Volume would be."""

    def __init__(self, router: Router, nursery: trio.Nursery, token: int) -> None:
        self.replicator = Replicator(router, nursery, VDI, token, generation=token)
        self.reader = ObjectReader(router, VDI)
        self.reader.token = token
        nursery.start_soon(self.replicator.run)

    async def create(self, oid: int, data: bytes, offset: int = 0) -> None:
        state = self.replicator.state(oid)
        state.ready = True
        await self._change(oid, offset, data, FLAG_CREATE)

    async def write(self, oid: int, data: bytes, offset: int = 0) -> None:
        await self._change(oid, offset, data, 0)

    async def _change(self, oid: int, offset: int, data: bytes, flags: int) -> None:
        state = self.replicator.state(oid)
        with trio.fail_after(10):
            await completion(
                lambda done: self.replicator.change(
                    state, Op.WRITE, offset, len(data), data, done, flags
                )
            )

    async def read(self, oid: int, offset: int = 0, length: int = BLOCK) -> bytes:
        with trio.fail_after(10):
            return await self.reader.fetch(oid, offset, length)

    async def flush(self) -> None:
        with trio.fail_after(10):
            await self.replicator.unflushed.make_durable()


@asynccontextmanager
async def holding(
    path: Path, token: int = 1
) -> AsyncIterator[tuple[StaticCluster, Router, Holder]]:
    async with static_cluster(path) as (cluster, router), trio.open_nursery() as nursery:
        yield cluster, router, Holder(router, nursery, token)
        nursery.cancel_scope.cancel()


def on_disk(cluster: StaticCluster, node: int, oid: int = OID, length: int = BLOCK) -> bytes:
    found = cluster.nodes[node].store.read(oid, 0, length, wait=True)
    return b"".join(found) if isinstance(found, list) else bytes(found or b"")


async def test_a_write_is_on_every_member_when_it_is_acknowledged(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        await holder.create(OID, b"a" * BLOCK)
        assert [on_disk(cluster, n) for n in (1, 2, 3)] == [b"a" * BLOCK] * 3


async def test_writes_pipeline_in_order(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        await holder.create(OID, b"0" * BLOCK)
        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(holder.write, OID, bytes([i]) * BLOCK)
        assert len({on_disk(cluster, n) for n in (1, 2, 3)}) == 1


async def test_a_dead_member_stalls_writes_until_a_new_epoch(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        cluster.nodes[3].stop()
        done = trio.Event()

        async def write() -> None:
            await holder.write(OID, b"b" * BLOCK)
            done.set()

        nursery.start_soon(write)
        await wait_until(lambda: on_disk(cluster, 1) == b"b" * BLOCK)
        assert not done.is_set()
        cluster.publish([1, 2])
        with trio.fail_after(5):
            await done.wait()


async def test_a_returning_member_catches_up_and_has_later_writes(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        for i in range(8):
            await holder.create(data_object(LAYER, i), bytes([i]) * BLOCK)
        await holder.flush()
        cluster.nodes[3].clean = False
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        for i in range(8):
            await holder.write(data_object(LAYER, i), bytes([i + 100]) * BLOCK)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await holder.write(OID, b"z" * BLOCK, offset=BLOCK)
        await wait_until(lambda: all(3 in g.sync for g in cluster.map.pools[3]))
        for i in range(8):
            oid = data_object(LAYER, i)
            copies = {on_disk(cluster, n, oid, 2 * BLOCK) for n in (1, 2, 3)}
            assert len(copies) == 1
        assert on_disk(cluster, 3) == bytes([100]) * BLOCK


async def test_objects_deleted_while_a_member_was_away_are_quarantined(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder):
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        await wait_until(lambda: router.map.epoch == cluster.map.epoch)
        version = holder.replicator.state(OID).version
        for node in (1, 2):
            link = router.link(node)
            assert link is not None
            fields = holder.replicator.fields(OID)
            await link.call(Op.DELETE, b"", prev=version, version=version + 1, **fields)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await wait_until(lambda: all(3 in g.sync for g in cluster.map.pools[3]))
        assert cluster.nodes[3].store.get(OID) is None
        assert cluster.nodes[3].store.usage().quarantined == 1


async def test_a_fenced_holder_can_neither_write_nor_read_nor_flush(tmp_path: Path) -> None:
    async with holding(tmp_path) as (_, router, holder):
        await holder.create(OID, b"a" * BLOCK)
        await fence_everywhere(router, VDI, 5)
        with pytest.raises(FencedError):
            await holder.read(OID)
        with pytest.raises(FencedError):
            await holder.flush()
        with pytest.raises(OperationError):
            await holder.write(OID, b"b" * BLOCK)


async def test_a_fence_survives_a_crash_of_the_node(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder):
        await fence_everywhere(router, VDI, 5)
        cluster.nodes[1].clean = False
        for node in (1, 2, 3):
            cluster.nodes[node].stop()
        await wait_until(lambda: not router.links)
        for node in (1, 2, 3):
            await cluster.nodes[node].start()
        cluster.publish([1, 2, 3])
        await wait_until(lambda: len(router.links) == 3)
        with pytest.raises(OperationError):
            await holder.create(OID, b"b" * BLOCK)


async def test_what_a_hung_member_was_asked_goes_to_the_others_once_it_is_voted_out(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, _, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        for op in (Op.READ, Op.WRITE, Op.FLUSH):
            cluster.nodes[3].server.handlers[op] = lambda client, header, payload: None
        found: list[bytes] = []
        for _ in cluster.nodes:  # Reads go round.
            holder.reader.read(
                OID, 0, BLOCK,
                lambda _, buffers: found.append(b"".join(buffers)),
                lambda work, _: nursery.start_soon(work),
            )  # fmt: skip
        await wait_until(lambda: len(found) == 2)
        nursery.start_soon(holder.flush)
        nursery.start_soon(holder.write, OID, b"b" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        cluster.publish([1, 2])
        await wait_until(lambda: len(found) == 3)
        # What still waits has a deadline.
    assert set(found) <= {b"a" * BLOCK, b"b" * BLOCK}


async def test_a_take_over_waits_for_the_last_members_of_a_group_though_they_are_down(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, router, _), trio.open_nursery() as nursery:
        for node in (1, 2, 3):
            cluster.nodes[node].stop()
        await wait_until(lambda: not router.links)
        cluster.publish([1, 2, 3], vanished=True)
        router.take_map(cluster.map)
        fenced = trio.Event()

        async def take_over() -> None:
            await fence_everywhere(router, VDI, 5)
            fenced.set()

        nursery.start_soon(take_over)
        await trio.testing.wait_all_tasks_blocked()
        assert not fenced.is_set()
        # Node 1 has nobody to learn from: what it is not told now, it would never know.
        await cluster.nodes[1].start()
        cluster.publish([1])
        router.take_map(cluster.map)
        with trio.fail_after(10):
            await fenced.wait()
        assert cluster.nodes[1].replica.tokens[VDI] == 5


async def test_replicas_that_differ_are_levelled_before_the_next_holder_reads(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, router, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        # The former holder died when only node 2 had its last write.
        store = cluster.nodes[2].store
        store.write(OID, 0, b"b" * BLOCK, holder.replicator.state(OID).version + 1)
        await fence_everywhere(router, VDI, 2)
        second = Holder(router, nursery, 2)
        with trio.fail_after(10):
            await second.replicator.open(second.replicator.state(OID))
        assert {on_disk(cluster, n) for n in (1, 2, 3)} == {b"b" * BLOCK}
        await second.write(OID, b"c" * BLOCK)
        assert {on_disk(cluster, n) for n in (1, 2, 3)} == {b"c" * BLOCK}
        nursery.cancel_scope.cancel()


async def test_a_write_on_an_older_version_is_refused_with_the_one_that_is_there(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (_, router, holder):
        await holder.create(OID, b"a" * BLOCK)
        link = router.link(1)
        assert link is not None
        fields = holder.replicator.fields(OID)
        with pytest.raises(StaleObjectError) as caught:
            await link.call(Op.WRITE, b"x" * BLOCK, span=BLOCK, prev=3, version=1 << 60, **fields)
        assert caught.value.version == holder.replicator.state(OID).version


async def test_a_change_of_what_is_there_is_carried_out_whatever_its_number(tmp_path: Path) -> None:
    """Also where it is not marked as dirty any more, and only the longer way finds that."""
    async with (
        holding(tmp_path, token=5) as (cluster, router, first),
        trio.open_nursery() as nursery,
    ):
        await first.create(OID, b"a" * BLOCK)
        await first.flush()
        for node in cluster.nodes.values():
            for _ in range(2):
                node.store.trim_marks()
            assert not node.store.is_marked(OID)
        second = Holder(router, nursery, 6)
        second.replicator = Replicator(router, nursery, VDI, 6, generation=1)
        await second.write(OID, b"b" * BLOCK)
        assert [on_disk(cluster, n) for n in (1, 2, 3)] == [b"b" * BLOCK] * 3
        nursery.cancel_scope.cancel()


async def test_a_bad_block_is_read_from_a_peer_and_repaired(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        path = next(cluster.nodes[1].path.glob(f"objects/*/*/{OID:016x}"))
        with path.open("r+b") as file:
            file.write(b"X")
        for _ in range(6):
            assert await holder.read(OID) == b"a" * BLOCK
        counters = cluster.nodes[1].replica.counters
        await wait_until(lambda: counters.repaired_blocks == 1)

        def is_good() -> bool:
            # Each of the readers asked for a repair: another one may be under way.
            with suppress(RecoveringError):
                return on_disk(cluster, 1) == b"a" * BLOCK
            return False

        await wait_until(is_good)
        assert counters.corrupt_blocks == 1


async def test_when_all_members_were_killed_the_last_one_is_the_truth(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        for node in cluster.nodes.values():
            node.clean = False
            node.stop()
        await wait_until(lambda: not router.links)
        for node in cluster.nodes.values():
            await node.start()
        cluster.publish([3], [1, 2])
        await fence_everywhere(router, VDI, 2)
        second = Holder(router, nursery, 2)
        assert await second.read(OID) == b"a" * BLOCK
        await wait_until(lambda: all(len(g.sync) == 3 for g in cluster.map.pools[3]))
        assert len({on_disk(cluster, n) for n in (1, 2, 3)}) == 1
        nursery.cancel_scope.cancel()


async def test_a_delete_of_another_version_than_is_there_deletes_nothing(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        await fence_everywhere(router, VDI, 2)
        second = Holder(router, nursery, 2)
        state = second.replicator.state(OID)
        state.version, state.ready = 5, True
        with trio.fail_after(10), pytest.raises(OperationError, match="ESTALE"):
            await completion(
                lambda done: second.replicator.change(state, Op.DELETE, 0, 0, b"", done)
            )
        assert {on_disk(cluster, n) for n in (1, 2, 3)} == {b"a" * BLOCK}
        nursery.cancel_scope.cancel()


async def test_a_suspect_is_resolved_by_whoever_asks_anything_of_it(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        for node in cluster.nodes.values():
            node.clean = False
            node.stop()
        await wait_until(lambda: not router.links)
        for node in cluster.nodes.values():
            await node.start()
        cluster.auto_join = False
        cluster.publish([3], [1, 2])
        second = Holder(router, nursery, 2)
        with trio.fail_after(10):
            extents = await second.reader.extents(OID)
        assert int.from_bytes(extents, "little") == 1
        nursery.cancel_scope.cancel()


async def test_of_a_node_that_was_away_only_the_changed_blocks_of_changed_objects_move(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        for oid in OIDS:
            await holder.create(oid, b"a" * 8 * BLOCK)
        await holder.flush()
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        for oid in OIDS[3:7]:
            await holder.write(oid, b"b" * 2 * BLOCK, offset=BLOCK)
        await holder.create(data_object(LAYER, 50), b"new" * BLOCK)
        await holder.flush()
        await cluster.nodes[3].start()
        counters = cluster.nodes[3].replica.counters
        cluster.publish([1, 2], [3])
        await wait_until(lambda: all(g.sync == (1, 2, 3) for g in cluster.map.pools[3]))
        assert counters.pulled_objects == 4 + 1
        assert counters.pulled_bytes == (4 * 2 + 3) * BLOCK
        for oid in OIDS:
            assert on_disk(cluster, 3, oid, 8 * BLOCK) == on_disk(cluster, 1, oid, 8 * BLOCK)


async def test_whoever_has_told_that_it_caught_up_misses_no_change_that_is_under_way(
    tmp_path: Path,
) -> None:
    """The change comes to the joining node first, and to the others when it has caught up."""
    async with holding(tmp_path) as (cluster, router, holder), trio.open_nursery() as nursery:
        cluster.auto_join = False
        await holder.create(OID, b"a" * BLOCK)
        await holder.flush()
        node = cluster.nodes[3]
        node.stop()
        cluster.publish([1, 2])
        setting = RecoveryRecord(paused=True)
        await node.start()
        node.replica.pacer.follow(lambda: setting)
        cluster.publish([1, 2], [3])
        pg = pg_of(OID, len(cluster.map.pools[3]))
        await wait_until(lambda: node.replica.is_guarded(3, pg) and 3 in router.links)
        await wait_until(lambda: router.map.epoch == cluster.map.epoch)
        before = holder.replicator.state(OID).version
        acknowledged: list[int] = []

        async def change(number: int) -> None:
            link = router.link(number)
            assert link is not None
            fields = {"oid": OID, "pool": 3, "pg": pg, "vdi": VDI, "token": 1}
            fields |= {"span": BLOCK, "prev": before, "version": before + 1}
            with suppress(RecoveringError):
                await link.call(Op.WRITE, b"b" * BLOCK, epoch=router.map.epoch, **fields)
                acknowledged.append(number)

        async with trio.open_nursery() as changes:
            changes.start_soon(change, 3)
            await wait_until(lambda: node.replica.is_held(OID))
            setting = RecoveryRecord()
            level = node.replica.level_of(3, pg)
            await wait_until(lambda: level.is_complete)
            changes.start_soon(change, 1)
            changes.start_soon(change, 2)
        if 3 not in acknowledged:
            await change(3)
        assert sorted(acknowledged) == [1, 2, 3]
        assert on_disk(cluster, 3) == b"b" * BLOCK
        nursery.cancel_scope.cancel()


async def test_a_write_does_not_wait_for_a_copy_and_the_copy_has_it(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        for oid in OIDS:
            await holder.create(oid, b"a" * BLOCK)
        node = cluster.nodes[3]
        node.stop()
        cluster.publish([1, 2])
        await holder.write(OID, b"b" * BLOCK)
        await node.start()
        setting = RecoveryRecord(paused=True)
        node.replica.pacer.follow(lambda: setting)
        cluster.publish([1, 2], [3])
        await holder.write(OID, b"c" * BLOCK)
        assert on_disk(cluster, 3) == b"a" * BLOCK
        pg = next(pg for pg in range(4) if node.replica.level_of(3, pg).missed)
        assert node.replica.level_of(3, pg).missed == {OID: holder.replicator.last_version}
        status = node.recovery.progress.status(trio.current_time())
        assert (status["waits"], status["objects_done"]) == ("paused", 0)
        setting = RecoveryRecord()
        await wait_until(lambda: all(g.sync == (1, 2, 3) for g in cluster.map.pools[3]))
        assert on_disk(cluster, 3) == b"c" * BLOCK
        await holder.write(OID, b"d" * BLOCK)
        assert on_disk(cluster, 3) == b"d" * BLOCK


async def test_of_an_object_that_changes_while_it_is_fetched_only_the_changes_are_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with holding(tmp_path) as (cluster, _, holder):
        blocks = OBJECT_SIZE // BLOCK
        node = cluster.nodes[3]
        cluster.auto_join = False
        node.stop()
        cluster.publish([1, 2])
        await holder.create(OID, b"a" * OBJECT_SIZE)
        await holder.flush()
        await node.start()
        ask_in_turn = node.recovery._ask_in_turn
        asked: list[int] = []

        async def ask(*args: Any) -> Any:
            reply = await ask_in_turn(*args)
            asked.append(args[-2])
            if len(asked) == 3:
                await holder.write(OID, b"b" * 2 * BLOCK, offset=BLOCK)
                await holder.write(OID, b"c" * BLOCK, offset=OBJECT_SIZE - BLOCK)
            return reply

        async def whole(*args: Any) -> None:
            raise AssertionError("the object was held and pulled as a whole")

        monkeypatch.setattr(node.recovery, "_ask_in_turn", ask)
        monkeypatch.setattr(node.recovery, "_try_to_pull", whole)
        cluster.publish([1, 2], [3])
        await wait_until(lambda: node.replica.counters.pulled_objects == 1)
        assert asked == list(range(0, OBJECT_SIZE, PIECE)), "each piece is asked for once"
        # Of what changed, the last block was fetched after it had: only two are moved twice.
        assert node.replica.counters.pulled_bytes == (blocks + 2) * BLOCK
        assert on_disk(cluster, 3, length=OBJECT_SIZE) == on_disk(cluster, 1, length=OBJECT_SIZE)


async def test_groups_are_fetched_from_all_sync_members_alike(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, _, _):
        recovery = cluster.nodes[3].recovery
        groups = cluster.map.pools[3]
        sources = [recovery._source(pg, group).node for pg, group in enumerate(groups)]
        assert sources.count(1) == sources.count(2) == len(groups) / 2


async def test_a_joining_member_misses_no_write_that_no_sync_member_has_yet(
    tmp_path: Path,
) -> None:
    async with holding(tmp_path) as (cluster, _, holder), trio.open_nursery() as nursery:
        await holder.create(OID, b"a" * BLOCK)
        node = cluster.nodes[3]
        cluster.auto_join = False
        node.stop()
        cluster.publish([1, 2])
        await node.start()
        node.replica.pacer.follow(lambda: RecoveryRecord(paused=True))
        cluster.publish([1, 2], [3])
        for source in (1, 2):
            cluster.nodes[source].replica.hold(OID)
        nursery.start_soon(holder.write, OID, b"b" * BLOCK)
        await wait_until(lambda: node.replica.is_held(OID))
        with trio.move_on_after(0.2):
            await wait_until(lambda: not node.replica.is_held(OID))
        levels = [node.replica.level_of(3, pg) for pg in range(4)]
        assert not any(level.missed for level in levels)
        for source in (1, 2):
            cluster.nodes[source].replica.release(OID)
        await wait_until(lambda: any(level.missed for level in levels))


async def test_who_asks_for_a_version_is_answered_once_it_is_there(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, router, holder):
        await holder.create(OID, b"a" * BLOCK)
        entry = cluster.nodes[1].store.get(OID)
        assert entry is not None
        before = entry.version
        link = router.link(1)
        assert link is not None
        answers: list[int] = []

        async def ask(version: int) -> None:
            fields = holder.replicator.fields(OID)
            header, _ = await link.call(Op.STAT, b"", version=version, timeout_s=5, **fields)
            answers.append(header.version)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for version in (before, before + 1, before + 1):
                    nursery.start_soon(ask, version)
                await wait_until(lambda: bool(cluster.nodes[1].replica.awaited))
                assert answers == [before]
                await holder.write(OID, b"b" * BLOCK)
            assert answers[1:] == [before + 1] * 2
            # Nobody waits for ever for what does not come.
            await ask(before + 1000)
        assert answers[3] == before + 1
        assert not cluster.nodes[1].replica.awaited
