"""Layers and roots: what keeps objects alive is read at one moment, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from fakes.snapshot_taker import KEYS, NOW, put, remove, take_snapshot
from sheepfs.core.errors import (
    ProtocolError,
    RetryableError,
    UnreachableError,
    UsageError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import copies_of, serial_of, tag_of
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import LayerRecord, LockRecord
from sheepfs.net.catalog import Catalog, Change, RootMap
from sheepfs.net.store import LeaseGoneError


@pytest.fixture
def catalog(fake_etcd: FakeEtcd) -> Catalog:
    return Catalog(fake_etcd, KEYS, clock=lambda: NOW)


async def test_new_layers_have_the_family_tag_and_their_own_pool(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1", 0, copies=3)
    lease = await fake_etcd.grant(10)
    layers = await catalog.begin_layers(made.id, made.family, 2, 3, lease)
    assert [serial_of(layer) for layer in layers] == [3, 4, 5]
    assert {tag_of(layer) for layer in layers} == {tag_of(made.family)}
    assert {copies_of(layer) for layer in layers} == {2}
    assert await fake_etcd.get(KEYS.pool(2)) is not None
    for layer in layers:
        born = await fake_etcd.get(KEYS.layer(layer))
        building = await catalog.building(layer)
        assert born is not None
        assert LayerRecord.decode(born.value) == LayerRecord(made.id, made.family, NOW)
        assert (born.lease, building.lease) == (0, lease)


async def test_layer_is_not_built_any_more_once_the_lease_has_ended(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(10)
    (layer,) = await catalog.begin_layers(made.id, made.family, 3, 1, lease)
    condition, change = catalog.built(await catalog.building(layer))
    await trio.sleep(11)
    assert await fake_etcd.commit(Transaction([condition], [change])) is None
    with pytest.raises(LeaseGoneError):
        await catalog.building(layer)
    with pytest.raises(LeaseGoneError):
        await catalog.begin_layers(made.id, made.family, 3, 1, lease)
    assert layer in (await catalog.roots(made.family)).frozen


async def test_layers_can_begin_together_with_another_change(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(10)
    rounds: list[list[int]] = []

    async def also(layers: list[int], change: Change) -> None:
        record, revision = await catalog.vdi("vm1")
        if not rounds:
            await catalog.update("vm1", lambda r: dataclasses.replace(r, size=4096))
        rounds.append(layers)
        change.unchanged(KEYS.vdi("vm1"), revision)
        change.put(KEYS.vdi("vm1"), dataclasses.replace(record, next=layers[0]))

    (layer,) = await catalog.begin_layers(made.id, made.family, 3, 1, lease, also)
    record, _ = await catalog.vdi("vm1")
    assert (record.size, record.next) == (4096, layer)
    assert len(rounds) == 2


async def test_layers_do_not_begin_when_the_other_change_has_lost_its_reason(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    async def also(layers: list[int], change: Change) -> None:
        await catalog.vdi("gone")

    with pytest.raises(VdiNotFoundError):
        await catalog.begin_layers(7, 1024, 3, 1, await fake_etcd.grant(10), also)
    with pytest.raises(UsageError):
        await catalog.begin_layers(7, 1024, 6, 1, await fake_etcd.grant(10))
    assert await fake_etcd.get(KEYS.counter("layer")) is None


async def test_layers_that_begin_at_the_same_time_are_all_different(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(1000)
    layers: list[int] = []

    async def begin(count: int) -> None:
        mine = Catalog(fake_etcd.server.client(), KEYS)
        layers.extend(await mine.begin_layers(made.id, made.family, 3, count, lease))

    async with trio.open_nursery() as nursery:
        for count in range(1, 11):
            nursery.start_soon(begin, count)
    assert sorted(serial_of(layer) for layer in layers) == list(range(3, 58))


async def test_roots_are_every_map_of_the_family_and_no_other(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    other = await catalog.create("other.raw", 0)
    await catalog.update("vm1.raw", lambda r: dataclasses.replace(r, maps=0b11))
    kept = await take_snapshot(catalog, fake_etcd, "vm1.raw", "kept")
    gone = await take_snapshot(catalog, fake_etcd, "vm1.raw", "gone")
    await catalog.delete_snapshot("vm1.raw", "gone")
    record, _ = await catalog.vdi("vm1.raw")
    lease = await fake_etcd.grant(10)
    (building,) = await catalog.begin_layers(made.id, made.family, 3, 1, lease)

    roots = await catalog.roots(made.family)
    assert (roots.family, roots.revision) == (made.family, fake_etcd.server.revision)
    assert [dataclasses.replace(root, touched=0) for root in roots.maps] == [
        RootMap(kept.map, 0, f"snapshot {made.id}/kept"),
        RootMap(gone.map, 0, "vm1@gone.raw in the trash"),
        RootMap(made.map, 0b11, "VDI vm1.raw"),
    ]
    assert roots.open == {record.layer}
    assert roots.building == {building}
    opened = {serial_of(layer) for layer in roots.layers}
    assert opened == {2, 4, 5, 6, 7, 8}
    assert roots.frozen == roots.layers - {record.layer, building}
    assert made.layer in roots.frozen

    everything = await catalog.all_roots()
    assert everything == {made.family: roots, other.family: await catalog.roots(other.family)}
    assert (await catalog.roots(999)).maps == []


async def test_layers_of_a_vdi_in_the_trash_stay_open(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await catalog.update("vm1.raw", lambda r: dataclasses.replace(r, next=4711))
    await catalog.delete("vm1.raw")
    roots = await catalog.roots(made.family)
    assert roots.open == {made.layer, 4711}
    assert [root.what for root in roots.maps] == ["vm1.raw in the trash"]
    await catalog.purge()
    roots = await catalog.roots(made.family)
    assert (roots.open, roots.maps, roots.frozen) == (set(), [], {made.layer})


@pytest.mark.parametrize("where", ["vdi", "snapshot", "trashed", "inside", "building", "layer"])
async def test_roots_are_not_known_while_a_record_cannot_be_read(
    catalog: Catalog, fake_etcd: FakeEtcd, where: str
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await catalog.create("vm2.raw", 0)
    await catalog.delete("vm2.raw")
    ((trashed, _),) = await catalog.trash()
    key, value = {
        "vdi": (KEYS.vdi("new"), b'{"format": 3}'),
        "snapshot": (KEYS.snapshot(made.id, "new"), b"{}"),
        "trashed": (KEYS.trashed(99), b""),
        "inside": (KEYS.trashed(99), dataclasses.replace(trashed, record="{}").encode()),
        "building": (KEYS.building + "x", LayerRecord(2, 3).encode()),
        "layer": (KEYS.layer(99), b"[]"),
    }[where]
    await put(fake_etcd, key, value)
    for call in (catalog.roots(made.family), catalog.all_roots()):
        with pytest.raises(ProtocolError, match=key):
            await call
    await remove(fake_etcd, key)
    await catalog.roots(made.family)


async def test_a_vdi_that_cannot_be_shown_as_a_file_is_a_root_all_the_same(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await put(fake_etcd, KEYS.vdis + "a/b", made.encode())
    snapshot = await take_snapshot(catalog, fake_etcd, "vm1.raw", "t")
    await put(fake_etcd, KEYS.snapshot(made.id, ".hidden"), snapshot.encode())
    assert len((await catalog.roots(made.family)).maps) == 4


async def test_reclaim_stays_wanted_when_it_was_wanted_again_meanwhile(catalog: Catalog) -> None:
    await catalog.want_reclaim(1034)
    ((family, revision),) = await catalog.reclaim_wanted()
    assert family == 1034
    await catalog.want_reclaim(1034)
    assert not await catalog.reclaim_done(1034, revision)
    ((_, later),) = await catalog.reclaim_wanted()
    assert await catalog.reclaim_done(1034, later)
    assert await catalog.reclaim_wanted() == []


async def test_layer_that_is_being_built_is_not_forgotten(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1", 0)
    (layer,) = await catalog.begin_layers(made.id, made.family, 3, 1, await fake_etcd.grant(10))
    assert not await catalog.forget_layer(layer)
    await catalog.abandon(layer)
    await catalog.abandon(layer)
    assert [family for family, _ in await catalog.reclaim_wanted()] == [made.family]
    assert await catalog.forget_layer(layer)
    assert (await catalog.roots(made.family)).layers == {made.layer}


async def test_layers_and_maps_of_attached_vdis_are_held(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1", 0)
    await take_snapshot(catalog, fake_etcd, "vm1", "t")
    await catalog.update("vm1", lambda r: dataclasses.replace(r, next=4711))
    assert (await catalog.roots(made.family)).held == set()
    await put(fake_etcd, KEYS.lock(made.id), LockRecord(made.id, 1, "host1:1:/mnt").encode())
    record, _ = await catalog.vdi("vm1")
    assert (await catalog.roots(made.family)).held == {record.layer, 4711, record.map}


async def test_layers_are_found_by_the_vdi_that_they_were_born_for(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    one = await catalog.create("vm1", 0)
    other = await catalog.create("vm2", 0)
    lease = await fake_etcd.grant(10)
    more = await catalog.begin_layers(one.id, one.family, 3, 2, lease)
    assert await catalog.layers_of(one.id) == {one.layer, *more}
    assert await catalog.layers_of(other.id) == {other.layer}


async def test_new_ids_are_never_those_of_vdis(catalog: Catalog) -> None:
    one = await catalog.create("vm1", 0)
    taken = [await catalog.new_id(), await catalog.new_id()]
    other = await catalog.create("vm2", 0)
    assert len({one.id, other.id, *taken}) == 4


async def test_pool_is_asked_for_once(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.want_pool(4)
    revision = fake_etcd.server.revision
    await catalog.want_pool(4)
    assert fake_etcd.server.revision == revision
    assert await fake_etcd.get(KEYS.pool(4)) is not None
    with pytest.raises(UsageError):
        await catalog.want_pool(6)


@pytest.mark.parametrize("happens", [True, False])
async def test_change_whose_answer_got_lost_is_made_once(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock, happens: bool
) -> None:
    rounds = []

    async def decide(change: Change) -> None:
        rounds.append(1)
        change.unchanged(KEYS.pool(5), None)
        change.changes.append(Put(KEYS.pool(5), b""))

    async def is_done() -> bool:
        return await fake_etcd.get(KEYS.pool(5)) is not None

    if happens:
        fake_etcd.lose_next_reply()
    else:
        fake_etcd.fail_next_commit()
    await catalog.commit_surely(decide, is_done)
    assert await is_done()
    assert len(rounds) == (1 if happens else 2)


async def test_change_is_given_up_while_etcd_stays_away(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    async def decide(change: Change) -> None:
        change.changes.append(Put(KEYS.pool(5), b""))

    async def is_done() -> bool:
        return await fake_etcd.get(KEYS.pool(5)) is not None

    fake_etcd.partition()
    with pytest.raises(UnreachableError):
        await catalog.commit_surely(decide, is_done)
    assert trio.current_time() >= 30


# -- reading all maps of a family ------------------------------------------------------------


class Reading:
    """Reads maps of a family, and lets things happen meanwhile."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.meanwhile: dict[int, Callable[[], Awaitable[None]]] = {}
        """What happens behind the reading of a map, the first time."""

    async def __call__(self, root: RootMap) -> None:
        self.read.append(root.map)
        happens = self.meanwhile.pop(root.map, None)
        if happens is not None:
            await happens()


