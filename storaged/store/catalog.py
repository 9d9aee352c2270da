"""The catalog: every object the store has, by id and by group, and who inherits from whom."""

from __future__ import annotations

import threading
from collections import deque

from sheepfs.core.errors import (
    CorruptError,
    ObjectNotFoundError,
    RecoveringError,
    RetryableError,
    SheepError,
)
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid, layer_of
from storaged.store.disk import Health
from storaged.store.entry import CORRUPT, SUSPECT, StoredObject


class Catalog:
    """All objects. `objects` may be read by any thread, changes go through the methods."""

    def __init__(self, health: Health) -> None:
        self.objects: dict[int, StoredObject] = {}
        self.last_layer = 0
        """The highest layer of any object that was added."""
        self._health = health
        self._groups: dict[tuple[int, int], dict[int, StoredObject]] = {}
        self._dependents: dict[int, set[int]] = {}
        self._lock = threading.Lock()
        # Threads and the loop both change the sum; appending is atomic where `+=` is not.
        self._growth: deque[int] = deque()
        self._blocks = 0

    def add(self, entry: StoredObject) -> None:
        """Add an object, in place of one with the same id."""
        with self._lock:
            old = self.objects.get(entry.oid)
            if old is not None:
                self._remove(old)
            self.objects[entry.oid] = entry
            self.last_layer = max(self.last_layer, layer_of(entry.oid))
            self._groups.setdefault((entry.pool, entry.pg), {})[entry.oid] = entry
            self._growth.append(entry.blocks)
            bases, entry.bases = entry.bases, ()
            self._set_bases(entry, bases)

    def set_bases(self, entry: StoredObject, bases: tuple[int, ...]) -> None:
        """Record which objects an object inherits blocks from."""
        with self._lock:
            if self.objects.get(entry.oid) is entry:
                self._set_bases(entry, bases)

    def dependents(self, oid: int) -> list[int]:
        """Give the objects that may inherit blocks from `oid`, which need not be there."""
        with self._lock:
            return list(self._dependents.get(oid, ()))

    def remove(self, entry: StoredObject) -> None:
        """Remove an object, unless another took its place."""
        with self._lock:
            if self.objects.get(entry.oid) is entry:
                self._remove(entry)

    def grow(self, entry: StoredObject, blocks: int) -> None:
        """Count blocks that an object won (or lost, if negative)."""
        if blocks:
            entry.blocks += blocks
            self._growth.append(blocks)
            if len(self._growth) > 1024:
                self._sum()

    def group(self, pool: int, pg: int) -> list[StoredObject]:
        """Give the objects of a placement group."""
        with self._lock:
            return list(self._groups.get((pool, pg), {}).values())

    def everything(self) -> list[StoredObject]:
        """Give all objects."""
        return list(self.objects.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that are no holes."""
        self._sum()
        return self._blocks * BLOCK_SIZE

    def refusal(self, oid: int) -> SheepError:
        """Give the reason why an object cannot be used, or could not a moment ago."""
        if self._health.failed is not None:
            return self._health.failed
        entry = self.objects.get(oid)
        if entry is None:
            return ObjectNotFoundError(f"no object {format_oid(oid)} here")
        if entry.state == SUSPECT:
            return RecoveringError(f"object {format_oid(oid)} is to be compared with its peers")
        if entry.state == CORRUPT:
            return CorruptError(
                f"object {format_oid(oid)}: header or table is damaged", range(BLOCKS_PER_OBJECT)
            )
        # The loop made it a good one after a thread had found that it was none.
        return RetryableError(f"object {format_oid(oid)} was made anew just now")

    def _remove(self, entry: StoredObject) -> None:
        del self.objects[entry.oid]
        group = self._groups[entry.pool, entry.pg]
        del group[entry.oid]
        if not group:
            del self._groups[entry.pool, entry.pg]
        self._growth.append(-entry.blocks)
        bases = entry.bases
        self._set_bases(entry, ())
        entry.bases = bases

    def _set_bases(self, entry: StoredObject, bases: tuple[int, ...]) -> None:
        for base in set(entry.bases).difference(bases):
            dependents = self._dependents.get(base, set())
            dependents.discard(entry.oid)
            if not dependents:
                self._dependents.pop(base, None)
                self._relink(base)
        added = set(bases).difference(entry.bases)
        entry.bases = bases
        for base in added:
            self._dependents.setdefault(base, set()).add(entry.oid)
            self._relink(base)
        entry.linked = bool(bases) or entry.oid in self._dependents

    def _relink(self, oid: int) -> None:
        entry = self.objects.get(oid)
        if entry is not None:
            entry.linked = bool(entry.bases) or oid in self._dependents

    def _sum(self) -> None:
        with self._lock:
            while self._growth:
                self._blocks += self._growth.popleft()
