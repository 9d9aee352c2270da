"""This node's part in reclaim: removing dead objects, and telling what it has.

Always holds:
- An object that others inherit blocks from is removed only after these have their own copies,
  durably; the copying is done in threads, one object at a time, and only requests to that object
  wait meanwhile.
- Being asked again, or killed half-way, does no harm: what is left is removed the next time.
"""

from __future__ import annotations

import json
import logging
import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import trio

from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.geometry import index_of, is_map_object
from sheepfs.core.wire import FLAG_KEEP_MAPS, RANGE, USAGE, Buffer, Header
from storaged.logic.reclaim import LiveIndexes
from storaged.operations.replica import Replica
from storaged.operations.requests import Client

log = logging.getLogger(__name__)

BATCH = 64
"""Objects removed between two looks at the other tasks, at most."""
SLICE_S = 0.002
"""How long they may take. An object in hundreds of pieces takes a file system a millisecond."""
USAGE_AT_ONCE = 100_000
"""Records in one reply to USAGE."""
_LAYER = struct.Struct("<Q")


class Outcome(NamedTuple):
    """What was done for one layer: replicas removed, and those that should go and are left."""

    removed: int
    left: int


class Removal:
    """Removes objects of frozen layers."""

    def __init__(self, replica: Replica, nursery: trio.Nursery) -> None:
        self._replica = replica
        self._nursery = nursery
        self._one_at_a_time = trio.Lock()

    def handle(self, client: Client, header: Header, payload: Buffer) -> None:
        """RECLAIM: remove the objects of the layer in `version` that are not in use."""
        if len(payload) % RANGE.size:
            raise UsageError("RECLAIM carries ranges of 8 bytes each")
        live = [(start, end) for start, end in RANGE.iter_unpack(payload)]
        self._nursery.start_soon(self._handle, client, header, live)

    async def _handle(self, client: Client, header: Header, live: list[tuple[int, int]]) -> None:
        try:
            keep_maps = bool(header.flags & FLAG_KEEP_MAPS)
            outcome = await self.remove(header.version, live, keep_maps)
        except SheepError as error:
            self._replica.fail(client, header, error)
        else:
            client.reply(header, json.dumps(outcome._asdict()).encode())

    async def remove(self, layer: int, live: Sequence[tuple[int, int]], keep_maps: bool) -> Outcome:
        """Remove a layer's objects but those whose index is in `live`, durably."""
        async with self._one_at_a_time:
            store = self._replica.store
            in_use = LiveIndexes(live)
            dead = _dead(store.of_layer(layer), in_use, keep_maps)
            removed = 0
            since = trio.current_time()
            for oid in dead:
                if store.dependents(oid):
                    await self._replica.free(oid)
                    since = trio.current_time()
                if not self._replica.is_held(oid):
                    store.delete(oid)
                    removed += 1
                if removed % BATCH == 0 or trio.current_time() - since > SLICE_S:
                    await trio.lowlevel.checkpoint()
                    since = trio.current_time()
            # Also when nothing went now: whoever was asked before may not have come to it.
            await self._replica.flush_store(None)
            return Outcome(removed, len(_dead(store.of_layer(layer), in_use, keep_maps)))

    def usage(self, client: Client, header: Header, payload: Buffer) -> None:
        """USAGE: the objects that this node has, of some layers or of all."""
        if len(payload) % _LAYER.size:
            raise UsageError("USAGE carries layers of 8 bytes each")
        layers = {layer for (layer,) in _LAYER.iter_unpack(payload)}
        self._nursery.start_soon(self._usage, client, header, layers or None)

    async def _usage(self, client: Client, header: Header, layers: set[int] | None) -> None:
        found = sorted(await trio.to_thread.run_sync(self._replica.store.inventory, layers))
        start = bisect_right(found, (header.oid, 1 << 64, 0, 0)) if header.oid else 0
        page = found[start : start + USAGE_AT_ONCE]
        client.reply(header, b"".join(USAGE.pack(*record) for record in page))


def _dead(oids: Sequence[int], live: LiveIndexes, keep_maps: bool) -> list[int]:
    return [oid for oid in oids if not (keep_maps if is_map_object(oid) else index_of(oid) in live)]
