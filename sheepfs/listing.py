"""The names of a mount: all VDIs and snapshots as etcd has them, read at most once a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import trio

from sheepfs.core.errors import VdiNotFoundError
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.net.catalog import Catalog

LIST_FRESH_S = 1.0

AnyRecord: TypeAlias = VdiRecord | SnapshotRecord


class Named(NamedTuple):
    """A file of the mount and its record; of a snapshot, the VDI's name and the tag too."""

    name: str
    record: AnyRecord
    vdi: str
    tag: str = ""


class Listing:
    """Names and ids, cached.

    Args:
        on_read: called with everything whenever it was read.
    """

    def __init__(self, catalog: Catalog, on_read: Callable[[list[Named]], None]) -> None:
        self._catalog = catalog
        self._on_read = on_read
        self._by_name: dict[str, Named] = {}
        self._by_id: dict[int, Named] = {}
        self._read_at = float("-inf")
        self._reading = trio.Lock()

    def forget(self) -> None:
        """Something was changed: read again before the next answer."""
        self._read_at = float("-inf")

    async def names(self) -> dict[str, Named]:
        """All names; one reading for all who ask at the same time."""
        async with self._reading:
            if trio.current_time() - self._read_at > LIST_FRESH_S:
                asked_at = trio.current_time()
                vdis = await self._catalog.vdis()
                found = [Named(name, record, name) for name, record, _ in vdis]
                found += [
                    Named(s.file, s.record, s.vdi_name, s.tag)
                    for s in await self._catalog.snapshots()
                ]
                self._by_name = {item.name: item for item in found}
                self._by_id = {item.record.id: item for item in found}
                self._read_at = asked_at
                self._on_read(found)
            return self._by_name

    async def by_name(self, name: str) -> Named:
        """Find a file. Raises VdiNotFoundError."""
        found = (await self.names()).get(name)
        if found is None:
            raise VdiNotFoundError(f"there is no VDI {name!r}")
        return found

    async def by_id(self, item: int) -> Named:
        """Find a file by its id. Raises VdiNotFoundError."""
        await self.names()
        found = self._by_id.get(item)
        if found is None:
            raise VdiNotFoundError(f"there is no VDI with id {item}")
        return found
