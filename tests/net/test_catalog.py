"""VDI records: create, rename, delete, update, and what hostile keys must not break."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from fakes.etcd_process import EtcdProcess
from sheepfs.core.errors import (
    HeldElsewhereError,
    ProtocolError,
    UnreachableError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import MAX_SERIAL, copies_of, make_layer, serial_of, tag_of
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import (
    ClusterConfig,
    LayerRecord,
    LockRecord,
    VdiRecord,
)
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd

GIB = 1 << 30
NOW = 1_700_000_000.0
KEYS = Keys("test")


@pytest.fixture
def catalog(fake_etcd: FakeEtcd) -> Catalog:
    return Catalog(fake_etcd, KEYS, clock=lambda: NOW)


async def put(etcd: FakeEtcd, key: str, value: bytes) -> None:
    await etcd.commit(Transaction([], [Put(key, value)]))


async def lock(etcd: FakeEtcd, vdi: int, owner: str = "other:1:/mnt") -> None:
    await put(etcd, KEYS.lock(vdi), LockRecord(vdi, 1, owner).encode())


async def names(catalog: Catalog) -> list[str]:
    return [name for name, _, _ in await catalog.vdis()]


async def test_missing_cluster_is_a_usage_error_that_says_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match=r"'test'.*start a storage daemon first"):
        await catalog.config()


async def test_config_is_read(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    config = ClusterConfig("ab" * 16)
    await put(fake_etcd, KEYS.config, config.encode())
    assert await catalog.config() == config


async def test_created_vdi_is_found_by_name_and_by_id(catalog: Catalog) -> None:
    made = await catalog.create("vm1.raw", 20 * GIB, 2, 0o600, 7, 8)
    assert (made.size, made.copies, made.mode, made.uid, made.gid) == (20 * GIB, 2, 0o600, 7, 8)
    assert made.created == made.modified == made.changed == NOW
    record, revision = await catalog.vdi("vm1.raw")
    assert record == made
    assert await catalog.find(made.id) == ("vm1.raw", made, revision)
    assert await catalog.find("vm1.raw") == ("vm1.raw", made, revision)
    assert await catalog.vdis() == [("vm1.raw", made, revision)]


async def test_ids_start_at_two_and_are_never_reused(catalog: Catalog) -> None:
    first = await catalog.create("a", 0)
    await catalog.delete("a")
    second = await catalog.create("a", 0)
    assert (first.id, first.layer) == (2, make_layer(2, 2, 3))
    assert (second.id, second.layer) == (3, make_layer(3, 3, 3))
    assert second.map == second.family == second.layer


async def test_create_asks_for_the_pool_once(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.create("a", 0, copies=2)
    pool = await fake_etcd.get(KEYS.pool(2))
    await catalog.create("b", 0, copies=2)
    assert pool is not None
    assert await fake_etcd.get(KEYS.pool(2)) == pool


async def test_create_records_the_birth_of_the_layer(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    made = await catalog.create("a", 0, copies=2)
    born = await fake_etcd.get(KEYS.layer(made.layer))
    assert born is not None
    assert LayerRecord.decode(born.value) == LayerRecord(made.id, made.layer, NOW)
    assert copies_of(made.layer) == 2


async def test_family_tag_is_the_serial_modulo_64(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await put(fake_etcd, KEYS.counter("layer"), b"199")
    made = await catalog.create("a", 0)
    assert (serial_of(made.layer), tag_of(made.layer)) == (200, 200 % 64)


async def test_create_stops_when_the_layer_ids_are_used_up(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await put(fake_etcd, KEYS.counter("layer"), b"%d" % (MAX_SERIAL - 1))
    assert serial_of((await catalog.create("a", 0)).layer) == MAX_SERIAL
    with pytest.raises(UsageError, match="used up"):
        await catalog.create("b", 0)


async def test_create_of_an_existing_name_is_refused(catalog: Catalog) -> None:
    await catalog.create("a", 0)
    with pytest.raises(VdiExistsError):
        await catalog.create("a", 0)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a@b", "x" * 129, "a\nb", "a\udcff"])
async def test_create_refuses_names_that_cannot_be_files(catalog: Catalog, name: str) -> None:
    with pytest.raises(UsageError):
        await catalog.create(name, 0)


async def test_create_refuses_bad_sizes_and_copies(catalog: Catalog) -> None:
    with pytest.raises(UsageError):
        await catalog.create("a", -1)
    with pytest.raises(UsageError):
        await catalog.create("a", (1 << 50) + 1)
    with pytest.raises(UsageError):
        await catalog.create("a", 0, copies=6)


async def test_fifty_creates_at_once_get_fifty_ids(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    async def create(number: int) -> None:
        await Catalog(fake_etcd.server.client(), KEYS).create(f"vm{number:02}", 0)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(create, number)
    vdis = await catalog.vdis()
    assert {record.id for _, record, _ in vdis} == set(range(2, 52))
    assert {serial_of(record.layer) for _, record, _ in vdis} == set(range(2, 52))


async def test_one_of_two_creates_of_one_name_wins(
    fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    outcomes: list[VdiRecord | VdiExistsError] = []

    async def create() -> None:
        try:
            outcomes.append(await Catalog(fake_etcd.server.client(), KEYS).create("a", 0))
        except VdiExistsError as error:
            outcomes.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(create)
        nursery.start_soon(create)
    assert sum(isinstance(outcome, VdiExistsError) for outcome in outcomes) == 1


async def test_create_whose_answer_got_lost_shows_when_it_is_tried_again(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    fake_etcd.lose_next_reply()
    with pytest.raises(UnreachableError):
        await catalog.create("a", 0)
    with pytest.raises(VdiExistsError):
        await catalog.create("a", 0)


async def test_hostile_keys_are_left_out_of_the_list_and_logged_once(
    catalog: Catalog, fake_etcd: FakeEtcd, caplog: pytest.LogCaptureFixture
) -> None:
    good = await catalog.create("good", 0)
    bad_names = ["", "..", "a/b", "x" * 200, b"\xff\xfe".decode(errors="surrogateescape"), "n\x1b"]
    for name in bad_names:
        await put(fake_etcd, KEYS.vdis + name, good.encode())
    bad_values = [b"", b"{", b"[]", b"null", b'{"format": 99}', b"[" * 100_000, b"\xff"]
    for number, value in enumerate(bad_values):
        await put(fake_etcd, KEYS.vdi(f"bad{number}"), value)
    with caplog.at_level(logging.WARNING):
        assert await names(catalog) == ["good"]
        assert await names(catalog) == ["good"]
    assert len(caplog.records) == len(bad_names) + len(bad_values)


async def test_record_of_a_newer_format_is_refused_by_name(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await put(fake_etcd, KEYS.vdi("new"), b'{"format": 3, "id": 5}')
    with pytest.raises(ProtocolError, match="format 3"):
        await catalog.vdi("new")


async def test_vdi_that_is_not_there_is_not_found(catalog: Catalog) -> None:
    for call in (
        catalog.vdi("a"), catalog.find("a"), catalog.find(7), catalog.delete("a"),
        catalog.rename("a", "b"), catalog.update("a", lambda record: record),
    ):  # fmt: skip
        with pytest.raises(VdiNotFoundError):
            await call


async def test_rename_keeps_the_id_and_frees_the_old_name(catalog: Catalog) -> None:
    made = await catalog.create("old", GIB)
    await catalog.rename("old", "new")
    name, record, _ = await catalog.find(made.id)
    assert (name, record) == ("new", made)
    assert await names(catalog) == ["new"]
    await catalog.create("old", 0)


async def test_rename_while_attached_is_allowed(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    made = await catalog.create("old", 0)
    await lock(fake_etcd, made.id)
    await catalog.rename("old", "new")
    assert (await catalog.find(made.id))[0] == "new"


async def test_rename_onto_a_taken_name_is_refused_unless_it_may_replace(
    catalog: Catalog,
) -> None:
    mover = await catalog.create("a", 0)
    gone = await catalog.create("b", GIB)
    with pytest.raises(VdiExistsError):
        await catalog.rename("a", "b")
    await catalog.rename("a", "b", replace=True)
    assert [(n, r.id) for n, r, _ in await catalog.vdis()] == [("b", mover.id)]
    with pytest.raises(VdiNotFoundError):
        await catalog.find(gone.id)
    assert [item.id for item, _ in await catalog.trash()] == [gone.id]


async def test_rename_does_not_replace_an_attached_vdi(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("a", 0)
    held = await catalog.create("b", 0)
    await lock(fake_etcd, held.id)
    with pytest.raises(HeldElsewhereError, match="'b' is attached by other:1:/mnt"):
        await catalog.rename("a", "b", replace=True)
    assert await names(catalog) == ["a", "b"]


async def test_rename_to_itself_changes_nothing(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.create("a", 0)
    before = fake_etcd.server.revision
    await catalog.rename("a", "a", replace=True)
    assert fake_etcd.server.revision == before


async def test_deleted_vdi_lies_in_the_trash_with_its_record(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("a", GIB, copies=2)
    changed = await catalog.update("a", lambda r: dataclasses.replace(r, maps=0b101))
    await catalog.delete("a", keep_s=60)
    assert await names(catalog) == []
    ((trashed, _),) = await catalog.trash()
    assert (trashed.id, trashed.name, trashed.tag) == (made.id, "a", "")
    assert (trashed.family, trashed.deleted, trashed.until) == (made.family, NOW, NOW + 60)
    assert VdiRecord.decode(trashed.record.encode()) == changed
    assert await fake_etcd.get(KEYS.vdi_name(made.id)) is None
    assert await catalog.reclaim_wanted() == []


async def test_delete_at_once_asks_for_reclaim_instead(catalog: Catalog) -> None:
    made = await catalog.create("a", GIB)
    await catalog.delete("a", keep_s=0)
    assert await catalog.trash() == []
    assert [family for family, _ in await catalog.reclaim_wanted()] == [made.family]


async def test_delete_of_a_held_vdi_is_refused_but_to_its_holder(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("a", 0)
    await lock(fake_etcd, made.id, "me:1:/mnt")
    with pytest.raises(HeldElsewhereError, match="me:1:/mnt"):
        await catalog.delete("a")
    with pytest.raises(HeldElsewhereError):
        await catalog.delete("a", owner="me:2:/mnt")
    assert (await catalog.locks())[made.id].owner == "me:1:/mnt"
    await catalog.delete("a", owner="me:1:/mnt")
    assert await catalog.locks() == {}


async def test_updates_at_the_same_time_all_happen(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    made = await catalog.create("a", 0)

    async def grow(which: str | int) -> None:
        mine = Catalog(fake_etcd.server.client(), KEYS)
        await mine.update(which, lambda r: dataclasses.replace(r, size=r.size + 1))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(grow, "a")
            nursery.start_soon(grow, made.id)
    assert (await catalog.vdi("a"))[0].size == 20


async def test_counter_that_is_no_number_stops_creation(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await put(fake_etcd, KEYS.counter("vdi"), b"many")
    with pytest.raises(ProtocolError, match="counters/vdi"):
        await catalog.create("a", 0)


async def test_name_key_that_points_nowhere_is_not_found(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("a", 0)
    await put(fake_etcd, KEYS.vdi_name(77), b'{"format": 2, "name": "a"}')
    with pytest.raises(VdiNotFoundError):
        await catalog.find(77)
    assert (await catalog.find(made.id))[0] == "a"


async def test_life_of_a_vdi_on_a_real_etcd(etcd_process: EtcdProcess) -> None:
    keys = Keys("catalog-life")
    async with Etcd(etcd_process.endpoint) as etcd:
        catalog = Catalog(etcd, keys, clock=lambda: NOW)
        made = await catalog.create("a", GIB)
        gone = await catalog.create("b", GIB)
        await catalog.rename("a", "b", replace=True)
        assert await catalog.find(made.id) == ("b", *await catalog.vdi("b"))
        await catalog.delete("b")
        assert [t.id for t, _ in await catalog.trash()] == [made.id, gone.id]
        assert await catalog.restore(gone.id) == "b"
        assert await catalog.restore(made.id, "a") == "a"
        for name in ("a", "b"):
            await catalog.delete(name)
        assert len(await catalog.purge()) == 2
        lease = await etcd.grant(10)
        (layer,) = await catalog.begin_layers(made.id, made.family, 3, 1, lease)
        assert (await catalog.roots(made.family)).building == {layer}
        await catalog.abandon(layer)
        for family, revision in await catalog.reclaim_wanted():
            for each in (await catalog.roots(family)).frozen:
                assert await catalog.forget_layer(each)
            assert await catalog.reclaim_done(family, revision)
        left, _ = await etcd.list(keys.root)
        assert [kv.key.removeprefix(keys.root) for kv in left] == [
            "counters/layer", "counters/vdi", "pools/3",
        ]  # fmt: skip
