"""Mounts of one VDI over a `StaticCluster`: real volumes, and in place of etcd a record in memory.

A mount can end without a detach, as a killed process does; its lease is then taken as expired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import trio

from fakes.static_cluster import StaticCluster
from sheepfs.callbacks import completion
from sheepfs.core.errors import HeldElsewhereError
from sheepfs.core.geometry import make_layer
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.core.wire import Buffer
from sheepfs.net.attach import Attachment
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.capture import Captured, copy_maps
from sheepfs.volume.frozen import FrozenVolume
from sheepfs.volume.volume import Volume

VDI = 2
COPIES = 3
LAYER = make_layer(2, 2, COPIES)
DEADLINE_S = 15.0


class StaticRecord:
    """What etcd has of the one VDI: its record and who holds it."""

    def __init__(self, size: int = 0) -> None:
        self.record = VdiRecord(VDI, size, COPIES, LAYER, LAYER, LAYER)
        self.holder: StaticMount | None = None
        self.token = 0
        self._serial = 2

    def new_layer(self) -> int:
        """Give a layer of the VDI's family that nobody has."""
        self._serial += 1
        return make_layer(self._serial, 2, COPIES)


class StaticMount:
    """One mount with the VDI open; implements `sheepfs.holding.holding.Attacher`."""

    def __init__(self, cluster: StaticCluster, etcd: StaticRecord) -> None:
        self.cluster = cluster
        self.etcd = etcd
        self.saves: list[VdiRecord] = []
        self.router = Router(cluster.uuid, cluster.fetch)
        self.volume: Volume
        self.nursery: trio.Nursery
        self.reclaims_wanted = 0
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def start(self) -> Volume:
        """Link to the nodes that are up and open the VDI, without holding it."""
        await self.cluster.nursery.start(self._run)
        with trio.fail_after(DEADLINE_S):
            while len(self.router.links) < self.cluster.running:
                await trio.sleep(0.005)
        return self.volume

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        self.router.take_map(self.cluster.map)
        with self._scope:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                self.volume = Volume("test", self.etcd.record, self.router, self, nursery)
                self.volume.handles = 1
                await nursery.start(self.router.run)
                task_status.started()
                await trio.sleep_forever()
        self._ended.set()

    async def end(self) -> None:
        """End without a detach: connections break, what is under way stays where it is."""
        self._scope.cancel()
        await self._ended.wait()
        if self.etcd.holder is self:
            self.etcd.holder = None

    # -- sheepfs.holding.Attacher ------------------------------------------------------------

    async def attach(self, vdi: int, *, gives_way: bool = False) -> Attachment:
        """Hold the VDI and fence the former holder."""
        etcd = self.etcd
        if etcd.holder is not None:
            raise HeldElsewhereError("held by another mount")
        etcd.holder = self
        was_clean = etcd.record.clean
        etcd.token += 1
        etcd.record = dataclasses.replace(
            etcd.record,
            generation=etcd.record.generation + 1,
            clean=False,
            layer=etcd.record.next or etcd.record.layer,
            next=0,
        )
        await fence_everywhere(self.router, vdi, etcd.token)
        return Attachment(
            vdi, etcd.token, etcd.record.generation, etcd.record, was_clean, "test",
            cast(Store, None), Keys("test"),
        )  # fmt: skip

    async def is_held(self, vdi: int) -> bool:
        """Tell whether any mount holds the VDI."""
        return self.etcd.holder is not None

    async def read_record(self, vdi: int) -> tuple[str, VdiRecord]:
        """Give the VDI as it is now."""
        return "test", self.etcd.record

    async def save(self, attachment: Attachment, record: VdiRecord) -> None:
        """Keep size and usage."""
        self.saves.append(record)
        self.etcd.record = dataclasses.replace(record, clean=False)

    async def detach(
        self, attachment: Attachment, record: VdiRecord, *, clean: bool, dropped: bool
    ) -> None:
        """Let others attach."""
        if self.etcd.holder is self:
            self.etcd.record = dataclasses.replace(record, clean=clean)
            self.etcd.holder = None

    async def want_reclaim(self, family: int) -> None:
        """Count how often somebody asked."""
        self.reclaims_wanted += 1

    # -- snapshots, as sheepfs.snapshots makes them -------------------------------------------

    async def snapshot(self) -> SnapshotRecord:
        """Freeze the VDI; what etcd would show stays with the caller."""
        made: list[SnapshotRecord] = []

        async def begin(layer: int) -> tuple[int, int]:
            upcoming = self.etcd.new_layer()
            self.etcd.record = dataclasses.replace(self.etcd.record, layer=layer, next=upcoming)
            self.volume.committed(self.etcd.record)
            return upcoming, self.etcd.new_layer()

        async def commit(captured: Captured) -> None:
            record = self.etcd.record
            assert record.next == captured.layer
            self.etcd.record = dataclasses.replace(record, layer=captured.layer, next=0)
            self.volume.committed(self.etcd.record)
            made.append(
                SnapshotRecord(
                    captured.map, VDI, captured.size, COPIES, captured.map, LAYER, captured.maps
                )
            )

        with trio.fail_after(DEADLINE_S):
            await self.volume.capture(begin, commit)
        return made[0]

    async def rollback(self, snapshot: SnapshotRecord) -> None:
        """Make the VDI as the snapshot is."""
        target, layer = self.etcd.new_layer(), self.etcd.new_layer()

        async def publish(replicator: Replicator) -> VdiRecord:
            await copy_maps(replicator, snapshot.map, target, snapshot.maps)
            await replicator.unflushed.make_durable()
            self.etcd.record = dataclasses.replace(
                self.etcd.record, layer=layer, next=0, map=target, maps=snapshot.maps,
                size=snapshot.size,
            )  # fmt: skip
            return self.etcd.record

        with trio.fail_after(DEADLINE_S):
            await self.volume.replace_map(publish)

    def frozen(self, snapshot: SnapshotRecord) -> FrozenVolume:
        """Open a snapshot."""
        return FrozenVolume("test@tag", snapshot, self.router, self.nursery)

    # -- the volume's operations, awaited ---------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Read and wait. Raises OSError."""
        finished = trio.Event()
        code, data = 0, b""

        def done(failed: int, buffers: Sequence[Buffer]) -> None:
            nonlocal code, data
            code, data = failed, b"".join(buffers)
            finished.set()

        with trio.fail_after(DEADLINE_S):
            self.volume.read(offset, length, done)
            await finished.wait()
        if code:
            raise OSError(code, "read")
        return data

    async def write(self, offset: int, data: bytes) -> None:
        """Write and wait. Raises OperationError, which has an errno."""
        with trio.fail_after(DEADLINE_S):
            await completion(lambda done: self.volume.write(offset, data, done))

    async def flush(self) -> None:
        """Flush and wait. Raises OperationError, which has an errno."""
        with trio.fail_after(DEADLINE_S):
            await completion(self.volume.flush)
