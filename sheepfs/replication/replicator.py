"""Changes to the objects of one attached VDI, sent to every member of their placement groups.

Always holds:
- A change is complete when every current member accepted it in the current epoch (I7): when a
  group changes, everything not complete is sent again to all its members (they know what they
  have by version), as new changes if all its members were lost.
- Versions are unique for ever: the attach's generation in the high bits, a sequence below.
- Changes of one object complete in the order of their versions.
- After a disagreement (`STALE_OBJECT`, a failed change) an object is opened again: its replicas
  are made equal before the next change or read.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Set as AbstractSet

import trio

from sheepfs.callbacks import Completed, ignore_answer
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import SheepError, Status, to_errno
from sheepfs.core.geometry import describe_oid, pg_of, pool_of
from sheepfs.core.wire import BASE, FLAG_COPY, FLAG_CREATE, Buffer, Header, Op
from sheepfs.logs import fields
from sheepfs.net.link import Link, describe, next_request
from sheepfs.net.router import Router
from sheepfs.replication.changes import Change, Group, ObjectState
from sheepfs.replication.levelling import Leveller
from sheepfs.replication.sending import Sender
from sheepfs.replication.unflushed import Unflushed, lost_groups

log = logging.getLogger(__name__)

SETTLE_POLL_S = 0.02
SEQUENCE_BITS = 40

_DISAGREE = (Status.STALE_OBJECT, Status.NOT_FOUND, Status.CORRUPT)
_MAKES = FLAG_CREATE | FLAG_COPY
"""Changes that make an object, whatever a replica may have of that name."""


class Replicator:
    """The holder's side of replication, for one attach of one VDI."""

    def __init__(
        self, router: Router, nursery: trio.Nursery, vdi: int, token: int, generation: int
    ) -> None:
        self.router = router
        self.vdi = vdi
        self.token = token
        self.generation = generation
        self.objects: dict[int, ObjectState] = {}
        self.fenced = False
        self.unflushed = Unflushed(self)
        self._leveller = Leveller(self, nursery)
        self._sequence = generation << SEQUENCE_BITS
        self.sender = Sender(router, vdi, token)
        self._idle = trio.Event()
        router.on_map.append(self._map_changed)
        router.on_link.append(self._link_up)
        router.on_end.append(self._links_end)

    @property
    def busy(self) -> bool:
        """Whether changes are under way."""
        return bool(self.sender.under_way)

    @property
    def stalled(self) -> str:
        """Why changes do not move, or an empty string (I12)."""
        return self.sender.stalled

    @property
    def last_version(self) -> int:
        """The version of the newest change so far."""
        return self._sequence

    @property
    def level(self) -> bool:
        """Whether all replicas are equal, as far as the changes of this attach go."""
        return not (self.fenced or self._leveller.failed or self.unflushed.losses)

    def close(self) -> None:
        """Forget the router; changes still under way fail with EIO."""
        self.router.on_map.remove(self._map_changed)
        self.router.on_link.remove(self._link_up)
        self.router.on_end.remove(self._links_end)
        self._fail_all(errno.EIO)

    def _fail_all(self, code: int) -> None:
        self._fail(self._unanswered(), code)

    def fail_groups(self, groups: AbstractSet[Group]) -> None:
        """What is under way in these groups builds on changes that were lost: it fails (EIO)."""
        self._fail([c for c in self._unanswered() if c.state.group in groups], errno.EIO)

    def _unanswered(self) -> list[Change]:
        queued = (change for state in self.objects.values() for change in state.queue)
        return [*self.sender.under_way, *queued]

    def _fail(self, changes: list[Change], code: int) -> None:
        for change in changes:
            self.sender.take_back(change)
            change.state.queue = []
        for change in changes:
            change.done(code)

    # -- changes ----------------------------------------------------------------------------

    def _group(self, oid: int) -> Group:
        pool = pool_of(oid)
        return pool, pg_of(oid, len(self.router.map.pools[pool]))

    def state(self, oid: int) -> ObjectState:
        """Give the state of an object, a new one (not ready) if none is known."""
        state = self.objects.get(oid)
        if state is None:
            state = self.objects[oid] = ObjectState(oid, self._group(oid))
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
            self._leveller.open_soon(state)

    def make_copy(
        self,
        state: ObjectState,
        base: ObjectState,
        op: int,
        offset: int,
        span: int,
        payload: Buffer,
        done: Completed,
    ) -> None:
        """Make a new object as a copy of an open one of the same group, and change it at once.

        Nothing else may be sent for the object until `done`, which gets ESTALE when a member has
        another version of `base`: that is to be opened again.
        """
        if self.fenced:
            done(errno.EIO)
            return
        data = b"".join((BASE.pack(base.layer), payload))
        change = Change(self, state, op, FLAG_COPY, offset, span, data, done)
        change.base = base
        state.ready = True
        self._submit(change)

    def distrust(self, state: ObjectState) -> None:
        """Members may differ: the object is levelled before it is used again."""
        state.ready = False
        state.uneven = True

    def distrust_all(self) -> None:
        """Nothing is known of any object any more."""
        for state in self.objects.values():
            self.distrust(state)

    def _submit(self, change: Change) -> None:
        state = change.state
        self._sequence += 1
        change.prev = state.version if change.base is None else change.base.version
        change.version = state.version = self._sequence
        state.changes.append(change)
        self.sender.under_way[change] = None
        self.sender.send(change)

    def completed(self, change: Change) -> None:
        """Every member accepted the change.

        So it did all before it of the same object, which may have been sent again since then and
        wait for answers: what comes last is complete when they are. Nothing that happens later may
        undo them, above all not the creation of the object.
        """
        state = change.state
        earlier: list[Change] = []
        if state.changes[0] is not change:
            earlier = state.changes[: state.changes.index(change)]
            for each in earlier:
                self.sender.take_back(each)
        del state.changes[0]
        del self.sender.under_way[change]
        self.unflushed.groups.add(state.group)
        self.unflushed.layers.add(state.layer)
        if not self.sender.under_way:
            self._idle.set()
        for each in earlier:
            each.done(0)
        change.done(0)

    def refused(
        self, change: Change, link: Link, header: Header, payload: memoryview | None
    ) -> None:
        """A member refused the change: wait and send again, open the object again, or fail."""
        status = header.status
        if status == Status.STALE_EPOCH:
            self.sender.park(change)
            if payload:
                self.router.take_encoded(bytes(payload))
        elif status == Status.CORRUPT and change.damaged == change.prev and change.base is None:
            # It was opened again since, and no member had carried the change out: all are damaged.
            self.sender.take_back(change)
            self._reopen(change.state)
            change.done(errno.EIO)
        elif status in _DISAGREE:
            if status == Status.CORRUPT:
                change.damaged = change.prev
            if change.base is None and change.op != Op.DELETE:
                self._reopen(change.state)
            else:
                # A delete is of one version only: what another one holds may be in use.
                self.sender.take_back(change)
                change.done(errno.ESTALE)
        elif status == Status.FENCED:
            self.fence(describe(bytes(payload or b"")))
        elif status == Status.NO_SPACE:
            self._no_space(change)
        elif status in (Status.BAD_REQUEST, Status.WRONG_CLUSTER):
            log.error(
                "node %d refused a change of %s: %s",
                link.node, describe_oid(change.state.oid), describe(bytes(payload or b"")),
            )  # fmt: skip
            self.sender.take_back(change)
            if not change.flags & _MAKES:
                self._reopen(change.state)
            change.done(errno.EIO)
        else:
            if status == Status.BUSY and header.epoch < change.epoch:
                # The member has not seen this epoch yet: show it the map.
                link.request(Op.MAP, next_request(), ignore_answer, self.router.map.encoded)
            self.sender.park(change)

    def _no_space(self, change: Change) -> None:
        """A member has no room: the change fails, and the others must not keep it either."""
        state = change.state
        is_made = not state.changes[0].flags & _MAKES
        if is_made:
            state.oldest = True
            failed = [change]
        else:
            # The map never named the object; the next creation voids what some members made.
            # Its other members may not have room for any of it: there is no older copy for them.
            self.objects.pop(state.oid, None)
            failed = [*state.changes, *state.queue]
            state.queue = []
        for victim in failed:
            self.sender.take_back(victim)
        if is_made:
            self._reopen(state)
        for victim in failed:
            victim.done(errno.ENOSPC)

    def in_use(self, state: ObjectState) -> bool:
        """Tell whether anything waits for an object."""
        return bool(state.opening or state.queue or state.changes)

    def fence(self, reason: str) -> None:
        """Another holder took over: everything under way fails, and all that comes."""
        if not self.fenced:
            log.error(
                "VDI %d: %s; its I/O fails from now on", self.vdi, reason,
                extra=fields(event="fenced", vdi=self.vdi),
            )  # fmt: skip
        self.fenced = True
        self._fail_all(errno.EIO)

    # -- what happens to the cluster ----------------------------------------------------------

    async def run(self) -> None:
        """Send again what does not arrive, until cancelled."""
        await self.sender.run()

    def _map_changed(self, old: ClusterMap, new: ClusterMap) -> None:
        self.sender.forget_routes()
        self.unflushed.map_changed(old, new)
        under_way = {change.state.group for change in self.sender.under_way}
        self._renew(lost_groups(under_way, old, new))
        self.sender.send_stale(new)

    def _renew(self, groups: AbstractSet[Group]) -> None:
        """What is under way in groups whose members were lost is sent as new changes.

        Who comes back may have kept a version without all the data that belongs to it: a power cut
        tears what was not flushed. So the version does not tell whether a change is there.
        """
        changes = [change for change in self.sender.under_way if change.state.group in groups]
        for state in {change.state: None for change in changes}:
            again = list(state.changes)
            if again[0].op == Op.DELETE:
                continue  # It is there, or the object is.
            if not again[0].flags & _MAKES:
                self._reopen(state)
                continue
            for change in again:
                self.sender.take_back(change)
            for change in again:
                self._submit(change)

    def _link_up(self, link: Link) -> None:
        self.sender.send_parked()

    def _links_end(self) -> None:
        self.fence("the connection to the cluster has ended")

    # -- opening objects --------------------------------------------------------------------

    async def open(self, state: ObjectState) -> None:
        """Make sure that an object's replicas are equal and its version known.

        Raises:
            ObjectNotFoundError: no replica has it.
            CorruptError: no replica can give it.
        """
        await self._leveller.open(state)

    def _reopen(self, state: ObjectState) -> None:
        """Replicas disagree: take back what is under way, level them, then go on."""
        self.distrust(state)
        again = list(state.changes)
        for change in again:
            self.sender.take_back(change)
        state.queue[:0] = again
        self._leveller.open_soon(state)

    def opened(self, state: ObjectState, failure: SheepError | None) -> None:
        """An object is open, or cannot be: carry out or fail what waits for it."""
        state.opening = False
        state.ready = failure is None
        queue, state.queue = state.queue, []
        waiters, state.waiters = state.waiters, []
        for waiter in waiters:
            waiter(failure)
        for change in queue:
            if failure is not None:
                change.done(to_errno(failure))
            elif state.ready:
                self._submit(change)
            else:
                state.queue.append(change)
        if failure is not None:
            self.objects.pop(state.oid, None)

    def fields(self, oid: int) -> dict[str, int]:
        """Give the header fields that address an object in the current epoch."""
        pool, pg = self._group(oid)
        return {
            "oid": oid,
            "pool": pool,
            "pg": pg,
            "epoch": self.router.map.epoch,
            "vdi": self.vdi,
            "token": self.token,
        }

    async def settle(self) -> None:
        """Wait until no change is under way."""
        while self.busy or any(s.queue or s.opening for s in self.objects.values()):
            self._idle = trio.Event()
            with trio.move_on_after(SETTLE_POLL_S):
                await self._idle.wait()
