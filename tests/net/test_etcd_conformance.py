"""What every Store does: the same tests run against the fake and against a real etcd."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from fakes.etcd import FakeEtcd, FakeServer, Saved
from fakes.etcd_process import EtcdProcess
from sheepfs.core.errors import UsageError
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import FencingRecord
from sheepfs.net.etcd import Etcd, LeaseGoneError, LeaseKeeper, Store
from sheepfs.net.history import WentBackError

WAIT_S = 10.0
_runs = itertools.count()


@pytest.fixture(params=["fake", "real"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "fake":
        yield FakeEtcd()
    else:
        process: EtcdProcess = request.getfixturevalue("etcd_process")
        async with Etcd(process.endpoint) as etcd:
            yield etcd


@pytest.fixture
def root() -> str:
    """A prefix that no other test uses."""
    return f"/conformance/{next(_runs)}/"


async def put(store: Store, key: str, value: bytes = b"", lease: int = 0) -> int:
    revision = await store.commit(Transaction([], [Put(key, value, lease)]))
    assert revision is not None
    return revision


async def found(store: Store, key: str) -> KeyValue:
    kv = await store.get(key)
    assert kv is not None
    return kv


async def until_gone(store: Store, key: str) -> None:
    with trio.fail_after(WAIT_S):
        while await store.get(key) is not None:
            await trio.sleep(0.02)


async def test_key_that_was_never_put_is_none(store: Store, root: str) -> None:
    assert await store.get(root + "a") is None


async def test_put_gives_the_revision_that_the_key_then_has(store: Store, root: str) -> None:
    first = await put(store, root + "a", b"one")
    second = await put(store, root + "a", b"two")
    assert second > first
    assert await store.get(root + "a") == KeyValue(root + "a", b"two", first, second, 0)


async def test_key_made_again_has_a_new_create_revision(store: Store, root: str) -> None:
    first = await put(store, root + "a")
    await store.commit(Transaction([], [Delete(root + "a")]))
    second = await put(store, root + "a")
    assert (await found(store, root + "a")).create_revision == second > first


async def test_all_keys_of_one_transaction_have_one_revision(store: Store, root: str) -> None:
    revision = await store.commit(Transaction([], [Put(root + "a", b""), Put(root + "b", b"")]))
    assert (await found(store, root + "a")).mod_revision == revision
    assert (await found(store, root + "b")).mod_revision == revision


async def test_failed_condition_changes_nothing(store: Store, root: str) -> None:
    revision = await put(store, root + "a", b"old")
    changes = [Put(root + "a", b"new"), Put(root + "b", b"new")]
    conditions = [Unchanged(root + "a", revision), Unchanged(root + "b", revision)]
    assert await store.commit(Transaction(conditions, changes)) is None
    assert (await found(store, root + "a")).value == b"old"
    assert await store.get(root + "b") is None


async def test_condition_zero_means_absent(store: Store, root: str) -> None:
    create = Transaction([Unchanged(root + "a", 0)], [Put(root + "a", b"")])
    assert await store.commit(create) is not None
    assert await store.commit(create) is None


async def test_condition_on_an_old_revision_fails_after_a_change(store: Store, root: str) -> None:
    first = await put(store, root + "a", b"same")
    await put(store, root + "a", b"same")
    change = Transaction([Unchanged(root + "a", first)], [Put(root + "a", b"")])
    assert await store.commit(change) is None


async def test_delete_of_a_missing_key_succeeds_without_a_revision(store: Store, root: str) -> None:
    revision = await put(store, root + "a")
    assert await store.commit(Transaction([], [Delete(root + "missing")])) == revision


async def test_key_twice_in_one_transaction_is_refused(store: Store, root: str) -> None:
    with pytest.raises(UsageError, match="duplicate key"):
        await store.commit(Transaction([], [Put(root + "a", b""), Put(root + "a", b"")]))
    with pytest.raises(UsageError, match="duplicate key"):
        await store.commit(Transaction([], [Put(root + "a", b""), Delete(root + "a")]))


async def test_transaction_with_too_many_changes_is_refused(store: Store, root: str) -> None:
    with pytest.raises(UsageError, match="too many operations"):
        await store.commit(Transaction([], [Put(f"{root}{i}", b"") for i in range(129)]))


async def test_list_is_sorted_and_keeps_to_its_prefix(store: Store, root: str) -> None:
    for name in ("b", "a", "aa", "a/x", "\u00e9"):
        await put(store, root + "in/" + name)
    last = await put(store, root + "in0")
    keys, revision = await store.list(root + "in/")
    names = [kv.key.removeprefix(root + "in/") for kv in keys]
    assert names == ["a", "a/x", "aa", "b", "\u00e9"]
    assert revision == last


async def test_list_of_nothing_is_empty_with_a_revision(store: Store, root: str) -> None:
    last = await put(store, root + "a")
    assert await store.list(root + "none/") == ([], last)


async def test_list_of_more_keys_than_a_page_is_complete(store: Store, root: str) -> None:
    for batch in range(21):
        changes = [Put(f"{root}{batch * 100 + i:05}", b"x") for i in range(100)]
        await store.commit(Transaction([], changes))
    keys, _ = await store.list(root)
    assert [kv.key for kv in keys] == [f"{root}{i:05}" for i in range(2100)]


async def test_key_that_is_not_utf8_comes_and_goes(store: Store, root: str) -> None:
    key = root + b"\xff\xfe".decode(errors="surrogateescape")
    await put(store, key, b"\0\xff")
    keys, _ = await store.list(root)
    assert [(kv.key, kv.value) for kv in keys] == [(key, b"\0\xff")]
    await store.commit(Transaction([], [Delete(key)]))
    assert await store.get(key) is None


async def test_revoked_lease_takes_its_keys_along(store: Store, root: str) -> None:
    lease = await store.grant(60)
    await put(store, root + "leased", lease=lease)
    await put(store, root + "kept")
    assert (await found(store, root + "leased")).lease == lease
    await store.revoke(lease)
    assert await store.get(root + "leased") is None
    assert await store.get(root + "kept") is not None
    assert not await store.keep_alive(lease)
    await store.revoke(lease)


async def test_put_without_a_lease_detaches_the_key_from_it(store: Store, root: str) -> None:
    lease = await store.grant(60)
    await put(store, root + "a", lease=lease)
    await put(store, root + "a")
    await store.revoke(lease)
    assert (await found(store, root + "a")).lease == 0


async def test_lease_that_is_not_renewed_ends(store: Store, root: str) -> None:
    lease = await store.grant(1)
    await put(store, root + "leased", lease=lease)
    assert await store.keep_alive(lease)
    await until_gone(store, root + "leased")
    assert not await store.keep_alive(lease)


async def test_put_with_an_ended_lease_changes_nothing(store: Store, root: str) -> None:
    lease = await store.grant(60)
    await store.revoke(lease)
    changes = [Put(root + "a", b""), Put(root + "leased", b"", lease)]
    with pytest.raises(LeaseGoneError):
        await store.commit(Transaction([], changes))
    assert await store.get(root + "a") is None


async def test_watch_hints_at_the_start_and_at_each_kind_of_change(store: Store, root: str) -> None:
    lease = await store.grant(60)
    with trio.fail_after(WAIT_S):
        async with store.watch(root, poll_s=3600) as hints:
            await hints.receive()
            # The real one hints once more when the watch stands: drain until it is quiet.
            await drain(hints)
            await put(store, root + "a", lease=lease)
            await hints.receive()
            await drain(hints)
            await put(store, root + "b")
            await hints.receive()
            await drain(hints)
            await store.revoke(lease)
            await hints.receive()


async def test_watch_gives_one_hint_for_many_changes(store: Store, root: str) -> None:
    with trio.fail_after(WAIT_S):
        async with store.watch(root, poll_s=3600) as hints:
            await hints.receive()
            for number in range(20):
                await put(store, f"{root}{number}")
            assert hints.statistics().current_buffer_used == 1


async def test_watch_hints_again_and_again_without_a_change(store: Store, root: str) -> None:
    with trio.fail_after(WAIT_S):
        async with store.watch(root, poll_s=0.02) as hints:
            for _ in range(5):
                await hints.receive()


async def test_watch_ends_when_its_block_is_left_by_an_error(store: Store, root: str) -> None:
    with trio.fail_after(WAIT_S), pytest.raises(ZeroDivisionError):
        async with store.watch(root):
            raise ZeroDivisionError


async def test_keeper_holds_a_lease_beyond_its_time_to_live(store: Store, root: str) -> None:
    keeper = LeaseKeeper(store, ttl_s=1)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(keeper.run) == keeper.lease
        await put(store, root + "leased", lease=keeper.lease)
        await trio.sleep(2.5)
        assert await store.get(root + "leased") is not None
        assert keeper.is_certain
        assert not keeper.lost.is_set()
        await keeper.revoke()
    assert await store.get(root + "leased") is None


async def test_keeper_says_when_its_lease_is_gone(store: Store) -> None:
    keeper = LeaseKeeper(store, ttl_s=1)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(keeper.run)
            await store.revoke(keeper.lease)
            await keeper.lost.wait()
    assert not keeper.is_certain


class FakeBackup:
    """`save` and `restore` of a fake server."""

    def __init__(self) -> None:
        self._server = FakeServer()
        self._saved: Saved | None = None

    def client(self) -> Store:
        return self._server.client()

    async def save(self) -> None:
        self._saved = self._server.save()

    async def restore(self) -> None:
        assert self._saved is not None
        self._server.restore(self._saved)


class RealBackup:
    """`save` and `restore` of a real etcd."""

    def __init__(self, process: EtcdProcess) -> None:
        self._process = process

    def client(self) -> Store:
        return Etcd(self._process.endpoint)

    async def save(self) -> None:
        await trio.to_thread.run_sync(self._process.save)

    async def restore(self) -> None:
        await trio.to_thread.run_sync(self._process.restore)


@pytest.fixture(params=["fake", "real"])
def backup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeBackup | RealBackup]:
    """An etcd of the test's own, which can go back."""
    if request.param == "fake":
        yield FakeBackup()
        return
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    process = EtcdProcess(tmp_path)
    process.start()
    yield RealBackup(process)
    process.stop()


