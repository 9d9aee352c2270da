"""Opening objects: making sure that an object's replicas are equal before it is used.

Always holds:
- All `sync` members are asked for the version; those that differ are levelled with one of them
  before the object counts as open.
- Members that join have no say. Where members are known to differ they are levelled too, or know
  that they are not: none becomes a `sync` member with a change that was taken back, or without one.
- A copy that cannot be read as a whole is no source (I11). Any other sync member's is a good one:
  what they differ in was not acknowledged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from sheepfs.core.errors import (
    CorruptError,
    FencedError,
    ObjectNotFoundError,
    RetryableError,
    SheepError,
)
from sheepfs.core.geometry import describe_oid, layer_of
from sheepfs.core.wire import Op
from sheepfs.net.link import Link
from sheepfs.replication.changes import ObjectState

if TYPE_CHECKING:
    from sheepfs.replication.replicator import Replicator

log = logging.getLogger(__name__)

RETRY_S = 0.02
STAT_TIMEOUT_S = 5.0
REPAIR_TIMEOUT_S = 10.0


class Leveller:
    """Opens the objects of one holder.

    Attributes:
        failed: an object could not be made equal on all members.
    """

    def __init__(self, replicator: Replicator, nursery: trio.Nursery) -> None:
        self.failed = False
        self._replicator = replicator
        self._nursery = nursery

    async def open(self, state: ObjectState) -> None:
        """Make sure that an object's replicas are equal and its version known.

        Raises:
            ObjectNotFoundError: no replica has it.
            CorruptError: no replica can give it.
        """
        if state.ready:
            return
        finished = trio.Event()
        outcome: list[SheepError | None] = []

        def done(error: SheepError | None) -> None:
            outcome.append(error)
            finished.set()

        state.waiters.append(done)
        self.open_soon(state)
        await finished.wait()
        if isinstance(outcome[0], ObjectNotFoundError):
            raise ObjectNotFoundError(f"{describe_oid(state.oid)}: no replica has it")
        if outcome[0]:
            raise CorruptError(f"{describe_oid(state.oid)}: no replica can give it")

    def open_soon(self, state: ObjectState) -> None:
        """Open in a task; what is queued on the object goes on when it is open."""
        if not state.opening:
            state.opening = True
            self._nursery.start_soon(self._open, state)

    async def _open(self, state: ObjectState) -> None:
        failure: SheepError | None = None
        try:
            damaged: set[int] = set()
            while not await self._level(state, damaged):
                if self._replicator.fenced:
                    raise FencedError("another mount took the VDI over")
                with trio.move_on_after(RETRY_S):
                    await self._replicator.router.wait_map()
        except SheepError as error:
            failure = error
        if isinstance(failure, FencedError):
            self._replicator.fence(str(failure))
        elif failure is not None:
            log.error("%s: %s", describe_oid(state.oid), failure)
        if failure is not None and not isinstance(failure, ObjectNotFoundError):
            # What no member has differs nowhere: it was just discarded, or is lost.
            self.failed = True
        self._replicator.opened(state, failure)

    async def _level(self, state: ObjectState, damaged: set[int]) -> bool:
        """Ask all sync members for the version, mend those that differ; True when all agree.

        Args:
            damaged: nodes whose copy turned out not to be readable; may become more.
        """
        router = self._replicator.router
        cluster_map = router.map
        pool, pg = state.group
        group = cluster_map.pools[pool][pg]
        links = [router.link(node) for node in group.sync]
        if not all(links) or not cluster_map.writable(pool, pg):
            return False
        found: dict[int, tuple[int, int] | None] = {}
        refused: list[SheepError] = []
        async with trio.open_nursery() as nursery:
            for link in links:
                if link is not None:
                    nursery.start_soon(self._stat, link, state, found, refused)
        if refused:
            raise refused[0]
        if len(found) < len(group.sync) or router.map.pools[pool][pg] != group:
            return False
        copies = {node: copy for node, copy in found.items() if copy is not None}
        if not copies:
            raise ObjectNotFoundError("the map names it, and no replica has it")
        if len(set(found.values())) > 1:
            copies = {node: copy for node, copy in copies.items() if node not in damaged}
            if not copies:
                raise CorruptError("replicas differ, and all are damaged")
        best = (min if state.oldest else max)(copies.values())
        behind = [node for node in found if found[node] != best]
        sources = [node for node in copies if copies[node] == best]
        source = next((node for node in sources if node not in damaged), None)
        if not behind:
            if state.uneven and source is not None:
                # Members that join have no say, and may be what is ahead.
                for node in group.joining:
                    if not await self._repair(node, state.oid, source, damaged):
                        return False
            state.version = best[0]
            state.oldest = state.uneven = False
            return True
        assert source is not None, "where versions differ, damaged copies are left out"
        log.warning(
            "%s: replicas differ; level node %s with node %d",
            describe_oid(state.oid), ", ".join(map(str, behind)), source,
        )  # fmt: skip
        for node in behind:
            await self._repair(node, state.oid, source, damaged)
        # What was copied is in the page cache of these nodes, and what it was copied from too.
        self._replicator.unflushed.groups.add(state.group)
        self._replicator.unflushed.layers.add(layer_of(state.oid))
        return False

    async def _stat(
        self,
        link: Link,
        state: ObjectState,
        found: dict[int, tuple[int, int] | None],
        refused: list[SheepError],
    ) -> None:
        try:
            header, _ = await link.call(
                Op.STAT, b"", timeout_s=STAT_TIMEOUT_S, **self._replicator.fields(state.oid)
            )
            found[link.node] = (header.version, header.span)
        except (ObjectNotFoundError, CorruptError):
            found[link.node] = None
        except RetryableError as error:
            # A node whose disk failed is voted out soon, as one that does not answer.
            log.debug("stat of %s at node %d: %s", describe_oid(state.oid), link.node, error)
        except SheepError as error:
            refused.append(error)

    async def _repair(self, node: int, oid: int, source: int, damaged: set[int]) -> bool:
        """Have a node level its copy with `source`, which may turn out damaged.

        Returns:
            False: it could not. True: it did; or it joins, and knows now that it lacks this copy.
        """
        link = self._replicator.router.link(node)
        if link is None:
            return False
        try:
            await link.call(
                Op.REPAIR,
                b"",
                span=source,
                timeout_s=REPAIR_TIMEOUT_S,
                **self._replicator.fields(oid),
            )
        except CorruptError as error:
            log.error("%s at node %d: %s", describe_oid(oid), source, error)
            damaged.add(source)
        except SheepError as error:
            log.info("repair of %s at node %d: %s", describe_oid(oid), node, error)
        else:
            return True
        return False
