"""What the store keeps in memory of each object, and of each open object file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sheepfs.core.geometry import BLOCK_SIZE, format_oid

OK = 0
SUSPECT = 1
"""Its data may differ from its table: it was dirty when the store stopped uncleanly."""
CORRUPT = 2
"""Its header or table is unreadable."""


class ObjectInfo(NamedTuple):
    """An object as peers compare it. `allocated` is bytes of blocks that are no holes."""

    oid: int
    version: int
    lineage: int
    suspect: bool
    allocated: int


class OpenFile:
    """An open object file and its checksum table.

    Who holds a reference may use `fd`: it closes when the last one is gone, so that the loop
    may evict or delete an object while a thread still reads it.

    Attributes:
        table: 8 KiB, as on disk; newer than the disk's while the object is changed.
        sequence: odd while a write is under way, and grows with each: a reader in a thread
            that sees it unchanged and even saw data and table that belong together.
    """

    __slots__ = ("__weakref__", "_close", "fd", "sequence", "table")

    def __init__(self, fd: int, table: bytearray, close: Callable[[int], None]) -> None:
        self.fd = fd
        self.table = table
        self.sequence = 0
        self._close = close

    def __del__(self) -> None:
        self._close(self.fd)


class StoredObject:
    """An object that the store has.

    Attributes:
        state: OK, SUSPECT or CORRUPT.
        blocks: blocks that are no holes.
        changed: the header and table in memory are newer than the file's.
        synced: while unclean: the file was synced since the last change, to be closed.
        file: set while the object is open.
        opened: grows when `file` is set or dropped, so that a thread that read the table from
            disk can tell whether it is still the current one.
        used: since the cache of open files last looked.
    """

    __slots__ = (
        "blocks",
        "changed",
        "file",
        "lineage",
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
    ) -> None:
        self.oid = oid
        self.pool = pool
        self.pg = pg
        self.version = version
        self.lineage = lineage
        self.blocks = blocks
        self.state = state
        self.changed = False
        self.synced = False
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
        return f"objects/{self.pool}/{self.pg:04x}/{format_oid(self.oid)}"

    def info(self) -> ObjectInfo:
        """Give what peers compare."""
        return ObjectInfo(
            self.oid, self.version, self.lineage, self.state != OK, self.blocks * BLOCK_SIZE
        )
