"""A VDI whose holder died is levelled by itself, and is anybody's who wants it meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from e2e.cluster import Mounted
from sheepfs.callbacks import completion
from sheepfs.cluster import Cluster
from sheepfs.connecting import connect
from sheepfs.core.errors import HeldElsewhereError, VdiNotFoundError
from sheepfs.holding import abandoned
from sheepfs.volume import convergence
from sheepfs.volume.volume import Volume

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def mounted(new_cluster: Callable[[], Mounted]) -> Mounted:
    """A cluster that has no mount: a mount would level what these tests leave."""
    mounted = new_cluster()
    mounted.cluster.unmount(mounted.path)
    return mounted


@asynccontextmanager
async def client(mounted: Mounted, owner: str) -> AsyncIterator[Cluster]:
    async with connect(mounted.cluster.etcd_address, mounted.cluster.cluster, owner) as cluster:
        yield cluster


async def make_abandoned(cluster: Cluster, name: str) -> int:
    """Make a VDI whose holder went without a detach; gives its id."""
    vdi = (await cluster.create(name, 0o644, 0, 0)).id
    volume = await cluster.open(vdi)
    assert isinstance(volume, Volume)
    await completion(partial(volume.write, 0, b"a" * 8192))
    await completion(volume.flush)
    await completion(partial(volume.write, 4096, b"b" * 4096))
    attachment = volume.attachment
    assert attachment is not None
    volume.fence("it is as good as dead")
    await cluster.store.revoke((await cluster.holding.lease()).lease)
    with suppress(Exception):
        await volume.close()
    assert vdi in await abandoned.abandoned(cluster)
    return vdi


async def never(*_: object) -> bool:
    await trio.sleep_forever()
    return False


@asynccontextmanager
async def levelling(
    there: Cluster, here: Cluster, vdi: int, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """While `there` levels a VDI and does not come to an end; it is let go afterwards."""
    with monkeypatch.context() as patched:
        patched.setattr(convergence, "converge", never)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(abandoned.level, there, vdi)
            with trio.fail_after(DEADLINE_S):
                while not await here.holding.is_held(vdi):
                    await trio.sleep(0.01)
            patched.undo()
            yield


async def test_who_wants_a_vdi_that_is_being_levelled_has_it_at_once(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(mounted, "dead") as dead:
        vdi = await make_abandoned(dead, "wanted.raw")
    async with client(mounted, "here") as here, client(mounted, "there") as there:
        with trio.fail_after(DEADLINE_S):
            async with levelling(there, here, vdi, monkeypatch), here.opened(vdi) as volume:
                assert isinstance(volume, Volume)
                await volume.attach()
                await completion(partial(volume.write, 0, b"c"))
                while volume.converging:
                    await trio.sleep(0.01)
            record, _ = await here.catalog.vdi("wanted.raw")
            assert record.clean
        await here.delete("wanted.raw")


async def test_a_vdi_that_is_being_levelled_can_be_deleted(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(mounted, "dead") as dead:
        vdi = await make_abandoned(dead, "unwanted.raw")
    async with client(mounted, "here") as here, client(mounted, "there") as there:
        with trio.fail_after(DEADLINE_S):
            async with levelling(there, here, vdi, monkeypatch):
                await here.delete("unwanted.raw")
            with pytest.raises(VdiNotFoundError):
                await here.lookup("unwanted.raw")


async def test_whoever_is_just_attaching_to_level_a_vdi_gives_way_too(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(mounted, "dead") as dead:
        vdi = await make_abandoned(dead, "early.raw")
    async with client(mounted, "here") as here, client(mounted, "there") as there:
        fence = there.holding._fence

        async def slow_fence(vdi: int, token: int) -> None:
            await trio.sleep(0.5)
            await fence(vdi, token)

        monkeypatch.setattr(there.holding, "_fence", slow_fence)
        with trio.fail_after(4):
            async with levelling(there, here, vdi, monkeypatch):
                await here.delete("early.raw")


async def test_who_levels_a_vdi_and_then_uses_it_keeps_it(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(mounted, "dead") as dead:
        vdi = await make_abandoned(dead, "kept.raw")
    async with client(mounted, "here") as here, client(mounted, "there") as there:
        with trio.fail_after(DEADLINE_S):
            async with (
                levelling(there, here, vdi, monkeypatch),
                there.opened(vdi) as used,
                here.opened(vdi) as other,
            ):
                assert isinstance(used, Volume)
                assert isinstance(other, Volume)
                await used.attach()
                with pytest.raises(HeldElsewhereError):
                    await other.attach()
                with pytest.raises(HeldElsewhereError):
                    await here.delete("kept.raw")
                await used.detach()


async def test_levelling_ends_by_itself(mounted: Mounted) -> None:
    async with client(mounted, "dead") as dead:
        vdi = await make_abandoned(dead, "left.raw")
    async with client(mounted, "here") as here:
        with trio.fail_after(DEADLINE_S):
            await abandoned.level(here, vdi)
        record, _ = await here.catalog.vdi("left.raw")
        assert record.clean
        assert not await here.holding.is_held(vdi)
