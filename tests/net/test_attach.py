"""Exclusive attach: tokens, generations, lost leases, answers that got lost."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from fakes.etcd import FakeServer
from fakes.etcd_process import EtcdProcess
from sheepfs.core.errors import (
    FencedError,
    HeldElsewhereError,
    RetryableError,
    UnreachableError,
    VdiNotFoundError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import ClusterConfig, LockRecord, VdiRecord
from sheepfs.net.attach import (
    Attachment,
    attach,
    detach,
    reclaim_after_lease_loss,
    save,
)
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd, LeaseGoneError, LeaseKeeper, Store
from sheepfs.net.unlock import force_unlock

KEYS = Keys("test")
TTL_S = 10


class Nodes:
    """The storage nodes as the fence sees them: the lowest token that they still take."""

    def __init__(self) -> None:
        self.lowest: dict[int, int] = {}
        self.failure: Exception | None = None

    async def fence(self, vdi: int, token: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.lowest[vdi] = max(self.lowest.get(vdi, 0), token)

    def takes(self, held: Attachment) -> bool:
        return held.token >= self.lowest[held.vdi]


class Mount:
    """One mount with a connection to etcd and a lease of its own."""

    def __init__(self, server: FakeServer, name: str, nodes: Nodes, nursery: trio.Nursery) -> None:
        self.owner = f"{name}:1:/mnt"
        self.etcd = server.client()
        self.nodes = nodes
        self.nursery = nursery
        self.lease = LeaseKeeper(self.etcd, TTL_S)

    async def new_lease(self) -> None:
        self.lease = LeaseKeeper(self.etcd, TTL_S)
        await self.nursery.start(self.lease.run)

    async def attach(self, which: str | int = "vm") -> Attachment:
        return await attach(self.etcd, KEYS, which, self.owner, self.lease, self.nodes.fence)


@dataclasses.dataclass
class World:
    server: FakeServer
    catalog: Catalog
    nodes: Nodes
    one: Mount
    other: Mount
    vdi: int

    async def record(self) -> VdiRecord:
        return (await self.catalog.find(self.vdi))[1]

    async def lock(self) -> LockRecord | None:
        return (await self.catalog.locks()).get(self.vdi)

    async def cut_off_until_lease_is_gone(self, mount: Mount) -> None:
        mount.etcd.partition()
        await trio.sleep(TTL_S + 1)
        mount.etcd.heal()
        await mount.lease.lost.wait()


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    server, nodes = FakeServer(), Nodes()
    server.commit(Transaction([], [Put(KEYS.config, ClusterConfig("c" * 32).encode())]))
    catalog = Catalog(server.client(), KEYS)
    made = await catalog.create("vm", 1 << 30)
    mounts = [Mount(server, name, nodes, nursery) for name in ("one", "other")]
    for mount in mounts:
        await mount.new_lease()
    return World(server, catalog, nodes, mounts[0], mounts[1], made.id)


def keep(record: VdiRecord) -> VdiRecord:
    return record


def grow(record: VdiRecord) -> VdiRecord:
    return dataclasses.replace(record, size=record.size + 1)


async def test_attach_locks_raises_the_generation_and_fences(world: World) -> None:
    held = await world.one.attach()
    assert (held.vdi, held.generation, held.was_clean) == (world.vdi, 1, True)
    assert held.token == world.server.revision == world.nodes.lowest[world.vdi]
    assert await world.record() == held.record
    assert not held.record.clean
    assert await world.lock() == LockRecord(world.vdi, 1, "one:1:/mnt")


async def test_attach_by_id_finds_a_renamed_vdi(world: World) -> None:
    await world.catalog.rename("vm", "new")
    assert (await world.one.attach(world.vdi)).vdi == world.vdi


async def test_second_attach_is_refused_at_once_and_names_the_holder(
    world: World, autojump_clock: MockClock
) -> None:
    await world.one.attach()
    before = trio.current_time()
    with pytest.raises(HeldElsewhereError, match="'vm' is attached by one:1:/mnt"):
        await world.other.attach()
    assert trio.current_time() == before


async def test_attach_of_a_missing_vdi_is_not_found(world: World) -> None:
    with pytest.raises(VdiNotFoundError):
        await world.one.attach("missing")
    with pytest.raises(VdiNotFoundError):
        await world.one.attach(99)


@pytest.mark.parametrize("fence_fails", [False, True])
async def test_a_layer_that_a_broken_snapshot_left_is_frozen_behind_the_fence(
    world: World, fence_fails: bool
) -> None:
    await world.catalog.update(
        "vm", lambda r: dataclasses.replace(r, next=r.layer + 512, clean=False)
    )
    before = await world.record()
    at_fence: list[tuple[int, int]] = []

    async def fence(vdi: int, token: int) -> None:
        record = await world.record()
        at_fence.append((record.layer, record.next))
        if fence_fails:
            raise UnreachableError("cut off")

    mount = world.one
    attaching = attach(mount.etcd, KEYS, "vm", mount.owner, mount.lease, fence)
    if fence_fails:
        with pytest.raises(UnreachableError, match="cut off"):
            await attaching
    else:
        assert (await attaching).record == await world.record()
    assert at_fence == [(before.layer, before.next)]
    after = await world.record()
    if fence_fails:
        assert (after.layer, after.next) == (before.layer, before.next)
    else:
        assert (after.layer, after.next) == (before.next, 0)
    wanted = [family for family, _ in await world.catalog.reclaim_wanted()]
    assert wanted == ([] if fence_fails else [before.family])


async def test_token_and_generation_grow_with_each_attach(world: World) -> None:
    held = await world.one.attach()
    for mount in (world.other, world.one, world.other):
        await detach(held, keep)
        last, held = held, await mount.attach()
        assert held.token > last.token
        assert held.generation == last.generation + 1
        assert not world.nodes.takes(last)


async def test_clean_detach_is_found_clean_and_an_unclean_one_is_not(world: World) -> None:
    await detach(await world.one.attach(), grow)
    held = await world.other.attach()
    assert held.was_clean
    assert held.record.size == (1 << 30) + 1
    await detach(held, keep, clean=False)
    assert not (await world.one.attach()).was_clean


async def test_a_detach_asks_for_reclaim_in_the_same_transaction(world: World) -> None:
    held = await world.one.attach()
    key = KEYS.reclaim_family(held.record.family)
    await detach(held, keep)
    assert await world.one.etcd.get(key) is None
    held = await world.one.attach()
    await detach(held, keep, reclaim=True)
    asked, record = await world.one.etcd.get(key), await world.one.etcd.get(KEYS.vdi("vm"))
    assert asked is not None
    assert record is not None
    assert asked.mod_revision == record.mod_revision


async def test_of_many_attaches_at_once_one_wins(
    world: World, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    outcomes: list[Attachment | HeldElsewhereError] = []

    async def race(number: int) -> None:
        mount = Mount(world.server, f"m{number}", world.nodes, nursery)
        await mount.new_lease()
        try:
            outcomes.append(await mount.attach())
        except HeldElsewhereError as error:
            outcomes.append(error)

    async with trio.open_nursery() as racers:
        for number in range(20):
            racers.start_soon(race, number)
    assert len(outcomes) == 20
    assert sum(isinstance(outcome, Attachment) for outcome in outcomes) == 1


async def test_save_changes_the_record_of_the_holder(world: World) -> None:
    held = await world.one.attach()
    assert await save(held, grow) == await world.record() == held.record


async def test_save_and_detach_follow_a_rename(world: World) -> None:
    held = await world.one.attach()
    await world.catalog.rename("vm", "new")
    await save(held, grow)
    await world.catalog.rename("new", "newer")
    await detach(held, grow)
    name, record, _ = await world.catalog.find(world.vdi)
    assert (name, record.size, record.clean) == ("newer", (1 << 30) + 2, True)


async def test_save_keeps_what_others_changed(world: World) -> None:
    held = await world.one.attach()
    await world.catalog.update("vm", lambda r: dataclasses.replace(r, mode=0o600))
    assert (await save(held, grow)).mode == 0o600


async def test_dead_holder_is_followed_when_its_lease_ends(
    world: World, autojump_clock: MockClock
) -> None:
    dead = await world.one.attach()
    world.one.etcd.partition()
    await trio.sleep(TTL_S - 4)
    with pytest.raises(HeldElsewhereError):
        await world.other.attach()
    await trio.sleep(5)
    held = await world.other.attach()
    assert not held.was_clean
    assert held.token > dead.token
    assert not world.nodes.takes(dead)


async def test_holder_survives_an_outage_shorter_than_its_lease(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    world.one.etcd.partition()
    await trio.sleep(TTL_S - 4)
    world.one.etcd.heal()
    await trio.sleep(3 * TTL_S)
    assert not world.one.lease.lost.is_set()
    await save(held, grow)


async def test_lock_is_put_again_with_the_same_token_when_nobody_came(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    assert await world.lock() is None
    with pytest.raises(RetryableError, match="ended with its lease"):
        await save(held, grow)
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert not held.lost.is_set()
    lock = await world.lock()
    assert lock is not None
    assert (lock.token, lock.generation) == (held.token, held.generation)
    assert world.nodes.takes(held)
    with pytest.raises(HeldElsewhereError):
        await world.other.attach()
    await save(held, grow)
    await detach(held, keep)
    assert (await world.other.attach()).was_clean


async def test_lock_is_lost_for_good_when_somebody_attached_meanwhile(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    usurper = await world.other.attach()
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert held.lost.is_set()
    for call in (save(held, grow), detach(held, grow)):
        with pytest.raises(FencedError):
            await call
    await save(usurper, grow)


async def test_lock_is_lost_also_when_the_other_holder_has_left_again(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await detach(await world.other.attach(), keep)
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert held.lost.is_set()
    assert (await world.record()).clean


async def test_save_without_reclaim_notices_the_take_over(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await world.other.attach()
    with pytest.raises(FencedError):
        await save(held, grow)
    assert held.lost.is_set()


async def test_detach_after_the_lease_ended_is_clean_if_nobody_came(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await detach(held, grow)
    assert (await world.other.attach()).was_clean


async def test_vdi_deleted_after_the_lease_ended_is_lost(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await world.catalog.delete("vm")
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert held.lost.is_set()


async def test_reclaim_goes_on_until_etcd_answers(world: World, autojump_clock: MockClock) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await world.one.new_lease()
    world.one.etcd.partition()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reclaim_after_lease_loss, held, world.one.lease)
        await trio.sleep(5)
        world.one.etcd.heal()
    assert await world.lock() is not None


async def test_reclaim_whose_answer_got_lost_is_seen_as_ours(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    await world.one.new_lease()
    world.one.etcd.lose_next_reply()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert not held.lost.is_set()
    await save(held, grow)


async def test_reclaim_with_a_lease_that_ended_too_says_so(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await world.cut_off_until_lease_is_gone(world.one)
    with pytest.raises(LeaseGoneError):
        await reclaim_after_lease_loss(held, world.one.lease)
    assert not held.lost.is_set()


async def test_attach_with_an_ended_lease_is_refused(world: World) -> None:
    await world.one.lease.revoke()
    with pytest.raises(LeaseGoneError):
        await world.one.attach()
    assert await world.lock() is None


async def test_fence_that_fails_gives_the_lock_back(world: World) -> None:
    world.nodes.failure = UnreachableError("node 3 does not answer")
    with pytest.raises(UnreachableError, match="node 3"):
        await world.one.attach()
    assert await world.lock() is None
    world.nodes.failure = None
    held = await world.other.attach()
    assert held.was_clean
    assert held.generation == 2


@pytest.mark.parametrize("stays", [True, False])
async def test_a_vdi_that_was_taken_over_while_it_was_fenced_is_not_attached(
    world: World, stays: bool
) -> None:
    """As by a mount that hangs for longer than its lease, and does not know it yet."""

    async def slow_fence(vdi: int, token: int) -> None:
        await world.one.etcd.revoke(world.one.lease.lease)
        held = await world.other.attach()
        if not stays:
            await detach(held, keep)

    one = world.one
    with pytest.raises(HeldElsewhereError if stays else LeaseGoneError):
        await attach(one.etcd, KEYS, "vm", one.owner, one.lease, slow_fence)
    lock = await world.lock()
    assert (lock is not None and lock.owner == world.other.owner) == stays
    assert (await world.record()).clean != stays


async def test_attach_cancelled_while_it_fences_gives_the_lock_back(
    world: World, autojump_clock: MockClock
) -> None:
    async def fence_for_ever(vdi: int, token: int) -> None:
        await trio.sleep_forever()

    one = world.one
    with trio.move_on_after(3) as scope:
        await attach(one.etcd, KEYS, "vm", one.owner, one.lease, fence_for_ever)
    assert scope.cancelled_caught
    assert await world.lock() is None


async def test_attach_whose_answer_got_lost_does_not_stay_locked(
    world: World, autojump_clock: MockClock
) -> None:
    world.one.etcd.lose_next_reply()
    with pytest.raises(UnreachableError):
        await world.one.attach()
    assert await world.lock() is None
    assert (await world.other.attach()).was_clean


async def test_attach_that_never_arrived_cannot_happen_later(world: World) -> None:
    """A transaction still under way is refused: the record's revision has changed."""
    before = (await world.catalog.vdi("vm"))[1]
    world.one.etcd.fail_next_commit()
    with pytest.raises(UnreachableError):
        await world.one.attach()
    assert (await world.catalog.vdi("vm"))[1] > before
    assert (await world.record()).generation == 0


