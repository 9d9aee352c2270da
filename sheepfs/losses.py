"""What a holder does when every copy of something that it had not flushed is lost.

Always holds:
- The map names nothing that is gone: an entry whose object no replica has goes back to what the
  stored map says. What was lost of other objects reads as it was at the last flush.
- What survived stays: nodes that were only started anew together have lost nothing.
- Until this is done no flush succeeds, so no map that names what is gone is ever stored; and the
  first one then tells of the loss (sheepfs.unflushed).
"""

from __future__ import annotations

import logging

from sheepfs.core.errors import ObjectNotFoundError
from sheepfs.core.geometry import data_object
from sheepfs.replication import Replicator
from sheepfs.vdimap import VdiMap

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
        try:
            await replicator.open(replicator.state(data_object(layer, index)))
        except ObjectNotFoundError:
            vdi_map.replace(index, stored)
            gone += 1
            holes += not stored
    log.warning("%s: %d objects made since the last flush are gone", name, gone)
    return holes
