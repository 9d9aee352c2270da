"""The lease of a mount, on an etcd in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeEtcd
from sheepfs.connecting import fetch_map
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.holding.holding import LEASE_TTL_S, Holding
from sheepfs.net.catalog import Catalog
from sheepfs.net.history import WentBackError
from sheepfs.net.router import Router
from sheepfs.net.store import LeaseKeeper
from sheepfs.volume.volume import Volume
from storaged.membership.membership import ensure_config

KEYS = Keys("test")


class Open:
    """What a mount knows of a VDI that it holds, as far as its lease is concerned."""

    attachment = None
    name = "vm"


@asynccontextmanager
async def holding(etcd: FakeEtcd, volumes: list[Open]) -> AsyncIterator[Holding]:
    config = await ensure_config(etcd, KEYS, 8)
    router = Router(config.cluster, lambda: fetch_map(etcd, KEYS))
    async with trio.open_nursery() as nursery:
        yield Holding(
            *(etcd, KEYS, Catalog(etcd, KEYS), router, "host:1:/mnt", nursery),
            *(lambda: cast(list[Volume], volumes), lambda: None),
        )
        nursery.cancel_scope.cancel()


async def test_an_attach_with_a_lease_that_has_just_ended_gets_another(
    fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    volumes: list[Open] = []
    async with holding(fake_etcd, volumes) as held:
        first = await held.lease()
        catalog = Catalog(fake_etcd, KEYS)
        one, two = [await catalog.create(name, 1 << 20) for name in ("one", "two")]
        volumes.append(Open())
        volumes[0].attachment = await held.attach(one.id)  # type: ignore[assignment]
        fake_etcd.server.revoke(first.lease)
        # Long before the mount's next renewal.
        began = trio.current_time()
        attachment = await held.attach(two.id)
        assert trio.current_time() - began < LEASE_TTL_S / 10
        assert fake_etcd.server.keys[KEYS.lock(two.id)].lease == (await held.lease()).lease
        assert first.lost.is_set()
        assert not attachment.lost.is_set()
        with trio.fail_after(LEASE_TTL_S):
            while KEYS.lock(one.id) not in fake_etcd.server.keys:
                await trio.sleep(0.01)
        await trio.sleep(3 * LEASE_TTL_S)
        assert {KEYS.lock(one.id), KEYS.lock(two.id)} <= fake_etcd.server.keys.keys()


async def test_an_attach_waits_while_one_lease_after_the_other_ends(
    fake_etcd: FakeEtcd, autojump_clock: MockClock
) -> None:
    async with holding(fake_etcd, []) as held:
        vdi = (await Catalog(fake_etcd, KEYS).create("vm", 1 << 20)).id
        leases: list[LeaseKeeper] = []
        for _ in range(3):
            leases.append(await held.lease())
            fake_etcd.server.revoke(leases[-1].lease)
            await held.attach(vdi)
            fake_etcd.server.revoke((await held.lease()).lease)
        assert KEYS.lock(vdi) not in fake_etcd.server.keys
        await held.attach(vdi)
        assert KEYS.lock(vdi) in fake_etcd.server.keys


async def test_an_attach_whose_lease_ends_before_it_is_complete_begins_again(
    fake_etcd: FakeEtcd, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with holding(fake_etcd, []) as held:
        catalog = Catalog(fake_etcd, KEYS)
        vdi = (await catalog.create("vm", 1 << 20)).id
        # A snapshot did not come to its end: the attach has to change the record once more.
        name, record, _ = await catalog.find(vdi)
        following = dataclasses.replace(record, next=record.layer + 512)
        await fake_etcd.commit(Transaction([], [Put(KEYS.vdi(name), following.encode())]))
        first = await held.lease()

        async def fence(vdi: int, token: int) -> None:
            fake_etcd.server.revoke(first.lease)

        monkeypatch.setattr(held, "_fence", fence)
        with trio.fail_after(1):
            attachment = await held.attach(vdi)
        assert attachment.record.layer == following.next
        assert fake_etcd.server.keys[KEYS.lock(vdi)].lease != first.lease


@pytest.mark.parametrize("has_lease", [False, True])
async def test_an_etcd_that_went_back_refuses_an_attach_at_once(
    fake_etcd: FakeEtcd, autojump_clock: MockClock, has_lease: bool
) -> None:
    async with holding(fake_etcd, []) as held:
        if has_lease:
            await held.lease()
        older = fake_etcd.server.save()
        vdi = (await Catalog(fake_etcd, KEYS).create("vm", 1 << 20)).id
        fake_etcd.server.restore(older)
        for _ in range(2):
            with trio.fail_after(1), pytest.raises(WentBackError):
                await held.attach(vdi)
        assert fake_etcd.server.revision == older.revision
