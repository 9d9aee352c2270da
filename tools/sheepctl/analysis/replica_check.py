"""Do all replicas of a VDI agree? Asks every sync member for each object's checksums.

Always holds:
- Nothing is changed; a corrupt block that a member finds while it reads, it repairs itself.
- An object of a VDI in use may change between two answers: a difference counts only when it is
  still there after `ATTEMPTS` looks at it while it does not change, or after `IN_USE_S`.
- What could not be compared is no agreement, whatever the members say instead.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import trio
from xxhash import xxh3_64_hexdigest

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    ProtocolError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import (
    MAP_ENTRIES_PER_OBJECT,
    OBJECT_SIZE,
    copies_of,
    data_object,
    describe_oid,
    layer_of,
    map_object,
    pg_of,
    pool_of,
)
from sheepfs.core.metadata import VdiRecord
from sheepfs.core.wire import Op
from sheepfs.net.link import Link, connect_node
from sheepfs_tools.sheepctl.session import Session

ATTEMPTS = 20
PAUSE_S = 0.25
IN_USE_S = 60.0
"""How long an object that changes all the time is looked at."""
WORKERS = 32
DEEP_WORKERS = 8
"""Each has as many objects in memory as there are copies."""
CALL_TIMEOUT_S = 10.0
WANT_DIGEST = 1
"""Flag of STAT: compute the checksum of the object's checksum table."""


class Answer(NamedTuple):
    """What a member has of an object.

    Attributes:
        text: for people; equal when the bytes are, if `is_good`.
        version: 0 if it has none or did not tell.
        is_good: it has given all bytes of this version.
    """

    text: str
    version: int = 0
    is_good: bool = False


MISSING = Answer("missing")


@dataclass
class Report:
    """What the check found. `differences`: object -> member -> what it has."""

    objects: int = 0
    replicas: int = 0
    joining_groups: int = 0
    differences: dict[str, dict[int, str]] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    """Nodes that could not be asked, and why."""

    @property
    def agree(self) -> bool:
        """True when every sync member was asked and all gave the same."""
        return not self.differences and not self.unanswered


