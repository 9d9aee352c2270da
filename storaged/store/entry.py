"""What the store keeps in memory of each object, and of each open object file.

Always holds of an overlay (an object that inherits blocks from others):
- On disk a block is said to be in the own file only when it is there durably; until then the
  header goes on naming the base (`Overlay.pending`). So whatever mix of old and new sectors a
  power cut leaves of the header, each block is found where it was flushed to.
- Before an object's first flush that is not needed: no map that names it is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sheepfs.core.geometry import (
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    data_object,
    format_oid,
    index_of,
    is_map_object,
    layer_of,
    map_object,
)
from storaged.store.format import Sources

OK = 0
SUSPECT = 1
"""Its data may differ from its table: it was dirty when the store stopped uncleanly."""
CORRUPT = 2
"""Its header or table is unreadable."""


class ObjectInfo(NamedTuple):
    """An object as peers compare it.

    Attributes:
        damaged: a block was found to be other than its checksum says, and may still be.
        allocated: bytes in the object's own file.
    """

    oid: int
    version: int
    lineage: int
    suspect: bool
    damaged: bool
    allocated: int


class Overlay:
    """Where the blocks of an open overlay lie.

    Attributes:
        sources: a byte for each block: 0 is the own file (or a hole), k is `bases[k - 1]`.
        bases: ids of objects; a base keeps its number as long as the overlay is open.
        pending: blocks in the own file that the header on disk must not yet say to be there,
            with their former sources. None before the first flush: nothing need be kept back.
    """

    __slots__ = ("bases", "pending", "sources")

    def __init__(
        self, sources: bytearray, bases: list[int], pending: dict[int, int] | None
    ) -> None:
        self.sources = sources
        self.bases = bases
        self.pending = pending

    def own(self, first: int, sums: Sequence[int]) -> None:
        """Record that blocks from `first` on were written to the own file, or are holes now."""
        sources, pending = self.sources, self.pending
        for i, entry in enumerate(sums, first):
            if sources[i]:
                if entry and pending is not None:
                    pending[i] = sources[i]
                sources[i] = 0

    def used(self) -> tuple[int, ...]:
        """Give the bases that a block is inherited from, in memory or on disk."""
        numbers = {*self.sources, *(self.pending or {}).values()} - {0}
        return tuple(self.bases[number - 1] for number in sorted(numbers))

    def on_disk(self) -> Sources | None:
        """Give what the header may say; None if the object inherits nothing."""
        sources = self.sources
        # At once: the loop may forget some of them while a thread is here.
        pending = list((self.pending or {}).items())
        if pending:
            sources = sources.copy()
            for i, number in pending:
                sources[i] = number
        elif sources.count(0) == BLOCKS_PER_OBJECT:
            return None
        return Sources(bytes(sources), tuple(layer_of(oid) for oid in self.bases))


class OpenFile:
    """An open object file and its checksum table.

    Who holds a reference may use `fd`: it closes when the last one is gone, so that the loop
    may evict or delete an object while a thread still reads it.

    Attributes:
        table: 8 KiB, as on disk; newer than the disk's while the object is changed.
        overlay: where inherited blocks lie; None if all are in the file.
        sequence: odd while a write is under way, and grows with each: a reader in a thread
            that sees it unchanged and even saw data and table that belong together.
    """

    __slots__ = ("__weakref__", "_close", "fd", "overlay", "sequence", "table")

    def __init__(
        self,
        fd: int,
        table: bytearray,
        close: Callable[[int], None],
        overlay: Overlay | None = None,
    ) -> None:
        self.fd = fd
        self.table = table
        self.overlay = overlay
        self.sequence = 0
        self._close = close

    def __del__(self) -> None:
        self._close(self.fd)


class StoredObject:
    """An object that the store has.

    Attributes:
        state: OK, SUSPECT or CORRUPT.
        blocks: blocks in the own file that are no holes.
        bases: ids of the objects it inherits blocks from, perhaps more; set by the catalog.
        linked: it has bases, or is one.
        changed: the header and table in memory are newer than the file's.
        synced: while unclean: the file was synced since the last change, to be closed.
        file: set while the object is open.
        opened: grows when `file` is set or dropped, so that a thread that read the table from
            disk can tell whether it is still the current one.
        used: since the cache of open files last looked.
    """

    __slots__ = (
        "bases",
        "blocks",
        "changed",
        "damaged",
        "file",
        "lineage",
        "linked",
        "oid",
        "opened",
        "pg",
        "pool",
        "state",
        "synced",
        "used",
        "version",
    )

    def __init__(
        self,
        oid: int,
        pool: int,
        pg: int,
        version: int = 0,
        lineage: int = 0,
        blocks: int = 0,
        state: int = OK,
        bases: tuple[int, ...] = (),
    ) -> None:
        self.oid = oid
        self.pool = pool
        self.pg = pg
        self.version = version
        self.lineage = lineage
        self.blocks = blocks
        self.state = state
        self.bases = bases
        self.linked = False
        self.changed = False
        self.synced = False
        self.damaged = False
        self.file: OpenFile | None = None
        self.opened = 0
        self.used = False

    @property
    def suspect(self) -> bool:
        """Whether the object must be resolved with peers before it can be used."""
        return self.state != OK

    @property
    def directory(self) -> str:
        """Directory of the object's file."""
        return f"objects/{self.pool}/{self.pg:04x}"

    @property
    def path(self) -> str:
        """Path of the object's file in the data directory."""
        return path_of(self.oid, self.pool, self.pg)

    def info(self) -> ObjectInfo:
        """Give what peers compare."""
        return ObjectInfo(
            self.oid,
            self.version,
            self.lineage,
            self.state != OK,
            self.damaged,
            self.blocks * BLOCK_SIZE,
        )


def sibling(oid: int, layer: int) -> int:
    """Give the id of the object of the same kind and index in another layer."""
    index = index_of(oid)
    return map_object(layer, index) if is_map_object(oid) else data_object(layer, index)


def open_overlay(oid: int, sources: Sources | None) -> Overlay | None:
    """Give where the blocks of `oid` lie by what its header says."""
    if sources is None or sources.sources.count(0) == BLOCKS_PER_OBJECT:
        return None
    bases = [sibling(oid, layer) for layer in sources.layers]
    return Overlay(bytearray(sources.sources), bases, {})


def path_of(oid: int, pool: int, pg: int) -> str:
    """Give the path of an object's file in a data directory."""
    return f"objects/{pool}/{pg:04x}/{format_oid(oid)}"
