"""Snapshots' records, the names that they keep, and what happens at the same time."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from fakes.snapshot_taker import KEYS, NOW, put, take_snapshot
from sheepfs.core.errors import (
    ProtocolError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotProtectedError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.kv import Transaction
from sheepfs.core.metadata import NameRecord, RetiredRecord, SnapshotRecord
from sheepfs.net.catalog import Catalog


@pytest.fixture
def catalog(fake_etcd: FakeEtcd) -> Catalog:
    return Catalog(fake_etcd, KEYS, clock=lambda: NOW)


class UnevenEtcd(FakeEtcd):
    """Answers sooner or later, so that calls of several clients come in any order."""

    async def _call(self) -> None:
        await trio.sleep(random.uniform(0, 0.01))
        await super()._call()


async def files(catalog: Catalog) -> list[str]:
    return [snapshot.file for snapshot in await catalog.snapshots()]


async def keeps_name(etcd: FakeEtcd, name: str) -> bool:
    return await etcd.get(KEYS.retired_name(name)) is not None


async def test_snapshots_are_listed_by_vdi_and_tag(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    one = await catalog.create("vm1.raw", 7)
    await catalog.create("data", 8)
    second = await take_snapshot(catalog, fake_etcd, "vm1.raw", "b")
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await take_snapshot(catalog, fake_etcd, "data", "z")
    assert await files(catalog) == ["data@z", "vm1@a.raw", "vm1@b.raw"]
    assert [s.tag for s in await catalog.snapshots(one.id)] == ["a", "b"]
    assert await catalog.snapshots(77) == []
    found = await catalog.snapshot("vm1.raw", "b")
    assert found.record == second
    assert found == (await catalog.snapshots(one.id))[1]


async def test_snapshot_that_is_not_there_is_not_found(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    for call in (
        catalog.snapshot("vm1.raw", "x"), catalog.snapshot("no", "x"),
        catalog.delete_snapshot("vm1.raw", "x"), catalog.rename_snapshot("vm1.raw", "x", "y"),
        catalog.protect("vm1.raw", "x", True), catalog.update_snapshot(2, "x", lambda r: r),
    ):  # fmt: skip
        with pytest.raises(SnapshotNotFoundError):
            await call
    assert SnapshotNotFoundError.errno == VdiNotFoundError.errno


async def test_hostile_snapshots_are_left_out_of_the_list_and_logged_once(
    catalog: Catalog, fake_etcd: FakeEtcd, caplog: pytest.LogCaptureFixture
) -> None:
    made = await catalog.create("vm1.raw", 0)
    good = (await take_snapshot(catalog, fake_etcd, "vm1.raw", "good")).encode()
    for tag in ("", ".hidden", "-x", "a/b", "a@b", "x\x1b", "y" * 65, "t.raw", "a\udcff"):
        await put(fake_etcd, KEYS.snapshot(made.id, tag), good)
    await put(fake_etcd, KEYS.snapshot(made.id, "bad"), b"{")
    await put(fake_etcd, KEYS.snapshot(77, "foreign"), good)
    orphan = dataclasses.replace(SnapshotRecord.decode(good), vdi=78)
    await put(fake_etcd, KEYS.snapshot(78, "orphan"), orphan.encode())
    await put(fake_etcd, KEYS.vdi_name(79), NameRecord("../up").encode())
    with caplog.at_level(logging.WARNING):
        assert await files(catalog) == ["vm1@good.raw"]
        assert await files(catalog) == ["vm1@good.raw"]
    assert len(caplog.records) == 13


async def test_snapshots_follow_a_vdi_that_is_renamed(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("old.raw", 0)
    await take_snapshot(catalog, fake_etcd, "old.raw", "t")
    await catalog.rename("old.raw", "new.raw")
    assert await files(catalog) == ["new@t.raw"]
    with pytest.raises(SnapshotNotFoundError):
        await catalog.snapshot("old.raw", "t")
    await catalog.create("old.raw", 0)


async def test_snapshot_can_be_renamed_but_not_onto_another(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "b")
    with pytest.raises(SnapshotExistsError, match=r"vm1@b.raw"):
        await catalog.rename_snapshot("vm1.raw", "a", "b")
    with pytest.raises(UsageError):
        await catalog.rename_snapshot("vm1.raw", "a", "x@y")
    before = fake_etcd.server.revision
    await catalog.rename_snapshot("vm1.raw", "a", "a")
    assert fake_etcd.server.revision == before
    await catalog.rename_snapshot("vm1.raw", "a", "c")
    assert await files(catalog) == ["vm1@b.raw", "vm1@c.raw"]
    assert (await catalog.snapshot("vm1.raw", "c")).record == made


async def test_protected_snapshot_is_not_deleted(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    assert (await catalog.protect("vm1.raw", "a", True)).protected
    with pytest.raises(SnapshotProtectedError, match=r"sheepctl snapshot unprotect vm1@a\.raw"):
        await catalog.delete_snapshot("vm1.raw", "a", keep_s=0)
    await catalog.protect("vm1.raw", "a", False)
    await catalog.delete_snapshot("vm1.raw", "a")
    assert await files(catalog) == []


async def test_deleted_snapshot_lies_in_the_trash(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    assert await catalog.delete_snapshot("vm1.raw", "a", keep_s=60) == made
    ((trashed, _),) = await catalog.trash()
    assert (trashed.id, trashed.name, trashed.tag) == (made.id, "vm1.raw", "a")
    assert (trashed.deleted, trashed.until) == (NOW, NOW + 60)
    assert SnapshotRecord.decode(trashed.record.encode()) == made
    assert await catalog.reclaim_wanted() == []


async def test_snapshot_deleted_at_once_asks_for_reclaim(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a", keep_s=0)
    assert await catalog.trash() == []
    assert [family for family, _ in await catalog.reclaim_wanted()] == [made.family]


async def test_name_of_a_deleted_vdi_stays_with_its_snapshots(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await catalog.create("other.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "b")
    await catalog.delete("vm1.raw", keep_s=0)
    assert await files(catalog) == ["vm1@a.raw", "vm1@b.raw"]
    retired = await fake_etcd.get(KEYS.retired_name("vm1.raw"))
    assert retired is not None
    assert RetiredRecord.decode(retired.value).vdi == made.id
    for call in (
        catalog.create("vm1.raw", 0),
        catalog.rename("other.raw", "vm1.raw"),
        catalog.rename("other.raw", "vm1.raw", replace=True),
    ):
        with pytest.raises(VdiExistsError, match=r"sheepctl snapshot list vm1\.raw"):
            await call
    with pytest.raises(VdiNotFoundError):
        await catalog.find(made.id)
    await catalog.delete_snapshot("vm1.raw", "a")
    with pytest.raises(VdiExistsError):
        await catalog.create("vm1.raw", 0)
    await catalog.rename_snapshot("vm1.raw", "b", "c")
    await catalog.delete_snapshot("vm1.raw", "c")
    assert await fake_etcd.get(KEYS.vdi_name(made.id)) is None
    await catalog.create("vm1.raw", 0)


async def test_last_snapshot_of_a_living_vdi_leaves_its_name_alone(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a")
    assert (await catalog.find(made.id))[0] == "vm1.raw"


async def test_vdi_with_snapshots_is_not_replaced(catalog: Catalog, fake_etcd: FakeEtcd) -> None:
    await catalog.create("new.raw", 0)
    await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    with pytest.raises(VdiExistsError, match="has snapshots"):
        await catalog.rename("new.raw", "vm1.raw", replace=True)
    await catalog.delete_snapshot("vm1.raw", "a")
    await catalog.rename("new.raw", "vm1.raw", replace=True)


async def test_attributes_are_kept_with_vdis_and_snapshots(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.set_attribute("vm1.raw", "owner", "anna")
    await catalog.set_attribute(made.id, "os", "debian")
    await catalog.set_attribute("vm1@a.raw", "note", "before the upgrade")
    assert (await catalog.vdi("vm1.raw"))[0].attributes == {"owner": "anna", "os": "debian"}
    assert (await catalog.snapshot("vm1.raw", "a")).record.attributes == {
        "note": "before the upgrade"
    }
    await catalog.set_attribute("vm1.raw", "owner", None)
    await catalog.set_attribute("vm1.raw", "absent", None)
    assert (await catalog.vdi("vm1.raw"))[0].attributes == {"os": "debian"}


async def test_attributes_that_do_not_fit_are_refused(catalog: Catalog) -> None:
    await catalog.create("vm1.raw", 0)
    await catalog.set_attribute("vm1.raw", "a", "x" * 3000)
    with pytest.raises(UsageError, match="4096"):
        await catalog.set_attribute("vm1.raw", "b", "x" * 3000)
    with pytest.raises(UsageError):
        await catalog.set_attribute("vm1.raw", "", "x")
    assert list((await catalog.vdi("vm1.raw"))[0].attributes) == ["a"]


async def test_updates_of_a_snapshot_at_the_same_time_all_happen(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")

    async def grow() -> None:
        mine = Catalog(fake_etcd.server.client(), KEYS)
        await mine.update_snapshot(
            made.vdi, "a", lambda r: dataclasses.replace(r, allocated=r.allocated + 1)
        )

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(grow)
    assert (await catalog.snapshot("vm1.raw", "a")).record.allocated == 20


async def test_last_two_snapshots_deleted_at_the_same_time_set_the_name_free(
    fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    catalog = Catalog(fake_etcd, KEYS, clock=lambda: NOW)
    for number in range(20):
        name = f"vm{number}"
        await catalog.create(name, 0)
        for tag in ("a", "b"):
            await take_snapshot(catalog, fake_etcd, name, tag)
        await catalog.delete(name)
        async with trio.open_nursery() as nursery:
            for tag in ("a", "b"):
                mine = Catalog(fake_etcd.server.client(), KEYS)
                nursery.start_soon(mine.delete_snapshot, name, tag)
        assert not await keeps_name(fake_etcd, name)
        await catalog.create(name, 0)


async def test_whatever_meets_the_end_of_a_vdi_a_name_is_kept_exactly_for_snapshots(
    fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    """Delete the VDI, delete its snapshot, restore another and rename, all at once."""
    catalog = Catalog(fake_etcd, KEYS, clock=lambda: NOW)

    async def quietly(call: Callable[..., Awaitable[object]], *arguments: object) -> None:
        with suppress(VdiNotFoundError, SnapshotNotFoundError, VdiExistsError):
            await call(*arguments)

    random.seed(7)
    for number in range(200):
        name, other = f"vm{number}", f"other{number}"
        vdi = await catalog.create(name, 0)
        await take_snapshot(catalog, fake_etcd, name, "a")
        gone = await take_snapshot(catalog, fake_etcd, name, "b")
        await catalog.delete_snapshot(name, "b")
        calls: list[tuple[str, tuple[object, ...]]] = [
            ("delete", (name,)),
            ("delete_snapshot", (name, "a")),
            ("restore", (gone.id,)),
            ("rename", (name, other)),
        ]
        async with trio.open_nursery() as nursery:
            for what, arguments in random.sample(calls, random.randint(2, 4)):
                client = Catalog(UnevenEtcd(fake_etcd.server), KEYS)
                nursery.start_soon(quietly, getattr(client, what), *arguments)
        living = {record.id: called for called, record, _ in await catalog.vdis()}
        snapshots, _ = await fake_etcd.list(KEYS.snapshots_of(vdi.id))
        named = await fake_etcd.get(KEYS.vdi_name(vdi.id))
        assert (named is not None) == bool(snapshots or vdi.id in living)
        if named is not None:
            called = NameRecord.decode(named.value).name
            assert await keeps_name(fake_etcd, called) == (vdi.id not in living)
            assert living.get(vdi.id, called) == called
        for free in {name, other} - {"" if named is None else called}:
            assert not await keeps_name(fake_etcd, free)


async def test_snapshot_whose_record_cannot_be_read_says_so(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await put(fake_etcd, KEYS.snapshot(made.id, "new"), b'{"format": 3}')
    with pytest.raises(ProtocolError, match="format 3"):
        await catalog.snapshot("vm1.raw", "new")


async def test_snapshot_is_still_kept_wherever_it_is_until_it_is_purged(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    snapshot = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await put(fake_etcd, KEYS.snapshot(made.id, "new"), b'{"format": 3}')
    first = await catalog.still_kept(snapshot)
    assert first.key == KEYS.snapshot(made.id, "a")
    await catalog.rename_snapshot("vm1.raw", "a", "b")
    assert (await catalog.still_kept(snapshot)).key == KEYS.snapshot(made.id, "b")
    await catalog.delete_snapshot("vm1.raw", "b")
    kept = await catalog.still_kept(snapshot)
    assert kept.key == KEYS.trashed(snapshot.id)
    assert await fake_etcd.commit(Transaction([kept], [])) is not None
    await catalog.purge()
    for condition in (first, kept):
        assert await fake_etcd.commit(Transaction([condition], [])) is None
    with pytest.raises(SnapshotNotFoundError):
        await catalog.still_kept(snapshot)
