"""A cluster in memory for import, export, backup and restore: implements transfer_access.Access.

Images are real `sheepfs.layers.image.Image`s: contents that are equal count as one layer's, as
they do after a snapshot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from fakes.memory_backend import MemoryNamespace, MemoryVdi, MemoryVolume
from fakes.memory_objects import MemoryObjects
from sheepfs.core.errors import HeldElsewhereError, VdiExistsError, VdiNotFoundError
from sheepfs.core.geometry import BLOCKS_PER_OBJECT, data_object, make_layer
from sheepfs.core.names import check_tag, full_name
from sheepfs.layers.image import Image
from sheepfs_tools.transfer.access import Found

BLOCK = 4096
_ZERO_BLOCK = bytes(BLOCK)


@dataclass
class _Snapshot:
    found: Found
    blocks: dict[int, bytes] = field(repr=False)


class MemoryAccess:
    """One command's view of a `MemoryCluster`."""

    def __init__(self, namespace: MemoryNamespace, cluster: str = "c0ffee") -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.objects = MemoryObjects()
        self._snapshots: dict[int, dict[str, _Snapshot]] = {}
        self._layers: dict[tuple[int, bytes], int] = {}
        self._copies: dict[int, int] = {}
        self._serial = 0

    # -- for tests --------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return sorted(self.namespace.cluster.vdis)

    def vdi(self, name: str) -> MemoryVdi:
        return self.namespace.cluster.vdis[full_name(name)]

    def contents(self, name: str) -> bytes:
        vdi = self.vdi(name)
        return vdi.get(0, vdi.size)

    # -- Access -----------------------------------------------------------------------------

    async def find(self, name: str, tag: str = "") -> Found:
        attributes = await self.namespace.lookup(full_name(name))
        if tag:
            snapshot = self._snapshots.get(attributes.id, {}).get(tag)
            if snapshot is None:
                raise VdiNotFoundError(f"{attributes.name} has no snapshot {tag!r}")
            return replace(snapshot.found, name=attributes.name)
        return Found(
            attributes.name, "", attributes.id, 0, attributes.size,
            self._copies.get(attributes.id, 3), attributes.allocated, 1.0,
        )  # fmt: skip

    async def snapshots(self, found: Found) -> Sequence[Found]:
        taken = self._snapshots.get(found.vdi, {}).values()
        return [replace(snapshot.found, name=found.name) for snapshot in taken]

    async def image(self, found: Found) -> Image:
        if found.tag:
            blocks = self._snapshots[found.vdi][found.tag].blocks
        else:
            blocks = {i: bytes(b) for i, b in self.vdi(found.name).blocks.items()}
        owners = {}
        for index in {i // BLOCKS_PER_OBJECT for i in blocks}:
            first = index * BLOCKS_PER_OBJECT
            content = b"".join(
                blocks.get(i, _ZERO_BLOCK) for i in range(first, first + BLOCKS_PER_OBJECT)
            )
            layer = self._layers.get((index, content))
            if layer is None:
                layer = self._layers[index, content] = self._new_layer()
                self.objects.put(data_object(layer, index), 0, content)
            owners[index] = layer
        return self.objects.image(found.size, self._new_layer(), owners)

    def _new_layer(self) -> int:
        self._serial += 1
        return make_layer(self._serial, 1, 3)

    async def create(self, name: str, size: int, copies: int) -> None:
        attributes = await self.namespace.create(name, 0o644, 0, 0)
        self._copies[attributes.id] = copies
        self.vdi(name).size = size

    async def rename(self, old: str, new: str) -> None:
        await self.namespace.rename(old, new, False)

    async def delete(self, name: str) -> None:
        vdi = (await self.namespace.lookup(name)).id
        await self.namespace.delete(name)
        self._snapshots.pop(vdi, None)

    async def snapshot(self, name: str, tag: str, attributes: Mapping[str, str]) -> None:
        check_tag(tag)
        found = await self.find(name)
        taken = self._snapshots.setdefault(found.vdi, {})
        if tag in taken:
            raise VdiExistsError(f"{name} has a snapshot {tag!r}")
        identity = self.namespace.cluster.next_id
        self.namespace.cluster.next_id += 1
        taken[tag] = _Snapshot(
            Found(
                found.name, tag, found.vdi, identity, found.size, found.copies, found.allocated,
                2.0, dict(attributes),
            ),
            {i: bytes(b) for i, b in self.vdi(name).blocks.items()},
        )  # fmt: skip

    async def rollback(self, name: str, tag: str) -> None:
        found = await self.find(name, tag)
        vdi = self.vdi(name)
        if vdi.holder is not None:
            raise HeldElsewhereError(f"{name} is in use")
        vdi.blocks = {i: bytes(b) for i, b in self._snapshots[found.vdi][tag].blocks.items()}
        vdi.size = found.size

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[MemoryVolume]:
        attributes = await self.namespace.lookup(full_name(name))
        volume = await self.namespace.open(attributes.id)
        try:
            yield volume
        finally:
            with trio.CancelScope(shield=True):
                await volume.close()
