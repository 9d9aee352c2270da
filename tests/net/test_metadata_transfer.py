"""Export of a cluster from one etcd and import into another (fakes)."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import SheepError, UnreachableError, UsageError, WrongClusterError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import ClusterConfig
from sheepfs.core.metadata_export import Export, imported
from sheepfs.net.attach import attach, detach, reclaim_after_lease_loss, save
from sheepfs.net.catalog import Catalog
from sheepfs.net.metadata_transfer import (
    Imported,
    accept,
    export_metadata,
    import_metadata,
    propose_acceptance,
)
from sheepfs.net.store import LeaseKeeper
from sheepfs.net.unlock import force_unlock
from storaged.membership.membership import ensure_config, register

KEYS = Keys("test")


async def put(etcd: FakeEtcd, key: str, value: bytes, lease: int = 0) -> None:
    assert await etcd.commit(Transaction([], [Put(key, value, lease)])) is not None


class Fences:
    """The tokens that storage nodes remember, as data directories do across a loss of etcd."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    async def __call__(self, vdi: int, token: int) -> None:
        assert token > self.tokens.get(vdi, 0), "an older token than the nodes have seen"
        self.tokens[vdi] = token


async def hold(etcd: FakeEtcd, vdi: int, fences: Fences) -> int:
    """Attach and detach; give the generation."""
    async with trio.open_nursery() as nursery:
        keeper = LeaseKeeper(etcd)
        await nursery.start(keeper.run)
        held = await attach(etcd, KEYS, vdi, "host:1:/mnt", keeper, fences)
        assert held.token == fences.tokens[vdi]
        await detach(held, lambda record: record)
        nursery.cancel_scope.cancel()
    return held.generation


async def old_cluster(vdis: int = 3) -> FakeEtcd:
    etcd = FakeEtcd()
    config = await ensure_config(etcd, KEYS, 8)
    await register(etcd, KEYS, "u" * 32, None)
    await put(etcd, KEYS.map, ClusterMap(17, config.cluster).encoded)
    catalog = Catalog(etcd, KEYS)
    for number in range(vdis):
        await catalog.create(f"vm{number}.raw", 1 << 30)
    await put(etcd, KEYS.alive_node(1), b"x", await etcd.grant(60))
    return etcd


async def into(etcd: FakeEtcd, export: Export) -> Imported:
    return await import_metadata(etcd, KEYS, export, 2e9, lambda count: None)


async def test_an_imported_cluster_has_all_that_hangs_on_no_lease(
    autojump_clock: MockClock,
) -> None:
    old = await old_cluster(vdis=300)
    export = await export_metadata(old, KEYS, 1e9)
    new = FakeEtcd()
    done = await into(new, export)
    before = {kv.key: kv.value for kv in (await old.list("/"))[0] if not kv.lease}
    after = {kv.key: kv.value for kv in (await new.list("/"))[0]}
    assert done == Imported(len(after), False)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    counters = {KEYS.counter(what) for what in ("node", "vdi", "layer")}
    assert changed == counters | {KEYS.map, KEYS.fencing}
    catalog = Catalog(new, KEYS)
    assert len(await catalog.vdis()) == 300
    assert await register(new, KEYS, "u" * 32, 1) == 1


async def test_tokens_and_generations_go_on_above_those_of_the_lost_etcd(
    autojump_clock: MockClock,
) -> None:
    old = await old_cluster()
    fences = Fences()
    vdi = (await Catalog(old, KEYS).vdi("vm1.raw"))[0].id
    await hold(old, vdi, fences)
    export = await export_metadata(old, KEYS, 1e9)
    generations = [await hold(old, vdi, fences) for _ in range(20)]  # Not in the export.
    new = FakeEtcd()
    await into(new, export)
    assert await hold(new, vdi, fences) > max(generations)
    async with trio.open_nursery() as nursery:
        keeper = LeaseKeeper(new)
        await nursery.start(keeper.run)
        held = await attach(new, KEYS, vdi, "host:1:/mnt", keeper, fences)
        await force_unlock(new, KEYS, vdi, fences)
        assert fences.tokens[vdi] > held.token
        nursery.cancel_scope.cancel()
    newer = FakeEtcd()
    await into(newer, await export_metadata(new, KEYS, 1e9))
    await hold(newer, vdi, fences)


