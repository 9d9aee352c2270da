"""Catching up: bring this node's copies level with members that stayed, then join.

Always holds:
- The source is a `sync` member of the group's current epoch, never this node's own memory of who
  had what (I8).
- A copy is patched block by block to be equal to the source's at one version of it.
- Strays (objects that the sync member does not have) go to quarantine, they are not deleted (I4).
- `joined` is told to the leader only after everything patched is durable.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.core.errors import (
    NoSpaceError,
    ObjectNotFoundError,
    ProtocolError,
    RecoveringError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid
from sheepfs.core.wire import Op
from sheepfs.logs import fields
from sheepfs.net.link import Link
from storaged.comparing import decode_layout
from storaged.logic.catchup import Listed, plan, waves
from storaged.replica import Replica
from storaged.store.entry import sibling
from storaged.store.format import BITMAP_SIZE
from storaged.store.level import make_patch

log = logging.getLogger(__name__)

PULL_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.1
PATIENCE_S = 2.0
"""How long a pull waits for a peer to be reachable: requests on the object wait meanwhile."""
PARALLEL_GROUPS = 4
PARALLEL_PULLS = 4


@dataclass(frozen=True, slots=True)
class JoinedGroup:
    """A group that this node caught up with, as of the group's change in epoch `changed`."""

    pool: int
    pg: int
    changed: int


class Peers(Protocol):
    """Live links to other nodes (sheepfs.net.router)."""

    map: ClusterMap

    def link(self, node: int) -> Link | None:
        """The live link to a node's current incarnation, if there is one."""
        ...


