"""Pulling: making this node's copy of one object equal to a sync member's.

Always holds:
- The source is a `sync` member of the group's current epoch, never this node's own memory of who
  had what (I8).
- A copy is patched block by block to be equal to the source's at one version of it.
- A copy is level only if it has every change that this node acknowledged (`Level.missed`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol

import trio

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.core.errors import (
    CorruptError,
    InDoubtError,
    NoSpaceError,
    ObjectNotFoundError,
    RecoveringError,
    RetryableError,
    SheepError,
    UnreachableError,
)
from sheepfs.core.geometry import describe_oid
from sheepfs.core.wire import FLAG_SALVAGE, Header, Op
from sheepfs.logs import fields
from sheepfs.net.link import Link
from storaged.operations.comparing import decode_layout
from storaged.operations.replica import Replica
from storaged.operations.requests import FirstInDoubtError
from storaged.store.entry import CORRUPT, sibling
from storaged.store.format import EMPTY_TABLE
from storaged.store.patch import PatchBuilder

log = logging.getLogger(__name__)

PULL_TIMEOUT_S = 5.0
RETRY_DELAY_S = 0.1
PATIENCE_S = 2.0
"""How long a pull waits for a peer to be reachable: requests on the object wait meanwhile."""
WITNESS_EVERY_S = 0.002


class Peers(Protocol):
    """Live links to other nodes (sheepfs.net.router)."""

    map: ClusterMap

    def link(self, node: int) -> Link | None:
        """The live link to a node's current incarnation, if there is one."""
        ...


