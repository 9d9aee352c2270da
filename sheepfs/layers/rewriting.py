"""Writing a VDI anew: layers of its own (flatten), or another number of copies.

Always holds:
- When it is interrupted the VDI works, and is as it was or partly new; to be called again.
"""

from __future__ import annotations

import dataclasses
import logging

from sheepfs.callbacks import completion
from sheepfs.core.geometry import copies_of
from sheepfs.core.kv import Put
from sheepfs.core.metadata import VdiRecord
from sheepfs.core.names import check_copies
from sheepfs.holding.requests import Progress
from sheepfs.layers.commits import Changes, Commits, attachment_of
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.capture import Captured
from sheepfs.volume.flusher import store_pages
from sheepfs.volume.vdimap import VdiMap, format_page
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)


class Rewriting(Commits):
    """What one mount does to VDIs that takes as long as their data is large."""

    async def flatten(self, volume: Volume, progress: Progress) -> None:
        """Give the VDI layers of its own for all that it has of what it was cloned from.

        Raises: HeldElsewhereError, SheepError.
        """
        await volume.borrow()
        own = await self._catalog.layers_of(volume.record.id)
        await volume.rewrite(lambda layer: layer not in own, progress)
        await completion(volume.flush)
        await self._commit(attachment_of(volume), lambda r: dataclasses.replace(r, parent=0))
        volume.committed(attachment_of(volume).record)

    async def change_copies(self, volume: Volume, copies: int, progress: Progress) -> None:
        """Keep another number of replicas of a VDI: all its data is written anew.

        Snapshots stay as they are. When it is interrupted, the VDI is as it was or partly of the
        new number, and works; to be called again.

        Raises: HeldElsewhereError, SheepError.
        """
        check_copies(copies)
        await volume.borrow()

        async def publish(captured: Captured) -> None:
            await self._commit(
                attachment_of(volume),
                lambda r: dataclasses.replace(r, layer=captured.layer, next=0, copies=copies),
            )
            volume.committed(attachment_of(volume).record)

        await self._capture(volume, publish, copy_map=False, copies=copies)
        await volume.rewrite(lambda layer: copies_of(layer) != copies, progress)
        if copies_of(volume.record.map) != copies:
            await self._move_map(volume, copies)

    async def _move_map(self, volume: Volume, copies: int) -> None:
        """Write the map to map objects of another pool."""
        await completion(volume.flush)
        record = volume.record
        (target,) = await self._catalog.begin_layers(
            record.id, record.family, copies, 1, (await self._lease()).lease
        )

        async def publish(replicator: Replicator) -> VdiRecord:
            vdi_map = await volume.load_map()
            pages = {
                number: format_page(page) for number, page in vdi_map.pages.items() if any(page)
            }
            moved = VdiMap(0, vdi_map.load_range)
            await store_pages(replicator, target, moved, pages)
            await replicator.unflushed.make_durable()

            async def extra() -> Changes:
                conditions, changes = await self._built(target)
                return conditions, [*changes, Put(self._keys.reclaim_family(record.family), b"")]

            await self._commit(
                attachment_of(volume),
                lambda r: dataclasses.replace(r, map=target, maps=moved.existing),
                extra,
            )
            return attachment_of(volume).record

        await volume.replace_map(publish)
