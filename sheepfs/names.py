"""Names and attributes of VDIs and snapshots: what a mount shows without opening any."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from sheepfs.backend import Attributes, OnChange
from sheepfs.core.errors import ReadOnlyError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.core.names import split_name
from sheepfs.holding.requests import delete_vdi
from sheepfs.listing import Listing, Named
from sheepfs.net.catalog import Catalog
from sheepfs.net.store import Store
from sheepfs.volume.frozen import FrozenVolume, snapshot_attributes
from sheepfs.volume.volume import Volume

DEFAULT_COPIES = 3


class Names:
    """The names of a cluster, for one mount; an open volume knows more than its record in etcd."""

    def __init__(self, store: Store, keys: Keys, catalog: Catalog) -> None:
        self.on_change: list[OnChange] = []
        self.catalog = catalog
        self.store = store
        self.keys = keys
        self._volumes: dict[int, Volume | FrozenVolume] = {}
        self._listing = Listing(catalog, self._take_list)

    def _take_list(self, found: list[Named]) -> None:
        """Let open volumes know what others changed."""
        for item in found:
            volume = self._volumes.get(item.record.id)
            if isinstance(volume, Volume) and isinstance(item.record, VdiRecord):
                self._take_record(volume, item.name, item.record)
            elif isinstance(volume, FrozenVolume) and isinstance(item.record, SnapshotRecord):
                volume.refresh(item.name, item.record)

    def _take_record(self, volume: Volume, name: str, record: VdiRecord) -> None:
        before = volume.attributes()
        volume.refresh(name, record)
        if volume.attributes() != before:
            self._changed(record.id)

    def _changed(self, vdi: int) -> None:
        for listener in self.on_change:
            listener(vdi)

    def _attributes(self, item: Named) -> Attributes:
        volume = self._volumes.get(item.record.id)
        if volume is not None:
            return volume.attributes()
        record = item.record
        if isinstance(record, SnapshotRecord):
            return snapshot_attributes(item.name, record)
        return Attributes(
            record.id, item.name, record.size, record.allocated, record.mode, record.uid,
            record.gid, record.modified, record.changed, False, record.family,
        )  # fmt: skip

    async def list(self) -> Sequence[Attributes]:
        """All VDIs and snapshots by name."""
        return [self._attributes(item) for _, item in sorted((await self._listing.names()).items())]

    async def lookup(self, name: str) -> Attributes:
        """Attributes by name. Raises VdiNotFoundError."""
        return self._attributes(await self._listing.by_name(name))

    async def get(self, vdi: int) -> Attributes:
        """Attributes by id. Raises VdiNotFoundError."""
        if volume := self._volumes.get(vdi):
            return volume.attributes()
        return self._attributes(await self._listing.by_id(vdi))

    async def create(self, name: str, mode: int, uid: int, gid: int) -> Attributes:
        """Make an empty VDI of three copies. Raises VdiExistsError, UsageError."""
        record = await self.catalog.create(name, 0, DEFAULT_COPIES, mode, uid, gid)
        self._listing.forget()
        return self._attributes(Named(name, record, name))

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename a VDI, or change the tag of a snapshot; see `sheepfs.backend.Namespace`."""
        vdi, tag = split_name(old)
        new_vdi, new_tag = split_name(new)
        if not tag and not new_tag:
            await self.catalog.rename(old, new, replace)
        elif not tag or not new_tag or vdi != new_vdi:
            raise UsageError(f"{old} to {new}: of a snapshot's name only the tag can be changed")
        elif tag != new_tag:
            if replace:
                with_tag = (await self._listing.names()).get(new)
                if with_tag is not None:
                    await self.catalog.delete_snapshot(vdi, new_tag)
            await self.catalog.rename_snapshot(vdi, tag, new_tag)
        self._listing.forget()

    async def delete(self, name: str) -> None:
        """Delete a VDI or snapshot. Raises HeldElsewhereError while any mount holds it."""
        vdi, tag = split_name(name)
        if tag:
            await self.catalog.delete_snapshot(vdi, tag)
        else:
            await delete_vdi(self.store, self.keys, self.catalog, name)
        self._listing.forget()

    async def set_attributes(
        self,
        vdi: int,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        modified: float | None = None,
    ) -> Attributes:
        """Change mode, owner and times in etcd."""
        item = await self._listing.by_id(vdi)
        if isinstance(item.record, SnapshotRecord):
            if modified is not None or (mode is not None and mode & 0o222):
                raise ReadOnlyError(f"{item.name} is a snapshot: it cannot be changed")
            await self.catalog.update_snapshot(
                item.record.vdi,
                item.tag,
                lambda r: dataclasses.replace(
                    r,
                    mode=r.mode if mode is None else mode,
                    uid=r.uid if uid is None else uid,
                    gid=r.gid if gid is None else gid,
                ),
            )
        else:
            await self.catalog.update(
                vdi,
                lambda r: dataclasses.replace(
                    r,
                    mode=r.mode if mode is None else mode,
                    uid=r.uid if uid is None else uid,
                    gid=r.gid if gid is None else gid,
                    modified=r.modified if modified is None else modified,
                    changed=time.time(),
                ),
            )
        volume = self._volumes.get(vdi)
        if isinstance(volume, Volume) and modified is not None:
            volume.set_modified(modified)
        self._listing.forget()
        return self._attributes(await self._listing.by_id(vdi))

    async def get_user_attributes(self, vdi: int) -> dict[str, str]:
        """Give what users keep with a VDI or snapshot."""
        return dict((await self._listing.by_id(vdi)).record.attributes)

    async def set_user_attribute(self, vdi: int, name: str, value: str | None) -> None:
        """Set one of these; None removes it."""
        item = await self._listing.by_id(vdi)
        await self.catalog.set_attribute(item.name if item.tag else vdi, name, value)
        self._listing.forget()

    def names_changed(self) -> None:
        """A record was changed past this object: read again before the next answer."""
        self._listing.forget()
