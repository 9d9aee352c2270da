"""Requests that wait: objects that are held for somebody, and how an object comes to be trusted.

Always holds:
- Every request passes the gate at the moment it is carried out, also when it had to wait.
- Requests on one object are carried out in the order in which they came; while an object is
  `held` (being marked, pulled or laundered) they queue.
- Who waits for another object while it holds one waits for a limited time only.
- Nobody waits for a copy that waits for another copy of the same object: two would wait for each
  other for ever.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    InDoubtError,
    RecoveringError,
    SheepError,
    Status,
)
from sheepfs.core.geometry import describe_oid
from sheepfs.core.wire import HEADER_SIZE, Buffer, Header, Op
from storaged.logic.catchup import Level, Levels
from storaged.logic.gate import Gate, Refusal
from storaged.recovery.pacing import Pacer
from storaged.store.entry import CORRUPT, SUSPECT
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)
HOLD_PATIENCE_S = 2.0
"""How long a request that needs a second object waits for whoever holds that."""


class Client(Protocol):
    """The connection that a request came from (storaged.server)."""

    received_ns: int
    """When the request that is being carried out was there."""
    name: str
    """The same on all connections of one program."""

    def reply(
        self, header: Header, payload: Buffer = b"", status: Status = Status.OK, **fields: int
    ) -> None:
        """Queue the reply to a request."""
        ...

    def acknowledge(self, header: Header) -> None:
        """Reply OK to a change."""
        ...

    def hold(self, size_bytes: int) -> None:
        """Count memory held for the client."""
        ...


class Puller(Protocol):
    """Brings an object level with a sync member's (storaged.recovery.pulling)."""

    async def pull(
        self, oid: int, pool: int, pg: int, source: int | None = None, *, exact: bool = True
    ) -> None:
        """Make the local copy equal to a sync member's (`source`'s, if given).

        Args:
            exact: also when `source` has an older one.

        Raises:
            FirstInDoubtError: all are in doubt, and this one may be taken as it is.
            SheepError: none can give it.
        """
        ...

    async def witness(self, oid: int, pool: int, pg: int, version: int) -> None:
        """Note a change as missed that a sync member has. Raises SheepError if none has it."""
        ...


class FirstInDoubtError(InDoubtError):
    """No sync member has a copy beyond doubt; this node is the first that has one at all."""


class Request(NamedTuple):
    client: Client
    header: Header
    payload: bytes
    received_ns: int


class Counters:
    """Events since the start, shown in STATUS."""

    def __init__(self) -> None:
        self.client_requests = 0
        """Reads, changes and flushes: what recovery yields to."""
        self.corrupt_blocks = 0
        self.repaired_blocks = 0
        self.restored_objects = 0
        """Objects that were missing here and came back from a peer."""
        self.laundered_objects = 0
        self.pulled_objects = 0
        self.pulled_bytes = 0