async def test_a_holder_goes_on_as_before_when_the_cluster_is_back(
    autojump_clock: MockClock,
) -> None:
    etcd = await old_cluster()
    fences = Fences()
    async with trio.open_nursery() as nursery:
        keeper = LeaseKeeper(etcd)
        await nursery.start(keeper.run)
        held = await attach(etcd, KEYS, "vm1.raw", "host:1:/mnt", keeper, fences)
        token = held.token
        export = await export_metadata(etcd, KEYS, 1e9)
        await keeper.revoke()
        etcd.server.keys.clear()
        with pytest.raises(UnreachableError, match="lost"):
            await save(held, lambda record: record)
        another = LeaseKeeper(etcd)
        await nursery.start(another.run)
        nursery.start_soon(reclaim_after_lease_loss, held, another)
        await trio.sleep(20)
        assert KEYS.lock(held.vdi) not in etcd.server.keys
        await into(etcd, export)
        await trio.sleep(20)
        assert KEYS.lock(held.vdi) in etcd.server.keys
        await save(held, lambda record: replace(record, size=5 << 20))
        assert held.token == token
        assert not held.lost.is_set()
        await detach(held, lambda record: record)
        assert await hold(etcd, held.vdi, fences) > held.generation
        nursery.cancel_scope.cancel()


async def test_new_ids_are_none_that_were_given_out_after_the_export(
    autojump_clock: MockClock,
) -> None:
    old = await old_cluster()
    export = await export_metadata(old, KEYS, 1e9)
    late = await Catalog(old, KEYS).create("late.raw", 1 << 30)
    node = await register(old, KEYS, "v" * 32, None)
    new = FakeEtcd()
    await into(new, export)
    made = await Catalog(new, KEYS).create("late.raw", 1 << 30)
    assert made.id > late.id
    assert made.layer > late.layer
    assert await register(new, KEYS, "w" * 32, None) > node
    with pytest.raises(WrongClusterError, match="does not know"):
        await register(new, KEYS, "v" * 32, node)


async def test_an_import_that_breaks_off_anywhere_is_completed_by_the_next(
    autojump_clock: MockClock,
) -> None:
    old = await old_cluster(vdis=100)
    export = await export_metadata(old, KEYS, 1e9)
    whole = FakeEtcd()
    await into(whole, export)
    wanted = {key: kv.value for key, kv in whole.server.keys.items()}
    other = await old_cluster()
    for reply_is_lost in (False, True):
        for steps in count():
            new = FakeEtcd()
            broken = _Breaking(new, steps, reply_is_lost)
            try:
                await into(broken, export)
                break
            except UnreachableError:
                pass
            if KEYS.importing in new.server.keys:
                with pytest.raises(UsageError, match="not come to its end"):
                    await ensure_config(new, KEYS)
                with pytest.raises(UsageError, match="not come to its end"):
                    await Catalog(new, KEYS).config()
                with pytest.raises(UsageError, match="not come to its end"):
                    await export_metadata(new, KEYS, 1e9)
                with pytest.raises(UsageError, match="another file"):
                    await into(new, await export_metadata(other, KEYS, 1e9))
            if KEYS.config not in new.server.keys:
                await into(new, export)
            assert {key: kv.value for key, kv in new.server.keys.items()} == wanted
        assert steps > 3


class _Breaking(FakeEtcd):
    """Its commit number `steps` (from 0) fails, before or after it happens."""

    def __init__(self, etcd: FakeEtcd, steps: int, reply_is_lost: bool) -> None:
        super().__init__(etcd.server)
        self._steps, self._reply_is_lost = steps, reply_is_lost

    async def commit(self, txn: Transaction) -> int | None:
        if self._steps == 0:
            (self.lose_next_reply if self._reply_is_lost else self.fail_next_commit)()
        self._steps -= 1
        return await super().commit(txn)


async def test_a_cluster_that_is_there_is_left_alone(autojump_clock: MockClock) -> None:
    old = await old_cluster()
    export = await export_metadata(old, KEYS, 1e9)
    with pytest.raises(UsageError, match=r"stop all of them"):
        await into(old, export)
    other = FakeEtcd()
    await ensure_config(other, KEYS)
    await Catalog(other, KEYS).create("vm.raw", 1 << 20)
    before = dict(other.server.keys)
    with pytest.raises(UsageError, match=r"1 VDIs.*--cluster"):
        await into(other, export)
    assert other.server.keys == before
    # Not under another name either: both would use the same data directories.
    with pytest.raises(UsageError, match="'test'"):
        await import_metadata(old, Keys("twin"), export, 2e9, lambda count: None)


