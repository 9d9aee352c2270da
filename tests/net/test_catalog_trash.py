"""The trash: restoring what was deleted, whatever became of its name, and purging."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from fakes.snapshot_taker import KEYS, put, take_snapshot
from sheepfs.core.errors import (
    SnapshotExistsError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.net.catalog import TRASH_KEEP_S, Catalog


class Clock:
    """Seconds since 1970, as the test says."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(fake_etcd: FakeEtcd, clock: Clock) -> Catalog:
    return Catalog(fake_etcd, KEYS, clock=clock)


async def everything(catalog: Catalog) -> list[str]:
    vdis = [name for name, _, _ in await catalog.vdis()]
    return sorted([*vdis, *(snapshot.file for snapshot in await catalog.snapshots())])


async def test_restored_vdi_is_as_it_was_with_a_new_generation(catalog: Catalog) -> None:
    made = await catalog.create("vm1.raw", 5)
    await catalog.delete("vm1.raw")
    assert await catalog.restore(made.id) == "vm1.raw"
    name, record, _ = await catalog.find(made.id)
    assert (name, record.layer, record.size) == ("vm1.raw", made.layer, 5)
    assert record.generation == made.generation + 1
    assert await catalog.trash() == []


async def test_restore_of_what_is_not_in_the_trash_is_not_found(catalog: Catalog) -> None:
    made = await catalog.create("vm1.raw", 0)
    with pytest.raises(VdiNotFoundError):
        await catalog.restore(made.id)
    with pytest.raises(VdiNotFoundError):
        await catalog.purge(made.id)


async def test_restored_vdi_needs_a_free_name(catalog: Catalog) -> None:
    made = await catalog.create("vm1.raw", 0)
    await catalog.delete("vm1.raw")
    await catalog.create("vm1.raw", 0)
    with pytest.raises(VdiExistsError, match="--name"):
        await catalog.restore(made.id)
    with pytest.raises(UsageError):
        await catalog.restore(made.id, "a@b")
    assert await catalog.restore(made.id, "vm2.raw") == "vm2.raw"
    assert await everything(catalog) == ["vm1.raw", "vm2.raw"]


