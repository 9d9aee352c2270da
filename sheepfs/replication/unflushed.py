"""What one attach has changed and not yet made durable, and the flush that does it.

Always holds:
- A group is in `groups` from the completion of a change until a flush that began later has
  succeeded on all its members: a flush covers exactly what was complete before it (I1).
- If every member that had accepted unflushed changes is lost at once, the next flush says so, and
  none succeeds before the map names what is left (sheepfs.volume.losses).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import FencedError, LostWritesError, Status
from sheepfs.core.wire import Header, Op
from sheepfs.net.link import Link, describe, next_request
from sheepfs.replication.changes import Group

if TYPE_CHECKING:
    from sheepfs.replication.replicator import Replicator

log = logging.getLogger(__name__)

RETRY_S = 0.02
ALL_LAYERS = 0
"""In place of a layer: whatever the nodes have unflushed."""


class Unflushed:
    """The unflushed changes of one holder, by placement group.

    Attributes:
        groups: groups with complete changes that were not flushed.
        layers: layers of their objects; `ALL_LAYERS` stands for any.
        losses: how often every member that had accepted unflushed changes of a group was lost.
        lost: the groups of losses that are not mended yet.
    """

    def __init__(self, replicator: Replicator) -> None:
        self.groups: set[Group] = set()
        self.layers: set[int] = set()
        self.losses = 0
        self.lost: set[Group] = set()
        self._mended = 0
        self._told = 0
        self._something_lost = trio.Event()
        self.on_loss: Callable[[], None] = lambda: None
        self._replicator = replicator
        self._flushing: set[Group] = set()

    def add_everything(self, pools: set[int]) -> None:
        """Flush all groups of these pools: what a former holder had acknowledged, too."""
        known = self._replicator.router.map.pools
        self.groups.update((pool, pg) for pool in pools for pg in range(len(known.get(pool, ()))))
        self.layers.add(ALL_LAYERS)

    def map_changed(self, old: ClusterMap, new: ClusterMap) -> None:
        """Note whether unflushed changes were lost with the members that left."""
        lost = lost_groups(self.groups | self._flushing, old, new)
        for pool, pg in sorted(lost):
            log.error(
                "VDI %d: group %d of pool %d lost every member with unflushed writes",
                self._replicator.vdi, pg, pool,
            )  # fmt: skip
        if lost:
            self.losses += 1
            self.lost |= lost
            self._something_lost.set()
            self.on_loss()
            self._replicator.fail_groups(lost)

    async def wait_lost(self) -> None:
        """Wait until writes may have been lost, and the map be mended."""
        while self.losses == self._mended:
            self._something_lost = trio.Event()
            await self._something_lost.wait()

    def mended(self, losses: int) -> bool:
        """The map names only what is left after so many losses; tells if that were all."""
        self._mended = losses
        if losses == self.losses:
            self.lost = set()
        return losses == self.losses

    def told(self) -> None:
        """Whoever flushes has learnt of all losses so far, or the next one will."""
        self._told = self.losses

    @property
    def _intact(self) -> bool:
        return self.losses == self._mended == self._told

    async def make_durable(self) -> None:
        """Flush on every member of every group changed since the last time.

        Durability: every change complete before the call (I1). Cancellation: what was not
        flushed stays dirty. Ordering: one at a time (the volume's flusher sees to it).

        Raises:
            FencedError: another holder took over.
            LostWritesError: unflushed changes may have been lost with the nodes that had them.
        """
        router = self._replicator.router
        self._flushing, self.groups = self.groups, set()
        layers, self.layers = self.layers, set()
        try:
            while self._flushing:
                cluster_map = router.map
                if await self._flushed(self._members(self._flushing), _one(layers)):
                    now = router.map.pools
                    self._flushing = {
                        (pool, pg)
                        for pool, pg in self._flushing
                        if now[pool][pg].changed > cluster_map.epoch
                    }
                else:
                    with trio.move_on_after(RETRY_S):
                        await router.wait_map()
                self._check_usable()
        finally:
            if self._flushing:
                self.groups |= self._flushing
                self.layers |= layers
            self._flushing = set()
        self._check_usable()

    def _members(self, groups: set[Group]) -> set[int]:
        pools = self._replicator.router.map.pools
        return {node for pool, pg in groups for node in pools[pool][pg].members}

    async def _flushed(self, nodes: set[int], layer: int) -> bool:
        finished = trio.Event()
        outcome: list[bool] = []

        def done(good: bool) -> None:
            outcome.append(good)
            finished.set()

        if not self._flush_nodes(nodes, layer, done):
            return False
        await finished.wait()
        return outcome[0]

    def _check_usable(self) -> None:
        vdi = self._replicator.vdi
        if self._replicator.fenced:
            raise FencedError(f"VDI {vdi} was taken over by another holder")
        if not self._intact:
            raise LostWritesError(f"VDI {vdi}: unflushed writes were lost with their nodes")

    def flush_directly(self, done: Callable[[bool], None]) -> bool:
        """Start what `make_durable` does, without a task; only while no other flush runs.

        Returns:
            False: it is not that simple now; nothing was started. Else `done` is called once,
            with False if `make_durable` must do it after all.
        """
        if not self.groups or self._replicator.fenced or not self._intact:
            return False
        router = self._replicator.router
        epoch = router.map.epoch
        taken, layers = self.groups, self.layers

        def flushed(good: bool) -> None:
            self._flushing = set()
            now = router.map.pools
            if not self._intact or any(now[pool][pg].changed > epoch for pool, pg in taken):
                good = False
            if not good:
                self.groups |= taken
                self.layers |= layers
            done(good)

        self._flushing, self.groups, self.layers = taken, set(), set()
        if not self._flush_nodes(self._members(taken), _one(layers), flushed):
            self._flushing, self.groups, self.layers = set(), taken, layers
            return False
        return True

    def _flush_nodes(self, nodes: set[int], layer: int, done: Callable[[bool], None]) -> bool:
        """Send FLUSH to all `nodes`, if all are linked; `done` is told whether all did it."""
        replicator = self._replicator
        links = [link for node in nodes if (link := replicator.router.link(node))]
        if len(links) < len(nodes):
            return False
        left = len(links)
        good = True

        def answer(link: Link, header: Header | None, payload: memoryview | None) -> None:
            nonlocal left, good
            left -= 1
            if header is None or header.status:
                good = False
                if header is not None and header.status == Status.FENCED:
                    replicator.fence(describe(bytes(payload or b"")))
            if not left:
                done(good)

        for link in links:
            link.request(
                Op.FLUSH,
                next_request(),
                answer,
                version=layer,
                vdi=replicator.vdi,
                token=replicator.token,
            )
        return True


def lost_groups(groups: Iterable[Group], old: ClusterMap, new: ClusterMap) -> set[Group]:
    """Give those that went on since `old` though each member with all in memory had ended."""
    return {(pool, pg) for pool, pg in groups if new.pools[pool][pg].lost > old.epoch}


def _one(layers: set[int]) -> int:
    """Give the one layer to flush, or `ALL_LAYERS`."""
    return next(iter(layers)) if len(layers) == 1 else ALL_LAYERS
