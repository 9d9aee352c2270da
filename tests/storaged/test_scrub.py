"""Scrubbing with real daemons' insides: what is found, what is repaired, what is left alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fakes.etcd import FakeEtcd
from fakes.static_cluster import PG_COUNT, StaticCluster, StaticNode, static_cluster
from fakes.waiting import wait_until
from sheepfs.core.errors import RetryableError, UsageError
from sheepfs.core.geometry import data_object, index_of, layer_of, make_layer, map_object, pg_of
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import LayerRecord, ScrubRecord, VdiRecord
from sheepfs.core.wire import FLAG_FORWARD, Op
from sheepfs.net.catalog import Catalog
from storaged.logic.scrub import Kind
from storaged.scrub import agreement, selfcheck
from storaged.scrub import scrubber as scrub
from storaged.scrub.scrubber import Scrubber
from storaged.settings import Setting
from storaged.store.format import META_OFFSET

BLOCK = 4096
LAYER, MAP = make_layer(2, 2, 3), make_layer(3, 2, 3)
OID, OTHER, UNNAMED = (data_object(LAYER, index) for index in range(3))
KEYS = Keys("test")
RECORD = VdiRecord(7, 16 << 20, 3, LAYER, MAP, LAYER, maps=1)


class Scrubbed:
    """A cluster of three whose nodes scrub; a VDI names OID and OTHER, not UNNAMED."""

    def __init__(self, cluster: StaticCluster, etcd: FakeEtcd, nursery: trio.Nursery) -> None:
        self.cluster = cluster
        self.nodes = cluster.nodes
        self._etcd = etcd
        self._nursery = nursery
        self._version = 1 << 40
        self.scrubbers: dict[int, Scrubber] = {}

    async def start(self, *nodes: int) -> None:
        for number in nodes or (1, 2, 3):
            node = self.nodes[number]
            etcd = self._etcd.server.client()
            setting = Setting(etcd, KEYS.setting("scrub"), ScrubRecord())
            scrubber = Scrubber(node.replica, node.router, Catalog(etcd, KEYS), setting)
            self.scrubbers[number] = scrubber
            self._nursery.start_soon(scrubber.run)
        await wait_until(
            lambda: all(len(self.nodes[n].router.links) == 2 for n in nodes or (1, 2, 3))
        )

    async def put(self, key: str, value: bytes) -> None:
        await self._etcd.commit(Transaction([], [Put(key, value)]))

    async def set_vdi(self, *, clean: bool) -> None:
        await self.put(KEYS.vdi("vm1.raw"), replace(RECORD, clean=clean).encode())

    def fill(self, oid: int, data: bytes, nodes: Sequence[int] = (1, 2, 3), at: int = 0) -> int:
        """Write and flush as a holder does; gives the version."""
        self._version += 1
        for number in nodes:
            write(self.nodes[number], oid, data, self._version, at)
        return self._version

    async def run(self, kind: Kind, *nodes: int) -> None:
        """Run one pass on some nodes, to the end."""
        wanted = {n: self.scrubbers[n] for n in nodes or self.scrubbers}
        before = {n: s.status()["passes"][kind]["completed"] for n, s in wanted.items()}
        for scrubber in wanted.values():
            scrubber.start([kind])
        await wait_until(
            lambda: all(
                s.status()["passes"][kind]["completed"] > before[n] for n, s in wanted.items()
            ),
            20,
        )

    def status(self, node: int) -> dict[str, Any]:
        return self.scrubbers[node].status(10)

    def total(self, what: str) -> int:
        return sum(int(self.status(n)[what]) for n in self.scrubbers)

    def contents(self, oid: int, length: int = BLOCK) -> set[bytes]:
        found = set()
        for node in self.nodes.values():
            if node.store.get(oid) is None:
                found.add(b"missing")
            else:
                found.add(b"".join(node.store.read(oid, 0, length, wait=True) or ()))
        return found


def write(node: StaticNode, oid: int, data: bytes, version: int, at: int = 0) -> None:
    store = node.store
    store.mark([oid])
    is_new = store.get(oid) is None
    store.write(oid, at, data, version, create=is_new, pool=3, pg=pg_of(oid, PG_COUNT))
    flush(node)


def flush(node: StaticNode) -> None:
    job = node.store.begin_flush(None)
    while job is not None:
        job.run()
        job = node.store.end_flush(job)


def spoil(node: StaticNode, oid: int, offset: int) -> None:
    (path,) = node.path.glob(f"objects/*/*/{oid:016x}")
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1) or b"\0"
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x40]))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECOND_LOOK_S", 0.1)
    monkeypatch.setattr(selfcheck, "AGAIN_S", 0.1)
    monkeypatch.setattr(scrub, "WAIT_S", 0.05)


@asynccontextmanager
async def scrubbed(path: Path, *, clean: bool = True) -> AsyncIterator[Scrubbed]:
    etcd = FakeEtcd()
    async with static_cluster(path) as (cluster, _), trio.open_nursery() as nursery:
        whole = Scrubbed(cluster, etcd, nursery)
        for layer in (LAYER, MAP):
            await whole.put(KEYS.layer(layer), LayerRecord(7, LAYER).encode())
        await whole.set_vdi(clean=clean)
        entries = b"".join(layer_of(oid).to_bytes(8, "little") for oid in (OID, OTHER))
        assert [index_of(oid) for oid in (OID, OTHER)] == [0, 1]
        whole.fill(map_object(MAP, 0), entries.ljust(BLOCK, b"\0"))
        for oid in (OID, OTHER, UNNAMED):
            whole.fill(oid, b"a" * 8 * BLOCK)
        await whole.start()
        yield whole
        nursery.cancel_scope.cancel()


async def test_what_is_good_is_found_good(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        await whole.run(Kind.DEEP)
        await whole.run(Kind.LIGHT)
        for node in whole.scrubbers:
            told = whole.status(node)
            assert (told["found"], told["problems"], told["left_out"]) == (0, [], 0)
            assert told["checked_objects"] == 4


async def test_a_bad_block_is_mended_durably_from_another_member(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        spoil(whole.nodes[2], OID, 3 * BLOCK + 7)
        await whole.run(Kind.DEEP)
        assert whole.contents(OID, 8 * BLOCK) == {b"a" * 8 * BLOCK}
        assert (whole.status(2)["found"], whole.status(2)["repaired"]) == (1, 1)
        assert whole.total("found") == 1
        assert whole.nodes[2].store.begin_flush(None) is None


async def test_a_bad_header_is_mended_whether_the_object_is_open_or_not(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        spoil(whole.nodes[1], OID, META_OFFSET + 20)
        spoil(whole.nodes[3], OTHER, META_OFFSET + BLOCK + 1)
        await whole.run(Kind.DEEP)
        assert whole.total("repaired") == 2
        for number in (1, 3):
            node = whole.nodes[number]
            node.stop()
            await node.start()
            for oid in (OID, OTHER):
                assert node.store.verify(oid) == []


async def test_members_that_are_damaged_in_different_places_mend_each_other(
    tmp_path: Path,
) -> None:
    async with scrubbed(tmp_path) as whole:
        for number in (1, 2, 3):
            spoil(whole.nodes[number], OID, number * BLOCK)
        await whole.run(Kind.DEEP)
        await wait_until(lambda: whole.total("repaired") == 3)
        assert whole.contents(OID, 8 * BLOCK) == {b"a" * 8 * BLOCK}
        assert whole.total("unrepairable") == 0


async def test_a_block_that_is_bad_everywhere_is_named_until_it_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "RETRY_S", 0.2)
    async with scrubbed(tmp_path) as whole:
        for number in (1, 2, 3):
            spoil(whole.nodes[number], OID, 5 * BLOCK)
        await whole.run(Kind.DEEP)
        await wait_until(lambda: whole.total("unrepairable") == 3)
        for number in (1, 2, 3):
            (problem,) = whole.status(number)["problems"]
            assert (problem["oid"], problem["blocks"]) == (OID, [5])
        whole.fill(OID, b"b" * BLOCK, at=5 * BLOCK)
        await wait_until(lambda: whole.total("unrepairable") == 0)
        assert whole.total("repaired") == 0


async def test_a_copy_that_a_map_names_and_a_member_lost_comes_back(tmp_path: Path) -> None:
    async with scrubbed(tmp_path, clean=False) as whole:
        for number in (1, 3):
            whole.nodes[number].store.delete(OID if number == 1 else OTHER)
            flush(whole.nodes[number])
        await whole.run(Kind.LIGHT)
        assert whole.contents(OID) == whole.contents(OTHER) == {b"a" * BLOCK}
        assert whole.total("repaired") == 2
        assert all(node.store.begin_flush(None) is None for node in whole.nodes.values())


async def test_what_no_map_names_never_comes_back(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        whole.nodes[2].store.delete(UNNAMED)
        await whole.run(Kind.LIGHT)
        assert whole.nodes[2].store.get(UNNAMED) is None
        assert whole.total("found") == whole.total("unrepairable") == 0


async def test_a_copy_that_is_behind_is_levelled_when_nobody_holds_the_vdi(
    tmp_path: Path,
) -> None:
    async with scrubbed(tmp_path) as whole:
        whole.fill(OID, b"b" * BLOCK, nodes=(2, 3))
        await whole.run(Kind.LIGHT)
        assert whole.contents(OID) == {b"b" * BLOCK}
        assert (whole.total("found"), whole.total("repaired")) == (1, 1)


async def test_copies_that_differ_by_their_lineage_only_are_no_finding(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        whole.fill(OID, b"b" * BLOCK)
        whole.nodes[2].store.launder(OID, 7)
        await whole.run(Kind.LIGHT)
        entries = [node.store.get(OID) for node in whole.nodes.values()]
        assert len({entry.lineage for entry in entries if entry is not None}) == 1
        assert whole.total("found") == whole.total("repaired") == 0


async def test_versions_that_differ_are_left_to_who_holds_the_vdi(tmp_path: Path) -> None:
    async with scrubbed(tmp_path, clean=False) as whole:
        whole.fill(OID, b"b" * BLOCK, nodes=(2, 3))
        await whole.run(Kind.LIGHT)
        assert whole.contents(OID) == {b"a" * BLOCK, b"b" * BLOCK}
        assert whole.total("left_to_holders") == 1
        assert whole.total("found") == whole.total("unrepairable") == 0


async def test_good_copies_with_other_bytes_at_one_version_are_an_alarm_and_stay(
    tmp_path: Path,
) -> None:
    async with scrubbed(tmp_path, clean=False) as whole:
        version = whole.fill(OID, b"b" * BLOCK, nodes=(1, 3))
        write(whole.nodes[2], OID, b"c" * BLOCK, version)
        await whole.run(Kind.LIGHT)
        (problem,) = [p for n in whole.scrubbers for p in whole.status(n)["problems"]]
        assert "different bytes" in problem["detail"]
        assert whole.contents(OID) == {b"b" * BLOCK, b"c" * BLOCK}
        await whole.run(Kind.LIGHT)
        assert whole.total("unrepairable") == 1
        whole.fill(OID, b"d" * 8 * BLOCK)
        await whole.run(Kind.LIGHT)
        assert whole.total("unrepairable") == 0


async def test_of_copies_with_other_tables_the_one_with_bad_data_is_no_source(
    tmp_path: Path,
) -> None:
    async with scrubbed(tmp_path) as whole:
        version = whole.fill(OID, b"b" * BLOCK, nodes=(2, 3))
        write(whole.nodes[1], OID, b"c" * BLOCK, version)
        spoil(whole.nodes[1], OID, 6 * BLOCK)
        await whole.run(Kind.LIGHT)
        assert whole.contents(OID, 8 * BLOCK) == {b"b" * BLOCK + b"a" * 7 * BLOCK}
        assert whole.total("repaired") == 1


async def test_an_older_copy_never_takes_the_place_of_a_damaged_newer_one(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        whole.fill(OID, b"b" * BLOCK, nodes=(2,))
        spoil(whole.nodes[2], OID, 4 * BLOCK)
        version = whole.nodes[2].replica._version(OID)
        await whole.run(Kind.LIGHT)
        (problem,) = [p for n in whole.scrubbers for p in whole.status(n)["problems"]]
        assert "newest copy is damaged" in problem["detail"]
        assert whole.nodes[2].replica._version(OID) == version


async def test_a_repair_that_may_not_go_back_leaves_a_newer_copy(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        version = whole.fill(OID, b"b" * BLOCK, nodes=(2,))
        link = whole.nodes[1].router.link(2)
        assert link is not None
        fields = {"oid": OID, "pool": 3, "pg": pg_of(OID, PG_COUNT), "epoch": 1, "span": 3}
        with pytest.raises(RetryableError):
            await link.call(Op.REPAIR, b"", flags=FLAG_FORWARD, **fields)
        assert whole.nodes[2].replica._version(OID) == version
        await link.call(Op.REPAIR, b"", **fields)
        assert whole.contents(OID) == {b"a" * BLOCK}


async def test_writes_beside_both_passes_are_never_taken_for_damage(tmp_path: Path) -> None:
    async with scrubbed(tmp_path, clean=False) as whole, trio.open_nursery() as nursery:
        links = [whole.nodes[1].router.link(2), whole.nodes[1].router.link(3)]
        links.append(whole.nodes[2].router.link(1))
        fields: dict[str, int] = {"oid": OID, "pool": 3, "pg": pg_of(OID, PG_COUNT), "epoch": 1}

        async def write_on() -> None:
            version = whole.fill(OID, b"0" * BLOCK)
            while True:
                for link in links:
                    assert link is not None
                    data = bytes([version % 251]) * BLOCK
                    await link.call(
                        Op.WRITE, data, token=1, vdi=7, span=BLOCK,
                        offset=version % 8 * BLOCK, prev=version, version=version + 1, **fields,
                    )  # fmt: skip
                version += 1

        nursery.start_soon(write_on)
        for _ in range(5):
            await whole.run(Kind.DEEP)
            await whole.run(Kind.LIGHT)
        assert whole.total("found") == whole.total("unrepairable") == 0
        nursery.cancel_scope.cancel()


async def test_while_scrubbing_is_paused_nothing_is_read_and_then_it_goes_on(
    tmp_path: Path,
) -> None:
    async with scrubbed(tmp_path) as whole:
        await whole.put(KEYS.setting("scrub"), ScrubRecord(enabled=False).encode())
        await wait_until(lambda: not any(whole.status(n)["enabled"] for n in whole.scrubbers))
        spoil(whole.nodes[1], OID, 0)
        for scrubber in whole.scrubbers.values():
            scrubber.start(list(Kind))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert whole.total("checked_objects") == 0
        assert whole.status(1)["passes"][Kind.DEEP]["running"]
        await whole.put(KEYS.setting("scrub"), ScrubRecord().encode())
        await wait_until(lambda: whole.total("repaired") == 1)


async def test_a_node_that_catches_up_does_that_first(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        whole.cluster.auto_join = False
        whole.cluster.publish([1, 2], [3])
        whole.scrubbers[3].start([Kind.DEEP])
        await whole.run(Kind.DEEP, 1, 2)
        assert whole.status(3)["checked_objects"] == 0
        whole.cluster.publish([1, 2, 3])
        await wait_until(lambda: whole.status(3)["passes"][Kind.DEEP]["completed"] == 1)
        assert whole.status(3)["checked_objects"] == 4


async def test_how_far_a_pass_came_and_what_it_found_survive_a_restart(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        for number in (1, 2, 3):
            spoil(whole.nodes[number], OID, 5 * BLOCK)
        await whole.run(Kind.DEEP)
        await wait_until(lambda: len(whole.status(1)["problems"]) == 1)
        told = whole.status(1)
        note = whole.nodes[1].path / "scrub.json"
        await wait_until(lambda: note.exists() and json.loads(note.read_bytes())["problems"])
        for content, expected in ((None, told["checked_objects"]), (b"{", 0)):
            whole.nodes[1].stop()
            if content is not None:
                note.write_bytes(content)
            await whole.nodes[1].start()
            whole.cluster.publish([1, 2, 3])
            await whole.start(1)
            if expected:
                await wait_until(lambda: whole.status(1)["checked_objects"] >= 4)
            assert bool(whole.status(1)["problems"]) == bool(expected)
            assert whole.status(1)["passes"][Kind.DEEP]["completed"] == (1 if expected else 0)


class Asker:
    """A connection, as a handler sees it."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def reply_json(self, header: object, content: Any) -> None:
        self.answers.append(content)


async def test_the_request_begins_passes_and_tells_how_things_stand(tmp_path: Path) -> None:
    async with scrubbed(tmp_path) as whole:
        asker: Any = Asker()
        header: Any = None
        whole.scrubbers[1].handle(asker, header, b"")
        assert not asker.answers[0]["passes"]["deep"]["running"]
        whole.scrubbers[1].handle(asker, header, b'{"start": ["deep"]}')
        assert asker.answers[1]["passes"]["deep"]["running"]
        assert not asker.answers[1]["passes"]["light"]["running"]
        for wrong in (b'{"start": ["all"]}', b'{"start": 3}', b"[]", b"{"):
            with pytest.raises(UsageError):
                whole.scrubbers[1].handle(asker, header, wrong)
        assert len(asker.answers) == 2