async def test_a_daemon_that_comes_in_between_ends_the_import(autojump_clock: MockClock) -> None:
    export = await export_metadata(await old_cluster(), KEYS, 1e9)
    new = FakeEtcd()

    class Meddled(FakeEtcd):
        async def commit(self, txn: Transaction) -> int | None:
            await put(new, KEYS.vdi("vm1.raw"), b"theirs")
            return await super().commit(txn)

    with pytest.raises(SheepError, match="somebody else"):
        await into(Meddled(new.server), export)
    with pytest.raises(UsageError, match="not empty"):
        await into(new, export)
    assert new.server.keys[KEYS.vdi("vm1.raw")].value == b"theirs"


async def test_a_data_directory_makes_no_cluster_in_an_etcd_that_lost_its_own() -> None:
    etcd = FakeEtcd()
    with pytest.raises(WrongClusterError, match="sheepctl metadata import"):
        await ensure_config(etcd, KEYS, 8, known="c" * 32)
    assert etcd.server.keys == {}
    await put(etcd, KEYS.config, ClusterConfig("c" * 32).encode())
    assert (await ensure_config(etcd, KEYS, 8, known="c" * 32)).cluster == "c" * 32


async def test_only_a_whole_cluster_can_be_exported() -> None:
    with pytest.raises(UsageError, match="no cluster"):
        await export_metadata(FakeEtcd(), KEYS, 1e9)


async def restored_cluster(bump: int = 0) -> tuple[FakeEtcd, int]:
    """An etcd that went back, with a client that has not seen it, and the last token before."""
    old = await old_cluster()
    await old.server.client().revoke(old.server.keys[KEYS.alive_node(1)].lease)
    older = old.server.save()
    fences = Fences()
    late = await Catalog(old, KEYS).create("late.raw", 1 << 30)
    for _ in range(5):
        await hold(old, late.id, fences)
    old.server.restore(older, bump)
    return old.server.client(), fences.tokens[late.id]


@pytest.mark.parametrize("bump", [0, 1 << 30])
async def test_accepting_lets_all_numbers_go_on_as_an_import_does(
    autojump_clock: MockClock, bump: int
) -> None:
    etcd, token = await restored_cluster(bump)
    export = await export_metadata(etcd, KEYS, 1e9)
    before = dict(etcd.server.keys)
    revision = etcd.server.revision
    acceptance = await propose_acceptance(etcd, KEYS, 1e9)
    assert acceptance.export.keys == export.keys
    assert etcd.server.keys == before
    await accept(etcd, acceptance)
    after = {key: kv.value for key, kv in etcd.server.keys.items()}
    assert after == {KEYS.root + key: value for key, value in imported(export).items()}
    assert etcd.server.revision == revision + 1
    fences = Fences()
    fences.tokens = dict.fromkeys(range(100), token)
    made = await Catalog(etcd, KEYS).create("late.raw", 1 << 30)
    await hold(etcd, made.id, fences)
    # Again is as good.
    await accept(etcd, await propose_acceptance(etcd, KEYS, 1e9))


async def test_nothing_is_accepted_while_daemons_run_or_etcd_changes(
    autojump_clock: MockClock,
) -> None:
    etcd = await old_cluster()
    with pytest.raises(UsageError, match=r"run \(node 1\)"):
        await propose_acceptance(etcd, KEYS, 1e9)
    await trio.sleep(61)
    lease = await etcd.grant(60)
    for change in (
        lambda: Catalog(etcd, KEYS).create("new.raw", 1 << 30),
        lambda: put(etcd, KEYS.leader, b"x", lease),
    ):
        acceptance = await propose_acceptance(etcd, KEYS, 1e9)
        await change()
        before = dict(etcd.server.keys)
        with pytest.raises(SheepError, match="nothing was accepted"):
            await accept(etcd, acceptance)
        assert etcd.server.keys == before


async def test_only_a_whole_cluster_can_be_accepted() -> None:
    with pytest.raises(UsageError, match="no cluster"):
        await propose_acceptance(FakeEtcd(), KEYS, 1e9)