class Recovery:
    """Pulls objects from peers, for one node."""

    def __init__(
        self,
        replica: Replica,
        peers: Peers,
        tell_joined: Callable[[list[JoinedGroup]], Awaitable[None]],
    ) -> None:
        self._replica = replica
        self._peers = peers
        self._tell_joined = tell_joined
        self._is_wanted = False
        """The map changed since the last round began."""
        self._changed = trio.Event()
        self._limit = trio.CapacityLimiter(PARALLEL_PULLS)
        self._to_keep: dict[int, int] = {}
        """Fences learned and not durable yet."""
        self.groups_left = 0
        self._began = (0.0, 0, 0)
        """When catching up began, and what had been pulled by then: objects, bytes."""

    def map_changed(self) -> None:
        """A new map is there: perhaps there is something to join."""
        self._is_wanted = True
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Catch up whenever the map says that this node joins a group."""
        while True:
            while not self._is_wanted:
                await self._changed.wait()
            self._is_wanted = False
            while not await self._round():
                if not self._is_wanted:
                    with trio.move_on_after(RETRY_DELAY_S):
                        await self._changed.wait()
                self._is_wanted = False

    def _joining(self) -> list[tuple[int, int, PlacementGroup]]:
        node = self._replica.node
        return [
            (copies, number, group)
            for copies, pgs in self._replica.map.pools.items()
            for number, group in enumerate(pgs)
            if node in group.joining
        ]

    async def _round(self) -> bool:
        """Catch up with all groups to join; tells whether nothing is left to do."""
        joining = self._joining()
        self._note(len(joining))
        if not joining:
            return True
        await self._learn_fences(joining)
        done: list[JoinedGroup] = []
        queue = iter(joining)

        async def worker() -> None:
            for copies, number, group in queue:
                try:
                    await self._catch_up(copies, number, group)
                    done.append(JoinedGroup(copies, number, group.changed))
                except SheepError as error:
                    log.debug("group %d of pool %d must wait: %s", number, copies, error)

        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL_GROUPS):
                nursery.start_soon(worker)
        if done:
            try:
                await self._replica.keep_tokens(self._to_keep)
                self._to_keep.clear()
            except NoSpaceError as error:
                log.error("cannot join: %s", error)
                return False
            await self._replica.flush_store(None)
            await self._tell_joined(done)
        # Not finished until the leader's next map says so.
        return False

    def _note(self, groups: int) -> None:
        """Say when catching up begins, and what it took when it ends."""
        counters = self._replica.counters
        if groups and not self.groups_left:
            self._began = (trio.current_time(), counters.pulled_objects, counters.pulled_bytes)
            log.info("catching up begins", extra=fields(event="recovery-begun", groups=groups))
        elif self.groups_left and not groups:
            since, objects, size = self._began
            log.info(
                "catching up has ended",
                extra=fields(
                    event="recovery-ended",
                    seconds=round(trio.current_time() - since, 1),
                    objects=counters.pulled_objects - objects,
                    bytes=counters.pulled_bytes - size,
                ),
            )
        self.groups_left = groups

    async def _learn_fences(self, joining: list[tuple[int, int, PlacementGroup]]) -> None:
        """Before any change: a holder fenced while this node was away may still be writing (I6).

        The source must know the epoch in which this node joins: whoever attaches after its
        answer fences this node itself.
        """
        sources: dict[int, list[tuple[int, int, PlacementGroup]]] = {}
        for copies, number, group in joining:
            if not self._replica.is_guarded(copies, number):
                with suppress(UnreachableError):
                    node = self._source(group).node
                    sources.setdefault(node, []).append((copies, number, group))
        epoch = self._replica.map.epoch
        for node, groups in sources.items():
            link = self._peers.link(node)
            if link is None:
                continue
            try:
                known = await link.call_json(Op.LIST, epoch=epoch, timeout_s=PULL_TIMEOUT_S)
                tokens = {int(vdi): int(token) for vdi, token in known.items()}
            except (SheepError, AttributeError, TypeError, ValueError) as error:
                log.info("node %d does not tell its fences: %s", node, error)
                continue
            self._to_keep.update(self._replica.learn_tokens(tokens))
            for copies, number, group in groups:
                self._replica.guard(copies, number, group.changed)

    async def _catch_up(self, copies: int, number: int, group: PlacementGroup) -> None:
        if not self._replica.is_guarded(copies, number):
            raise RecoveringError("the fences are not known yet")
        source = self._source(group)
        rows = await source.call_json(
            Op.LIST,
            pool=copies,
            pg=number,
            epoch=self._replica.map.epoch,
            timeout_s=PULL_TIMEOUT_S,
        )
        try:
            theirs = [Listed(int(o), int(v), int(li), bool(s)) for o, v, li, s, *_ in rows]
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"node {source.node} sent a bad list: {error}") from error
        store = self._replica.store
        ours = store.list(copies, number, len(self._replica.map.pools[copies]))
        fresh = self._replica.fresh.of(copies, number, group.changed)
        todo = plan(ours, theirs, fresh)
        fresh.update(todo.equal)
        for wave in waves(todo.pull):
            async with trio.open_nursery() as nursery:
                for oid in wave:
                    await self._limit.acquire_on_behalf_of(oid)
                    nursery.start_soon(self._pull_one, oid, copies, number, fresh)
            if fresh.isdisjoint(wave):
                break  # The source went away: do not wait for each of its objects in turn.
        if missing := [oid for oid in todo.pull if oid not in fresh]:
            raise RecoveringError(f"{len(missing)} objects could not be pulled yet")
        for oid in todo.strays:
            if oid not in fresh and not self._replica.is_held(oid):
                await self._replica.free(oid)
            if oid not in fresh and not self._replica.is_held(oid):
                store.quarantine(oid)
                log.info("%s: no sync member has it; quarantined", describe_oid(oid))

    async def _pull_one(self, oid: int, copies: int, number: int, fresh: set[int]) -> None:
        try:
            if oid in fresh or self._replica.is_held(oid):
                # A write got here first and pulls it; the next round sees the result.
                return
            self._replica.hold(oid)
            try:
                await self.pull(oid, copies, number)
            except SheepError as error:
                log.debug("%s: cannot be pulled yet: %s", describe_oid(oid), error)
            finally:
                self._replica.release(oid)
        finally:
            self._limit.release_on_behalf_of(oid)

    def _source(self, group: PlacementGroup, wanted: int | None = None) -> Link:
        """Give a live link to a sync member other than this node."""
        for node in group.sync if wanted is None else (wanted,):
            link = self._peers.link(node)
            if node != self._replica.node and node in group.sync and link is not None:
                return link
        raise UnreachableError("no sync member of the group can be reached")

    async def pull(self, oid: int, pool: int, pg: int, source: int | None = None) -> None:
        """Make the local copy of a held object equal to a sync member's.

        Durability: none until the next flush. Cancellation: the copy may be half patched; it is
        marked, so after a restart it counts as suspect. Ordering: the caller holds the object.

        Raises:
            SheepError: no sync member gave it (the last one's reason).
        """
        give_up = trio.current_time() + PATIENCE_S
        while True:
            problem = await self._try_to_pull(oid, pool, pg, source)
            if problem is None:
                return
            if not isinstance(problem, RetryableError) or trio.current_time() > give_up:
                raise problem
            with trio.move_on_after(RETRY_DELAY_S):
                await self._changed.wait()

    async def _try_to_pull(
        self, oid: int, pool: int, pg: int, source: int | None
    ) -> SheepError | None:
        """Ask each sync member (or `source` alone) once; give the last one's reason."""
        group = self._replica.map.pools[pool][pg]
        candidates = [n for n in group.sync if n != self._replica.node]
        problem: SheepError = ObjectNotFoundError("the group has no other sync member")
        for node in candidates if source is None else [source]:
            try:
                await self._pull_from(self._source(group, node), oid, pool, pg, source is not None)
                return None
            except SheepError as error:
                problem = error
        return problem

    async def _pull_from(self, link: Link, oid: int, pool: int, pg: int, exact: bool) -> None:
        replica, store = self._replica, self._replica.store
        inherited = store.get(oid) is None and await self._inherit(link, oid, pool, pg)
        hashes = await trio.to_thread.run_sync(store.digests, oid)
        try:
            header, body = await link.call(
                Op.PULL,
                hashes,
                oid=oid,
                pool=pool,
                pg=pg,
                epoch=replica.map.epoch,
                timeout_s=PULL_TIMEOUT_S,
            )
        except ObjectNotFoundError:
            if inherited:
                store.delete(oid)  # It never was an object.
            elif replica.node in replica.map.pools[pool][pg].joining:
                await replica.free(oid)
                store.quarantine(oid)
            replica.fresh_of(pool, pg).add(oid)
            raise
        own = store.get(oid)
        trusted = own is not None and not own.suspect and self._is_trusted(oid, pool, pg)
        if own is not None and trusted and header.version < own.version and not exact:
            # The peer has yet to get a write that this node acknowledged: never go back.
            raise RecoveringError(f"node {link.node} is behind for {describe_oid(oid)}")
        patch = await trio.to_thread.run_sync(
            make_patch,
            hashes,
            header.version,
            header.span,
            body[:BITMAP_SIZE],
            body[BITMAP_SIZE : 2 * BITMAP_SIZE],
            memoryview(body)[2 * BITMAP_SIZE :],
        )
        if not store.is_marked(oid):
            await trio.to_thread.run_sync(store.mark, [oid])
        store.patch(oid, patch, pool=pool, pg=pg)
        replica.fresh_of(pool, pg).add(oid)
        replica.counters.pulled_objects += 1
        replica.counters.pulled_bytes += len(patch.data)
        if own is not None and trusted:
            replica.counters.repaired_blocks += len(patch.differs)

    async def _inherit(self, link: Link, oid: int, pool: int, pg: int) -> bool:
        """Make an object that is not here of what local objects have of it; tells whether it did.

        As the source's copy is made of others, so that what is shared there is shared here.
        """
        replica, store = self._replica, self._replica.store
        try:
            _, body = await link.call(
                Op.LAYOUT,
                b"",
                oid=oid,
                pool=pool,
                pg=pg,
                epoch=replica.map.epoch,
                timeout_s=PULL_TIMEOUT_S,
            )
        except ObjectNotFoundError:
            return False  # PULL says the same, and what follows from it.
        layout = decode_layout(body)
        bases = [sibling(oid, layer) for layer in layout.layers]
        trusted = {base for base in bases if self._is_trusted(base, pool, pg)}
        if not trusted or store.get(oid) is not None:
            return False
        copy = await trio.to_thread.run_sync(store.compose, oid, layout, trusted)
        if copy.overlay is None:
            return False
        await trio.to_thread.run_sync(store.mark, [oid])
        store.inherit(oid, copy, pool=pool, pg=pg)
        return True

    def _is_trusted(self, oid: int, pool: int, pg: int) -> bool:
        group = self._replica.map.pools[pool][pg]
        return self._replica.node in group.sync or oid in self._replica.fresh_of(pool, pg)


def parse_joined(content: object) -> list[JoinedGroup]:
    """Parse a JOINED request's list of [pool, pg, changed] (ProtocolError if it is none)."""
    try:
        return [JoinedGroup(int(p), int(g), int(c)) for p, g, c in content]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"not a list of joined groups: {error}") from error


def encode_joined(node: int, incarnation: int, groups: list[JoinedGroup]) -> bytes:
    """Give the payload of a JOINED request."""
    rows = [[g.pool, g.pg, g.changed] for g in groups]
    return json.dumps({"node": node, "incarnation": incarnation, "groups": rows}).encode()
