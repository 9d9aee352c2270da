"""Bugs put into the production code on purpose: a simulation that misses them is worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

from sheepfs.core.clustermap import PlacementGroup
from sheepfs.core.wire import Header
from sheepfs.net import router
from sheepfs.replication import changes
from storaged.logic import catchup, gate, leader
from storaged.logic.leader import Groups
from storaged.operations import replica
from storaged.recovery import recovery
from storaged.store import dirtylog, flush

Put = Callable[[Any, str, Any], None]


def acknowledge_early(put: Put) -> None:
    """A write is acknowledged before all members have it."""

    def accepted(self: changes.Change, request: int) -> None:
        if request == self.request and self.left > 0:
            self.left = 0
            self.owner.completed(self)

    put(changes.Change, "accepted", accepted)


def skip_epoch_check(put: Put) -> None:
    """A member takes requests of clients that know an older map."""
    check = gate.Gate.check

    def unchecked(self: gate.Gate, header: Header) -> gate.Role:
        if header.epoch < self._epoch:
            header = header._replace(epoch=self._epoch)
        return check(self, header)

    put(gate.Gate, "check", unchecked)


def serve_before_caught_up(put: Put) -> None:
    """A node says that it has caught up, and has not."""

    async def catch_up(self: recovery.Recovery, *_: Any) -> None: ...

    put(recovery.Recovery, "_catch_up", catch_up)


def forget_dirty_marks(put: Put) -> None:
    """What is being written is not noted: after a power cut nothing is suspect."""

    def mark(self: dirtylog.DirtyLog, oids: Sequence[int]) -> None:
        with self.lock:
            self.marked.update(oids)
            self._fresh.update(oids)

    put(dirtylog.DirtyLog, "mark", mark)


def retry_failed_sync(put: Put) -> None:
    """A sync that failed is tried again, and believed."""

    def run(self: flush.FlushJob) -> None:
        for file in self.files:
            try:
                self._disk.fdatasync(file.fd)
            except OSError:
                self._disk.fdatasync(file.fd)
        for directory in self.directories:
            self._disk.fsync_dir(directory)

    put(flush.FlushJob, "run", run)


def delete_strays_unconfirmed(put: Put) -> None:
    """What a sync member did not list is deleted, although it may have been made since."""

    def plan(ours: Any, theirs: Any, fresh: set[int], *more: Any) -> Any:
        todo: Any = original(ours, theirs, fresh, *more)
        listed = {item.oid for item in theirs}

        def strays() -> Iterator[int]:
            # When all is pulled: what was made meanwhile is fresh.
            for oid in [*todo.strays, *sorted(fresh - listed)]:
                fresh.discard(oid)
                yield oid

        return todo._replace(strays=strays())

    original = catchup.plan
    put(recovery, "plan", plan)
    put(replica.Replica, "is_held", lambda self, oid: False)


def level_from_the_stale_side(put: Put) -> None:
    """Who comes back first has the say, although its peers wrote without it."""

    def standings(groups: Groups, copies: int, view: Any, *args: Any) -> list[Any]:
        return original(tuple(stale(group, view.live) for group in groups), copies, view, *args)

    def stale(group: PlacementGroup, live: AbstractSet[int]) -> PlacementGroup:
        back = [node for node in (*group.joining, *group.away) if node in live]
        if back and not any(node in live for node in group.sync):
            away = [node for node in (*group.sync, *group.away) if node not in back]
            group = PlacementGroup(group.changed, (back[0],), tuple(back[1:]), tuple(away))
        return group

    original = leader._standings
    put(leader, "_standings", standings)


def keep_links_to_the_voted_out(put: Put) -> None:
    """Who hangs is waited for, although it was voted out."""
    put(router.Router, "_give_up_on_lost", lambda self, old: None)


PLANTED: dict[str, Callable[[Put], None]] = {
    plant.__name__: plant
    for plant in (
        acknowledge_early, skip_epoch_check, serve_before_caught_up, forget_dirty_marks,
        retry_failed_sync, delete_strays_unconfirmed, level_from_the_stale_side,
        keep_links_to_the_voted_out,
    )
}  # fmt: skip


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Have one of the bugs in the block; none if the name is empty."""
    former: list[tuple[Any, str, Any]] = []

    def put(owner: Any, what: str, value: Any) -> None:
        former.append((owner, what, getattr(owner, what, None)))
        setattr(owner, what, value)

    if name:
        PLANTED[name](put)
    try:
        yield
    finally:
        for owner, what, value in reversed(former):
            if value is None:
                delattr(owner, what)
            else:
                setattr(owner, what, value)
