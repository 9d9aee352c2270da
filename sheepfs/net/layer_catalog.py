"""Layers and what names them: what reclaim works on.

Always holds:
- `roots` is one reading at one revision: what is frozen in it is frozen for ever.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sheepfs.core.errors import ProtocolError
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    LayerRecord,
    LockRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
    check_copies,
)
from sheepfs.net.records import Records
from sheepfs.net.store import Hints

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RootMap:
    """A map that a record names: everything that it names in turn is in use."""

    map: int
    """Layer id under which its map objects are stored."""
    maps: int
    """Bit i is set when map object i exists."""
    what: str
    """`vm1.raw`, `vm1.raw@daily` or `trash/7`, for people."""
    size: int
    copies: int
    held: frozenset[int] = frozenset()
    """The open layers, if a mount has it attached: what is stored is older than what it knows."""


@dataclass
class Roots:
    """What etcd says of one family, at one revision.

    Attributes:
        open: layers that take writes.
        building: layers whose map is being made.
        layers: every layer that was born and not forgotten -> the VDI it was born for.
    """

    maps: list[RootMap] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    building: set[int] = field(default_factory=set)
    layers: dict[int, int] = field(default_factory=dict)


class LayerCatalog(Records):
    """Layers, roots, and requests for reclaim."""

    async def families(self) -> dict[int, Roots]:
        """All families: everything that exists, from one reading.

        Raises:
            ProtocolError: a record cannot be read: what it names is not known.
        """
        keys = self._keys
        found, _ = await self._store.list(keys.root)
        families: dict[int, Roots] = {}
        building = set()
        held = set()
        for kv in found:
            if kv.key.startswith(keys.building):
                building.add(_number(kv, keys.building))
            elif kv.key.startswith(keys.locks):
                held.add(LockRecord.decode(kv.value).vdi)
        for kv in found:
            if kv.key.startswith(keys.layers):
                record = LayerRecord.decode(kv.value)
                layer = _number(kv, keys.layers)
                roots = families.setdefault(record.family, Roots())
                roots.layers[layer] = record.vdi
                if layer in building:
                    roots.building.add(layer)
            elif kv.key.startswith(keys.vdis):
                vdi = VdiRecord.decode(kv.value)
                _add_vdi(families, vdi, kv.key.removeprefix(keys.vdis), vdi.id in held)
            elif kv.key.startswith(keys.snapshots):
                snapshot = SnapshotRecord.decode(kv.value)
                _add_snapshot(families, snapshot, kv.key.removeprefix(keys.root))
            elif kv.key.startswith(keys.trash):
                trash = TrashRecord.decode(kv.value)
                what = kv.key.removeprefix(keys.root)
                if trash.tag:
                    _add_snapshot(families, SnapshotRecord.decode(trash.record.encode()), what)
                else:
                    _add_vdi(families, VdiRecord.decode(trash.record.encode()), what, False)
        return families

    async def roots(self, family: int) -> Roots:
        """What there is of one family, at one revision. Raises as `families`."""
        return (await self.families()).get(family, Roots())

    async def layers_of(self, vdi: int) -> set[int]:
        """Layers that were born for a VDI."""
        found, _ = await self._store.list(self._keys.layers)
        return {
            _number(kv, self._keys.layers)
            for kv, record in self._readable(found, LayerRecord)
            if record.vdi == vdi
        }

    async def want_pool(self, copies: int) -> None:
        """Ask the leader for placement groups of so many copies, if there are none yet."""
        check_copies(copies)
        key = self._keys.pool(copies)
        await self._store.commit(Transaction([Unchanged(key, 0)], [Put(key, b"")]))

    async def want_reclaim(self, family: int) -> None:
        """Ask for a look at what a family does not use any more."""
        await self._store.commit(Transaction([], [Put(self._keys.reclaim_family(family), b"")]))

    async def reclaim_wanted(self) -> list[tuple[int, int]]:
        """Families to be looked at, each with the revision of the last request."""
        found, _ = await self._store.list(self._keys.reclaim)
        return [(_number(kv, self._keys.reclaim), kv.mod_revision) for kv in found]

    async def reclaim_done(self, family: int, revision: int) -> None:
        """A family was looked at on every node; a later request stays."""
        key = self._keys.reclaim_family(family)
        await self._store.commit(Transaction([Unchanged(key, revision)], [Delete(key)]))

    @asynccontextmanager
    async def watch_reclaim(self, poll_s: float) -> AsyncIterator[Hints]:
        """Give hints that a family may have to be looked at."""
        async with self._store.watch(self._keys.reclaim, poll_s) as hints:
            yield hints

    async def forget_layer(self, layer: int) -> None:
        """No node has an object of this layer, and nothing will ever name it."""
        await self._store.commit(Transaction([], [Delete(self._keys.layer(layer))]))


def _add_vdi(families: dict[int, Roots], vdi: VdiRecord, what: str, held: bool) -> None:
    roots = families.setdefault(vdi.family, Roots())
    opened = frozenset({vdi.layer, vdi.next}) - {0}
    roots.open |= opened
    roots.maps.append(
        RootMap(vdi.map, vdi.maps, what, vdi.size, vdi.copies, opened if held else frozenset())
    )


def _add_snapshot(families: dict[int, Roots], snapshot: SnapshotRecord, what: str) -> None:
    roots = families.setdefault(snapshot.family, Roots())
    roots.maps.append(RootMap(snapshot.map, snapshot.maps, what, snapshot.size, snapshot.copies))


def _number(kv: KeyValue, prefix: str) -> int:
    number = kv.key.removeprefix(prefix)
    if not number.isdecimal():
        raise ProtocolError(f"etcd key {kv.key!r} does not end in a number")
    return int(number)