Call = Callable[[], Awaitable[object]]


async def assert_refused(calls: dict[str, Call]) -> None:
    for call in calls.values():
        with pytest.raises(WentBackError, match="sheepctl metadata accept"):
            await call()


@pytest.mark.parametrize("first", ["list", "commit", "keep_alive"])
async def test_a_store_that_went_back_is_refused_and_left_alone(
    backup: FakeBackup | RealBackup, root: str, first: str
) -> None:
    store = backup.client()
    lease = await store.grant(60)
    await put(store, root + "a", b"old", lease)
    await backup.save()
    await put(store, root + "a", b"new")
    await put(store, root + "a", b"newer")
    async with store.watch(root, poll_s=0.05) as hints:
        await drain_for(hints, 0.3)
        await backup.restore()
        calls: dict[str, Call] = {
            "get": lambda: store.get(root + "a"),
            "list": lambda: store.list(root),
            "commit": lambda: put(store, root + "b"),
            "grant": lambda: store.grant(60),
            "keep_alive": lambda: store.keep_alive(lease),
            "revoke": lambda: store.revoke(lease),
        }
        with trio.fail_after(WAIT_S):
            await assert_refused({first: calls[first]})
            await assert_refused(calls)
            await assert_refused(calls)
            for _ in range(3):
                await hints.receive()
    other = backup.client()
    # Who has seen nothing else is served: it is an etcd like any other.
    assert (await found(other, root + "a")).value == b"old"
    assert await other.get(root + "b") is None
    # And grows beyond what was seen: too late to be trusted again.
    for _ in range(5):
        await put(other, root + "c")
    await assert_refused(calls)
    await other.aclose()
    await store.aclose()