class Checker:
    """Compares the replicas of one VDI; `deep` reads every byte instead of trusting tables."""

    def __init__(self, session: Session, record: VdiRecord, deep: bool) -> None:
        self.report = Report()
        self._session = session
        self._record = record
        self._deep = deep
        self._links: dict[int, Link] = {}
        self._map = ClusterMap(0, session.config.cluster)

    async def run(self) -> Report:
        """Check all objects.

        Raises:
            UnreachableError: no node answers.
            SheepError: the VDI's map cannot be read from any member.
        """
        self._map = await self._session.cluster_map()
        async with AsyncExitStack() as stack:
            for node in self._map.nodes.values():
                try:
                    self._links[node.id] = await stack.enter_async_context(
                        connect_node(node.address, self._session.config.cluster)
                    )
                except SheepError as error:
                    if any(node.id in g.sync for pool in self._map.pools.values() for g in pool):
                        self.report.unanswered[node.id] = str(error)
            if self._record.copies in self._map.pools:
                await self._check_all()
        return self.report

    def _group(self, oid: int) -> PlacementGroup:
        pool = self._map.pools[pool_of(oid)]
        return pool[pg_of(oid, len(pool))]

    async def _check_all(self) -> None:
        if not self._links:
            raise UnreachableError("no storage daemon answers: sheepctl cluster status tells more")
        named = set(await self._named_objects())
        present = await self._present_objects()
        pools = {pool_of(oid) for oid in named}
        self.report.joining_groups = sum(
            bool(group.joining) for pool in pools for group in self._map.pools[pool]
        )
        objects = iter(sorted(named | present))
        self.report.objects = len(named | present)
        async with trio.open_nursery() as nursery:
            for _ in range(DEEP_WORKERS if self._deep else WORKERS):
                nursery.start_soon(self._work, objects, named)

    async def _work(self, objects: Iterator[int], named: set[int]) -> None:
        for oid in objects:
            await self._compare(oid, oid in named)

    def _fields(self, oid: int) -> dict[str, int]:
        pool = pool_of(oid)
        pg = pg_of(oid, len(self._map.pools[pool]))
        return {"oid": oid, "pool": pool, "pg": pg, "epoch": self._map.epoch}

    async def _named_objects(self) -> list[int]:
        """All objects that the VDI's map names: map objects, and data objects of any layer."""
        named = []
        for number in range(self._record.maps.bit_length()):
            if not self._record.maps >> number & 1:
                continue
            oid = map_object(self._record.map, number)
            named.append(oid)
            entries = array("Q", await self._read_anywhere(oid))
            base = number * MAP_ENTRIES_PER_OBJECT
            named += [
                data_object(owner, base + entry) for entry, owner in enumerate(entries) if owner
            ]
        return named

    async def _read_anywhere(self, oid: int) -> bytes:
        """Read a whole object from the first member that gives it."""
        problem: SheepError = ObjectNotFoundError(f"{describe_oid(oid)}: no member can be asked")
        for _ in range(ATTEMPTS):
            for node in self._group(oid).sync:
                if node not in self._links:
                    continue
                try:
                    return await self._read(self._links[node], oid)
                except SheepError as error:
                    problem = error
            await self._pause()
        raise problem

    async def _read(self, link: Link, oid: int) -> bytes:
        fields = self._fields(oid)
        _, body = await link.call(
            Op.READ, b"", span=OBJECT_SIZE, timeout_s=CALL_TIMEOUT_S, **fields
        )
        return body

    async def _present_objects(self) -> set[int]:
        """Objects of the VDI's active layer that any member has, named or not."""
        present: set[int] = set()

        own = {self._record.layer, self._record.map} - {0}

        async def ask(node: int, link: Link) -> None:
            for layer in own:
                for pg, group in enumerate(self._map.pools[copies_of(layer)]):
                    if node in group.sync:
                        present.update(await self._list(link, layer, pg))

        async with trio.open_nursery() as nursery:
            for node, link in self._links.items():
                nursery.start_soon(ask, node, link)
        return present

    async def _list(self, link: Link, layer: int, pg: int) -> list[int]:
        try:
            rows = await link.call_json(
                Op.LIST,
                pool=copies_of(layer),
                pg=pg,
                version=layer,
                epoch=self._map.epoch,
                timeout_s=CALL_TIMEOUT_S,
            )
            return [row[0] for row in rows if layer_of(row[0]) == layer]
        except (RetryableError, TypeError, IndexError):
            # The group changed meanwhile. What the map names is compared all the same.
            return []

    async def _compare(self, oid: int, is_named: bool) -> None:
        answers: dict[int, Answer] = {}
        left = ATTEMPTS
        newest = 0
        patience = trio.current_time() + IN_USE_S
        while left:
            answers = await self._ask_all(oid)
            found = set(answers.values())
            if found <= {MISSING} and not is_named:
                # Deleted while we looked.
                return
            if len(found) == 1 and all(answer.is_good for answer in found):
                self.report.replicas += len(answers)
                return
            seen = max((answer.version for answer in found), default=0)
            if seen == newest or trio.current_time() > patience:
                left -= 1
            newest = max(newest, seen)
            await self._pause()
        self.report.differences[describe_oid(oid)] = {
            node: answer.text for node, answer in sorted(answers.items())
        }

    async def _ask_all(self, oid: int) -> dict[int, Answer]:
        """Ask all sync members at once: what changes meanwhile is then equal the most often."""
        answers: dict[int, Answer] = {}

        async def ask(node: int, link: Link) -> None:
            answers[node] = await self._ask(link, oid)

        async with trio.open_nursery() as nursery:
            for node in self._group(oid).sync:
                if link := self._links.get(node):
                    nursery.start_soon(ask, node, link)
        return answers

    async def _ask(self, link: Link, oid: int) -> Answer:
        try:
            version, digest = await self._stat(link, oid)
            if not self._deep:
                return Answer(f"version {version:x} checksum {digest}", version, is_good=True)
            data = await self._read(link, oid)
            again, _ = await self._stat(link, oid, flags=0)
            if again != version:
                return Answer(f"version {version:x} became {again:x} while it was read", again)
        except ObjectNotFoundError:
            return MISSING
        except CorruptError:
            return Answer("corrupt")
        except SheepError as error:
            return Answer(str(error))
        digest += " " + xxh3_64_hexdigest(data)
        return Answer(f"version {version:x} checksum {digest}", version, is_good=True)

    async def _stat(self, link: Link, oid: int, flags: int = WANT_DIGEST) -> tuple[int, str]:
        """Give an object's version, and the checksum of its checksum table if that is wanted."""
        header, body = await link.call(
            Op.STAT, b"", flags=flags, timeout_s=CALL_TIMEOUT_S, **self._fields(oid)
        )
        try:
            return header.version, str(json.loads(body)["digest"]) if flags else ""
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"node {link.node} answered STAT badly: {error!r}") from error

    async def _pause(self) -> None:
        await trio.sleep(PAUSE_S)
        self._map = await self._session.cluster_map()
