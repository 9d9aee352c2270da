"""A data directory that has seen more than etcd knows; daemons in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd, FakeServer
from fakes.waiting import wait_until
from sheepfs.connecting import join
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import DiskError, NoSpaceError, ProtocolError, SheepError, UsageError
from sheepfs.core.geometry import data_object, format_oid, pg_of
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import LayerRecord, VdiRecord
from sheepfs.net.catalog import Catalog
from sheepfs.net.metadata_transfer import accept, propose_acceptance
from sheepfs_tools.sheepctl import session as sheepctl_session
from sheepfs_tools.sheepctl.commandline.parser import build_parser
from sheepfs_tools.sheepctl.commands.vdi import vdi_create
from storaged.daemon import Daemon, Machine, Options
from storaged.membership.restored import EpochMemory, refuse_restored
from storaged.store.objects import ObjectStore

KEYS = Keys("test")
MESSAGE = "sheepctl metadata accept"


@dataclass
class Known:
    """What a directory has seen."""

    epoch: int = 0
    last_layer: int = 0
    highest: dict[int, int] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    errors: list[SheepError] = field(default_factory=list)

    def tokens(self) -> dict[int, int]:
        return self.highest

    def set_epoch(self, epoch: int) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.written.append(epoch)


async def put(etcd: FakeEtcd, key: str, value: bytes) -> None:
    await etcd.commit(Transaction([], [Put(key, value)]))


async def etcd_of(epoch: int = 10, layer: int = 20) -> FakeEtcd:
    etcd = FakeEtcd()
    await put(etcd, KEYS.map, ClusterMap(epoch, "c" * 32).encoded)
    await put(etcd, KEYS.counter("layer"), b"%d" % layer)
    return etcd


async def test_a_directory_that_has_seen_no_more_than_etcd_knows_is_served() -> None:
    etcd = await etcd_of()
    await refuse_restored(etcd, KEYS, Known())
    await refuse_restored(etcd, KEYS, Known(10, 20, {7: etcd.server.revision, 8: 1}), 10)
    await refuse_restored(FakeEtcd(), KEYS, Known())


@pytest.mark.parametrize(
    ("known", "epoch", "reason"),
    [
        (Known(epoch=11), 0, "last epoch there is 10, here 11"),
        (Known(epoch=9), 12, "last epoch there is 10, here 12"),
        (Known(last_layer=21), 0, "last layer there is 20, here 21"),
        (Known(highest={1: 2, 5: 99}), 0, "last token there is 3, here 99"),
    ],
)
async def test_a_directory_that_has_seen_more_is_refused(
    known: Known, epoch: int, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        await refuse_restored(await etcd_of(), KEYS, known, epoch)
    assert MESSAGE in str(caught.value)


async def test_an_etcd_that_lost_map_and_counter_knows_less() -> None:
    with pytest.raises(UsageError, match="epoch there is 0"):
        await refuse_restored(FakeEtcd(), KEYS, Known(epoch=1))
    with pytest.raises(UsageError, match="layer there is 0"):
        await refuse_restored(FakeEtcd(), KEYS, Known(last_layer=1))
    etcd = await etcd_of()
    await put(etcd, KEYS.counter("layer"), b"many")
    with pytest.raises(ProtocolError, match="no number"):
        await refuse_restored(etcd, KEYS, Known())


@asynccontextmanager
async def memory_of(known: Known) -> AsyncIterator[tuple[EpochMemory, list[SheepError]]]:
    failed: list[SheepError] = []
    memory = EpochMemory(known, failed.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.run)
        yield memory, failed
        nursery.cancel_scope.cancel()


async def until(known: Known, written: list[int]) -> None:
    with trio.fail_after(60):
        while known.written != written:
            await trio.sleep(0.01)


async def test_epochs_that_come_fast_are_written_once(autojump_clock: MockClock) -> None:
    known = Known(epoch=5)
    async with memory_of(known) as (memory, failed):
        memory.note(5)
        memory.note(4)
        await trio.sleep(10)
        assert known.written == []
        memory.note(6)
        await until(known, [6])
        for epoch in range(7, 100):
            memory.note(epoch)
        await until(known, [6, 99])
        assert failed == []


async def test_a_full_disk_is_tried_again_and_a_failed_one_is_told(
    autojump_clock: MockClock,
) -> None:
    known = Known(errors=[NoSpaceError("full"), NoSpaceError("full")])
    async with memory_of(known) as (memory, failed):
        memory.note(1)
        await until(known, [1])
        assert failed == []
        known.errors.append(DiskError("broken"))
        memory.note(2)
        with trio.fail_after(60):
            while not failed:
                await trio.sleep(0.01)
        assert known.written == [1]


# -- a daemon --------------------------------------------------------------------------------


class OneNode:
    """A cluster of one daemon on a fake etcd, which can go back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = FakeServer()
        self.daemon: Daemon

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Daemon]:
        """Run the daemon until the block ends, then stop it cleanly."""
        options = Options(self.path, "127.0.0.1:1", "test", "127.0.0.1:0", None, "z", 1.0, 4)
        daemon = Daemon(options, Machine(etcd=lambda _: self.server.client()))
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.run, lambda _: ready.set())
            with trio.fail_after(10):
                await ready.wait()
            yield daemon
            daemon.stop()

    def epoch(self) -> int:
        found = self.server.keys.get(KEYS.map)
        return 0 if found is None else ClusterMap.decode(found.value).epoch

    async def start_and_leave(self) -> None:
        """Serve in a new epoch, and remember it."""
        before = self.epoch()
        async with self.running():
            await wait_until(lambda: self.epoch() > before)
            await wait_until(lambda: self.remembered() > before)

    def remembered(self) -> int:
        return int(json.loads((self.path / "sheepfs.json").read_text())["epoch"])

    async def write_to_new_vdi(self) -> tuple[VdiRecord, Path]:
        """Make a VDI and an object of it while the daemon does not run; give record and file."""
        made = await Catalog(self.server.client(), KEYS).create("late.raw", 1 << 30, copies=1)
        store = ObjectStore.open(self.path)
        oid = data_object(made.layer, 0)
        store.mark([oid])
        store.write(oid, 0, b"x", 1, create=True, pool=1, pg=pg_of(oid, 4))
        store.close()
        (file,) = self.path.glob(f"objects/*/*/{format_oid(oid)}")
        return made, file

    async def refused(self) -> str:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with self.running():
                pytest.fail("it was started")
        (error,) = caught.value.exceptions
        assert isinstance(error, UsageError)
        return str(error)