async def test_lock_left_over_by_us_is_taken_again(world: World) -> None:
    left = await world.one.attach()
    held = await world.one.attach()
    assert held.token > left.token
    assert not held.was_clean
    with pytest.raises(FencedError):
        await save(left, grow)


async def test_detach_whose_answer_got_lost_can_be_repeated(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    world.one.etcd.lose_next_reply()
    with pytest.raises(UnreachableError):
        await detach(held, keep)
    await detach(held, keep)
    assert (await world.other.attach()).was_clean


async def test_force_unlock_fences_the_holder_everywhere(world: World) -> None:
    held = await world.one.attach()
    owner = await force_unlock(world.other.etcd, KEYS, world.vdi, world.nodes.fence)
    assert owner == "one:1:/mnt"
    assert not world.nodes.takes(held)
    assert await world.lock() is None
    with pytest.raises(FencedError):
        await save(held, grow)
    new = await world.other.attach()
    assert not new.was_clean
    assert world.nodes.takes(new)


async def test_force_unlock_of_a_free_vdi_leaves_it_clean(world: World) -> None:
    assert await force_unlock(world.other.etcd, KEYS, world.vdi, world.nodes.fence) is None
    assert (await world.one.attach()).was_clean


async def test_who_lost_a_vdi_to_force_does_not_take_its_lock_back(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()
    await force_unlock(world.other.etcd, KEYS, world.vdi, world.nodes.fence)
    await world.cut_off_until_lease_is_gone(world.one)
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert held.lost.is_set()
    assert await world.lock() is None


async def test_who_lost_a_vdi_while_its_lease_ended_does_not_take_its_lock_back(
    world: World, autojump_clock: MockClock
) -> None:
    held = await world.one.attach()

    async def fence(vdi: int, token: int) -> None:
        await world.nodes.fence(vdi, token)
        await world.cut_off_until_lease_is_gone(world.one)

    await force_unlock(world.other.etcd, KEYS, world.vdi, fence)
    await world.one.new_lease()
    await reclaim_after_lease_loss(held, world.one.lease)
    assert held.lost.is_set()


async def test_a_lock_stays_when_not_every_node_refuses_its_holder(world: World) -> None:
    held = await world.one.attach()
    world.nodes.failure = UnreachableError("node 3 does not answer")
    with pytest.raises(UnreachableError):
        await force_unlock(world.other.etcd, KEYS, world.vdi, world.nodes.fence)
    assert await world.lock() is not None
    await save(held, grow)


async def test_force_unlock_leaves_the_lock_of_who_came_meanwhile(world: World) -> None:
    held = await world.one.attach()

    async def fence(vdi: int, token: int) -> None:
        await world.nodes.fence(vdi, token)
        await detach(held, keep)
        await world.other.attach()

    with pytest.raises(HeldElsewhereError, match="other:1:/mnt"):
        await force_unlock(world.other.etcd, KEYS, world.vdi, fence)
    lock = await world.lock()
    assert lock is not None
    assert lock.owner == "other:1:/mnt"


async def test_force_unlock_of_who_lets_go_meanwhile_is_done(world: World) -> None:
    held = await world.one.attach()

    async def fence(vdi: int, token: int) -> None:
        await world.nodes.fence(vdi, token)
        await detach(held, keep)

    assert await force_unlock(world.other.etcd, KEYS, world.vdi, fence) == "one:1:/mnt"
    assert (await world.other.attach()).was_clean


async def test_attach_and_take_over_on_a_real_etcd(etcd_process: EtcdProcess) -> None:
    keys, nodes = Keys("attach-real"), Nodes()

    async def hold(etcd: Store, owner: str, lease: LeaseKeeper) -> Attachment:
        return await attach(etcd, keys, "vm", owner, lease, nodes.fence)

    async with Etcd(etcd_process.endpoint) as etcd, trio.open_nursery() as nursery:
        await Catalog(etcd, keys).create("vm", 0)
        leases = [LeaseKeeper(etcd, 5), LeaseKeeper(etcd, 5), LeaseKeeper(etcd, 5)]
        for lease in leases:
            await nursery.start(lease.run)
        held = await hold(etcd, "one", leases[0])
        with pytest.raises(HeldElsewhereError, match="one"):
            await hold(etcd, "other", leases[1])
        await etcd.revoke(leases[0].lease)
        await reclaim_after_lease_loss(held, leases[2])
        await save(held, grow)
        with pytest.raises(HeldElsewhereError, match="one"):
            await hold(etcd, "other", leases[1])
        await etcd.revoke(leases[2].lease)
        usurper = await hold(etcd, "other", leases[1])
        assert usurper.token > held.token
        with pytest.raises(FencedError):
            await save(held, grow)
        await detach(usurper, keep)
        nursery.cancel_scope.cancel()
