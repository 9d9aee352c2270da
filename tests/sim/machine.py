"""Disk, etcd client and worker threads of a simulated host: slow, failing and mortal.

The parts are the fakes that pass the real parts' conformance tests; here they get a host that can
be paused or die, and latencies drawn by seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from random import Random
from typing import Any

import trio

from fakes.etcd import FakeEtcd, FakeServer
from fakes.faulty_disk import BLOCK, FaultyDisk
from sheepfs.core.errors import UnreachableError
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.kv import Transaction
from sheepfs.core.wire import Buffer
from sim.network import SimHost

HOST: ContextVar[SimHost | None] = ContextVar("HOST", default=None)
"""Whose program the current task is a part of."""


class KilledError(BaseException):
    """The process is gone: raised by the system call that it did not live to see the end of."""


class SimEtcdServer(FakeServer):
    """etcd, whose leader may be lost for a while: nothing is answered, and no lease ends."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False

    def expire(self) -> None:
        if not self.is_down:
            super().expire()

    def next_expiry(self) -> float:
        return float("inf") if self.is_down else super().next_expiry()

    def elect(self) -> None:
        """Have a leader again, which counts every lease from now."""
        self.is_down = False
        now = trio.current_time()
        self._leases = {lease: (ttl_s, now + ttl_s) for lease, (ttl_s, _) in self._leases.items()}
        self._notify()


class SimEtcd(FakeEtcd):
    """A client of etcd on a host."""

    server: SimEtcdServer

    def __init__(self, server: SimEtcdServer, host: SimHost, rng: Random) -> None:
        super().__init__(server)
        self._host = host
        self._rng = rng
        self.trouble = 0.0
        """Share of commits whose outcome stays unknown to the caller."""

    @property
    def is_well(self) -> bool:
        """Whether this client has no trouble of its own."""
        return self._is_watching and not self._is_partitioned and not self.trouble

    async def _call(self) -> None:
        host = self._host
        await trio.sleep(host.network.latency())
        await host.running()
        if not host.alive:
            raise UnreachableError("this host is dead")
        if self.server.is_down:
            await trio.sleep(self._rng.choice((0.01, self.deadline_s)))
            raise UnreachableError("etcd has no leader")
        await super()._call()

    async def commit(self, txn: Transaction) -> int | None:
        if self.trouble and self._rng.random() < self.trouble:
            if self._rng.random() < 0.5:
                self.lose_next_reply()
            else:
                self.fail_next_commit()
        return await super().commit(txn)


class ProcessDisk:
    """A disk as one process sees it: after the process's death it does nothing more.

    Attributes:
        calls_left: the process dies within the call that finds none left.
        fail_next: name of a method -> errno of its next call.
        spoil_next: what becomes of the next write of object data: "lost" or "misdirected", although
            it succeeds, ...
        may_spoil: ... provided that this says so then.
    """

    def __init__(
        self, disk: FaultyDisk, on_death: Callable[[], None], on_loss: Callable[[], None]
    ) -> None:
        """`on_loss` is told when what was written is lost, and the process lives on."""
        self.disk = disk
        self.alive = True
        self.calls_left = -1
        self.fail_next: dict[str, int] = {}
        self.spoil_next = ""
        self.may_spoil: Callable[[], bool] = lambda: True
        self._objects: set[int] = set()
        """Descriptors of object files."""
        self._on_death = on_death
        self._on_loss = on_loss

    def _before(self, name: str) -> None:
        if not self.alive:
            raise KilledError
        if self.calls_left >= 0:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.alive = False
                self._on_death()
                raise KilledError
        if name in self.fail_next:
            error = self.fail_next.pop(name)
            if name == "fdatasync":
                # As Linux does: the pages count as clean then, whatever becomes of them.
                self.disk.lose_dirty_pages()
                self._on_loss()
            raise OSError(error, os.strerror(error))

    def open(self, path: str, *, create: bool = False, truncate: bool = False) -> int:
        """See Disk."""
        self._before("open")
        fd = self.disk.open(path, create=create, truncate=truncate)
        if path.startswith("objects/"):
            self._objects.add(fd)
        return fd

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        """See Disk."""
        self._before("pwrite")
        end = offset + len(data)
        is_data = fd in self._objects and not (offset % BLOCK or end % BLOCK) and end <= OBJECT_SIZE
        if self.spoil_next and is_data and self.may_spoil():
            how, self.spoil_next = self.spoil_next, ""
            if how == "misdirected":
                self.disk.pwrite(fd, data, (offset + OBJECT_SIZE // 2) % OBJECT_SIZE)
            return len(data)
        return self.disk.pwrite(fd, data, offset)

    def close(self, fd: int, /) -> None:
        """See Disk. What a dead process had open is closed already."""
        if self.alive:
            self._objects.discard(fd)
            self.disk.close(fd)


def _passed_on(name: str) -> Callable[..., Any]:
    def call(self: ProcessDisk, *args: Any, **kwargs: Any) -> Any:
        self._before(name)
        return getattr(self.disk, name)(*args, **kwargs)

    return call


for _name in (
    "pread", "pread_nowait", "punch", "truncate", "fdatasync", "drop_cache", "fsync_dir",
    "syncfs", "rename", "unlink", "mkdir", "listdir", "space", "lock",
):  # fmt: skip
    setattr(ProcessDisk, _name, _passed_on(_name))


class Threads:
    """Worker threads without threads: what they do happens in one piece, some time later.

    Attributes:
        delay_s: host -> mean time that a job waits for its disk.
    """

    def __init__(self, rng: Random) -> None:
        self.delay_s: dict[str, float] = {}
        self._rng = rng

    async def run_sync(self, function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        """Stand in for `trio.to_thread.run_sync`: a job that has begun is never cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        host = HOST.get()
        mean_s = 0.0005 if host is None else self.delay_s.get(host.name, 0.0005)
        with trio.CancelScope(shield=True):
            await trio.sleep(self._rng.expovariate(1 / mean_s))
            if host is not None:
                await host.running()
            result = function(*args)
            if self._rng.random() < 0.5:
                await trio.sleep(self._rng.expovariate(1 / mean_s))
        return result
