"""When every copy of what was not flushed is lost, and the holder lives (sheepfs.volume.losses)."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio
import trio.testing

from fakes.static_cluster import PG_COUNT, StaticCluster, static_cluster
from fakes.static_mount import LAYER, StaticMount, StaticRecord
from fakes.waiting import wait_until
from sheepfs.callbacks import OperationError
from sheepfs.core.errors import FencedError, SheepError, UnreachableError
from sheepfs.core.geometry import (
    MAP_ENTRIES_PER_OBJECT,
    OBJECT_SIZE,
    data_object,
    map_object,
    pg_of,
)
from sheepfs.core.wire import Op
from storaged.store.objects import ObjectStore

BLOCK = 4096
A, B, C = b"a" * BLOCK, b"b" * BLOCK, b"c" * BLOCK


async def lose_power(cluster: StaticCluster, mount: StaticMount, *oids: int) -> None:
    """All nodes start anew, and these objects, which were not flushed, have left no trace."""
    for node in cluster.nodes.values():
        node.clean = False
        node.stop()
    for node in cluster.nodes.values():
        await node._ended.wait()
        store = ObjectStore.open(node.path, cluster=cluster.uuid, reserve_bytes=0)
        for oid in oids:
            if store.get(oid) is not None:
                store.delete(oid)
        store.close(clean=True)
    await start_all(cluster, mount)


async def tear(cluster: StaticCluster, mount: StaticMount, oid: int, old: bytes) -> None:
    """All nodes lose power, and kept of the last change of an object its version, not its data."""
    nodes = list(cluster.nodes.values())
    version = max(entry.version for node in nodes if (entry := node.store.get(oid)))
    for node in nodes:
        node.clean = False
        node.stop()
    for node in nodes:
        await node._ended.wait()
        store = ObjectStore.open(node.path, cluster=cluster.uuid, reserve_bytes=0)
        store.mark([oid])
        store.write(oid, 0, old, version, create=True, pool=3, pg=pg_of(oid, PG_COUNT))
        store.close(clean=True)
    await start_all(cluster, mount)


def files_of(cluster: StaticCluster, oid: int) -> dict[Path, bytes]:
    """Give what is in the files of an object, on all nodes."""
    files = [next(n.path.glob(f"objects/*/*/{oid:016x}")) for n in cluster.nodes.values()]
    return {file: file.read_bytes() for file in files}


async def go_back(cluster: StaticCluster, mount: StaticMount, kept: dict[Path, bytes]) -> None:
    """All nodes lose power, and have these files as they were."""
    for node in cluster.nodes.values():
        node.clean = False
        node.stop()
        await node._ended.wait()
    for file, content in kept.items():
        file.write_bytes(content)
    await start_all(cluster, mount)


async def start_all(cluster: StaticCluster, mount: StaticMount) -> None:
    """Start all nodes; one of them is the truth."""
    for node in cluster.nodes.values():
        await node.start()
    cluster.publish([2], [1, 3])
    await wait_until(lambda: mount.router.map.epoch >= cluster.map.epoch)


async def has_mended(mount: StaticMount) -> None:
    """Flushes tell of the loss, and soon the map names only what is left."""
    with pytest.raises(OperationError, match="EIO"):
        await mount.flush()
    replicator = mount.volume.replicator
    assert replicator is not None
    await wait_until(lambda: replicator.unflushed._intact)


async def let_go(mount: StaticMount) -> None:
    """Whoever closes the file is told, too; all is made durable."""
    with pytest.raises(OperationError, match="EIO"):
        await mount.volume.detach()


async def mount_of(cluster: StaticCluster, etcd: StaticRecord) -> StaticMount:
    mount = StaticMount(cluster, etcd)
    await mount.start()
    return mount


async def test_an_object_that_is_gone_is_a_hole_again_and_can_be_made_anew(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        here = await mount_of(cluster, etcd)
        await here.write(0, A)
        await here.flush()
        await here.write(OBJECT_SIZE, B)
        await lose_power(cluster, here, data_object(LAYER, 1))
        await has_mended(here)
        assert await here.read(0, BLOCK) == A
        assert await here.read(OBJECT_SIZE, BLOCK) == bytes(BLOCK)
        await here.write(OBJECT_SIZE, C)
        await let_go(here)
        there = await mount_of(cluster, etcd)
        await there.volume.attach()
        assert await there.read(0, BLOCK) == A
        assert await there.read(OBJECT_SIZE, BLOCK) == C


@pytest.mark.parametrize("kind", ["a write", "a creation", "a copy"])
async def test_a_change_under_way_is_there_though_a_power_cut_kept_only_its_version(
    tmp_path: Path, kind: str
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.write(2 * BLOCK, A)
        await here.flush()
        if kind == "a creation":
            await here.volume.punch(0, OBJECT_SIZE)
        elif kind == "a copy":
            await here.snapshot()
        oid = data_object(here.volume.open_layer, 0)
        before = {n: node.store.get(oid) for n, node in cluster.nodes.items()}
        versions = {n: entry.version if entry else 0 for n, entry in before.items()}
        # One node hears nothing, so that the write is not complete.
        cluster.nodes[1].server.handlers[Op.WRITE] = lambda *_: None

        def is_at(number: int) -> bool:
            entry = cluster.nodes[number].store.get(oid)
            return entry is not None and not entry.state and entry.version > versions[number]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.write, 0, B)
            await wait_until(lambda: is_at(2) and is_at(3))
            await tear(cluster, here, oid, A + bytes(BLOCK) + A)
        await here.flush()
        rest = bytes(2 * BLOCK) if kind == "a creation" else bytes(BLOCK) + A
        assert await here.read(0, 3 * BLOCK) == B + rest


async def test_everybody_who_flushes_after_a_loss_is_told_until_the_vdi_was_let_go(
    tmp_path: Path,
) -> None:
    """In a guest several programs flush: what one of them is told, the others do not know."""
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.flush()
        await here.write(0, B)
        await here.write(OBJECT_SIZE, C)
        await lose_power(cluster, here, data_object(LAYER, 1))
        await has_mended(here)
        for _ in range(3):
            with pytest.raises(OperationError, match="EIO"):
                await here.flush()
        await let_go(here)
        await here.volume.attach()
        assert await here.read(OBJECT_SIZE, BLOCK) == bytes(BLOCK)
        await here.write(OBJECT_SIZE, C)
        await here.flush()


async def test_a_read_under_way_when_writes_are_lost_gives_what_is_left(tmp_path: Path) -> None:
    """QEMU, for one, writes whatever is in its buffer if a read to widen a write fails."""
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.flush()
        await here.write(0, B)
        await here.write(OBJECT_SIZE, C)
        found: list[bytes] = []

        async def read(offset: int) -> None:
            found.append(await here.read(offset, BLOCK))

        async with trio.open_nursery() as nursery:
            for node in cluster.nodes.values():
                node.clean = False
                node.stop()
                await node._ended.wait()
            for offset in (0, OBJECT_SIZE):
                nursery.start_soon(read, offset)
            await trio.testing.wait_all_tasks_blocked()
            assert not found
            await lose_power(cluster, here, data_object(LAYER, 1))
        assert sorted(found) == [bytes(BLOCK), B]


async def test_a_read_fails_if_the_vdi_is_taken_over_before_the_map_is_mended(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        replicator = here.volume.replicator
        assert replicator is not None
        async with here.volume._capturing:  # The map is not mended meanwhile.
            here.volume._is_losing()
            replicator.fence("taken over")
            for node in cluster.nodes.values():
                node.stop()
            await wait_until(lambda: not here.router.links)
            with trio.fail_after(5), pytest.raises(OSError, match="read") as failure:
                await here.read(0, BLOCK)
            assert failure.value.errno == errno.EIO


async def test_a_vdi_whose_writes_were_lost_is_compared_by_its_next_holder(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        here = await mount_of(cluster, etcd)
        await here.write(0, A)
        await lose_power(cluster, here)
        await has_mended(here)
        await let_go(here)
        assert not etcd.record.clean


async def test_what_only_seemed_lost_stays(tmp_path: Path) -> None:
    """All daemons were started anew at the same time: their files are as they were."""
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        here = await mount_of(cluster, etcd)
        await here.write(0, A)
        await here.flush()
        await here.write(0, B)
        await here.write(OBJECT_SIZE, C)
        await lose_power(cluster, here)
        await has_mended(here)
        assert await here.read(0, BLOCK) == B
        assert await here.read(OBJECT_SIZE, BLOCK) == C
        await let_go(here)
        there = await mount_of(cluster, etcd)
        await there.volume.attach()
        assert await there.read(OBJECT_SIZE, BLOCK) == C


async def test_what_was_deleted_before_does_not_come_back(tmp_path: Path) -> None:
    """The discard was durable, the deletion was not, nor what was then made in its place."""
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord(2 * OBJECT_SIZE)
        here = await mount_of(cluster, etcd)
        await here.write(OBJECT_SIZE, A)
        await here.flush()
        kept = files_of(cluster, data_object(LAYER, 1))
        await here.volume.punch(OBJECT_SIZE, OBJECT_SIZE)
        await here.flush()
        await wait_until(lambda: not any(file.exists() for file in kept))
        await here.write(OBJECT_SIZE + BLOCK, B)
        await go_back(cluster, here, kept)
        await has_mended(here)
        assert await here.read(OBJECT_SIZE, 2 * BLOCK) == bytes(2 * BLOCK)
        await here.write(OBJECT_SIZE + BLOCK, C)
        assert await here.read(OBJECT_SIZE, 2 * BLOCK) == bytes(BLOCK) + C


async def test_what_was_to_be_deleted_stays_where_a_loss_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the discard was durable, nor what was made in its place."""
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord(2 * OBJECT_SIZE)
        here = await mount_of(cluster, etcd)
        await here.write(OBJECT_SIZE, A)
        await here.flush()
        replicator = here.volume.replicator
        assert replicator is not None
        kept = files_of(cluster, data_object(LAYER, 1))
        await here.volume.punch(OBJECT_SIZE, OBJECT_SIZE)
        written = trio.Event()

        async def fail() -> None:
            await written.wait()
            raise UnreachableError("a node is away")

        async def flush() -> None:
            with pytest.raises(OperationError, match="EHOSTUNREACH"):
                await here.flush()

        with monkeypatch.context() as patched:
            patched.setattr(replicator.unflushed, "make_durable", fail)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                await trio.testing.wait_all_tasks_blocked()
                await here.write(OBJECT_SIZE + BLOCK, B)
                written.set()
        await go_back(cluster, here, kept)
        await has_mended(here)
        assert await here.read(OBJECT_SIZE, 2 * BLOCK) == A + bytes(BLOCK)
        await let_go(here)
        there = await mount_of(cluster, etcd)
        await there.volume.attach()
        assert await there.read(OBJECT_SIZE, 2 * BLOCK) == A + bytes(BLOCK)