async def test_a_store_that_was_restarted_is_not_taken_for_one_that_went_back(
    backup: FakeBackup | RealBackup, root: str
) -> None:
    store = backup.client()
    await put(store, root + "a")
    await backup.save()
    await backup.restore()
    last = await put(store, root + "a")
    assert (await found(store, root + "a")).mod_revision == last
    await store.aclose()


async def test_calls_at_the_same_time_are_not_taken_for_going_back(store: Store, root: str) -> None:
    async def work(number: int) -> None:
        lease = await store.grant(60)
        for _ in range(20):
            await put(store, f"{root}{number}", lease=lease)
            await store.list(root)
            assert await store.keep_alive(lease)
        await store.revoke(lease)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(work, number)


async def test_a_keeper_renews_no_lease_in_a_store_that_went_back(
    backup: FakeBackup | RealBackup, root: str
) -> None:
    store = backup.client()
    keeper = LeaseKeeper(store, ttl_s=2)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        await put(store, root + "leased", lease=keeper.lease)
        await backup.save()
        await put(store, root + "a")
        await backup.restore()
        other = backup.client()
        await until_gone(other, root + "leased")
        assert not keeper.lost.is_set()
        assert not keeper.is_certain
        nursery.cancel_scope.cancel()
    await other.aclose()
    await store.aclose()


async def test_a_store_that_went_back_is_used_again_once_it_is_vouched_for(
    backup: FakeBackup | RealBackup, root: str
) -> None:
    store, key = backup.client(), root + "fencing"
    store.trust(key)
    await put(store, root + "a", b"old")
    await backup.save()
    for _ in range(3):
        await put(store, root + "a", b"new")
    async with store.watch(root, poll_s=3600) as hints:
        await drain_for(hints, 0.3)
        await backup.restore()
        with pytest.raises(WentBackError):
            await store.get(root + "a")
        other = backup.client()
        await put(other, key, FencingRecord(1 << 40).encode())
        with trio.fail_after(WAIT_S):
            while True:
                try:
                    assert (await found(store, root + "a")).value == b"old"
                    break
                except WentBackError:
                    await trio.sleep(0.05)
            await put(store, root + "a", b"newest")
            await hints.receive()
    await other.aclose()
    await store.aclose()


async def drain_for(hints: trio.MemoryReceiveChannel[None], seconds: float) -> None:
    with trio.move_on_after(seconds):
        async for _ in hints:
            pass


async def drain(hints: trio.MemoryReceiveChannel[None]) -> None:
    while True:
        with trio.move_on_after(0.2) as quiet:
            await hints.receive()
        if quiet.cancelled_caught:
            return
