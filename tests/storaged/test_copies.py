"""Copy-on-write on the replicas: what a copy is made of, what it waits for, and how it goes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fakes.static_cluster import PG_COUNT, StaticCluster, StaticNode, static_cluster
from fakes.waiting import wait_until
from sheepfs.core.errors import (
    DiskError,
    NoSpaceError,
    ObjectNotFoundError,
    SheepError,
    StaleObjectError,
    UnreachableError,
    UsageError,
)
from sheepfs.core.geometry import data_object, layer_of, make_layer, map_object, pg_of
from sheepfs.core.wire import BASE, FLAG_COPY, FLAG_CREATE, FLAG_KEEP_MAPS, RANGE, Header, Op
from sheepfs.net.router import Router
from storaged.logic.catchup import waves
from storaged.operations.comparing import decode_layout
from storaged.space.removal import Removal

BLOCK = 4096
OLD, OPEN, LATER = (make_layer(serial, 2, 3) for serial in (2, 3, 4))
BASE_OID, OID, LAST = (data_object(layer, 0) for layer in (OLD, OPEN, LATER))
V = 1 << 40
"""Versions of one attach."""


class Holder:
    """Sends what a holder would, to all nodes or to one."""

    def __init__(self, cluster: StaticCluster, router: Router) -> None:
        self.cluster = cluster
        self.router = router

    async def call(
        self, op: int, oid: int, body: bytes = b"", *, node: int, **fields: Any
    ) -> tuple[Header, bytes]:
        link = self.router.link(node)
        assert link is not None
        with trio.fail_after(10):
            return await link.call(
                op,
                body,
                oid=oid,
                pool=3,
                pg=fields.pop("pg", pg_of(oid, PG_COUNT)),
                epoch=self.router.map.epoch,
                vdi=2,
                token=1,
                **fields,
            )

    async def all(self, op: int, oid: int, body: bytes = b"", **fields: Any) -> None:
        group = self.cluster.map.pools[3][pg_of(oid, PG_COUNT)]
        async with trio.open_nursery() as nursery:
            for node in group.members:

                async def one(node: int = node) -> None:
                    await self.call(op, oid, body, node=node, **fields)

                nursery.start_soon(one)

    async def create(self, oid: int, data: bytes, version: int, offset: int = 0) -> None:
        await self.all(
            Op.WRITE, oid, data, offset=offset, span=len(data), version=version, flags=FLAG_CREATE
        )

    async def copy(self, base: int, oid: int, data: bytes, prev: int, version: int) -> None:
        await self.all(Op.WRITE, oid, **copying(base, data, prev, version))

    async def flush(self) -> None:
        await self.all(Op.FLUSH, 0)


def copying(base: int, data: bytes, prev: int, version: int) -> dict[str, Any]:
    body = BASE.pack(layer_of(base)) + data
    return {"body": body, "span": len(data), "prev": prev, "version": version, "flags": FLAG_COPY}


@asynccontextmanager
async def holding(path: Path) -> AsyncIterator[tuple[StaticCluster, Holder]]:
    async with static_cluster(path) as (cluster, router):
        yield cluster, Holder(cluster, router)


def on_disk(node: StaticNode, oid: int, length: int = 4 * BLOCK) -> bytes:
    return b"".join(node.store.read(oid, 0, length, wait=True) or ())


def own_bytes(node: StaticNode, oid: int) -> int:
    entry = node.store.get(oid)
    assert entry is not None
    return entry.info().allocated


async def test_a_copy_is_made_on_every_member_and_then_written_to(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * 4 * BLOCK, V + 1)
        await holder.copy(BASE_OID, OID, b"b" * 100, V + 1, V + 2)
        for node in cluster.nodes.values():
            assert on_disk(node, OID) == b"b" * 100 + b"a" * (4 * BLOCK - 100)
            assert on_disk(node, BASE_OID) == b"a" * 4 * BLOCK
            assert own_bytes(node, OID) == BLOCK
        await holder.copy(BASE_OID, OID, b"c" * 100, V + 1, V + 2)
        assert on_disk(cluster.nodes[1], OID)[:1] == b"b", "a retry changes nothing"


async def test_a_pure_copy_and_a_copy_with_a_hole(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * 4 * BLOCK, V + 1)
        await holder.copy(BASE_OID, OID, b"", V + 1, V + 2)
        fields = {**copying(OID, b"", V + 2, V + 3), "offset": BLOCK, "span": BLOCK}
        await holder.all(Op.PUNCH, LAST, **fields)
        expected = b"a" * BLOCK + bytes(BLOCK) + b"a" * 2 * BLOCK
        assert [on_disk(node, OID) for node in cluster.nodes.values()] == [b"a" * 4 * BLOCK] * 3
        assert [on_disk(node, LAST) for node in cluster.nodes.values()] == [expected] * 3


async def test_copies_of_maps(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        base, oid = map_object(OLD, 1), map_object(OPEN, 1)
        await holder.create(base, b"m" * BLOCK, V + 1)
        await holder.copy(base, oid, b"", V + 1, V + 2)
        assert {on_disk(node, oid, BLOCK) for node in cluster.nodes.values()} == {b"m" * BLOCK}


@pytest.mark.parametrize("prev", [V + 1, V + 3])
async def test_a_base_that_is_missing_or_at_another_version_is_stale(
    tmp_path: Path, prev: int
) -> None:
    async with holding(tmp_path) as (cluster, holder):
        if prev == V + 3:
            await holder.create(BASE_OID, b"a" * BLOCK, V + 1)
        with pytest.raises(StaleObjectError) as caught:
            await holder.call(Op.WRITE, OID, node=1, **copying(BASE_OID, b"", prev, V + 4))
        assert caught.value.version == (V + 1 if prev == V + 3 else 0)
        assert cluster.nodes[1].store.get(OID) is None


async def test_senseless_copies_are_refused(tmp_path: Path) -> None:
    async with holding(tmp_path) as (_, holder):
        good = copying(BASE_OID, b"", V, V + 1)
        other_pg = next(
            tag
            for tag in range(64)
            if pg_of(make_layer(2, tag, 3) << 28, PG_COUNT) != pg_of(OID, PG_COUNT)
        )
        for changed in (
            {"body": BASE.pack(OPEN)},
            {"body": BASE.pack(1 << 60)},
            {"body": BASE.pack(make_layer(2, 2, 2))},
            {"body": BASE.pack(make_layer(2, other_pg, 3))},
            {"body": b"short"},
            {"body": BASE.pack(OLD), "flags": FLAG_COPY | FLAG_CREATE},
            {"span": 5, "prev": V + 1},
        ):
            with pytest.raises((UsageError, StaleObjectError)):
                await holder.call(Op.WRITE, OID, node=1, **{**good, **changed})
        with pytest.raises(UsageError):
            await holder.call(Op.DELETE, OID, node=1, **{**good, "body": BASE.pack(OLD)})


async def test_a_suspect_base_is_resolved_first(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * BLOCK, V + 1)
        await holder.flush()
        for node in cluster.nodes.values():
            node.clean = False
            node.stop()
        await wait_until(lambda: not holder.router.links)
        for node in cluster.nodes.values():
            await node.start()
        cluster.publish([1])
        await wait_until(lambda: 1 in holder.router.links)
        assert cluster.nodes[1].store.suspects() == [BASE_OID]
        await holder.copy(BASE_OID, OID, b"", V + 1, V + 2)
        assert cluster.nodes[1].store.suspects() == []
        assert on_disk(cluster.nodes[1], OID, BLOCK) == b"a" * BLOCK


async def test_a_joining_member_levels_the_base_before_it_copies(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * 2 * BLOCK, V + 1)
        await holder.flush()
        cluster.auto_join = False
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        await wait_until(lambda: holder.router.map.epoch == cluster.map.epoch)
        await holder.all(Op.WRITE, BASE_OID, b"z" * BLOCK, span=BLOCK, prev=V + 1, version=V + 2)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await wait_until(lambda: 3 in holder.router.links)
        await wait_until(lambda: holder.router.map.epoch == cluster.map.epoch)
        guarded = cluster.nodes[3].replica.is_guarded
        await wait_until(lambda: guarded(3, pg_of(OID, PG_COUNT)))
        level = cluster.nodes[3].replica.level_of(3, pg_of(OID, PG_COUNT))
        await wait_until(lambda: level.is_complete)
        level.fresh.discard(BASE_OID)
        await holder.copy(BASE_OID, OID, b"b", V + 2, V + 3)
        copies = {on_disk(node, OID, 2 * BLOCK) for node in cluster.nodes.values()}
        assert copies == {b"b" + b"z" * (BLOCK - 1) + b"a" * BLOCK}


async def test_a_joining_member_without_the_base_says_that_it_is_stale(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        cluster.auto_join = False
        cluster.publish([1, 2], [3])
        await wait_until(lambda: holder.router.map.epoch == cluster.map.epoch)
        guarded = cluster.nodes[3].replica.is_guarded
        await wait_until(lambda: guarded(3, pg_of(OID, PG_COUNT)))
        level = cluster.nodes[3].replica.level_of(3, pg_of(OID, PG_COUNT))
        await wait_until(lambda: level.is_complete)
        with pytest.raises(StaleObjectError):
            await holder.call(Op.WRITE, OID, node=3, **copying(BASE_OID, b"", V + 1, V + 2))


async def test_a_copy_waits_while_its_base_is_held(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder), trio.open_nursery() as nursery:
        await holder.create(BASE_OID, b"a" * BLOCK, V + 1)
        replica = cluster.nodes[1].replica
        replica.hold(BASE_OID)
        done = trio.Event()

        async def copy() -> None:
            await holder.copy(BASE_OID, OID, b"", V + 2, V + 3)
            done.set()

        async def write() -> None:
            await holder.all(Op.WRITE, BASE_OID, b"z", span=1, prev=V + 1, version=V + 2)

        nursery.start_soon(write)
        await wait_until(lambda: on_disk(cluster.nodes[2], BASE_OID, 1) == b"z")
        await wait_until(lambda: on_disk(cluster.nodes[3], BASE_OID, 1) == b"z")
        nursery.start_soon(copy)
        await wait_until(lambda: cluster.nodes[2].store.get(OID) is not None)
        assert cluster.nodes[1].store.get(OID) is None
        replica.release(BASE_OID)
        with trio.fail_after(5):
            await done.wait()
        assert {on_disk(node, OID, 1) for node in cluster.nodes.values()} == {b"z"}


async def test_deleting_a_base_leaves_its_copies_whole(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * 4 * BLOCK, V + 1)
        await holder.copy(BASE_OID, OID, b"b", V + 1, V + 2)
        await holder.copy(OID, LAST, b"c", V + 2, V + 3)
        cluster.nodes[2].replica.hold(OID)  # Busy for longer than anybody waits.
        await holder.all(Op.DELETE, BASE_OID, prev=V + 1, version=V + 4)
        for node in cluster.nodes.values():
            assert node.store.get(BASE_OID) is None
            assert on_disk(node, OID) == b"b" + b"a" * (4 * BLOCK - 1)
            assert on_disk(node, LAST) == b"c" + b"a" * (4 * BLOCK - 1)


async def test_a_joining_member_deletes_without_a_pull(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * BLOCK, V + 1)
        cluster.auto_join = False
        cluster.publish([1, 2], [3])
        await wait_until(lambda: holder.router.map.epoch == cluster.map.epoch)
        replica = cluster.nodes[3].replica
        await wait_until(lambda: replica.is_guarded(3, pg_of(OID, PG_COUNT)))
        replica.fresh_of(3, pg_of(OID, PG_COUNT)).discard(BASE_OID)
        for node in (1, 2):
            cluster.nodes[node].stop()
        await holder.call(Op.DELETE, BASE_OID, node=3, prev=V + 7, version=V + 8)
        assert cluster.nodes[3].store.get(BASE_OID) is None


async def test_sums_layout_and_list_tell_what_is_shared(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        await holder.create(BASE_OID, b"a" * 4 * BLOCK, V + 1)
        await holder.copy(BASE_OID, OID, b"b" * BLOCK, V + 1, V + 2)
        with pytest.raises(ObjectNotFoundError):
            await holder.call(Op.SUMS, LAST, node=1)
        for restart in (False, True):
            if restart:
                cluster.nodes[1].stop()
                await wait_until(lambda: 1 not in holder.router.links)
                await cluster.nodes[1].start()
                cluster.publish([1, 2, 3])
                await wait_until(lambda: 1 in holder.router.links)
            header, sums = await holder.call(Op.SUMS, OID, node=1)
            assert (header.version, sums) == (V + 2, cluster.nodes[2].store.sums(OID))
            header, body = await holder.call(Op.LAYOUT, OID, node=1)
            layout = decode_layout(body)
            assert (header.version, layout.layers) == (V + 2, (OLD,))
            assert layout.sources[:5] == b"\0\1\1\1\0"
            _, body = await holder.call(Op.LIST, OID, node=1)
            rows = {row[0]: row[1:] for row in json.loads(body)}
            assert rows == {BASE_OID: [V + 1, 0, 0, 4 * BLOCK], OID: [V + 2, 0, 0, BLOCK]}


async def test_a_member_that_catches_up_shares_what_the_others_share(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder):
        cluster.nodes[3].stop()
        cluster.publish([1, 2])
        await wait_until(lambda: holder.router.map.epoch == cluster.map.epoch)
        for index in range(6):
            oids = [data_object(layer, index) for layer in (OLD, OPEN, LATER)]
            await holder.create(oids[0], bytes([index + 1]) * 4 * BLOCK, V + 1)
            await holder.copy(oids[0], oids[1], b"b", V + 1, V + 2)
            await holder.copy(oids[1], oids[2], b"c" * BLOCK, V + 2, V + 3)
        await cluster.nodes[3].start()
        cluster.publish([1, 2], [3])
        await wait_until(lambda: all(3 in g.sync for g in cluster.map.pools[3]))
        for index in range(6):
            for layer, own in ((OLD, 4), (OPEN, 1), (LATER, 1)):
                oid = data_object(layer, index)
                assert on_disk(cluster.nodes[3], oid) == on_disk(cluster.nodes[1], oid)
                assert own_bytes(cluster.nodes[3], oid) == own * BLOCK
        counters = cluster.nodes[3].replica.counters
        assert counters.pulled_bytes == 6 * 6 * BLOCK


async def test_reclaim_removes_what_no_range_names_and_keeps_copies_whole(tmp_path: Path) -> None:
    async with holding(tmp_path) as (cluster, holder), trio.open_nursery() as nursery:
        store = cluster.nodes[1].store
        for index in range(8):
            base, oid = data_object(OLD, index), data_object(OPEN, index)
            await holder.create(base, bytes([index + 1]) * BLOCK, V + 1)
            await holder.copy(base, oid, b"", V + 1, V + 2)
        await holder.create(map_object(OLD, 0), b"m" * BLOCK, V + 1)
        removal = Removal(cluster.nodes[1].replica, nursery)
        cluster.nodes[1].server.handlers[Op.RECLAIM] = removal.handle
        live = RANGE.pack(1, 3) + RANGE.pack(6, 7)
        for keep, answer in (
            (FLAG_KEEP_MAPS, {"left": 0, "removed": 5}),
            (FLAG_KEEP_MAPS, {"left": 0, "removed": 0}),
            (0, {"left": 0, "removed": 1}),
        ):
            _, body = await holder.call(Op.RECLAIM, 0, live, node=1, version=OLD, flags=keep)
            assert json.loads(body) == answer
        assert sorted(store.of_layer(OLD)) == [data_object(OLD, i) for i in (1, 2, 6)]
        for index in range(8):
            oid = data_object(OPEN, index)
            assert on_disk(cluster.nodes[1], oid, BLOCK) == bytes([index + 1]) * BLOCK
        cluster.nodes[1].replica.hold(data_object(OLD, 1))
        _, body = await holder.call(Op.RECLAIM, 0, b"", node=1, version=OLD)
        assert json.loads(body) == {"left": 1, "removed": 2}
        with pytest.raises(UsageError):
            await holder.call(Op.RECLAIM, 0, b"odd", node=1, version=OLD)


def test_objects_are_pulled_after_what_they_may_be_made_of() -> None:
    oids = [LAST, map_object(OPEN, 0), BASE_OID, OID, data_object(OLD, 4)]
    assert waves(oids) == [[BASE_OID, data_object(OLD, 4)], [map_object(OPEN, 0), OID], [LAST]]


@pytest.mark.parametrize(
    ("method", "error"),
    [("read", DiskError("Input/output error")), ("write", NoSpaceError("the disk is full"))],
)
async def test_a_map_is_copied_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: SheepError
) -> None:
    """A copy that failed half-way is sent again: it must not be taken for done."""
    base, copy = map_object(OLD, 0), map_object(OPEN, 0)
    async with static_cluster(tmp_path) as (cluster, router):
        holder = Holder(cluster, router)
        await holder.create(base, b"a" * BLOCK, V + 1)
        await holder.all(
            Op.WRITE, base, b"b" * BLOCK, offset=2 * BLOCK, span=BLOCK, prev=V + 1, version=V + 2
        )
        store = cluster.nodes[1].store
        original = getattr(store, method)
        calls: list[int] = []

        def failing(oid: int, offset: int, *args: Any, **fields: Any) -> Any:
            if offset == 2 * BLOCK and oid in (base, copy):
                calls.append(oid)
                raise error
            return original(oid, offset, *args, **fields)

        with monkeypatch.context() as patch:
            patch.setattr(store, method, failing)
            with pytest.raises((type(error), UnreachableError)):
                await holder.call(
                    Op.WRITE, copy, BASE.pack(OLD), node=1, prev=V + 2, version=V + 3,
                    flags=FLAG_COPY,
                )  # fmt: skip
        assert calls
        assert store.get(copy) is None
        await wait_until(lambda: router.link(1))
        await holder.copy(base, copy, b"", V + 2, V + 3)
        for node in cluster.nodes.values():
            assert node.store.sums(copy) == node.store.sums(base)
