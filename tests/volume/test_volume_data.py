"""One volume over real replicas: sizes, holes, flushes, who may read and what fails how."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticCluster, static_cluster
from fakes.static_mount import LAYER, StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.callbacks import OperationError
from sheepfs.core.errors import (
    HeldElsewhereError,
    NoSpaceError,
    SheepError,
    Status,
    UnreachableError,
)
from sheepfs.core.geometry import OBJECT_SIZE, data_object, map_object, pg_of
from sheepfs.core.wire import Header
from sheepfs.replication import sending
from sheepfs.volume import flusher, recording

BLOCK = 4096
A, B = b"a" * BLOCK, b"b" * BLOCK


@asynccontextmanager
async def mounted(
    path: Path, size: int = 0
) -> AsyncIterator[tuple[StaticCluster, StaticMount, StaticMount]]:
    """A cluster, and two mounts of its one VDI."""
    async with static_cluster(path) as (cluster, _):
        etcd = StaticRecord(size)
        here, there = StaticMount(cluster, etcd), StaticMount(cluster, etcd)
        await here.start()
        await there.start()
        yield cluster, here, there


def copies(cluster: StaticCluster, oid: int) -> list[bytes | None]:
    """The first block of an object as each node has it."""
    found: list[bytes | None] = []
    for node in cluster.nodes.values():
        there = node.store.get(oid) is not None
        buffers = node.store.read(oid, 0, BLOCK, wait=True) if there else None
        found.append(None if buffers is None else b"".join(buffers))
    return found


# -- size and map -------------------------------------------------------------------------------


async def test_a_write_past_the_end_grows_the_vdi_and_a_flush_saves_it(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (_, here, _there):
        await here.write(OBJECT_SIZE + 5, b"x")
        assert here.volume.size == OBJECT_SIZE + 6
        assert here.etcd.record.size == 0
        await here.flush()
        assert (here.etcd.record.size, here.etcd.record.maps) == (OBJECT_SIZE + 6, 1)
        assert await here.read(0, 2 * OBJECT_SIZE) == bytes(OBJECT_SIZE + 5) + b"x"
        saves = len(here.saves)
        await here.write(OBJECT_SIZE, b"y")
        await here.flush()
        assert len(here.saves) == saves


async def test_what_was_cut_is_gone_when_grown_again_also_after_a_crash(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (_, here, there):
        await here.write(0, b"a" * (OBJECT_SIZE + BLOCK))
        await here.flush()
        await here.volume.resize(100)
        await here.end()
        await there.volume.attach()
        assert there.volume.size == 100
        await there.volume.resize(2 * OBJECT_SIZE)
        found = await there.read(0, 2 * OBJECT_SIZE)
        assert found == b"a" * 100 + bytes(2 * OBJECT_SIZE - 100)


async def test_a_whole_punched_object_is_freed_on_every_node_by_a_flush(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (cluster, here, _):
        await here.write(0, A)
        await here.write(OBJECT_SIZE, B)
        await here.flush()
        await here.volume.punch(0, OBJECT_SIZE)
        assert await here.read(0, BLOCK) == bytes(BLOCK)
        assert copies(cluster, data_object(LAYER, 0)) == [A] * 3
        await here.flush()
        await wait_until(lambda: copies(cluster, data_object(LAYER, 0)) == [None] * 3)
        assert here.volume.attributes().allocated == OBJECT_SIZE
        await here.write(1, b"x")
        assert await here.read(0, 3) == b"\0x\0"


async def test_an_object_written_again_before_its_hole_was_flushed_stays(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        await here.volume.punch(0, OBJECT_SIZE)
        await here.write(BLOCK, B)
        await here.flush()
        await here.flush()
        assert copies(cluster, data_object(LAYER, 0)) == [bytes(BLOCK)] * 3
        assert await here.read(0, 2 * BLOCK) == bytes(BLOCK) + B


async def test_a_punch_of_an_object_that_is_being_made_leaves_zeros(tmp_path: Path) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (_, here, _there):
        await here.volume.attach()
        await here.read(0, 1)
        codes: list[int] = []
        here.volume.write(0, A, codes.append)
        await here.volume.punch(0, OBJECT_SIZE)
        await here.write(BLOCK, B)
        await here.flush()
        assert codes == [0]
        assert await here.read(0, 3 * BLOCK) == bytes(BLOCK) + B + bytes(BLOCK)
        assert here.volume.attributes().allocated == OBJECT_SIZE


async def test_a_punch_of_a_petabyte_of_nothing_is_quick_and_small(tmp_path: Path) -> None:
    async with mounted(tmp_path, 1 << 50) as (_, here, _there):
        with trio.fail_after(1):
            await here.volume.punch(0, 1 << 50)
            assert await here.volume.seek_data(0) is None
        await here.write(1 << 49, A)
        with trio.fail_after(5):
            assert await here.volume.seek_data(5) == 1 << 49
            assert await here.volume.seek_hole(1 << 49) == (1 << 49) + BLOCK


# -- who may read and write ---------------------------------------------------------------------


async def test_a_mount_that_does_not_hold_the_vdi_reads_what_was_flushed(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (_, here, there):
        await here.write(0, A)
        await here.flush()
        there.volume.refresh("test", there.etcd.record)
        assert await there.read(0, BLOCK) == A
        assert there.volume.attachment is None
        with pytest.raises(OperationError, match="EBUSY"):
            await there.write(0, B)
        with pytest.raises(HeldElsewhereError):
            await there.volume.attach()


async def test_a_read_after_a_detach_does_not_hold_the_vdi_again(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (_, here, there):
        await here.write(0, A)
        await here.volume.detach()
        assert await here.read(0, BLOCK) == A
        await there.volume.attach()
        assert await there.read(0, BLOCK) == A


async def test_what_is_written_during_a_detach_is_flushed_or_attaches_again(
    tmp_path: Path,
) -> None:
    async with mounted(tmp_path, 8 * OBJECT_SIZE) as (_, here, there):
        await here.write(0, A)
        codes: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.volume.detach)
            for i in range(1, 8):
                for _ in range(3):
                    await trio.sleep(0)
                here.volume.write(i * OBJECT_SIZE, A, codes.append)
                here.volume.flush(codes.append)
        await wait_until(lambda: len(codes) == 14)
        assert set(codes) == {0}
        await here.volume.detach()
        assert here.etcd.record.clean
        there.volume.refresh("test", there.etcd.record)
        for i in range(8):
            assert await there.read(i * OBJECT_SIZE, BLOCK) == A


async def test_a_read_beside_a_creation_that_stalls_gives_zeros(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.volume.attach()
        await here.read(0, 1)
        cluster.nodes[1].stop()
        await wait_until(lambda: here.router.link(1) is None)
        codes: list[int] = []
        here.volume.write(0, A, codes.append)
        assert await here.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert await here.volume.seek_data(0) is None
        assert not codes
        cluster.publish([2, 3])
        await wait_until(lambda: codes == [0])
        assert await here.read(0, BLOCK) == A


async def test_what_is_written_to_an_object_is_read_though_its_creation_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "RETRY_S", math.inf)
    async with mounted(tmp_path, OBJECT_SIZE) as (_, here, _):
        await here.volume.attach()
        await here.read(0, 1)
        codes: list[int] = []
        here.volume.write(0, A, codes.append)
        assert here.volume.replicator is not None
        creation = here.volume.replicator.objects[data_object(LAYER, 0)].changes[0]
        # A member was busy; all others have carried it out.
        here.volume.replicator.sender.park(creation)
        await here.write(BLOCK, B)
        assert codes == [0]
        assert await here.read(0, 2 * BLOCK) == A + B
        await here.flush()


# -- flushes ------------------------------------------------------------------------------------


async def test_lost_writes_are_told_to_every_flush_also_when_none_waited_for_the_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher, "FLUSH_EVERY_S", 0.01)
    async with mounted(tmp_path) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        replicator = here.volume.replicator
        assert replicator is not None
        unflushed = replicator.unflushed
        unflushed.losses += 1
        unflushed._something_lost.set()
        await here.write(0, B)
        await wait_until(lambda: unflushed._intact)
        for _ in range(2):
            with pytest.raises(OperationError, match="EIO"):
                await here.flush()
        assert not unflushed.groups, "it is carried out all the same"
        assert copies(cluster, data_object(LAYER, 0)) == [B] * 3


async def test_flushes_fail_when_all_nodes_that_had_the_writes_died(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        await here.write(0, B)
        for node in cluster.nodes.values():
            node.clean = False
            node.stop()
        for node in cluster.nodes.values():
            await node.start()
        cluster.publish([2], [1, 3])
        for _ in range(2):
            with pytest.raises(OperationError, match="EIO"):
                await here.flush()
        assert await here.read(0, BLOCK) in (A, B)


async def test_nobody_waits_for_ever_for_a_flush_of_a_vdi_that_is_let_go(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        await here.write(0, B)
        for node in cluster.nodes.values():
            node.server.handlers[7] = lambda client, header, payload: None
        codes: list[int] = []
        here.volume.flush(codes.append)
        here.volume.flush(codes.append)
        await trio.sleep(0)
        here.volume.fence("taken over")
        await here.volume.detach()
        for node in cluster.nodes.values():
            node.stop()
        await wait_until(lambda: len(codes) == 2)
        assert codes == [errno.EIO] * 2
        assert not here.etcd.record.clean


# -- no space -----------------------------------------------------------------------------------


def fill(cluster: StaticCluster, node: int) -> None:
    """From now on only the reserve is left on a node's disk."""
    space = cluster.nodes[node].store._space
    space._reserve = 1 << 60
    space._budget = 0