async def test_each_map_is_read_once_while_nothing_moves(catalog: Catalog) -> None:
    made = await catalog.create("vm1", 0)
    await catalog.create("other", 0)
    reading = Reading()
    roots = await catalog.read_maps(made.family, reading)
    assert reading.read == [made.map]
    assert roots.layers == {made.layer}


async def test_a_snapshot_that_came_meanwhile_is_read_and_its_layers_are_left_alone(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1", 0)
    reading = Reading()
    taken: list[int] = []

    async def snapshot() -> None:
        taken.append((await take_snapshot(catalog, fake_etcd, "vm1", "s")).map)

    reading.meanwhile[made.map] = snapshot
    roots = await catalog.read_maps(made.family, reading)
    assert reading.read == [made.map, *taken]
    assert roots.layers == {made.layer}
    assert roots.open == {made.layer}


async def test_a_map_that_is_being_made_is_waited_for(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    """It may name already what its VDI has dropped since."""
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(1000)
    (layer,) = await catalog.begin_layers(made.id, made.family, 3, 1, lease)
    with pytest.raises(RetryableError, match="being made"):
        await catalog.read_maps(made.family, Reading())
    async with trio.open_nursery() as nursery:
        done = trio.Event()

        async def read() -> None:
            await catalog.read_maps(made.family, Reading())
            done.set()

        nursery.start_soon(read)
        await trio.sleep(2)
        assert not done.is_set()
        await catalog.abandon(layer)
        with trio.fail_after(1):
            await done.wait()


async def test_a_map_that_took_over_from_others_meanwhile_is_read_again(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(1000)
    reading = Reading()

    async def share() -> None:
        await catalog.begin_sharing(made.map, lease)
        await catalog.end_sharing(made.map)

    reading.meanwhile[made.map] = share
    await catalog.read_maps(made.family, reading)
    assert reading.read == [made.map, made.map]


async def test_a_map_is_not_read_while_it_takes_over_from_others(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    made = await catalog.create("vm1", 0)
    lease = await fake_etcd.grant(3)
    await catalog.begin_sharing(made.map, lease)
    reading = Reading()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.read_maps, made.family, reading)
        await trio.sleep(2)
        assert reading.read == []
    assert reading.read == [made.map]  # When the lease had ended.
    with pytest.raises(LeaseGoneError):
        await catalog.end_sharing(made.map)
    with pytest.raises(LeaseGoneError):
        await catalog.begin_sharing(made.map, lease)
