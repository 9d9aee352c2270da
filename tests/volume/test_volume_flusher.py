"""In what order a flush makes things durable, seen by a replicator that records; and callbacks."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing

from fakes.waiting import wait_until
from sheepfs.callbacks import Completed, OperationError, completion, countdown
from sheepfs.core.errors import CorruptError, SheepError, UnreachableError
from sheepfs.core.geometry import data_object, map_object
from sheepfs.core.wire import FLAG_CREATE, Op
from sheepfs.replication.changes import ObjectState
from sheepfs.replication.replicator import Replicator
from sheepfs.volume import flusher as flusher_module
from sheepfs.volume.flusher import Flusher
from sheepfs.volume.vdimap import VdiMap

LAYER = 7


class Recorder:
    """A replicator that only takes notes."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.objects: dict[int, ObjectState] = {}
        self.fenced = False
        self.unflushed = self
        self.groups: set[tuple[int, int]] = set()
        self.problem: SheepError | None = None
        self.refuse = 0
        self.gate = trio.Event()
        self.gate.set()

    def state(self, oid: int) -> ObjectState:
        return self.objects.setdefault(oid, ObjectState(oid, (3, 0)))

    def in_use(self, state: ObjectState) -> bool:
        return bool(state.queue)

    def flush_directly(self, done: Callable[[bool], None]) -> bool:
        if not self.groups:
            return False
        self.events.append("flush directly")
        self.groups.clear()
        done(self.problem is None)
        return True

    async def make_durable(self) -> None:
        await self.gate.wait()
        self.events.append("flush")
        self.groups.clear()
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem

    def change(
        self, state: ObjectState, op: int, offset: int, span: int, payload: bytes,
        done: Completed, flags: int = 0,
    ) -> None:  # fmt: skip
        if op == Op.DELETE:
            self.events.append("delete")
            done(0)
            return
        named = sum(map(bool, memoryview(payload).cast("Q")))
        self.events.append(
            f"{Op(op).name} {state.oid:x} +{offset} names {named}{' new' * (flags & FLAG_CREATE)}"
        )
        done(self.refuse)


