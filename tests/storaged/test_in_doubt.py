"""A write fails half-way at several members: their copies are suspects while all of them run."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from fakes.static_cluster import StaticCluster, static_cluster
from fakes.waiting import wait_until
from sheepfs.core.errors import CorruptError, InDoubtError, NoSpaceError, SheepError
from sheepfs.core.geometry import data_object, make_layer, pg_of
from sheepfs.core.wire import FLAG_CREATE, Buffer, Op
from sheepfs.net.router import Router
from storaged.store.disk import FileDisk
from storaged.store.entry import CORRUPT

BLOCK = 4096
OID = data_object(make_layer(1, 2, 3), 0)
PG = pg_of(OID, 4)
V = 1 << 40
TORN = b"t" * 4 * BLOCK
Ask = Callable[..., Awaitable[bytes]]


def asking(cluster: StaticCluster, router: Router) -> Ask:
    """Give a function that asks one node for something about the object."""

    async def ask(node: int, op: Op, body: bytes = b"", **fields: int) -> bytes:
        link = router.link(node)
        assert link is not None
        fields |= {"oid": OID, "pool": 3, "pg": PG, "vdi": 2, "token": 1}
        with trio.fail_after(10):
            _, answer = await link.call(op, body, epoch=cluster.map.epoch, **fields)
        return bytes(answer)

    return ask


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk ends in the middle of what is written of TORN, as a full file system's may."""

    def until_full(fd: int, data: Buffer, offset: int) -> int:
        if bytes(data) == TORN:
            os.pwrite(fd, bytes(data)[: len(TORN) // 2 + 512], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(fd, data, offset)

    monkeypatch.setattr(FileDisk, "pwrite", staticmethod(until_full))


async def prepare(cluster: StaticCluster, ask: Ask, torn: tuple[int, ...]) -> None:
    """Write 8 blocks everywhere; then a write fails at some members, and succeeds at the others."""
    for node in cluster.nodes:
        await ask(node, Op.WRITE, b"a" * 8 * BLOCK, span=8 * BLOCK, version=V, flags=FLAG_CREATE)
        await ask(node, Op.FLUSH)
    for node in cluster.nodes:
        body = TORN if node in torn else b"b" * 4 * BLOCK
        change = {"span": len(body), "prev": V, "version": V + 1}
        if node in torn:
            with pytest.raises(NoSpaceError):
                await ask(node, Op.WRITE, body, **change)
            assert cluster.nodes[node].store.suspects() == [OID]
        else:
            await ask(node, Op.WRITE, body, **change)


async def read(ask: Ask, node: int) -> bytes:
    """Read as a client does: again, while the node says that it will be able to."""
    with trio.fail_after(5):
        while True:
            try:
                return await ask(node, Op.READ, span=8 * BLOCK)
            except InDoubtError:
                await trio.lowlevel.checkpoint()


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("first", [1, 2, 3])
async def test_when_all_copies_are_in_doubt_one_is_taken_and_the_others_follow(
    tmp_path: Path, first: int
) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        ask = asking(cluster, router)
        await prepare(cluster, ask, (1, 2, 3))
        found = {}

        async def note(node: int) -> None:
            found[node] = await read(ask, node)

        started = trio.current_time()
        await note(first)
        async with trio.open_nursery() as nursery:
            for node in cluster.nodes:
                nursery.start_soon(note, node)
        assert trio.current_time() - started < 2  # No wait ran out.
        assert len(set(found.values())) == 1
        assert found[1][4 * BLOCK :] == b"a" * 4 * BLOCK
        assert set(found[1][: 4 * BLOCK]) <= set(b"ta")
        entries = [node.store.get(OID) for node in cluster.nodes.values()]
        assert len({(e.version, e.lineage, e.state) for e in entries if e}) == 1


@pytest.mark.usefixtures("full")
async def test_all_who_ask_at_once_are_answered(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        ask = asking(cluster, router)
        await prepare(cluster, ask, (1, 2, 3))
        found = set()

        async def note(node: int) -> None:
            found.add(await read(ask, node))

        async with trio.open_nursery() as nursery:
            for node in (3, 2, 1, 2, 3, 1):
                nursery.start_soon(note, node)
        assert len(found) == 1


@pytest.mark.usefixtures("full")
async def test_a_copy_beyond_doubt_is_the_truth_for_those_in_doubt(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        ask = asking(cluster, router)
        await prepare(cluster, ask, (1, 2))
        for node in (1, 2, 3):
            assert await read(ask, node) == b"b" * 4 * BLOCK + b"a" * 4 * BLOCK


@pytest.mark.usefixtures("full")
async def test_nobody_is_taken_at_its_word_while_a_member_is_silent(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 3) as (cluster, router):
        ask = asking(cluster, router)
        await prepare(cluster, ask, (1, 2, 3))
        cluster.nodes[3].stop()
        await wait_until(lambda: 3 not in cluster.nodes[1].router.links)
        with pytest.raises(SheepError):
            await ask(1, Op.READ, span=BLOCK)
        assert cluster.nodes[1].store.suspects() == [OID]


@pytest.mark.usefixtures("full")
async def test_a_copy_without_a_header_does_not_keep_the_others_in_doubt(tmp_path: Path) -> None:
    async with static_cluster(tmp_path, 2) as (cluster, router):
        ask = asking(cluster, router)
        await prepare(cluster, ask, (1, 2))
        entry = cluster.nodes[1].store.get(OID)
        assert entry is not None
        entry.state = CORRUPT
        found = await read(ask, 2)
        assert found[4 * BLOCK :] == b"a" * 4 * BLOCK
        with pytest.raises(CorruptError):
            await ask(1, Op.READ, span=BLOCK)  # What finds the damage has it mended.
        await wait_until(lambda: not entry.suspect)
        assert await read(ask, 1) == found
