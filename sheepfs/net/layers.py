"""Layers: their birth, what keeps them alive, and their end.

Always holds:
- Roots are read all at one revision of etcd, and all of them or none: a record that cannot be
  read stops whoever wants to remove something (I4).
- A layer in `building/` is alive: its map is being made by who holds the lease.
- Layer ids come from `counters/layer` and are never given out twice (I4).
- What names an object of a frozen layer is copied only to a map in `building/`, from before the
  copy until the map is stored (and known, if it is a new one).
Source: docs/snapshots.md.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial

import trio

from sheepfs.core.errors import ProtocolError, RetryableError, UsageError
from sheepfs.core.geometry import MAX_SERIAL, make_layer, tag_of
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    LayerRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
)
from sheepfs.core.names import check_copies, snapshot_file
from sheepfs.net.records import Change
from sheepfs.net.store import Hints, LeaseGoneError
from sheepfs.net.trash import TrashCatalog

log = logging.getLogger(__name__)

BUILDING_PATIENCE_S = 5.0
BUILDING_POLL_S = 0.2
"""How long, and how often, roots are read again while a map of the family is being made."""

AlsoChange = Callable[[list[int], Change], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RootMap:
    """A map that keeps alive what it names."""

    map: int
    """The layer id under which its map objects are stored."""
    maps: int
    """Bit i is set when map object i exists."""
    what: str
    """Whose map it is, for people."""
    settled: bool = True
    """Nobody changes it, and its replicas are equal: a snapshot's, or of a VDI let go cleanly."""
    touched: int = 0
    """The revision in which its layer was born, or last began to take over from other maps."""


@dataclass(slots=True)
class Roots:
    """All that keeps objects of one family alive, at one revision of etcd."""

    family: int
    revision: int
    maps: list[RootMap] = field(default_factory=list)
    """Of every VDI, snapshot and item in the trash."""
    open: set[int] = field(default_factory=set)
    """Layers that take writes: of VDIs, and of those in the trash, which may be restored."""
    building: set[int] = field(default_factory=set)
    """Layers whose map is being made."""
    layers: set[int] = field(default_factory=set)
    """All layers that were born and are not forgotten."""
    held: set[int] = field(default_factory=set)
    """Open layers, and maps, of VDIs that are attached: what is stored there changes."""

    @property
    def frozen(self) -> set[int]:
        """Layers of which nothing new can come: what no map names of them may go."""
        return self.layers - self.open - self.building


