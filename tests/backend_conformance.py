"""What every backend of the mount does; a test module subclasses and gives it a `mounts` fixture.

    class TestMemory(BackendConformance):
        @pytest.fixture
        async def mounts(self) -> AsyncIterator[Mounts]: ...

`mounts` holds two namespaces of one empty cluster, as two hosts have them.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import trio

from sheepfs.backend import Namespace, OpenVolume
from sheepfs.core.errors import (
    HeldElsewhereError,
    SheepError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE

WAIT_S = 20.0
BLOCK = 4096


class Mounts(NamedTuple):
    """Two mounts of one cluster."""

    here: Namespace
    there: Namespace


async def read(volume: OpenVolume, offset: int, length: int) -> bytes:
    """Read and wait. Raises OSError."""
    finished = trio.Event()
    result: tuple[int, bytes] = (0, b"")

    def done(code: int, buffers: object) -> None:
        nonlocal result
        result = (code, b"".join(buffers))  # type: ignore[arg-type]
        finished.set()

    volume.read(offset, length, done)
    with trio.fail_after(WAIT_S):
        await finished.wait()
    if result[0]:
        raise OSError(result[0], "read")
    return result[1]


class _Waiter:
    def __init__(self) -> None:
        self.finished = trio.Event()
        self.code = 0

    def __call__(self, code: int) -> None:
        self.code = code
        self.finished.set()

    async def wait(self) -> None:
        with trio.fail_after(WAIT_S):
            await self.finished.wait()
        if self.code:
            raise OSError(self.code, "write or flush")


async def write(volume: OpenVolume, offset: int, data: bytes) -> None:
    """Write and wait. Raises OSError."""
    waiter = _Waiter()
    volume.write(offset, data, waiter)
    await waiter.wait()


async def flush(volume: OpenVolume) -> None:
    """Flush and wait. Raises OSError."""
    waiter = _Waiter()
    volume.flush(waiter)
    await waiter.wait()


async def make(namespace: Namespace, name: str = "vm.raw", size: int = 0) -> OpenVolume:
    """Create and open a VDI of `size` bytes."""
    made = await namespace.create(name, 0o644, 0, 0)
    volume = await namespace.open(made.id)
    if size:
        await volume.attach()
        await volume.resize(size)
    return volume


class BackendConformance:
    """Tests of Namespace and OpenVolume."""

    async def test_new_vdi_is_listed_found_and_empty(self, mounts: Mounts) -> None:
        made = await mounts.here.create("vm.raw", 0o640, 7, 8)
        assert (made.size, made.mode, made.uid, made.gid) == (0, 0o640, 7, 8)
        assert made.id >= 2
        assert (await mounts.here.lookup("vm.raw")).id == made.id
        assert (await mounts.here.get(made.id)).name == "vm.raw"
        assert [a.name for a in await mounts.here.list()] == ["vm.raw"]

    async def test_unknown_names_and_ids_are_not_found(self, mounts: Mounts) -> None:
        with pytest.raises(VdiNotFoundError):
            await mounts.here.lookup("none.raw")
        with pytest.raises(VdiNotFoundError):
            await mounts.here.get(12345)
        with pytest.raises(VdiNotFoundError):
            await mounts.here.delete("none.raw")

    async def test_second_vdi_of_a_name_is_refused(self, mounts: Mounts) -> None:
        await mounts.here.create("vm.raw", 0o644, 0, 0)
        with pytest.raises(VdiExistsError):
            await mounts.there.create("vm.raw", 0o644, 0, 0)

    @pytest.mark.parametrize("name", ["", ".hidden", "a@b", "a/b", "a\nb", "x" * 129])
    async def test_bad_name_is_refused(self, mounts: Mounts, name: str) -> None:
        with pytest.raises(UsageError):
            await mounts.here.create(name, 0o644, 0, 0)

    async def test_ids_are_not_reused(self, mounts: Mounts) -> None:
        first = await mounts.here.create("vm.raw", 0o644, 0, 0)
        await mounts.here.delete("vm.raw")
        assert (await mounts.here.create("vm.raw", 0o644, 0, 0)).id != first.id

    async def test_rename_keeps_id_and_data(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 0, b"data")
        vdi = volume.attributes().id
        await volume.close()
        await mounts.here.rename("vm.raw", "new.raw", replace=False)
        assert (await mounts.here.lookup("new.raw")).id == vdi
        with pytest.raises(VdiNotFoundError):
            await mounts.here.lookup("vm.raw")
        volume = await mounts.here.open(vdi)
        assert await read(volume, 0, 10) == b"data"
        await volume.close()

    async def test_rename_replaces_only_if_asked(self, mounts: Mounts) -> None:
        kept = await mounts.here.create("a.raw", 0o644, 0, 0)
        await mounts.here.create("b.raw", 0o644, 0, 0)
        with pytest.raises(VdiExistsError):
            await mounts.here.rename("a.raw", "b.raw", replace=False)
        await mounts.here.rename("a.raw", "b.raw", replace=True)
        assert [a.id for a in await mounts.here.list()] == [kept.id]

    async def test_attributes_are_kept(self, mounts: Mounts) -> None:
        made = await mounts.here.create("vm.raw", 0o644, 0, 0)
        await mounts.here.set_attributes(made.id, mode=0o600, uid=5, gid=6, modified=1000.5)
        found = await mounts.here.get(made.id)
        assert (found.mode, found.uid, found.gid, found.modified) == (0o600, 5, 6, 1000.5)

    async def test_capacity_is_positive(self, mounts: Mounts) -> None:
        capacity = await mounts.here.capacity()
        assert capacity.total >= capacity.free > 0

    async def test_written_data_is_read_back(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=3 * OBJECT_SIZE)
        data = random.Random(1).randbytes(200_000)
        await write(volume, OBJECT_SIZE - 70_001, data)
        await flush(volume)
        assert await read(volume, OBJECT_SIZE - 70_001, len(data)) == data
        assert await read(volume, OBJECT_SIZE - 70_011, 10) == bytes(10)
        assert volume.size == 3 * OBJECT_SIZE
        await volume.close()

    async def test_write_beyond_the_end_grows(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 10_000, b"end")
        assert volume.size == volume.attributes().size == 10_003
        assert await read(volume, 0, 20_000) == bytes(10_000) + b"end"
        await volume.close()
        assert (await mounts.here.lookup("vm.raw")).size == 10_003

    async def test_reads_are_cut_at_the_end(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=5000)
        assert await read(volume, 4990, 100) == bytes(10)
        assert await read(volume, 5000, 100) == b""
        assert await read(volume, 90_000, 100) == b""
        await volume.close()

    async def test_cut_off_data_is_zeros_when_grown_again(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 0, b"x" * 100_000)
        await volume.resize(50_001)
        await volume.resize(100_000)
        assert await read(volume, 0, 100_000) == b"x" * 50_001 + bytes(49_999)
        await volume.close()

    async def test_impossible_size_is_refused(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        with pytest.raises(SheepError):
            await volume.resize(MAX_VDI_SIZE + 1)
        await volume.close()

    async def test_punched_range_reads_as_zeros(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 0, b"x" * 100_000)
        await volume.punch(10_001, 60_000)
        assert await read(volume, 0, 100_000) == b"x" * 10_001 + bytes(60_000) + b"x" * 29_999
        assert volume.size == 100_000
        await volume.close()

    async def test_data_and_holes_are_found(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=4 * OBJECT_SIZE)
        assert await volume.seek_data(0) is None
        assert await volume.seek_hole(5) == 5
        await write(volume, 2 * OBJECT_SIZE, b"x" * BLOCK)
        start = await volume.seek_data(0)
        assert start is not None
        # A backend may call more than what was written data, but never less.
        assert start <= 2 * OBJECT_SIZE
        assert await volume.seek_data(2 * OBJECT_SIZE + 1) == 2 * OBJECT_SIZE + 1
        assert await volume.seek_hole(2 * OBJECT_SIZE) >= 2 * OBJECT_SIZE + BLOCK
        assert await volume.seek_data(3 * OBJECT_SIZE) is None
        await volume.close()

    async def test_hole_at_the_end_of_full_data_is_the_end(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 0, b"x" * 5000)
        assert await volume.seek_hole(0) == 5000
        await volume.close()

    async def test_allocated_grows_with_data_and_not_with_size(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=1 << 40)
        assert volume.attributes().allocated == 0
        await write(volume, 1 << 39, b"x" * BLOCK)
        assert BLOCK <= volume.attributes().allocated <= 2 * OBJECT_SIZE
        await volume.close()

    async def test_one_writer_and_many_readers(self, mounts: Mounts) -> None:
        writer = await make(mounts.here)
        await write(writer, 0, b"data")
        await flush(writer)
        reader = await mounts.there.open(writer.attributes().id)
        with pytest.raises(HeldElsewhereError):
            await reader.attach()
        await writer.close()
        await reader.attach()
        assert await read(reader, 0, 4) == b"data"
        await reader.close()

    async def test_attach_twice_is_once(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await volume.attach()
        await volume.attach()
        await volume.detach()
        other = await mounts.there.open(volume.attributes().id)
        await other.attach()
        await other.close()
        await volume.close()

    async def test_detach_lets_another_mount_take_over_while_open(self, mounts: Mounts) -> None:
        source = await make(mounts.here, size=BLOCK)
        target = await mounts.there.open(source.attributes().id)
        await write(source, 0, b"source")
        await source.detach()
        await target.attach()
        assert await read(target, 0, 6) == b"source"
        await write(target, 0, b"target")
        with pytest.raises(HeldElsewhereError):
            await source.attach()
        await target.close()
        await source.attach()
        assert await read(source, 0, 6) == b"target"
        await source.close()

    async def test_handles_share_the_volume_until_the_last_close(self, mounts: Mounts) -> None:
        first = await make(mounts.here)
        second = await mounts.here.open(first.attributes().id)
        await write(first, 0, b"one")
        await first.close()
        assert await read(second, 0, 3) == b"one"
        other = await mounts.there.open(second.attributes().id)
        with pytest.raises(HeldElsewhereError):
            await other.attach()
        await second.close()
        await other.attach()
        await other.close()

    async def test_vdi_held_elsewhere_is_not_deleted(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=BLOCK)
        with pytest.raises(HeldElsewhereError):
            await mounts.there.delete("vm.raw")
        await volume.close()
        await mounts.there.delete("vm.raw")

    async def test_random_operations_agree_with_an_array(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        chance = random.Random(7)
        oracle = bytearray()
        for _ in range(150):
            offset = chance.randrange(300_000)
            length = chance.randrange(1, 70_000)
            action = chance.choice(("write", "write", "read", "punch", "resize"))
            if action == "write":
                data = chance.randbytes(length)
                oracle.extend(bytes(max(0, offset - len(oracle))))
                oracle[offset : offset + length] = data
                await write(volume, offset, data)
            elif action == "punch" and offset < len(oracle):
                end = min(len(oracle), offset + length)
                oracle[offset:end] = bytes(end - offset)
                await volume.punch(offset, end - offset)
            elif action == "resize":
                oracle = oracle[:offset] + bytes(max(0, offset - len(oracle)))
                await volume.resize(offset)
            assert volume.size == len(oracle)
            assert await read(volume, offset, length) == oracle[offset : offset + length]
        assert await read(volume, 0, 400_000) == oracle
        await volume.close()