async def test_a_creation_without_space_leaves_a_hole_and_no_object(tmp_path: Path) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (cluster, here, there):
        await here.write(0, A)
        await here.flush()
        fill(cluster, 3)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(OBJECT_SIZE, B)
        assert await here.read(OBJECT_SIZE, BLOCK) == bytes(BLOCK)
        await here.flush()
        await wait_until(lambda: copies(cluster, data_object(LAYER, 1)) == [None] * 3)
        assert here.volume.attributes().allocated == OBJECT_SIZE
        await here.volume.detach()
        assert here.etcd.record.clean
        there.volume.refresh("test", there.etcd.record)
        assert await there.read(0, OBJECT_SIZE + BLOCK) == A + bytes(OBJECT_SIZE)


async def test_a_copy_without_space_leaves_the_frozen_object_and_no_other(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.snapshot()
        copy = data_object(here.volume.open_layer, 0)
        fill(cluster, 3)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(BLOCK, B)
        await here.flush()
        await wait_until(lambda: copies(cluster, copy) == [None] * 3)
        assert await here.read(0, 2 * BLOCK) == A + bytes(BLOCK)


async def test_a_write_without_space_leaves_all_replicas_as_they_were(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        fill(cluster, 3)
        codes: list[int] = []
        for i in range(1, 9):
            here.volume.write(i * BLOCK, B, codes.append)
        await wait_until(lambda: len(codes) == 8)
        assert set(codes) == {errno.ENOSPC}
        assert await here.read(0, 2 * BLOCK) == A + bytes(BLOCK)
        await here.write(0, B)
        await here.volume.punch(0, 100)
        expected = bytes(100) + B[100:]
        assert copies(cluster, data_object(LAYER, 0)) == [expected] * 3
        assert await here.read(0, 2 * BLOCK) == expected + bytes(BLOCK)
        await here.volume.detach()
        assert here.etcd.record.clean


async def test_a_write_is_taken_back_where_it_took_the_last_room(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        for node in (1, 2):
            fill(cluster, node)
            cluster.nodes[node].store._space._budget = 3 * BLOCK // 2
        fill(cluster, 3)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(BLOCK - 100, B)
        assert await here.read(0, 2 * BLOCK) == A + bytes(BLOCK)
        await here.write(0, B)
        assert copies(cluster, data_object(LAYER, 0)) == [B] * 3


async def test_an_object_that_not_all_members_have_room_for_is_not_made_on_any(
    tmp_path: Path,
) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.volume.attach()
        await here.read(0, 1)
        fill(cluster, 3)
        codes: list[int] = []
        for i in range(3):
            here.volume.write(i * BLOCK, A, codes.append)
        replicator = here.volume.replicator
        assert replicator is not None
        second = replicator.objects[data_object(LAYER, 0)].changes[1]
        # One that had room for the first was faster than the one that had none at all.
        link = here.router.link(1)
        assert link is not None
        refusal = {"status": Status.NO_SPACE, "request": second.request}
        replicator.refused(
            second, link, Header(**{**dict.fromkeys(Header._fields, 0), **refusal}), None
        )
        await wait_until(lambda: codes == [errno.ENOSPC] * 3)
        assert await here.read(0, 3 * BLOCK) == bytes(3 * BLOCK)
        await here.flush()
        await wait_until(lambda: copies(cluster, data_object(LAYER, 0)) == [None] * 3)


async def test_a_full_disk_still_frees_objects(tmp_path: Path) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        for node in cluster.nodes:
            fill(cluster, node)
        await here.volume.punch(0, OBJECT_SIZE)
        await here.flush()
        await wait_until(lambda: copies(cluster, data_object(LAYER, 0)) == [None] * 3)
        assert copies(cluster, map_object(LAYER, 0)) == [bytes(BLOCK)] * 3


async def test_no_room_for_the_dirty_log_is_no_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):

        def full(oids: object) -> None:
            raise NoSpaceError("the log cannot grow")

        monkeypatch.setattr(cluster.nodes[2].store, "mark", full)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(0, A)
        assert not cluster.nodes[2].disk_errors


async def test_a_disk_that_fails_is_waited_for_until_it_is_voted_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.volume.detach()
        await here.volume.attach()
        store = cluster.nodes[1].store
        store._health.fail(OSError(errno.EIO, "bad sector"), "test")
        codes: list[int] = []
        here.volume.write(0, B, codes.append)
        for _ in range(50):
            assert await here.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert not codes
        monkeypatch.setattr(cluster.nodes[1], "clean", False)
        cluster.nodes[1].stop()
        cluster.publish([2, 3])
        await wait_until(lambda: codes == [0])
        assert await here.read(0, BLOCK) == B


async def test_a_write_beyond_the_largest_vdi_is_refused(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (_, here, _there):
        await here.volume.attach()
        with pytest.raises(OperationError, match="EFBIG"):
            await here.write((1 << 50) - 1, b"xx")
        with pytest.raises(SheepError):
            await here.volume.resize(1 << 51)


async def begin_joining(cluster: StaticCluster, here: StaticMount) -> None:
    """Write A to the first block; node 3 has to catch up, and stays among those that join."""
    await here.write(0, A)
    await here.flush()
    cluster.auto_join = False
    cluster.publish([1, 2], [3])


async def test_a_joining_member_is_taken_back_too_when_another_has_no_space(
    tmp_path: Path,
) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await begin_joining(cluster, here)
        await here.write(0, B)
        fill(cluster, 2)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(BLOCK, B)
        await here.write(0, A)
        assert copies(cluster, data_object(LAYER, 0)) == [A] * 3
        versions = {node.store.get(data_object(LAYER, 0)) for node in cluster.nodes.values()}
        assert len({entry.version for entry in versions if entry}) == 1


async def test_a_member_that_has_caught_up_and_has_no_space_is_level_before_the_next_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await begin_joining(cluster, here)
        oid = data_object(LAYER, 0)
        joining = cluster.nodes[3].replica.level_of(3, pg_of(oid, PG_COUNT))
        await wait_until(lambda: joining.is_complete)
        fill(cluster, 3)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(BLOCK, B)
        read: list[bytes] = []

        async def reads() -> None:
            read.append(await here.read(BLOCK, BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reads)
            await wait_until(lambda: caplog.text.count("repair of") > 1)
            assert not read
            cluster.publish([1, 2, 3])
        assert read == [bytes(BLOCK)]
        assert copies(cluster, oid) == [A] * 3


async def test_a_member_that_joins_and_cannot_be_levelled_copies_the_object_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mounted(tmp_path, OBJECT_SIZE) as (cluster, here, _):
        await begin_joining(cluster, here)
        oid = data_object(LAYER, 0)
        node = cluster.nodes[3].replica
        joining = node.level_of(3, pg_of(oid, PG_COUNT))
        await wait_until(lambda: oid in joining.fresh)
        joining.is_complete = False
        joining.miss(oid, 1 << 60)  # Acknowledged, and taken back together with what comes.
        fill(cluster, 2)

        async def pull(*_args: object, **_options: object) -> None:
            raise UnreachableError("no member can be reached from here")

        monkeypatch.setattr(node.puller, "pull", pull)
        with pytest.raises(OperationError, match="ENOSPC"):
            await here.write(BLOCK, B)
        assert await here.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert joining.missed == {oid: 0}
        assert oid not in joining.fresh


async def test_a_reader_whose_map_names_what_is_gone_looks_again(tmp_path: Path) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (cluster, here, there):
        await here.write(0, A)
        await here.write(OBJECT_SIZE, B)
        await here.flush()
        assert await there.read(0, BLOCK) == A
        await here.volume.punch(0, OBJECT_SIZE)
        await here.flush()
        await wait_until(lambda: copies(cluster, data_object(LAYER, 0)) == [None] * 3)
        assert await there.read(0, BLOCK) == bytes(BLOCK)


async def test_an_object_that_is_read_while_it_is_discarded_goes_before_the_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (cluster, here, _):
        await here.write(0, A)
        await here.flush()
        replicator = here.volume.replicator
        assert replicator is not None
        uses = iter([True, True, True])
        monkeypatch.setattr(replicator, "in_use", lambda state: next(uses, False))
        await here.volume.punch(0, OBJECT_SIZE)
        await here.volume.detach()
        assert copies(cluster, data_object(LAYER, 0)) == [None] * 3
        assert next(uses, None) is None


async def test_a_holder_asks_for_reclaim_of_what_it_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RECLAIM_EVERY_S", 0.02)
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (_, here, _):
        await here.write(0, A)
        await here.snapshot()
        await here.write(OBJECT_SIZE, B)
        await trio.sleep(0.1)
        assert here.reclaims_wanted == 0
        await here.write(0, B)
        await wait_until(lambda: here.reclaims_wanted == 1)
        assert here.volume._map.is_dirty is False
        await trio.sleep(0.1)
        assert here.reclaims_wanted == 1


async def test_a_reader_follows_a_rollback(tmp_path: Path) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (cluster, here, there):
        await here.write(0, A)
        snapshot = await here.snapshot()
        await here.write(0, B)
        await here.flush()
        assert await there.read(0, BLOCK) == B
        before = here.volume.record.map
        await here.rollback(snapshot)
        for node in cluster.nodes.values():
            node.store.delete(map_object(before, 0))
        assert await there.read(0, BLOCK) in (A, B)
        there.volume._map.forget_clean()
        assert await there.read(0, BLOCK) == A


async def test_what_no_node_has_any_more_can_be_given_up_and_made_anew(tmp_path: Path) -> None:
    async with mounted(tmp_path, 2 * OBJECT_SIZE) as (cluster, here, there):
        await here.write(0, A)
        await here.write(OBJECT_SIZE, B)
        await here.flush()
        await here.volume.detach()
        for node in cluster.nodes.values():
            node.store.delete(data_object(LAYER, 0))
        with pytest.raises(OperationError, match="EIO"):
            await there.write(0, B)
        await there.volume.punch(0, OBJECT_SIZE)
        assert await there.read(0, BLOCK) == bytes(BLOCK)
        await there.write(BLOCK, A)
        await there.flush()
        assert await there.read(0, 2 * BLOCK) == bytes(BLOCK) + A
        assert await there.read(OBJECT_SIZE, BLOCK) == B
