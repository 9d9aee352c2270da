"""A real cluster as import, export, backup and restore see it (`transfer_access.Access`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from sheepfs.backend import OpenVolume
from sheepfs.cluster import Cluster
from sheepfs.core.errors import UsageError, VdiNotFoundError
from sheepfs.core.metadata import SnapshotRecord
from sheepfs.core.names import full_name
from sheepfs.holding.abandoned import level
from sheepfs.layers.image import Image
from sheepfs.net.catalog import Snapshot
from sheepfs.replication.objects import ObjectReader
from sheepfs.volume.volume import Volume
from sheepfs_tools.transfer.access import Found


class ClusterAccess:
    """One command's view of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._catalog = cluster.catalog

    @property
    def cluster(self) -> str:
        """The cluster's unique id."""
        return self._cluster.router.map.cluster

    async def find(self, name: str, tag: str = "") -> Found:
        """See Access.find."""
        problem: VdiNotFoundError | None = None
        for candidate in dict.fromkeys((full_name(name), name)):
            try:
                if tag:
                    return _found(await self._catalog.snapshot(candidate, tag))
                record, _ = await self._catalog.vdi(candidate)
            except VdiNotFoundError as error:
                problem = problem or error
                continue
            return Found(
                candidate, "", record.id, 0, record.size, record.copies, record.allocated,
                record.created, record.attributes,
            )  # fmt: skip
        raise problem or VdiNotFoundError(f"there is no VDI {name!r}")

    async def snapshots(self, found: Found) -> Sequence[Found]:
        """See Access.snapshots."""
        return [_found(snapshot) for snapshot in await self._catalog.snapshots(found.vdi)]

    async def image(self, found: Found) -> Image:
        """See Access.image."""
        router = self._cluster.router
        if found.tag:
            frozen = (await self._catalog.snapshot(found.name, found.tag)).record
            return Image(ObjectReader(router, frozen.vdi), frozen.size, frozen.map, frozen.maps)
        _, record, _ = await self._catalog.find(found.vdi)
        if not record.clean and not await self._cluster.holding.is_held(record.id):
            await level(self._cluster, record.id)
            _, record, _ = await self._catalog.find(found.vdi)
        return Image(ObjectReader(router, record.id), record.size, record.map, record.maps)

    async def create(self, name: str, size: int, copies: int) -> None:
        """See Access.create."""
        await self._catalog.create(name, size, copies)
        self._cluster.names_changed()

    async def rename(self, old: str, new: str) -> None:
        """See Access.rename."""
        await self._cluster.rename(old, new, False)

    async def delete(self, name: str) -> None:
        """See Access.delete."""
        found = await self.find(name)
        for snapshot in await self._catalog.snapshots(found.vdi):
            await self._catalog.delete_snapshot(found.name, snapshot.tag, keep_s=0)
        await self._catalog.delete(found.name, keep_s=0)
        self._cluster.names_changed()

    async def snapshot(self, name: str, tag: str, attributes: Mapping[str, str]) -> None:
        """See Access.snapshot."""
        found = await self.find(name)
        self._cluster.names_changed()
        made = await self._cluster.snapshot(found.vdi, tag)
        try:
            for key, value in attributes.items():
                await self._catalog.set_attribute(made.name, key, value)
        except BaseException:
            # Without what tells whose it is it would be taken for another one.
            with trio.CancelScope(shield=True), suppress(VdiNotFoundError):
                await self._catalog.delete_snapshot(found.name, tag, keep_s=0)
            raise

    async def rollback(self, name: str, tag: str) -> None:
        """See Access.rollback."""
        found = await self.find(name)
        record = (await self._catalog.snapshot(found.name, tag)).record
        assert isinstance(record, SnapshotRecord)
        await self._cluster.rollback(found.vdi, record)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenVolume]:
        """See Access.open."""
        found = await self.find(name)
        self._cluster.names_changed()
        async with self._cluster.opened(found.vdi) as volume:
            if not isinstance(volume, Volume):
                raise UsageError(f"{name} is a snapshot")
            yield volume


def _found(snapshot: Snapshot) -> Found:
    record = snapshot.record
    return Found(
        snapshot.vdi_name, snapshot.tag, record.vdi, record.id, record.size, record.copies,
        record.allocated, record.created, record.attributes,
    )  # fmt: skip