class LayerCatalog(TrashCatalog):
    """Layers and roots."""

    async def begin_layers(
        self,
        vdi: int,
        family: int,
        copies: int,
        count: int,
        lease: int,
        also: AlsoChange | None = None,
    ) -> list[int]:
        """Give birth to layers that are being built until their keys go, or the lease ends.

        Args:
            vdi: Whose they are, for people.
            copies: Their pool.
            lease: Of who builds them.
            also: Adds to the transaction, given the new ids; called again after a lost race, so
                it must read again and raise an error when its own reason is gone.

        Raises:
            LeaseGoneError: the lease has ended.
            UsageError: a bad number of copies.
        """
        check_copies(copies)
        keys = self._keys

        async def decide(change: Change) -> list[int]:
            layers = await self._new_layers(tag_of(family), copies, count, change)
            record = LayerRecord(vdi, family, self._clock())
            for layer in layers:
                change.put(keys.layer(layer), record)
                change.changes.append(Put(keys.building_layer(layer), record.encode(), lease))
            await self._add_pool(copies, change)
            if also is not None:
                await also(layers, change)
            return layers

        return await self._commit(decide)

    async def begin_sharing(self, layer: int, lease: int) -> None:
        """Say that a known map is about to take over what other maps of its family name.

        Raises:
            LeaseGoneError: the lease has ended.
            UsageError: there is no such map.
        """
        key = self._keys.layer(layer)

        async def decide(change: Change) -> None:
            found = await self._store.get(key)
            if found is None:
                raise UsageError(f"there is no layer {layer:#x}")
            change.unchanged(key, found)
            building = Put(self._keys.building_layer(layer), found.value, lease)
            change.changes += [Put(key, found.value), building]

        await self._commit(decide)

    async def end_sharing(self, layer: int) -> None:
        """Say that the map is stored as it is now.

        Raises:
            LeaseGoneError: reclaim may have taken meanwhile what only this map names.
        """
        unchanged, delete = self.built(await self.building(layer))
        if await self._store.commit(Transaction([unchanged], [delete])) is None:
            raise LeaseGoneError(f"layer {layer:#x} is not being built any more")

    async def building(self, layer: int) -> KeyValue:
        """Give the key that says that a layer is being built.

        Raises:
            LeaseGoneError: it is gone, as the lease has ended: what was built may be gone, too.
        """
        found = await self._store.get(self._keys.building_layer(layer))
        if found is None:
            raise LeaseGoneError(
                f"layer {layer:#x} is not being built any more: the lease has ended"
            )
        return found

    @staticmethod
    def built(building: KeyValue) -> tuple[Unchanged, Delete]:
        """Give what the transaction needs that puts a record for a layer that was built."""
        return Unchanged(building.key, building.mod_revision), Delete(building.key)

    async def abandon(self, layer: int) -> None:
        """Say that a layer is not being built any more, and ask for its removal."""

        async def decide(change: Change) -> None:
            key = self._keys.building_layer(layer)
            found = await self._store.get(key)
            if found is not None:
                change.unchanged(key, found)
                change.delete(key)
                change.changes.append(self.reclaim_put(LayerRecord.decode(found.value).family))

        await self._commit(decide)

    async def roots(self, family: int) -> Roots:
        """Read what keeps a family's objects alive. Raises ProtocolError (see all_roots)."""
        all_families, revision = await self._all_roots()
        return all_families.get(family) or Roots(family, revision)

    async def read_maps(self, family: int, read: Callable[[RootMap], Awaitable[None]]) -> Roots:
        """Have all maps of a family read; give the roots as they were before.

        Maps change while they are read: a snapshot takes over what its VDI names, and the VDI
        drops it. Who reads the VDI's map after that, and the roots before, sees it nowhere. So the
        roots are read again behind the maps, until they tell of none that has come, or taken over
        anything, since the roots were read before it: then what no map was seen to name is dead.

        Raises:
            RetryableError: there is a map that is being made for long.
            SheepError: of `read`.
            ProtocolError: see all_roots.
        """
        first = roots = await self.roots(family)
        seen: dict[int, int] = {}
        give_up = trio.current_time() + BUILDING_PATIENCE_S
        while True:
            known = [root for root in roots.maps if root.map not in roots.building]
            unread = [root for root in known if root.touched > seen.get(root.map, -1)]
            for root in unread:
                await read(root)
                seen[root.map] = roots.revision
            if not unread and not roots.building:
                return first
            if not unread:
                if trio.current_time() > give_up:
                    raise RetryableError("a snapshot, clone or copy is being made for long")
                await trio.sleep(BUILDING_POLL_S)
            roots = await self.roots(family)

    async def all_roots(self) -> dict[int, Roots]:
        """Read what keeps objects alive, by family, all at one revision.

        Raises:
            ProtocolError: a record cannot be read, so nobody knows what it keeps alive.
        """
        return (await self._all_roots())[0]

    async def forget_layer(self, layer: int) -> bool:
        """Say that no object of a layer is left; False: it is being built."""
        key = self._keys.layer(layer)

        async def decide(change: Change) -> bool:
            building = self._keys.building_layer(layer)
            if await self._store.get(building) is not None:
                return False
            change.unchanged(building, None)
            change.delete(key)
            return True

        return await self._commit(decide)

    async def layers_of(self, vdi: int) -> set[int]:
        """Give the layers that were born for a VDI."""
        found, _ = await self._store.list(self._keys.layers)
        layers = set()
        for kv in found:
            if LayerRecord.decode(kv.value).vdi == vdi:
                layers.add(int(kv.key.removeprefix(self._keys.layers)))
        return layers

    async def layers_building(self) -> dict[int, int]:
        """Give the layers whose map is being made -> their family."""
        found, _ = await self._store.list(self._keys.building)
        return {
            int(kv.key.removeprefix(self._keys.building)): LayerRecord.decode(kv.value).family
            for kv in found
        }

    async def new_id(self) -> int:
        """Take an id for a VDI or snapshot that is being made: no other gets it."""
        return await self._commit(partial(self._next_id, "vdi"))

    async def want_pool(self, copies: int) -> None:
        """Ask the leader for placement groups of so many copies, if nobody did yet."""
        check_copies(copies)
        await self._commit(partial(self._add_pool, copies))

    def watch_reclaim(self, poll_s: float) -> AbstractAsyncContextManager[Hints]:
        """Give hints that there may be something to reclaim."""
        return self._store.watch(self._keys.reclaim, poll_s)

    async def want_reclaim(self, family: int) -> None:
        """Ask for a look at what a family does not use any more."""

        async def decide(change: Change) -> None:
            change.changes.append(self.reclaim_put(family))

        await self._commit(decide)

    async def reclaim_wanted(self) -> list[tuple[int, int]]:
        """Families to be looked at, as (family, mod_revision)."""
        found, _ = await self._store.list(self._keys.reclaim)
        families = []
        for kv in found:
            try:
                families.append((int(kv.key.removeprefix(self._keys.reclaim)), kv.mod_revision))
            except ValueError:
                self._complain(kv.key, ProtocolError("not the id of a family"))
        return sorted(families)

    async def reclaim_done(self, family: int, mod_revision: int) -> bool:
        """Say that every node looked; False when it was wanted again meanwhile."""
        key = self._keys.reclaim_family(family)
        txn = Transaction([Unchanged(key, mod_revision)], [Delete(key)])
        return await self._store.commit(txn) is not None

    # -- parts ------------------------------------------------------------------------------

    async def _new_layers(
        self, tag: int | None, copies: int, count: int, change: Change
    ) -> list[int]:
        """Take layer ids; with no tag each starts a family of its own."""
        first = await self._next_id("layer", change, count)
        if first + count - 1 > MAX_SERIAL:
            raise UsageError(f"all {MAX_SERIAL} layer ids of this cluster are used up")
        return [
            make_layer(serial, serial if tag is None else tag, copies)
            for serial in range(first, first + count)
        ]

    async def _all_roots(self) -> tuple[dict[int, Roots], int]:
        keys = self._keys
        found, revision = await self._store.list(keys.root)
        families: dict[int, Roots] = {}

        def of(family: int) -> Roots:
            return families.setdefault(family, Roots(family, revision))

        def add(record: VdiRecord | SnapshotRecord, what: str) -> None:
            roots = of(record.family)
            settled = not isinstance(record, VdiRecord) or record.clean
            touched = revisions.get(keys.layer(record.map), 0)
            roots.maps.append(RootMap(record.map, record.maps, what, settled, touched))
            if isinstance(record, VdiRecord):
                roots.open |= {record.layer, record.next} - {0}
                if record.id in locked:
                    roots.held |= {record.layer, record.next, record.map} - {0}

        revisions = {kv.key: kv.mod_revision for kv in found if kv.key.startswith(keys.layers)}
        locked = {
            int(number)
            for kv in found
            if (number := kv.key.removeprefix(keys.locks)) != kv.key and number.isdecimal()
        }
        for kv in found:
            key = kv.key
            try:
                if key.startswith(keys.vdis):
                    add(VdiRecord.decode(kv.value), f"VDI {key.removeprefix(keys.vdis)}")
                elif key.startswith(keys.snapshots):
                    where = key.removeprefix(keys.snapshots)
                    add(SnapshotRecord.decode(kv.value), f"snapshot {where}")
                elif key.startswith(keys.trash):
                    trashed = TrashRecord.decode(kv.value)
                    kind = SnapshotRecord if trashed.tag else VdiRecord
                    file = snapshot_file(trashed.name, trashed.tag) if trashed.tag else trashed.name
                    add(kind.decode(trashed.record.encode()), f"{file} in the trash")
                elif key.startswith(keys.building):
                    record = LayerRecord.decode(kv.value)
                    of(record.family).building.add(int(key.removeprefix(keys.building)))
                elif key.startswith(keys.layers):
                    record = LayerRecord.decode(kv.value)
                    of(record.family).layers.add(int(key.removeprefix(keys.layers)))
            except (ProtocolError, UsageError, ValueError) as error:
                raise ProtocolError(
                    f"etcd key {key!r} cannot be read, so nobody can tell what it uses: {error}"
                ) from error
        return families, revision
