"""What a holder does when every copy of something that it had not flushed is lost.

Always holds:
- The map names nothing that is gone: an entry whose object no replica has goes back to what the
  stored map says; so does one whose object was deleted before, and is back as it was then. What was
  lost of other objects reads as it was at the last flush.
- A copy of a frozen object is given up: of what was changed in it, the old bytes are not in it.
- Other objects that survived stay: nodes that were only started anew together have lost nothing.
- What a group has that lost nothing stays as it is, copies too.
- Changes under way in the groups that lost something fail when that is noticed: they build on what
  may be gone. Those that come, or go on, before the map is mended wait until it is: what is made
  meanwhile would be given up too.
- Until this is done no flush is carried out, so no map that names what is gone is ever stored; from
  then on each one tells of the loss until the VDI is let go (sheepfs.volume.flusher).
"""

from __future__ import annotations

import logging

from sheepfs.core.errors import ObjectNotFoundError
from sheepfs.core.geometry import data_object
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.vdimap import VdiMap

log = logging.getLogger(__name__)


async def mend_map(
    name: str, vdi_map: VdiMap, stored_maps: int, open_layer: int, replicator: Replicator
) -> int:
    """Let go of what is gone; no change is under way, and none begins meanwhile.

    Args:
        stored_maps: bit i is set when map object i was made durable.
        open_layer: objects of other layers are frozen, and durable since then.

    Returns:
        How many indexes are holes now.

    Durability: with the next flush. Cancellation: safe at any point, to be done again.

    Raises:
        SheepError: not all could be looked at.
    """
    replicator.distrust_all()
    gone = holes = 0
    for index, (layer, stored) in (await vdi_map.lost(stored_maps)).items():
        if layer != open_layer:
            continue
        if replicator.state(data_object(layer, index)).group not in replicator.unflushed.lost:
            continue
        if stored or not await _is_there(replicator, index, layer, vdi_map.born_after(index)):
            vdi_map.replace(index, stored)
            gone += 1
            holes += not stored
    log.warning("%s: %d objects made since the last flush are gone", name, gone)
    return holes


async def _is_there(replicator: Replicator, index: int, layer: int, born_after: int) -> bool:
    state = replicator.state(data_object(layer, index))
    try:
        await replicator.open(state)
    except ObjectNotFoundError:
        return False
    return state.version > born_after