class Parts:
    """A flusher with everything around it recorded."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.map = VdiMap(0, self._load)
        self.saved = True
        self.save_problem: SheepError | None = None
        self.flusher = Flusher(
            "test", LAYER, cast(Replicator, self.recorder), self.map, self._save, lambda: self.saved
        )

    async def _load(self, map_index: int, offset: int, length: int) -> bytes:
        return bytes(length)

    async def _save(self) -> None:
        self.recorder.events.append("save")
        if self.save_problem is not None:
            raise self.save_problem

    async def make(self, index: int, complete: bool = True) -> None:
        if self.map.get(index) is None:
            await self.map.load(index)
        self.map.begin_create(index, LAYER)
        if complete:
            self.map.end_create(index, created=True)
        self.recorder.groups.add((3, 0))

    async def flush(self) -> None:
        with trio.fail_after(5):
            await completion(self.flusher.flush)


@asynccontextmanager
async def flushing() -> AsyncIterator[Parts]:
    parts = Parts()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.flusher.run)
        yield parts
        nursery.cancel_scope.cancel()


MAP = f"{map_object(LAYER, 0):x}"


async def test_data_is_durable_before_the_map_and_the_map_before_the_record() -> None:
    async with flushing() as parts:
        await parts.make(0)
        await parts.make(600)
        await parts.make(1, complete=False)
        await parts.flush()
        assert parts.recorder.events == [
            "flush", f"WRITE {MAP} +0 names 1 new", f"WRITE {MAP} +4096 names 1", "flush", "save",
        ]  # fmt: skip
        assert parts.map.existing == 1


async def test_data_alone_goes_the_short_way() -> None:
    async with flushing() as parts:
        parts.recorder.groups.add((3, 0))
        await parts.flush()
        assert parts.recorder.events == ["flush directly"]


async def test_an_object_made_a_hole_is_deleted_last() -> None:
    async with flushing() as parts:
        await parts.make(0)
        await parts.flush()
        parts.recorder.events.clear()
        parts.map.discard(0)
        parts.flusher.discarded[data_object(LAYER, 0)] = 0
        await parts.flush()
        assert parts.recorder.events == [
            "flush", f"WRITE {MAP} +0 names 0", "flush", "save", "delete",
        ]  # fmt: skip


async def test_what_a_failed_flush_took_is_in_the_next_one() -> None:
    async with flushing() as parts:
        await parts.make(0)
        parts.flusher.discarded[data_object(LAYER, 9)] = 0
        parts.recorder.problem = CorruptError("lost")
        with pytest.raises(OperationError, match="EIO"):
            await parts.flush()
        assert parts.recorder.events == ["flush"]
        parts.recorder.refuse = errno.ENOSPC
        with pytest.raises(OperationError, match="ENOSPC"):
            await parts.flush()
        parts.recorder.refuse = 0
        parts.recorder.events.clear()
        await parts.flush()
        assert parts.recorder.events == [
            "flush", f"WRITE {MAP} +0 names 1 new", "flush", "save", "delete",
        ]  # fmt: skip


async def test_what_is_made_again_after_a_failed_flush_is_not_deleted() -> None:
    """Even if it is of the version that was to be deleted: what followed that may be lost."""
    async with flushing() as parts:
        await parts.make(0)
        await parts.flush()
        parts.map.discard(0)
        parts.flusher.discarded[data_object(LAYER, 0)] = 0
        parts.recorder.problem = CorruptError("lost")
        with pytest.raises(OperationError, match="EIO"):
            await parts.flush()
        await parts.make(0)
        parts.recorder.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.flush)
            await trio.testing.wait_all_tasks_blocked()
            # The stored map will name it.
            parts.map.discard(0)
            parts.recorder.gate.set()
        assert "delete" not in parts.recorder.events


async def test_what_is_made_again_while_the_map_is_stored_is_not_deleted() -> None:
    async with flushing() as parts:
        await parts.make(0)
        await parts.flush()
        parts.map.discard(0)
        parts.flusher.discarded[data_object(LAYER, 0)] = 0
        parts.recorder.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.flush)
            await trio.testing.wait_all_tasks_blocked()
            await parts.make(0)
            parts.recorder.gate.set()
        assert "delete" not in parts.recorder.events


async def test_a_record_that_cannot_be_saved_fails_the_flush() -> None:
    async with flushing() as parts:
        await parts.make(0)
        parts.save_problem = UnreachableError("no etcd")
        with pytest.raises(OperationError, match="EHOSTUNREACH"):
            await parts.flush()
        assert parts.map.is_dirty


async def test_a_failure_that_nobody_waited_for_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flusher_module, "FLUSH_EVERY_S", 0.01)
    async with flushing() as parts:
        parts.recorder.problem = CorruptError("lost")
        parts.recorder.groups.add((3, 0))
        await wait_until(lambda: parts.recorder.problem is None)
        await wait_until(lambda: not parts.flusher._busy)
        with pytest.raises(OperationError, match="EIO"):
            await parts.flush()
        await parts.flush()


async def test_who_asks_while_a_flush_runs_shares_the_next_one() -> None:
    async with flushing() as parts:
        await parts.make(0)
        parts.recorder.gate = trio.Event()
        codes: list[int] = []
        parts.flusher.flush(codes.append)
        await wait_until(lambda: parts.flusher._busy)
        for _ in range(5):
            parts.flusher.flush(codes.append)
        parts.recorder.gate.set()
        await wait_until(lambda: len(codes) == 6)
        assert parts.recorder.events.count("save") == 2


async def test_everybody_is_answered_when_the_vdi_is_let_go() -> None:
    async with flushing() as parts:
        await parts.make(0)
        parts.recorder.gate = trio.Event()
        codes: list[int] = []
        parts.flusher.flush(codes.append)
        await wait_until(lambda: parts.flusher._busy)
        parts.flusher.flush(codes.append)
        parts.flusher.fail_waiting()
        assert codes == [errno.EIO] * 2
        parts.recorder.gate.set()
        await wait_until(lambda: "save" in parts.recorder.events)
        assert len(codes) == 2
    parts.recorder.fenced = True
    parts.flusher.flush(codes.append)
    assert codes == [errno.EIO] * 3


def test_a_countdown_ends_once_with_the_first_error() -> None:
    codes: list[int] = []
    done = countdown(3, codes.append)
    done(0)
    done(errno.ENOSPC)
    assert not codes
    done(errno.EIO)
    assert codes == [errno.ENOSPC]


async def test_completion_turns_an_errno_into_an_error_that_has_it() -> None:
    await completion(lambda done: done(0))
    with pytest.raises(OperationError) as caught:
        await completion(lambda done: done(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
