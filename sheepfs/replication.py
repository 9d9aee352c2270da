"""Changes to the objects of one attached VDI, sent to every member of their placement groups.

Always holds:
- A change is complete when every current member accepted it in the current epoch (I7): when a
  group changes, everything not complete is sent again to all its members (they know what they
  have by version).
- Versions are unique for ever: the attach's generation in the high bits, a sequence below.
- Changes of one object complete in the order of their versions.
- After a disagreement (`STALE_OBJECT`, a failed change) an object is opened again: its replicas
  are made equal before the next change or read.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from operator import attrgetter

import trio
from xxhash import xxh3_64_intdigest

from sheepfs.callbacks import Completed, ignore_answer
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import (
    CorruptError,
    DiskError,
    FencedError,
    ObjectNotFoundError,
    RetryableError,
    SheepError,
    Status,
    to_errno,
)
from sheepfs.core.geometry import describe_oid, pg_of
from sheepfs.core.wire import FLAG_CREATE, Buffer, Header, Op, prepare
from sheepfs.net.link import Link, describe, next_request
from sheepfs.net.router import Router

log = logging.getLogger(__name__)

RETRY_S = 0.02
STALL_LOG_S = 5.0
SEQUENCE_BITS = 40

_DISAGREE = (Status.STALE_OBJECT, Status.NOT_FOUND, Status.CORRUPT)
_by_version = attrgetter("version")


class ObjectState:
    """What the holder knows of one object; `ready` when its replicas are known to be equal."""

    __slots__ = (
        "oid", "oldest", "opening", "pg", "queue", "ready", "uneven", "version", "waiters",
    )  # fmt: skip

    def __init__(self, oid: int, pg: int) -> None:
        self.oid = oid
        self.pg = pg
        self.version = 0
        self.ready = False
        self.opening = False
        self.oldest = False
        """Level to the oldest copy: a member refused a change for lack of space."""
        self.uneven = False
        """Members are known to differ: nothing may be read before they are level."""
        self.queue: list[Change] = []
        self.waiters: list[Completed] = []


class Change:
    """One change of one object under way: a write, punch or delete."""

    __slots__ = (
        "checksum", "done", "epoch", "flags", "left", "offset", "op", "owner", "payload", "prev",
        "request", "span", "started", "state", "version",
    )  # fmt: skip

    def __init__(
        self,
        owner: Replicator,
        state: ObjectState,
        op: int,
        flags: int,
        offset: int,
        span: int,
        payload: Buffer,
        done: Completed,
    ) -> None:
        self.owner = owner
        self.state = state
        self.op = op
        self.flags = flags
        self.offset = offset
        self.span = span
        self.payload = payload
        self.checksum = xxh3_64_intdigest(payload) if payload else 0
        self.done = done
        self.prev = self.version = 0
        self.request = self.epoch = self.left = 0
        self.started = 0.0

    def answer(self, link: Link, header: Header | None, payload: memoryview | None) -> None:
        """Take one member's answer; answers to a former sending of this change are ignored."""
        if header is None:
            self.owner.park(self)
        elif header.status:
            if header.request == self.request:
                self.owner.refused(self, link, header, payload)
        else:
            self.accepted(header.request)

    def accepted(self, request: int) -> None:
        """Count one member's acceptance of the sending numbered `request`."""
        if request == self.request:
            self.left -= 1
            if not self.left:
                self.owner.completed(self)