async def test_restored_vdi_takes_back_the_name_that_its_snapshots_kept(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete("vm1.raw")
    assert await catalog.restore(made.id) == "vm1.raw"
    assert await everything(catalog) == ["vm1.raw", "vm1@a.raw"]
    assert await fake_etcd.get(KEYS.retired_name("vm1.raw")) is None


async def test_snapshots_follow_a_vdi_that_is_restored_under_another_name(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    made = await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete("vm1.raw")
    assert await catalog.restore(made.id, "vm2.raw") == "vm2.raw"
    assert await everything(catalog) == ["vm2.raw", "vm2@a.raw"]
    await catalog.create("vm1.raw", 0)


async def test_restored_vdi_does_not_take_a_name_that_other_snapshots_keep(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    first = await catalog.create("vm1.raw", 0)
    await catalog.delete("vm1.raw")
    await catalog.create("vm1.raw", 0)
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete("vm1.raw")
    with pytest.raises(VdiExistsError, match=r"snapshots of the deleted VDI .*--name"):
        await catalog.restore(first.id)


async def test_snapshot_returns_to_its_vdi_whatever_it_is_called_now(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a")
    await catalog.rename("vm1.raw", "vm2.raw")
    await catalog.create("vm1.raw", 0)
    assert await catalog.restore(made.id) == "vm2@a.raw"
    assert (await catalog.snapshot("vm2.raw", "a")).record == made


async def test_snapshot_whose_tag_is_taken_returns_under_another(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a")
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    with pytest.raises(SnapshotExistsError, match="--name"):
        await catalog.restore(made.id)
    with pytest.raises(UsageError, match=r"vm1@b\.raw"):
        await catalog.restore(made.id, "other@b.raw")
    with pytest.raises(UsageError, match="VDI@TAG"):
        await catalog.restore(made.id, "b")
    assert await catalog.restore(made.id, "vm1@b.raw") == "vm1@b.raw"


async def test_snapshot_returns_to_a_deleted_vdi_that_has_others(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await take_snapshot(catalog, fake_etcd, "vm1.raw", "b")
    await catalog.delete_snapshot("vm1.raw", "a")
    await catalog.delete("vm1.raw", keep_s=0)
    assert await catalog.restore(made.id) == "vm1@a.raw"
    assert await everything(catalog) == ["vm1@a.raw", "vm1@b.raw"]


async def test_snapshot_of_a_vdi_that_is_gone_keeps_the_name_again(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a")
    await catalog.delete("vm1.raw", keep_s=0)
    assert await catalog.restore(made.id) == "vm1@a.raw"
    with pytest.raises(VdiExistsError):
        await catalog.create("vm1.raw", 0)


async def test_snapshot_of_a_vdi_that_is_gone_needs_a_free_name(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    vdi = await catalog.create("vm1.raw", 0)
    made = await take_snapshot(catalog, fake_etcd, "vm1.raw", "a")
    await catalog.delete_snapshot("vm1.raw", "a")
    await catalog.delete("vm1.raw")
    await catalog.create("vm1.raw", 0)
    with pytest.raises(VdiExistsError, match=r"is deleted.*--name NAME@a"):
        await catalog.restore(made.id)
    assert await catalog.restore(made.id, "rescue@a.raw") == "rescue@a.raw"
    # The VDI itself comes back beside its snapshot, and both have one name again.
    assert await catalog.restore(vdi.id, "vm3.raw") == "vm3.raw"
    assert await everything(catalog) == ["vm1.raw", "vm3.raw", "vm3@a.raw"]
    await catalog.create("rescue.raw", 0)


async def test_purge_asks_for_reclaim(catalog: Catalog) -> None:
    made = await catalog.create("vm1.raw", 0)
    other = await catalog.create("vm2.raw", 0)
    for name in ("vm1.raw", "vm2.raw"):
        await catalog.delete(name)
    assert [record.id for record in await catalog.purge(made.id)] == [made.id]
    assert [family for family, _ in await catalog.reclaim_wanted()] == [made.family]
    with pytest.raises(VdiNotFoundError):
        await catalog.restore(made.id)
    assert [record.name for record in await catalog.purge()] == ["vm2.raw"]
    assert [family for family, _ in await catalog.reclaim_wanted()] == [made.family, other.family]
    assert await catalog.purge() == []


async def test_only_what_was_kept_for_its_time_expires(catalog: Catalog, clock: Clock) -> None:
    first = await catalog.create("vm1.raw", 0)
    await catalog.create("vm2.raw", 0)
    await catalog.delete("vm1.raw")
    clock.now += TRASH_KEEP_S / 2
    await catalog.delete("vm2.raw")
    assert await catalog.purge(expired_only=True) == []
    assert await catalog.purge(first.id, expired_only=True) == []
    clock.now += TRASH_KEEP_S / 2
    assert [r.name for r in await catalog.purge(expired_only=True)] == ["vm1.raw"]
    clock.now += TRASH_KEEP_S
    assert [r.name for r in await catalog.purge(expired_only=True)] == ["vm2.raw"]


async def test_trash_that_cannot_be_read_is_left_alone(
    catalog: Catalog, fake_etcd: FakeEtcd
) -> None:
    await put(fake_etcd, KEYS.trashed(9), b"{}")
    assert await catalog.trash() == []
    assert await catalog.purge() == []
    assert await fake_etcd.get(KEYS.trashed(9)) is not None


async def test_purge_and_restore_at_the_same_time_are_one_or_the_other(
    catalog: Catalog, fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    for number in range(20):
        made = await catalog.create(f"vm{number}", 0)
        await catalog.delete(f"vm{number}")
        outcomes: list[str] = []

        async def restore(item: int = made.id, into: list[str] = outcomes) -> None:
            try:
                await Catalog(fake_etcd.server.client(), KEYS).restore(item)
                into.append("restored")
            except VdiNotFoundError:
                pass

        async def purge(item: int = made.id, into: list[str] = outcomes) -> None:
            try:
                await Catalog(fake_etcd.server.client(), KEYS).purge(item)
                into.append("purged")
            except VdiNotFoundError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restore)
            nursery.start_soon(purge)
        assert len(outcomes) == 1
        names = [name for name, _, _ in await catalog.vdis()]
        assert (f"vm{number}" in names) == (outcomes == ["restored"])