async def test_a_copy_that_is_gone_leaves_the_frozen_object(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        here = await mount_of(cluster, etcd)
        await here.write(0, A)
        await here.snapshot()
        await here.write(0, B)
        assert here.volume.open_layer != LAYER
        await lose_power(cluster, here, data_object(here.volume.open_layer, 0))
        await has_mended(here)
        assert await here.read(0, BLOCK) == A
        await here.write(BLOCK, C)
        await let_go(here)
        await here.volume.attach()
        assert await here.read(0, 2 * BLOCK) == A + C


def lose(mount: StaticMount, index: int) -> None:
    """As a map does that has none of the members which had the unflushed writes of an object."""
    replicator = mount.volume.replicator
    assert replicator is not None
    unflushed = replicator.unflushed
    unflushed.losses += 1
    unflushed.lost.add(replicator.state(data_object(mount.volume.open_layer, index)).group)
    unflushed.on_loss()
    unflushed._something_lost.set()


async def test_a_copy_in_a_group_that_lost_nothing_stays(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        pgs = len(cluster.map.pools[3])
        first = pg_of(data_object(LAYER, 0), pgs)
        other = next(i for i in range(1, 99) if pg_of(data_object(LAYER, i), pgs) != first)
        for index in (0, other):
            await here.write(index * OBJECT_SIZE, A)
        await here.snapshot()
        for index in (0, other):
            await here.write(index * OBJECT_SIZE, B)
        lose(here, 0)
        await has_mended(here)
        assert await here.read(0, BLOCK) == A
        assert await here.read(other * OBJECT_SIZE, BLOCK) == B


async def test_a_write_that_waits_for_its_map_page_is_not_lost_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.snapshot()
        vdi_map = here.volume._map
        load, codes = vdi_map.load, list[int]()

        async def load_until_lost(index: int) -> None:
            await load(index)
            lose(here, 0)

        vdi_map.pages.clear()
        monkeypatch.setattr(vdi_map, "load", load_until_lost)
        here.volume.write(0, B, codes.append)
        await wait_until(lambda: codes == [0])
        monkeypatch.undo()
        await has_mended(here)
        assert await here.read(0, BLOCK) == B


async def test_a_copy_under_way_when_writes_are_lost_fails(tmp_path: Path) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.snapshot()
        codes: list[int] = []
        here.volume.write(0, B, codes.append)
        await wait_until(lambda: here.volume._copies is not None and here.volume._copies.busy)
        lose(here, 0)
        await wait_until(lambda: codes == [errno.EIO])
        await has_mended(here)
        assert await here.read(0, BLOCK) == A
        await here.write(0, C)
        assert await here.read(0, BLOCK) == C


async def test_a_map_object_that_is_gone_is_not_named_any_more(tmp_path: Path) -> None:
    index = MAP_ENTRIES_PER_OBJECT + 3
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord((index + 1) * OBJECT_SIZE)
        here = await mount_of(cluster, etcd)
        await here.write(0, A)
        await here.flush()
        await here.write(index * OBJECT_SIZE, B)
        flusher, replicator = here.volume.flusher, here.volume.replicator
        assert flusher is not None
        assert replicator is not None
        make_durable = replicator.unflushed.make_durable
        flushes = 0

        async def stored_and_not_durable() -> None:
            nonlocal flushes
            flushes += 1
            if flushes == 2:
                # The data is durable; the map is stored, and in the page cache only.
                await lose_power(cluster, here, map_object(LAYER, 1))
            await make_durable()

        replicator.unflushed.make_durable = stored_and_not_durable  # type: ignore[method-assign]
        await has_mended(here)
        assert await here.read(index * OBJECT_SIZE, BLOCK) == B
        await here.write(index * OBJECT_SIZE, C)
        await let_go(here)
        assert etcd.record.maps == 3
        there = await mount_of(cluster, etcd)
        await there.volume.attach()
        assert await there.read(index * OBJECT_SIZE, BLOCK) == C


async def test_a_snapshot_that_meets_the_loss_does_not_hide_it_from_the_next_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        await here.flush()
        await here.write(OBJECT_SIZE, B)
        hold_changes = here.volume.hold_changes

        async def lost_meanwhile() -> None:
            monkeypatch.undo()
            await here.write(OBJECT_SIZE, C)
            await hold_changes()
            await lose_power(cluster, here)

        monkeypatch.setattr(here.volume, "hold_changes", lost_meanwhile)
        with pytest.raises(SheepError):
            await here.snapshot()
        await has_mended(here)


async def test_what_waits_until_a_loss_is_mended_fails_when_another_mount_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        here = await mount_of(cluster, StaticRecord())
        await here.write(0, A)
        failed: list[int] = []

        async def taken_over(*_: object) -> int:
            # These come before it is known, and wait.
            here.volume.write(0, B, failed.append)
            here.volume.write(OBJECT_SIZE, B, failed.append)
            here.volume.fence("another mount took it over")
            raise FencedError("another mount took it over")

        monkeypatch.setattr("sheepfs.volume.mapping.mend_map", taken_over)
        await lose_power(cluster, here)
        await wait_until(lambda: len(failed) == 2)
        with pytest.raises(OperationError, match="EIO"):
            await here.write(OBJECT_SIZE, C)
        assert failed == [errno.EIO] * 2


async def test_growing_a_vdi_names_no_map_object_that_is_not_durable(tmp_path: Path) -> None:
    index = MAP_ENTRIES_PER_OBJECT
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord((index + 1) * OBJECT_SIZE)
        here = await mount_of(cluster, etcd)
        await here.write(index * OBJECT_SIZE, A)
        replicator = here.volume.replicator
        assert replicator is not None
        make_durable = replicator.unflushed.make_durable
        seen: list[int] = []

        async def grown_meanwhile() -> None:
            if here.volume._map.existing:
                await here.volume.resize((index + 2) * OBJECT_SIZE)
                seen.append(etcd.record.maps)
            await make_durable()

        replicator.unflushed.make_durable = grown_meanwhile  # type: ignore[method-assign]
        await here.flush()
        assert seen == [0]
        assert (etcd.record.maps, etcd.record.size) == (2, (index + 2) * OBJECT_SIZE)


async def test_whoever_waits_for_convergence_does_not_keep_the_vdi_from_being_let_go(
    tmp_path: Path,
) -> None:
    async with static_cluster(tmp_path) as (cluster, _):
        etcd = StaticRecord()
        old = await mount_of(cluster, etcd)
        await old.write(0, A)
        await old.flush()
        await old.end()
        for node in cluster.nodes.values():
            node.store.delete(data_object(LAYER, 0))
        here = await mount_of(cluster, etcd)
        await here.volume.attach()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.snapshot)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10):
                await here.volume.detach()
            nursery.cancel_scope.cancel()
        assert not etcd.record.clean