class Replicator:
    """The holder's side of replication, for one attach of one VDI."""

    def __init__(
        self,
        router: Router,
        nursery: trio.Nursery,
        vdi: int,
        pool: int,
        token: int,
        generation: int,
    ) -> None:
        self.router = router
        self.vdi = vdi
        self.pool = pool
        self.token = token
        self.objects: dict[int, ObjectState] = {}
        self.fenced = False
        self.lost_writes = False
        """Every member that had accepted unflushed changes was lost: they may be gone."""
        self.stalled = ""
        self.dirty: set[int] = set()
        """Groups with complete changes that were not flushed."""
        self._flushing: set[int] = set()
        self._sequence = generation << SEQUENCE_BITS
        self._inflight: dict[Change, None] = {}
        self._parked: dict[Change, None] = {}
        self._routes: dict[int, list[Link]] = {}
        self._nursery = nursery
        self._retry = trio.Event()
        self._idle = trio.Event()
        self._uneven = False
        """An object could not be made equal on all members."""
        router.on_map.append(self._map_changed)
        router.on_link.append(self._link_up)

    @property
    def busy(self) -> bool:
        """Whether changes are under way."""
        return bool(self._inflight)

    @property
    def level(self) -> bool:
        """Whether all replicas are equal, as far as the changes of this attach go."""
        return not self.fenced and not self._uneven

    def close(self) -> None:
        """Forget the router; changes still under way fail with EIO."""
        self.router.on_map.remove(self._map_changed)
        self.router.on_link.remove(self._link_up)
        self._fail_all(errno.EIO)

    def _fail_all(self, code: int) -> None:
        changes = [*self._inflight, *(c for s in self.objects.values() for c in s.queue)]
        self._inflight.clear()
        self._parked.clear()
        for state in self.objects.values():
            state.queue = []
        for change in changes:
            change.request = 0
            change.done(code)

    # -- changes ----------------------------------------------------------------------------

    def state(self, oid: int) -> ObjectState:
        """Give the state of an object, a new one (not ready) if none is known."""
        state = self.objects.get(oid)
        if state is None:
            pg = pg_of(oid, len(self.router.map.pools[self.pool]))
            state = self.objects[oid] = ObjectState(oid, pg)
        return state

    def change(
        self,
        state: ObjectState,
        op: int,
        offset: int,
        span: int,
        payload: Buffer,
        done: Completed,
        flags: int = 0,
    ) -> None:
        """Carry out a change on all members; `done` is called once with errno or 0.

        Durability: none before `make_durable`. Ordering: per object, in the order of the calls.
        """
        if self.fenced:
            done(errno.EIO)
            return
        change = Change(self, state, op, flags, offset, span, payload, done)
        if state.ready:
            self._submit(change)
        else:
            state.queue.append(change)
            self._open_soon(state)

    def _submit(self, change: Change) -> None:
        state = change.state
        self._sequence += 1
        change.prev = state.version
        change.version = state.version = self._sequence
        self._inflight[change] = None
        self._send(change)

    def _send(self, change: Change) -> None:
        state = change.state
        links = self._routes.get(state.pg) or self._route(state.pg)
        if links is None:
            self.park(change)
            return
        change.request = request = next_request()
        change.epoch = epoch = self.router.map.epoch
        change.left = len(links)
        payload = change.payload
        unsealed = prepare(
            change.op, change.flags, request, epoch, self.vdi, self.pool, state.pg, self.token,
            state.oid, change.offset, change.span, change.prev, change.version,
            len(payload), change.checksum,
        )  # fmt: skip
        for link in links:
            if link.lost:
                self._routes.pop(state.pg, None)
                self.park(change)
                return
            link.changes[request] = change
            link.connection.send_frame(unsealed.seal(link.session), payload)

    def _route(self, pg: int) -> list[Link] | None:
        """Give links to all members, if the group takes writes and all of them are linked."""
        cluster_map = self.router.map
        if not cluster_map.writable(self.pool, pg):
            return None
        links = []
        for node in cluster_map.pools[self.pool][pg].members:
            link = self.router.link(node)
            if link is None:
                return None
            links.append(link)
        self._routes[pg] = links
        return links

    def completed(self, change: Change) -> None:
        """Every member accepted the change."""
        self._inflight.pop(change, None)
        self.dirty.add(change.state.pg)
        if not self._inflight:
            self._idle.set()
        change.done(0)

    def refused(
        self, change: Change, link: Link, header: Header, payload: memoryview | None
    ) -> None:
        """A member refused the change: wait and send again, open the object again, or fail."""
        status = header.status
        if status == Status.STALE_EPOCH:
            self.park(change)
            if payload:
                self.router.take_encoded(bytes(payload))
        elif status in _DISAGREE:
            self._reopen(change.state)
        elif status == Status.FENCED:
            self.fence(describe(bytes(payload or b"")))
        elif status == Status.NO_SPACE:
            self._no_space(change)
        elif status in (Status.BAD_REQUEST, Status.WRONG_CLUSTER):
            log.error(
                "node %d refused a change of %s: %s",
                link.node, describe_oid(change.state.oid), describe(bytes(payload or b"")),
            )  # fmt: skip
            self._inflight.pop(change, None)
            change.request = 0
            self._reopen(change.state)
            change.done(errno.EIO)
        else:
            if status == Status.BUSY and header.epoch < change.epoch:
                # The member has not seen this epoch yet: show it the map.
                link.request(Op.MAP, next_request(), ignore_answer, self.router.map.encoded)
            self.park(change)

    def _no_space(self, change: Change) -> None:
        """A member has no room: the change fails, and the others must not keep it either."""
        state = change.state
        if change.flags & FLAG_CREATE:
            # The map never named the object; the next creation voids what some members made.
            self.objects.pop(state.oid, None)
            failed = [*sorted(self._changes_of(state), key=_by_version), *state.queue]
            state.queue = []
        else:
            state.oldest = True
            failed = [change]
        for victim in failed:
            victim.request = 0
            self._inflight.pop(victim, None)
            self._parked.pop(victim, None)
        if not change.flags & FLAG_CREATE:
            self._reopen(state)
        for victim in failed:
            victim.done(errno.ENOSPC)

    def _changes_of(self, state: ObjectState) -> list[Change]:
        return [change for change in self._inflight if change.state is state]

    def in_use(self, state: ObjectState) -> bool:
        """Tell whether anything waits for an object."""
        return bool(state.opening or state.queue or self._changes_of(state))

    def fence(self, reason: str) -> None:
        """Another holder took over: everything under way fails, and all that comes."""
        if not self.fenced:
            log.error("VDI %d: %s; its I/O fails from now on", self.vdi, reason)
        self.fenced = True
        self._fail_all(errno.EIO)

    # -- sending again ----------------------------------------------------------------------

    def park(self, change: Change) -> None:
        """Send a change again a little later, or as soon as the map or a link changes."""
        if change in self._inflight:
            change.request = 0
            self._parked[change] = None
            self._retry.set()

    def _send_again(self, changes: list[Change]) -> None:
        for change in sorted(changes, key=_by_version):
            if change in self._inflight:
                self._parked.pop(change, None)
                self._send(change)

    def _map_changed(self, old: ClusterMap, new: ClusterMap) -> None:
        self._routes.clear()
        groups = new.pools.get(self.pool, ())
        if old.pools.get(self.pool):
            self._note_lost(old, new)
        self._send_again(
            [c for c in self._inflight if not c.request or groups[c.state.pg].changed > c.epoch]
        )

    def _note_lost(self, old: ClusterMap, new: ClusterMap) -> None:
        for pg in self.dirty | self._flushing:
            had = old.pools[self.pool][pg].members
            stayed = any(
                node in had
                and node in old.nodes
                and old.nodes[node].incarnation == new.nodes[node].incarnation
                for node in new.pools[self.pool][pg].sync
            )
            if not stayed:
                log.error("VDI %d: group %d lost every member with unflushed writes", self.vdi, pg)
                self.lost_writes = True

    def _link_up(self, link: Link) -> None:
        self._routes.clear()
        self._send_again(list(self._parked))

    async def run(self) -> None:
        """Send parked changes again; say so when something stalls (I12)."""
        while True:
            with trio.move_on_after(1.0):
                await self._retry.wait()
            self._retry = trio.Event()
            if self._parked:
                await trio.sleep(RETRY_S)
                self._routes.clear()
                self._send_again(list(self._parked))
            self._watch_stall()

    def _watch_stall(self) -> None:
        now = trio.current_time()
        oldest = next(iter(self._inflight), None)
        if oldest is not None and not oldest.started:
            oldest.started = now
        if oldest is None or now - oldest.started < STALL_LOG_S:
            if self.stalled:
                log.warning("VDI %d goes on", self.vdi)
                self.stalled = ""
            return
        reason = self._why_stalled(oldest.state.pg)
        if reason != self.stalled:
            log.warning("VDI %d is stalled: %s", self.vdi, reason)
        self.stalled = reason

    def _why_stalled(self, pg: int) -> str:
        cluster_map = self.router.map
        group = cluster_map.pools[self.pool][pg]
        needed = cluster_map.needed(self.pool)
        if len(group.sync) < needed:
            return f"group {pg} has {len(group.sync)} of {needed} needed members in sync"
        away = [n for n in group.members if self.router.link(n) is None]
        if away:
            return f"no connection to node {', '.join(map(str, away))}"
        return f"group {pg}: members {', '.join(map(str, group.members))} have not answered"

    # -- opening objects --------------------------------------------------------------------

    async def open(self, state: ObjectState) -> None:
        """Make sure that an object's replicas are equal and its version known."""
        if state.ready:
            return
        finished = trio.Event()
        outcome: list[int] = []

        def done(code: int) -> None:
            outcome.append(code)
            finished.set()

        state.waiters.append(done)
        self._open_soon(state)
        await finished.wait()
        if outcome[0]:
            raise CorruptError(f"{describe_oid(state.oid)}: no replica can give it")

    def _reopen(self, state: ObjectState) -> None:
        """Replicas disagree: take back what is under way, level them, then go on."""
        state.ready = False
        state.uneven = True
        again = sorted(self._changes_of(state), key=_by_version)
        for change in again:
            change.request = 0
            del self._inflight[change]
            self._parked.pop(change, None)
        state.queue[:0] = again
        self._open_soon(state)

    def _open_soon(self, state: ObjectState) -> None:
        if not state.opening:
            state.opening = True
            self._nursery.start_soon(self._open, state)

    async def _open(self, state: ObjectState) -> None:
        code = 0
        try:
            while not await self._level(state):
                with trio.move_on_after(RETRY_S):
                    await self.router.wait_map()
        except FencedError as error:
            self.fence(str(error))
            code = errno.EIO
        except SheepError as error:
            log.error("%s: %s", describe_oid(state.oid), error)
            code = to_errno(error)
        state.opening = False
        state.ready = not code
        queue, state.queue = state.queue, []
        waiters, state.waiters = state.waiters, []
        for waiter in waiters:
            waiter(code)
        for change in queue:
            if code:
                change.done(code)
            elif state.ready:
                self._submit(change)
            else:
                state.queue.append(change)
        if code:
            self._uneven = True
            self.objects.pop(state.oid, None)

    async def _level(self, state: ObjectState) -> bool:
        """Ask all sync members for the version, mend those that differ; True when all agree."""
        cluster_map = self.router.map
        group = cluster_map.pools[self.pool][state.pg]
        links = [self.router.link(node) for node in group.sync]
        if not all(links) or not cluster_map.writable(self.pool, state.pg):
            return False
        found: dict[int, tuple[int, int] | None] = {}
        refused: list[SheepError] = []
        async with trio.open_nursery() as nursery:
            for link in links:
                if link is not None:
                    nursery.start_soon(self._stat, link, state, found, refused)
        if refused:
            raise refused[0]
        if len(found) < len(group.sync) or self.router.map.pools[self.pool][state.pg] != group:
            return False
        copies = {node: copy for node, copy in found.items() if copy is not None}
        if not copies:
            raise ObjectNotFoundError("the map names it, and no replica has it")
        best = (min if state.oldest else max)(copies.values())
        behind = [node for node in found if found[node] != best]
        source = next(node for node in copies if copies[node] == best)
        if not behind:
            if state.uneven:
                # Members that join have no say, and may be what is ahead.
                for node in group.joining:
                    await self.repair(node, state.oid, state.pg, source)
            state.version = best[0]
            state.oldest = state.uneven = False
            return True
        log.warning(
            "%s: replicas differ; level node %s with node %d",
            describe_oid(state.oid), ", ".join(map(str, behind)), source,
        )  # fmt: skip
        for node in behind:
            await self.repair(node, state.oid, state.pg, source)
        # What was copied is in the page cache of these nodes, and what it was copied from too.
        self.dirty.add(state.pg)
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
                Op.STAT, b"", timeout_s=5, **self.fields(state.oid, state.pg)
            )
            found[link.node] = (header.version, header.span)
        except (ObjectNotFoundError, CorruptError):
            found[link.node] = None
        except (RetryableError, DiskError) as error:
            # A node whose disk failed is voted out soon, as one that does not answer.
            log.debug("stat of %s at node %d: %s", describe_oid(state.oid), link.node, error)
        except SheepError as error:
            refused.append(error)

    def fields(self, oid: int, pg: int) -> dict[str, int]:
        """Give the header fields that address an object in the current epoch."""
        return {
            "oid": oid,
            "pool": self.pool,
            "pg": pg,
            "epoch": self.router.map.epoch,
            "vdi": self.vdi,
            "token": self.token,
        }

    def members(self, pg: int) -> list[Link]:
        """Give the live links to a group's members."""
        members = self.router.map.pools[self.pool][pg].members
        return [link for node in members if (link := self.router.link(node))]

    async def repair(self, node: int, oid: int, pg: int, source: int = 0) -> None:
        """Ask a node to level its copy with `source` (0: any sync member); best effort."""
        link = self.router.link(node)
        if link is None:
            return
        try:
            await link.call(Op.REPAIR, b"", span=source, timeout_s=10, **self.fields(oid, pg))
        except SheepError as error:
            log.info("repair of %s at node %d: %s", describe_oid(oid), node, error)

    # -- flush ------------------------------------------------------------------------------

    async def make_durable(self, layer: int) -> None:
        """Flush on every member of every group changed since the last time.

        Durability: every change complete before the call (I1). Cancellation: what was not
        flushed stays dirty. Ordering: one at a time (the volume's flusher sees to it).

        Raises:
            FencedError: another holder took over.
            CorruptError: unflushed changes may have been lost with the nodes that had them.
        """
        self._flushing, self.dirty = self.dirty, set()
        try:
            while self._flushing:
                cluster_map = self.router.map
                groups = cluster_map.pools[self.pool]
                nodes = {node for pg in self._flushing for node in groups[pg].members}
                if await self._flushed(nodes, layer):
                    now = self.router.map.pools[self.pool]
                    self._flushing = {
                        pg for pg in self._flushing if now[pg].changed > cluster_map.epoch
                    }
                else:
                    with trio.move_on_after(RETRY_S):
                        await self.router.wait_map()
                self._check_usable()
        finally:
            self.dirty |= self._flushing
            self._flushing = set()
        self._check_usable()

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
        if self.fenced:
            raise FencedError(f"VDI {self.vdi} was taken over by another holder")
        if self.lost_writes:
            self.lost_writes = False
            raise CorruptError(f"VDI {self.vdi}: unflushed writes were lost with their nodes")

    def flush_directly(self, layer: int, done: Callable[[bool], None]) -> bool:
        """Start what `make_durable` does, without a task; only while no other flush runs.

        Returns:
            False: it is not that simple now; nothing was started. Else `done` is called once,
            with False if `make_durable` must do it after all.
        """
        if not self.dirty or self.fenced or self.lost_writes:
            return False
        epoch = self.router.map.epoch
        groups = self.router.map.pools[self.pool]
        taken = self.dirty

        def flushed(good: bool) -> None:
            self._flushing = set()
            now = self.router.map.pools[self.pool]
            if self.lost_writes or any(now[pg].changed > epoch for pg in taken):
                good = False
            if not good:
                self.dirty |= taken
            done(good)

        self._flushing, self.dirty = taken, set()
        nodes = {node for pg in taken for node in groups[pg].members}
        if not self._flush_nodes(nodes, layer, flushed):
            self._flushing, self.dirty = set(), taken
            return False
        return True

    def _flush_nodes(self, nodes: set[int], layer: int, done: Callable[[bool], None]) -> bool:
        """Send FLUSH to all `nodes`, if all are linked; `done` is told whether all did it."""
        links = [link for node in nodes if (link := self.router.link(node))]
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
                    self.fence(describe(bytes(payload or b"")))
            if not left:
                done(good)

        for link in links:
            link.request(
                Op.FLUSH, next_request(), answer, version=layer, vdi=self.vdi, token=self.token
            )
        return True

    async def settle(self) -> None:
        """Wait until no change is under way."""
        while self.busy or any(s.queue or s.opening for s in self.objects.values()):
            self._idle = trio.Event()
            with trio.move_on_after(RETRY_S):
                await self._idle.wait()