class Pulling:
    """Pulls objects from peers, for one node."""

    def __init__(self, replica: Replica, peers: Peers) -> None:
        self._replica = replica
        self._peers = peers
        self._changed = trio.Event()
        """Set, and replaced by another, when a new map is there."""

    def _source(self, pg: int, group: PlacementGroup, wanted: int | None = None) -> Link:
        """Give a live link to a sync member other than this node: of each group another one."""
        others = [n for n in group.sync if n != self._replica.node and wanted in (None, n)]
        turn = pg % len(others) if others else 0
        for node in others[turn:] + others[:turn]:
            link = self._peers.link(node)
            if link is not None:
                return link
        raise UnreachableError("no sync member of the group can be reached")

    async def witness(self, oid: int, pool: int, pg: int, version: int) -> None:
        """See that a sync member has a change that this node will miss, and note it as missed.

        Raises:
            SheepError: none has it, or says so in time.
        """
        replica = self._replica
        give_up = trio.current_time() + PATIENCE_S
        while True:
            group = replica.map.pools[pool][pg]
            found = 0
            with suppress(ObjectNotFoundError):
                header, _ = await self._source(pg, group).call(
                    Op.STAT,
                    version=version,
                    oid=oid,
                    pool=pool,
                    pg=pg,
                    epoch=replica.map.epoch,
                    timeout_s=PULL_TIMEOUT_S,
                )
                found = header.version
            level = replica.level_of(pool, pg)
            if level.changed != group.changed or replica.node not in group.joining:
                raise RecoveringError("the group changed meanwhile")
            if level.is_complete:
                raise RecoveringError("this node has caught up meanwhile: it may miss nothing")
            if found >= version:
                level.miss(oid, found)
                return
            if trio.current_time() > give_up:
                raise RecoveringError(f"no sync member has {describe_oid(oid)} at {version:x} yet")
            await trio.sleep(WITNESS_EVERY_S)

    async def pull(
        self, oid: int, pool: int, pg: int, source: int | None = None, *, exact: bool = True
    ) -> None:
        """Make the local copy of a held object equal to a sync member's (`source`'s, if given).

        Durability: none until the next flush. Cancellation: the copy may be half patched; it is
        marked, so after a restart it counts as suspect. Ordering: the caller holds the object.

        Args:
            exact: also when `source` has an older one.

        Raises:
            FirstInDoubtError: as the other members', the local copy is a suspect, and may be taken
                as it is.
            SheepError: no sync member gave it (the last one's reason).
        """
        give_up = trio.current_time() + PATIENCE_S
        while True:
            problem = await self._try_to_pull(oid, pool, pg, source, exact)
            if problem is None:
                return
            if not isinstance(problem, RetryableError) or trio.current_time() > give_up:
                raise problem
            with trio.move_on_after(RETRY_DELAY_S):
                await self._changed.wait()

    async def _try_to_pull(
        self, oid: int, pool: int, pg: int, source: int | None, exact: bool
    ) -> SheepError | None:
        """Ask each sync member (or `source` alone) once; give the last one's reason.

        If the copies of all are damaged, a node that joins takes what is good of one: the good
        blocks need their second copy, and the group has other objects.
        """
        group = self._replica.map.pools[pool][pg]
        candidates = [n for n in group.sync if n != self._replica.node]
        problem: SheepError = ObjectNotFoundError("the group has no other sync member")
        damaged: list[int] = []
        doubtful: list[int] = []
        for node in candidates if source is None else [source]:
            try:
                link = self._source(pg, group, node)
                await self._pull_from(link, oid, pool, pg, exact and source is not None)
                return None
            except NoSpaceError as error:
                return error  # It is this node that has none.
            except CorruptError as error:
                problem = error
                damaged.append(node)
            except InDoubtError as error:
                problem = error
                doubtful.append(node)
            except SheepError as error:
                problem = error
        if doubtful or damaged:
            self._judge_doubt(oid, group, damaged, doubtful)
        if self._replica.node not in group.joining or group.away or damaged != candidates:
            return problem  # One who is expected back may have what the others lack.
        try:
            link = self._source(pg, group, damaged[0])
            await self._pull_from(link, oid, pool, pg, False, FLAG_SALVAGE)
        except SheepError as error:
            return error
        log.error(
            "%s: no copy is whole; took what is good of one", describe_oid(oid),
            extra=fields(event="salvaged", object=describe_oid(oid), node=damaged[0]),
        )  # fmt: skip
        return None

    def _judge_doubt(
        self, oid: int, group: PlacementGroup, damaged: list[int], doubtful: list[int]
    ) -> None:
        """End a pull for a copy that is no better than what the others have; they may wait for it.

        Raises:
            FirstInDoubtError: the copy here may be taken as it is.
            InDoubtError: another one is to be.
            CorruptError: the copy here is none.
        """
        replica = self._replica
        own = replica.store.get(oid)
        if own is None or not own.suspect or replica.node not in group.sync:
            return
        if own.state == CORRUPT:
            raise CorruptError(f"{describe_oid(oid)}: the header is damaged, and no copy is whole")
        before = group.sync[: group.sync.index(replica.node)]
        if len(damaged) + len(doubtful) == len(group.sync) - 1 and not {*before} & {*doubtful}:
            raise FirstInDoubtError(f"{describe_oid(oid)}: the copies of all members are in doubt")
        if doubtful:
            raise InDoubtError(f"{describe_oid(oid)}: an earlier member's copy comes first")

    async def _pull_from(
        self, link: Link, oid: int, pool: int, pg: int, exact: bool, flags: int = 0
    ) -> None:
        store = self._replica.store
        inherited = False
        if store.get(oid) is None and not flags & FLAG_SALVAGE:
            inherited = await self._inherit(link, oid, pool, pg)
        hashes = await self._hashes(oid)
        try:
            header, body = await self._ask(link, oid, pool, pg, hashes, flags)
        except ObjectNotFoundError:
            if inherited:
                store.delete(oid)  # It never was an object.
            await self._not_there(oid, pool, pg)
            raise
        builder = PatchBuilder(hashes)
        await trio.to_thread.run_sync(builder.add, body)
        await self._apply(link.node, oid, pool, pg, header, builder, exact)

    async def _not_there(self, oid: int, pool: int, pg: int) -> None:
        """A sync member does not have a held object: it is out of the way, if it is here."""
        replica = self._replica
        if replica.node in replica.map.pools[pool][pg].joining:
            await replica.free(oid)
            replica.store.quarantine(oid)
        replica.level_of(pool, pg).bring(oid)

    async def _hashes(self, oid: int) -> bytes:
        if self._replica.store.get(oid) is None:
            return EMPTY_TABLE
        digests: bytes = await trio.to_thread.run_sync(self._replica.store.digests, oid)
        return digests

    async def _ask(
        self, link: Link, oid: int, pool: int, pg: int, hashes: bytes, flags: int = 0, **span: int
    ) -> tuple[Header, bytes]:
        """Ask a peer for what differs from `hashes`."""
        header, body = await link.call(
            Op.PULL,
            hashes,
            flags=flags,
            oid=oid,
            pool=pool,
            pg=pg,
            epoch=self._replica.map.epoch,
            timeout_s=PULL_TIMEOUT_S,
            **span,
        )
        return header, body

    async def _apply(
        self,
        source: int,
        oid: int,
        pool: int,
        pg: int,
        header: Header,
        builder: PatchBuilder,
        exact: bool,
    ) -> None:
        """Patch a held object with what a source said to differ in its version of it."""
        replica, store = self._replica, self._replica.store
        version, lineage = header.version, header.span
        own = store.get(oid)
        trusted = own is not None and not own.suspect and self._is_trusted(oid, pool, pg)
        if own is not None and trusted and version < own.version and not exact:
            # The peer has yet to get a write that this node acknowledged: never go back.
            raise RecoveringError(f"node {source} is behind for {describe_oid(oid)}")
        if version < replica.level_of(pool, pg).missed.get(oid, 0) and not exact:
            raise RecoveringError(f"node {source} lacks a change of {describe_oid(oid)}")

        patch = builder.patch(version, lineage)
        if not store.is_marked(oid):
            await trio.to_thread.run_sync(store.mark, [oid])
        job = store.begin_patch(oid, patch, pool=pool, pg=pg)
        try:
            await trio.to_thread.run_sync(job.run)
        except BaseException:
            store.leave_patch(job)
            raise
        store.end_patch(job)
        replica.level_of(pool, pg).bring(oid)
        replica.counters.pulled_objects += 1
        replica.counters.pulled_bytes += patch.size
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