@pytest.mark.parametrize("bump", [0, 1 << 30])
async def test_a_daemon_starts_on_a_restored_etcd_only_once_it_is_accepted(
    tmp_path: Path, bump: int
) -> None:
    node = OneNode(tmp_path / "disk")
    await node.start_and_leave()
    older = node.server.save()
    await node.start_and_leave()
    remembered = node.remembered()
    node.server.restore(older, bump)
    before = dict(node.server.keys)
    assert MESSAGE in await node.refused()
    assert node.server.keys == before
    etcd = node.server.client()
    await accept(etcd, await propose_acceptance(etcd, KEYS, 1e9))
    await node.start_and_leave()
    assert node.remembered() > remembered


async def test_a_daemon_with_objects_of_layers_that_etcd_does_not_know_is_refused(
    tmp_path: Path,
) -> None:
    node = OneNode(tmp_path / "disk")
    await node.start_and_leave()
    older = node.server.save()
    await node.write_to_new_vdi()
    await node.start_and_leave()
    node.server.restore(older, 1 << 30)
    etcd = node.server.client()
    # Even if the map were no older.
    cluster = ObjectStore.cluster_of(node.path)
    await put(etcd, KEYS.map, ClusterMap(node.remembered(), cluster).encoded)
    assert "last layer" in await node.refused()


@pytest.mark.parametrize("bump", [0, 1 << 30])
async def test_who_starts_beside_a_running_daemon_is_refused_by_what_that_has_seen(
    tmp_path: Path, bump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = OneNode(tmp_path / "disk")
    create = build_parser().parse_args(["vdi", "create", "new", "1G", "--cluster", "test"])
    monkeypatch.setattr(sheepctl_session, "Etcd", lambda _: node.server.client())
    async with node.running():
        await wait_until(lambda: node.epoch() > 0)
        older, epoch = node.server.save(), node.epoch()
        await put(node.server.client(), KEYS.pool(2), b"")
        await wait_until(lambda: node.epoch() > epoch)
        async with join(node.server.client(), "test", "a mount"):
            pass
        assert await vdi_create(create) == 0
        node.server.restore(older, bump)
        before = dict(node.server.keys)
        with pytest.raises(UsageError, match=f"etcd knows less than node 1.*{MESSAGE}"):
            async with join(node.server.client(), "test", "another"):
                pytest.fail("it was let in")
        with pytest.raises(UsageError, match=f"etcd knows less than node 1.*{MESSAGE}"):
            await vdi_create(create)
        assert node.server.keys == before


async def test_a_running_daemon_changes_nothing_in_an_etcd_that_went_back(tmp_path: Path) -> None:
    node = OneNode(tmp_path / "disk")
    await node.start_and_leave()
    older = node.server.save()
    async with node.running() as daemon:
        await wait_until(lambda: node.epoch() > ClusterMap.decode(older.keys[KEYS.map].value).epoch)
        node.server.restore(older)
        await put(node.server.client(), KEYS.pool(2), b"")
        revision = node.server.revision
        await trio.sleep(2.5)
        assert node.server.revision == revision
        assert not daemon._stop.is_set()
    assert node.server.revision == revision


async def test_a_running_daemon_makes_no_map_after_an_older_one_of_higher_revision(
    tmp_path: Path,
) -> None:
    node = OneNode(tmp_path / "disk")
    await node.start_and_leave()
    older = node.server.save()
    async with node.running():
        epoch = node.epoch()
        await wait_until(lambda: node.epoch() > epoch)
        node.server.restore(older, 1 << 30)
        await put(node.server.client(), KEYS.pool(2), b"")
        await trio.sleep(2.5)
        assert node.epoch() == epoch


async def test_nothing_is_freed_while_etcd_does_not_know_the_newest_layer(tmp_path: Path) -> None:
    node = OneNode(tmp_path / "disk")
    await node.start_and_leave()
    older = node.server.save()
    made, file = await node.write_to_new_vdi()
    epoch = node.epoch()
    async with node.running():
        await wait_until(lambda: node.epoch() > epoch)
        current = node.server.keys[KEYS.map].value
        node.server.restore(older, 1 << 30)
        etcd = node.server.client()
        # The map is no older, and an id was given out again; so the file has no name.
        await put(etcd, KEYS.map, current)
        await put(etcd, KEYS.layer(made.layer), LayerRecord(made.id, made.family, 1e9).encode())
        await put(etcd, KEYS.reclaim_family(made.family), b"")
        await trio.sleep(1.5)
        assert file.exists()
        assert KEYS.reclaim_family(made.family) in node.server.keys
        # What the check keeps from happening.
        await put(etcd, KEYS.counter("layer"), b"1000")
        await put(etcd, KEYS.reclaim_family(made.family), b"")
        await wait_until(lambda: not file.exists(), 20)
