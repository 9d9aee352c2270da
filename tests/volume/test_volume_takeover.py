"""What the next holder finds, and must do, after one that ended without a detach."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fakes.static_cluster import StaticCluster, static_cluster
from fakes.static_mount import LAYER, StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.callbacks import OperationError
from sheepfs.core.errors import CorruptError, FencedError, ObjectNotFoundError
from sheepfs.core.geometry import OBJECT_SIZE, data_object, pg_of
from sheepfs.core.wire import Op
from sheepfs.volume.convergence import converge

OID = data_object(LAYER, 1)
BLOCK = 4096


def on_disk(cluster: StaticCluster, oid: int = OID) -> set[bytes]:
    found = [node.store.read(oid, 0, BLOCK, wait=True) for node in cluster.nodes.values()]
    return {b"".join(buffers or ()) for buffers in found}


async def leave_differing(cluster: StaticCluster, etcd: StaticRecord) -> None:
    """A holder ends when only node 2 has its last write."""
    mount = StaticMount(cluster, etcd)
    await mount.start()
    await mount.write(OBJECT_SIZE, b"a" * BLOCK)
    await mount.flush()
    store = cluster.nodes[2].store
    entry = store.get(OID)
    assert entry is not None
    store.write(OID, 0, b"b" * BLOCK, entry.version + 1)
    await mount.end()


async def test_all_replicas_become_equal_without_a_read(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_differing(cluster, etcd)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        await wait_until(lambda: not mount.volume.converging)
        assert on_disk(cluster) == {b"b" * BLOCK}
        await mount.volume.detach()
        assert etcd.record.clean


async def test_a_holder_that_left_before_it_compared_all_leaves_that_to_the_next(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_differing(cluster, etcd)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        await mount.volume.detach()
        assert not etcd.record.clean
        assert await mount.read(OBJECT_SIZE, BLOCK) == b"b" * BLOCK
        assert on_disk(cluster) == {b"b" * BLOCK}


MADE = data_object(LAYER, 2)


def make_unnamed(cluster: StaticCluster, nodes: tuple[int, ...]) -> None:
    """Make an object that no map names on some nodes, as a holder does that dies before a flush."""
    for number in nodes:
        store = cluster.nodes[number].store
        last = store.get(OID)
        assert last is not None
        store.mark([MADE])
        pg = pg_of(MADE, len(cluster.map.pools[3]))
        store.write(MADE, 0, b"n" * BLOCK, last.version + 1, create=True, pool=3, pg=pg)


async def wait_swept(cluster: StaticCluster) -> None:
    await wait_until(lambda: all(n.store.get(MADE) is None for n in cluster.nodes.values()))


async def test_a_holder_removes_what_is_of_no_use_when_it_is_asked_to(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        await mount.volume.detach()
        make_unnamed(cluster, (3,))
        await mount.volume.attach()
        assert not mount.volume.converging, "it was left in order"
        await mount.volume.sweep()
        await mount.flush()
        await wait_swept(cluster)
        assert on_disk(cluster) == {b"a" * BLOCK}


@pytest.mark.parametrize("nodes", [(1,), (2,), (3,), (2, 3)])
async def test_what_a_holder_was_about_to_make_goes_wherever_it_is(
    tmp_path: Path, nodes: tuple[int, ...]
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_differing(cluster, etcd)
        make_unnamed(cluster, nodes)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        await wait_until(lambda: not mount.volume.converging)
        await mount.flush()
        await wait_swept(cluster)
        assert on_disk(cluster) == {b"b" * BLOCK}


def damage(cluster: StaticCluster, node: int) -> None:
    path = next(cluster.nodes[node].path.glob(f"objects/*/*/{OID:016x}"))
    with path.open("r+b") as file:
        file.write(b"X")


async def test_a_damaged_copy_is_levelled_with_a_good_one_although_it_is_newer(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_differing(cluster, etcd)
        damage(cluster, 2)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        assert await mount.read(OBJECT_SIZE, BLOCK) == b"a" * BLOCK
        await wait_until(lambda: not mount.volume.converging)
        assert on_disk(cluster) == {b"a" * BLOCK}


async def test_where_all_copies_differ_and_are_damaged_a_read_ends_with_an_error(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_differing(cluster, etcd)
        for node in cluster.nodes:
            damage(cluster, node)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        with pytest.raises(OSError, match="Errno 5"):
            await mount.read(OBJECT_SIZE, BLOCK)


@pytest.mark.parametrize("differing", [False, True])
async def test_the_first_flush_covers_what_the_former_holder_wrote(
    tmp_path: Path, differing: bool
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        if differing:
            await leave_differing(cluster, etcd)
        else:
            former = StaticMount(cluster, etcd)
            await former.start()
            await former.write(OBJECT_SIZE, b"a" * BLOCK)
            await former.flush()
            await former.write(OBJECT_SIZE, b"b" * BLOCK)
            await former.end()
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.attach()
        await mount.flush()
        assert await mount.read(OBJECT_SIZE, BLOCK) == b"b" * BLOCK
        await mount.flush()
        assert [node.store.begin_flush(LAYER) for node in cluster.nodes.values()] == [None] * 3


async def test_a_former_holder_can_do_nothing_any_more(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        former, mount = StaticMount(cluster, etcd), StaticMount(cluster, etcd)
        await former.start()
        await former.write(OBJECT_SIZE, b"a" * BLOCK)
        await former.flush()
        etcd.holder = None
        await mount.start()
        await mount.volume.attach()
        with pytest.raises(OSError, match="Errno 5"):
            await former.read(OBJECT_SIZE, BLOCK)
        former.volume.fence("taken over")
        for work in (former.flush(), former.write(0, b"x"), former.write(OBJECT_SIZE, b"x")):
            with pytest.raises(Exception, match="EIO"):
                await work
        with pytest.raises(OSError, match="Errno 5"):
            # Also where it knows of a hole: somebody may have written there.
            await former.read(0, BLOCK)
        await former.volume.detach()
        assert etcd.holder is mount


async def test_an_object_that_only_some_members_made_is_no_part_of_the_vdi(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord(2 * OBJECT_SIZE)
        former, mount = StaticMount(cluster, etcd), StaticMount(cluster, etcd)
        await former.start()
        await former.volume.attach()
        cluster.nodes[1].server.handlers[Op.WRITE] = lambda client, header, payload: None
        former.volume.write(OBJECT_SIZE, b"a" * BLOCK, lambda code: None)
        await wait_until(lambda: cluster.nodes[2].store.get(OID))
        await former.end()
        cluster.nodes[1].server.handlers[Op.WRITE] = cluster.nodes[1].replica.handle
        await mount.start()
        assert await mount.read(OBJECT_SIZE, BLOCK) == bytes(BLOCK)
        await mount.write(OBJECT_SIZE + BLOCK, b"b")
        assert on_disk(cluster) == {bytes(BLOCK)}


async def leave_data_beyond_the_end(cluster: StaticCluster, etcd: StaticRecord) -> None:
    """A holder ends when its data is stored and the size that covers it is not."""
    former = StaticMount(cluster, etcd)
    await former.start()
    await former.write(0, b"a" * 2 * BLOCK)
    await former.write(2 * OBJECT_SIZE, b"b" * BLOCK)
    await former.flush()
    await former.end()
    etcd.record = dataclasses.replace(etcd.record, size=BLOCK)


@pytest.mark.parametrize("resized", [False, True])
async def test_a_vdi_grows_with_zeros_over_what_the_former_holder_left_beyond_its_end(
    tmp_path: Path, resized: bool
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_data_beyond_the_end(cluster, etcd)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        end = 3 * OBJECT_SIZE
        if resized:
            await mount.volume.resize(end)
        else:
            await mount.write(end - 1, b"\0")
        assert mount.volume.size == end
        assert await mount.read(0, 2 * BLOCK) == b"a" * BLOCK + bytes(BLOCK)
        assert await mount.read(2 * OBJECT_SIZE, BLOCK) == bytes(BLOCK)


async def test_growth_that_waits_for_a_clear_end_outlives_a_detach(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        await leave_data_beyond_the_end(cluster, etcd)
        mount = StaticMount(cluster, etcd)
        await mount.start()
        handlers, held = cluster.nodes[1].server.handlers, list[tuple[Any, ...]]()
        handle = handlers[Op.PUNCH]
        handlers[Op.PUNCH] = lambda *request: held.append(request)
        await mount.volume.attach()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.write, BLOCK, b"c" * BLOCK)
            nursery.start_soon(mount.volume.resize, 3 * BLOCK)
            await wait_until(lambda: held)
            assert mount.volume.size == BLOCK
            nursery.start_soon(mount.volume.detach)
            await trio.testing.wait_all_tasks_blocked()
            handlers[Op.PUNCH] = handle
            for request in held:
                handle(*request)
        assert await mount.read(0, 3 * BLOCK) == b"a" * BLOCK + b"c" * BLOCK + bytes(BLOCK)


async def test_what_no_map_names_is_gone_when_a_vdi_was_only_levelled(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        former = StaticMount(cluster, etcd)
        await former.start()
        await former.write(OBJECT_SIZE, b"a" * BLOCK)
        await former.end()
        mount = StaticMount(cluster, etcd)
        await mount.start()
        await mount.volume.level()
        assert etcd.record.clean
        assert [node.store.get(OID) for node in cluster.nodes.values()] == [None] * 3


async def test_who_was_taken_over_waits_for_no_member_and_reads_no_more_of_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        volume = await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        await mount.flush()
        vdi_map, replicator = volume._map, volume.replicator
        assert replicator is not None
        cluster.nodes[2].stop()
        await wait_until(lambda: mount.router.link(2) is None)
        vdi_map.pages.clear()
        state = replicator.state(OID)
        replicator.distrust(state)
        loads: list[int] = []

        async def load(index: int) -> None:
            loads.append(index)
            raise CorruptError("no replica can give it")

        monkeypatch.setattr(vdi_map, "load", load)
        async with trio.open_nursery() as nursery:

            async def opened() -> None:
                with pytest.raises(CorruptError):
                    await replicator.open(state)

            nursery.start_soon(opened)
            await trio.testing.wait_all_tasks_blocked()
            replicator.fence("another mount took it over")
            with trio.fail_after(5):
                assert not await converge(vdi_map, replicator)
        assert len(loads) == 1


async def test_a_vdi_is_let_go_as_clean_though_an_object_that_is_looked_for_was_just_discarded(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        mount = StaticMount(cluster, etcd)
        volume = await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        assert volume.replicator is not None
        with pytest.raises(ObjectNotFoundError):
            await volume.replicator.open(volume.replicator.state(data_object(LAYER, 7)))
        await volume.detach()
        assert etcd.record.clean


async def test_who_was_taken_over_and_does_not_know_it_discards_nothing(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        here, there = StaticMount(cluster, etcd), StaticMount(cluster, etcd)
        await here.start()
        await there.start()
        await here.write(0, b"a" * BLOCK)
        await here.write(OBJECT_SIZE, b"b" * BLOCK)
        await here.flush()
        etcd.holder = None
        await there.volume.attach()
        with pytest.raises(FencedError):
            await here.volume.punch(0, OBJECT_SIZE)
        assert await there.read(0, BLOCK) == b"a" * BLOCK


@pytest.mark.parametrize("for_a_while", ["level", "borrow"])
async def test_a_vdi_that_is_in_use_is_not_let_go_by_who_needs_it_for_a_while_only(
    tmp_path: Path, for_a_while: str
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        volume = await mount.start()
        async with trio.open_nursery() as nursery, volume._attaching:
            nursery.start_soon(volume.attach)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(getattr(volume, for_a_while))
            await trio.testing.wait_all_tasks_blocked()
        await volume.give_back()
        assert volume.attachment is not None


async def test_a_vdi_that_is_used_before_it_is_given_back_stays(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        volume = await mount.start()
        await volume.borrow()
        async with trio.open_nursery() as nursery, volume._capturing:
            nursery.start_soon(volume.give_back)
            await trio.testing.wait_all_tasks_blocked()
            await volume.attach()
        assert volume.attachment is not None
        await volume.detach()
        assert volume.attachment is None


@pytest.mark.parametrize("good", [0, 1, 2])
async def test_part_of_a_damaged_block_is_changed_if_a_member_has_a_good_one(
    tmp_path: Path, good: int
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        await mount.flush()
        for node in range(good + 1, 4):
            damage(cluster, node)
        if good:
            await mount.write(OBJECT_SIZE + 1, b"b")
            assert on_disk(cluster) == {b"ab".ljust(BLOCK, b"a")}
            return
        with pytest.raises(OperationError, match="EIO"):
            await mount.write(OBJECT_SIZE + 1, b"b")
        await mount.write(OBJECT_SIZE, b"c" * BLOCK)
        await mount.write(OBJECT_SIZE + 1, b"d")
        assert on_disk(cluster) == {b"cd".ljust(BLOCK, b"c")}


@pytest.mark.parametrize("good", [0, 1])
async def test_a_damaged_object_is_copied_if_a_member_has_a_good_one(
    tmp_path: Path, good: int
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        mount = StaticMount(cluster, StaticRecord())
        await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        await mount.snapshot()
        for node in range(good + 1, 4):
            damage(cluster, node)
        if good:
            await mount.write(OBJECT_SIZE + 1, b"b")
            assert await mount.read(OBJECT_SIZE, BLOCK) == b"ab".ljust(BLOCK, b"a")
            return
        with pytest.raises(OperationError, match="EIO"):
            await mount.write(OBJECT_SIZE + 1, b"b")


async def test_a_detach_ends_when_the_links_do_and_says_nothing_is_clean(tmp_path: Path) -> None:
    """As where a task of the mount fails for a reason of its own: all others are cancelled."""
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        mount = StaticMount(cluster, etcd)
        volume = await mount.start()
        await mount.write(OBJECT_SIZE, b"a" * BLOCK)
        cluster.nodes[2].stop()
        detached = trio.Event()

        async def detach() -> None:
            with trio.CancelScope(shield=True), pytest.raises(OperationError):
                await volume.detach()
            detached.set()

        cluster.nursery.start_soon(detach)
        flusher = volume.flusher
        assert flusher is not None
        await wait_until(lambda: flusher.is_asked)
        mount._scope.cancel()
        with trio.fail_after(5):
            await detached.wait()
        assert etcd.holder is None
        assert not etcd.record.clean
