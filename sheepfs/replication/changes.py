"""The state that a holder keeps of an object, and a change of one that is under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from xxhash import xxh3_64_intdigest

from sheepfs.callbacks import Completed
from sheepfs.core.errors import SheepError
from sheepfs.core.geometry import layer_of
from sheepfs.core.wire import Buffer, Header
from sheepfs.net.link import Link

if TYPE_CHECKING:
    from sheepfs.replication.replicator import Replicator

Group: TypeAlias = tuple[int, int]
"""(pool, placement group)."""


class ObjectState:
    """What the holder knows of one object; `ready` when its replicas are known to be equal."""

    __slots__ = (
        "changes", "group", "layer", "oid", "oldest", "opening", "queue", "ready", "uneven",
        "version", "waiters",
    )  # fmt: skip

    def __init__(self, oid: int, group: Group) -> None:
        self.oid = oid
        self.layer = layer_of(oid)
        self.group = group
        self.version = 0
        self.ready = False
        self.opening = False
        self.oldest = False
        """Level to the oldest copy: a member refused a change for lack of space."""
        self.uneven = False
        """Members are known to differ: nothing may be read before they are level."""
        self.changes: list[Change] = []
        """Under way, by version."""
        self.queue: list[Change] = []
        """Waiting until the object is open."""
        self.waiters: list[Callable[[SheepError | None], None]] = []


class Change:
    """One change of one object under way: a write, punch or delete.

    Attributes:
        base: what the object is made a copy of (`FLAG_COPY`), open; else None.
        damaged: version of the object at which a member's copy was too damaged to be changed; or 0.
    """

    __slots__ = (
        "base", "checksum", "damaged", "done", "epoch", "flags", "left", "offset", "op", "owner",
        "payload", "prev", "request", "span", "started", "state", "version",
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
        self.base: ObjectState | None = None
        self.prev = self.version = self.damaged = 0
        self.request = self.epoch = self.left = 0
        self.started = 0.0

    def answer(self, link: Link, header: Header | None, payload: memoryview | None) -> None:
        """Take one member's answer; answers to a former sending of this change are ignored."""
        if header is None:
            self.owner.sender.park(self)
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