class Requests:
    """What all operations on one node's objects share."""

    def __init__(
        self,
        store: ObjectStore,
        node: int,
        incarnation: int,
        nursery: trio.Nursery,
        on_disk_error: Callable[[SheepError], None],
    ) -> None:
        self.store = store
        self.node = node
        self.incarnation = incarnation
        self.map = ClusterMap(0, "")
        self.gate = Gate(self.map, node, incarnation)
        self.tokens = store.tokens()
        self._levels = Levels()
        self._guarded: dict[tuple[int, int], int] = {}
        self.counters = Counters()
        self.pacer = Pacer(lambda: self.counters.client_requests)
        self.puller: Puller | None = None
        self._nursery = nursery
        self._on_disk_error = on_disk_error
        self._held: dict[int, deque[Request]] = {}
        self.awaited: dict[int, trio.Event] = {}
        """Objects that peers wait for a change of."""
        self._repairing: set[int] = set()
        """Held objects whose damage is being repaired from a peer."""
        self._asking: set[int] = set()
        """Held objects of which peers are asked for their copies."""
        self._freed: set[int] = set()
        """Objects whose heirs have their own copies, about to be deleted."""
        self._released: dict[int, trio.Event] = {}
        self.handlers: dict[int, Callable[[Client, Header, Buffer], None]] = {}

    def set_map(self, cluster_map: ClusterMap) -> None:
        """Take a newer map."""
        self.map = cluster_map
        self.gate = Gate(cluster_map, self.node, self.incarnation)
        for pool, pgs in cluster_map.pools.items():
            for pg, group in enumerate(pgs):
                if self.node not in group.joining:
                    self._levels.forget(pool, pg)

    def sync_members(self, pool: int, pg: int) -> tuple[int, ...]:
        """Give a group's members that have everything; none if the map is not about this run."""
        groups = self.map.pools.get(pool, ())
        return groups[pg].sync if self.is_known and pg < len(groups) else ()

    @property
    def is_known(self) -> bool:
        """Whether the map is about this run."""
        known = self.map.nodes.get(self.node)
        return known is not None and known.incarnation == self.incarnation

    def fresh_of(self, pool: int, pg: int) -> set[int]:
        """Objects of a group that are level since this node began to join it."""
        return self.level_of(pool, pg).fresh

    def level_of(self, pool: int, pg: int) -> Level:
        """What is known of this node's copies of a group since it began to join it."""
        return self._levels.of(pool, pg, self.map.pools[pool][pg].changed)

    def guard(self, pool: int, pg: int, changed: int) -> None:
        """From here on take changes of a group that this node joins: their fences are known."""
        self._guarded[pool, pg] = changed

    def is_guarded(self, pool: int, pg: int) -> bool:
        """Tell whether this node knows the fences of a group since it began to join it."""
        return self._guarded.get((pool, pg)) == self.map.pools[pool][pg].changed

    # -- dispatch ---------------------------------------------------------------------------

    def handle(self, client: Client, header: Header, payload: Buffer) -> None:
        """Carry out one request, now or when its object is free; always ends in one reply."""
        held = self._held.get(header.oid)
        if held is not None and header.op != Op.READ:
            if header.op == Op.PULL:
                problem = self._unfit(header.oid)
                if problem is not None:
                    self.fail(client, header, problem)
                    return
            self._queue(held, client, header, payload)
            return
        try:
            self.handlers[header.op](client, header, payload)
        except Refusal as refusal:
            self._refuse(client, header, refusal)
        except SheepError as error:
            self.fail(client, header, error)

    def _unfit(self, oid: int) -> SheepError | None:
        """Tell why a peer must not wait for a held object's copy, if it must not."""
        if oid in self._asking:
            entry = self.store.get(oid)
            if entry is not None and entry.state == SUSPECT:
                return InDoubtError("this copy is in doubt, too")
            if entry is None or entry.suspect or oid in self._repairing:
                return CorruptError("this copy is damaged, too")
        return None

    def _queue(self, held: deque[Request], client: Client, header: Header, payload: Buffer) -> None:
        client.hold(HEADER_SIZE + len(payload))
        held.append(Request(client, header, bytes(payload), client.received_ns))

    def _refuse(self, client: Client, header: Header, refusal: Refusal) -> None:
        body: Buffer = str(refusal).encode()
        if refusal.status is Status.STALE_EPOCH:
            body = self.map.encoded
        client.reply(header, body, refusal.status, epoch=self.map.epoch)

    def fail(self, client: Client, header: Header, error: SheepError) -> None:
        """Answer a request with an error; a failed disk ends the daemon."""
        if isinstance(error, DiskError):
            self._on_disk_error(error)
        client.reply(header, str(error).encode(), error.status, version=self._version(header.oid))

    def disk_failed(self, error: SheepError) -> None:
        """The disk failed in something that nobody asked for: the daemon ends (I5)."""
        self._on_disk_error(error)

    def _version(self, oid: int) -> int:
        try:
            entry = self.store.get(oid)
        except SheepError:
            return 0
        return entry.version if entry else 0

    # -- holding objects --------------------------------------------------------------------

    def hold(self, oid: int) -> None:
        """Make later requests on an object wait until `release`."""
        self._held.setdefault(oid, deque())

    def is_held(self, oid: int) -> bool:
        """Tell whether requests on an object are waiting for something."""
        return oid in self._held

    async def take(self, oid: int) -> None:
        """Hold an object that nobody else holds. Raises RecoveringError if that takes too long."""
        with trio.move_on_after(HOLD_PATIENCE_S):
            while oid in self._held:
                await self._released.setdefault(oid, trio.Event()).wait()
        if oid in self._held:
            raise RecoveringError(f"{describe_oid(oid)} is busy")
        self.hold(oid)

    def release(self, oid: int) -> None:
        """Carry out what waited for the object; one of them may hold it again."""
        for client, header, payload, received_ns in self._let_go(oid):
            client.hold(-HEADER_SIZE - len(payload))
            client.received_ns = received_ns
            self.handle(client, header, payload)

    def fail_held(self, oid: int, error: SheepError) -> None:
        """Answer what waited for the object with an error."""
        for client, header, payload, _ in self._let_go(oid):
            client.hold(-HEADER_SIZE - len(payload))
            self.fail(client, header, error)

    def _let_go(self, oid: int) -> Iterable[Request]:
        released = self._released.pop(oid, None)
        if released is not None:
            released.set()
        return self._held.pop(oid, ())

    def _after(
        self, work: Callable[[int], Any], client: Client, header: Header, payload: Buffer
    ) -> None:
        """Hold the object, let `work(oid)` (async) run, then carry out the request again."""
        oid = header.oid
        self.hold(oid)
        self._queue(self._held[oid], client, header, payload)

        async def task() -> None:
            try:
                await work(oid)
            except SheepError as error:
                log.warning("object %s: %s", describe_oid(oid), error)
                self.fail_held(oid, error)
            else:
                self.release(oid)

        self._nursery.start_soon(task)

    # -- trust ------------------------------------------------------------------------------

    def _corrupt(self, oid: int, header: Header, error: CorruptError) -> None:
        """A bad block: the reader goes to another replica, and this copy mends itself (I11)."""
        if self.is_held(oid):
            return
        self.counters.corrupt_blocks += len(error.blocks)
        log.error("%s: %s; repairing it from a peer", describe_oid(oid), error)
        self.hold(oid)
        self._repairing.add(oid)
        self._nursery.start_soon(self._repair_held, oid, header.pool, header.pg)

    async def _repair_held(self, oid: int, pool: int, pg: int) -> None:
        try:
            await self._bring_level(oid, pool, pg)
        except SheepError as error:
            log.error("%s: no replica could repair it: %s", describe_oid(oid), error)
        self._repairing.discard(oid)
        self.release(oid)

    async def level(self, oid: int, pool: int, pg: int, source: int | None = None) -> None:
        """Make a copy that is missing, bad or behind equal to a sync member's, never older.

        Durability: none until the next flush. Cancellation: as `Puller.pull`.

        Raises:
            SheepError: no member, or not `source`, can give it now.
        """
        await self.take(oid)
        self._repairing.add(oid)
        try:
            await self._bring_level(oid, pool, pg, source, exact=False)
        finally:
            self._repairing.discard(oid)
            self.release(oid)

    async def _bring_level(
        self, oid: int, pool: int, pg: int, source: int | None = None, *, exact: bool = True
    ) -> None:
        if self.puller is None:
            raise RecoveringError("this node has no way to reach its peers yet")
        self._asking.add(oid)
        try:
            await self.puller.pull(oid, pool, pg, source, exact=exact)
        finally:
            self._asking.discard(oid)

    def _miss(self, client: Client, header: Header, payload: Buffer) -> None:
        """A change of an object that this joining node lacks: the copy to come will have it.

        So no client waits for 4 MiB to be copied. It must not be acknowledged before a sync member
        has it, or it could be in no copy at all.
        """
        oid, pool, pg, version = header.oid, header.pool, header.pg, header.version
        level, puller = self.level_of(pool, pg), self.puller
        if version <= level.missed.get(oid, 0):
            client.acknowledge(header)
        elif level.is_complete or puller is None:
            self._after(lambda oid: self._bring_level(oid, pool, pg), client, header, payload)
        else:
            self._after(lambda oid: puller.witness(oid, pool, pg, version), client, header, payload)

    def _when_trusted(self, client: Client, header: Header, payload: Buffer) -> None:
        """Resolve a suspect, then carry out the request."""
        held = self._held.get(header.oid)
        if held is not None:
            self._queue(held, client, header, payload)
        else:
            self._after(
                lambda oid: self._resolve(oid, header.pool, header.pg), client, header, payload
            )

    async def _resolve(self, oid: int, pool: int, pg: int) -> None:
        """A peer that stayed knows better; if there is none, this copy is the truth (I8).

        A change that failed half-way at all members leaves suspects only. Each has all that was
        acknowledged, so any may be the truth: the first is, and the others follow it.
        """
        sync = self.map.pools[pool][pg].sync
        if len(sync) > 1:
            try:
                await self._bring_level(oid, pool, pg)
                return
            except FirstInDoubtError:
                if self.map.pools[pool][pg].sync != sync:
                    raise
        entry = self.store.get(oid)
        if entry is not None and entry.state == CORRUPT:
            raise CorruptError(f"{describe_oid(oid)}: the only copy has a damaged header")
        await self._launder(oid)

    async def _launder(self, oid: int) -> None:
        await trio.to_thread.run_sync(self.store.launder, oid, self.map.epoch)
        self.counters.laundered_objects += 1
        log.info("%s: was written when the node stopped; taken as it is", describe_oid(oid))
