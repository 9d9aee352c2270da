from __future__ import annotations

from dataclasses import dataclass

import trio

from fakes.etcd import FakeEtcd
from fakes.waiting import wait_until
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Transaction
from sheepfs.core.metadata import Record
from storaged.settings import Setting

KEY = Keys("test").setting("pace")


@dataclass(frozen=True, slots=True)
class Pace(Record):
    steps: int = 3


async def put(store: FakeEtcd, value: bytes) -> None:
    await store.commit(Transaction([], [Put(KEY, value)]))


async def test_a_setting_follows_etcd_and_falls_back_to_its_default(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    setting = Setting(fake_etcd, KEY, Pace())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setting.run)
        assert setting.value == Pace(3)
        changed = setting.changed
        await put(fake_etcd, Pace(5).encode())
        await changed.wait()
        assert setting.value == Pace(5)
        await fake_etcd.commit(Transaction([], [Delete(KEY)]))
        await wait_until(lambda: setting.value == Pace(3))
        nursery.cancel_scope.cancel()


async def test_what_cannot_be_read_changes_nothing(
    fake_etcd: FakeEtcd, autojump_clock: trio.testing.MockClock
) -> None:
    setting = Setting(fake_etcd, KEY, Pace())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setting.run)
        await put(fake_etcd, Pace(5).encode())
        await wait_until(lambda: setting.value == Pace(5))
        await put(fake_etcd, b'{"format": 99, "steps": 7}')
        await trio.sleep(20)
        assert setting.value == Pace(5)
        await put(fake_etcd, Pace(6).encode())
        await wait_until(lambda: setting.value == Pace(6))
        nursery.cancel_scope.cancel()
