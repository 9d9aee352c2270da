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
    ReadOnlyError,
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


async def copy(
    namespace: Namespace, source: OpenVolume, start: int, target: OpenVolume, at: int, length: int
) -> int:
    """Copy a whole range, as a program does: again and again until nothing is left."""
    done = 0
    while done < length:
        count = await namespace.copy_range(source, start + done, target, at + done, length - done)
        assert 0 <= count <= length - done
        if not count:
            break
        done += count
    return done


async def names(namespace: Namespace) -> list[str]:
    """Names of all files."""
    return [attributes.name for attributes in await namespace.list()]


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

    # -- snapshots ------------------------------------------------------------------------------

    async def test_snapshot_keeps_what_the_vdi_was(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=2 * OBJECT_SIZE)
        await write(volume, 1000, b"before")
        made = await mounts.here.snapshot(volume.attributes().id, "daily")
        assert (made.name, made.size, made.read_only) == ("vm@daily.raw", 2 * OBJECT_SIZE, True)
        assert made.id > volume.attributes().id
        assert not made.mode & 0o222
        await write(volume, 1000, b"after!")
        await write(volume, OBJECT_SIZE, b"new")
        await volume.punch(0, 1002)
        await volume.resize(OBJECT_SIZE)
        kept = await mounts.here.open(made.id)
        assert kept.read_only
        assert not volume.read_only
        assert kept.size == kept.attributes().size == 2 * OBJECT_SIZE
        assert await read(kept, 998, 10) == b"\0\0before\0\0"
        assert await read(kept, OBJECT_SIZE, 3) == bytes(3)
        assert await read(volume, 998, 10) == b"\0\0\0\0ter!\0\0"
        assert await kept.seek_data(0) in range(1001)
        assert await kept.seek_data(OBJECT_SIZE) is None
        assert await kept.seek_hole(1000) in range(1006, OBJECT_SIZE + 1)
        await kept.close()
        await volume.close()

    async def test_snapshot_is_found_by_name_and_id_and_listed(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 7, 8)
        made = await mounts.here.snapshot(vdi.id, "daily")
        await mounts.here.create("other", 0o644, 0, 0)
        assert await names(mounts.here) == sorted(["vm.raw", "vm@daily.raw", "other"])
        found = await mounts.here.lookup("vm@daily.raw")
        assert (found.id, found.uid, found.gid, found.read_only) == (made.id, 7, 8, True)
        assert (await mounts.here.get(made.id)).name == "vm@daily.raw"
        assert not (await mounts.here.get(vdi.id)).read_only
        with pytest.raises(VdiNotFoundError):
            await mounts.here.lookup("vm@weekly.raw")
        with pytest.raises(VdiNotFoundError):
            await mounts.here.lookup("other@daily")

    async def test_snapshot_of_a_snapshot_or_with_a_bad_or_taken_tag_is_refused(
        self, mounts: Mounts
    ) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        made = await mounts.here.snapshot(vdi.id, "daily")
        with pytest.raises(VdiExistsError):
            await mounts.here.snapshot(vdi.id, "daily")
        with pytest.raises(UsageError):
            await mounts.here.snapshot(made.id, "again")
        for tag in ("", "a@b", "a/b", ".x"):
            with pytest.raises(UsageError):
                await mounts.here.snapshot(vdi.id, tag)

    async def test_snapshot_of_a_vdi_held_elsewhere_has_all_completed_writes(
        self, mounts: Mounts
    ) -> None:
        volume = await make(mounts.here, size=BLOCK)
        await write(volume, 0, b"held here")
        made = await mounts.there.snapshot(volume.attributes().id, "daily")
        await write(volume, 0, b"unharmed!")
        both = [await namespace.open(made.id) for namespace in mounts]
        for kept in both:
            assert await read(kept, 0, 9) == b"held here"
        assert await read(volume, 0, 9) == b"unharmed!"
        for kept in both:
            await kept.close()
        await volume.close()

    async def test_snapshot_under_writes_is_one_moment(self, mounts: Mounts) -> None:
        objects, completed, stop = 4, 0, False
        volume = await make(mounts.here, size=objects * OBJECT_SIZE)

        def place(number: int) -> int:
            return number % objects * OBJECT_SIZE + number // objects * BLOCK

        async def keep_writing() -> None:
            nonlocal completed
            while not stop and completed < OBJECT_SIZE // BLOCK * objects:
                await write(volume, place(completed), b"%08d" % completed)
                completed += 1

        bounds = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_writing)
            for number, namespace in enumerate((mounts.here, mounts.there, mounts.here)):
                await trio.sleep(0.01)
                before = completed
                made = await namespace.snapshot(volume.attributes().id, f"s{number}")
                bounds.append((made.id, before, completed + 1))
            stop = True
        for snapshot, least, most in bounds:
            kept = await mounts.here.open(snapshot)
            data = b"".join(
                [await read(kept, i * OBJECT_SIZE, OBJECT_SIZE) for i in range(objects)]
            )
            found = [data[place(n) : place(n) + 8] for n in range(most + 1)]
            count = next((n for n, part in enumerate(found) if part == bytes(8)), most)
            assert least <= count <= most
            assert found[:count] == [b"%08d" % n for n in range(count)]
            # And nothing of what came later.
            assert sum(data[place(n)] != 0 for n in range(completed)) == count
            await kept.close()
        await volume.close()

    async def test_snapshot_is_never_attached_or_changed(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        made = await mounts.here.snapshot(vdi.id, "daily")
        for namespace in mounts:
            kept = await namespace.open(made.id)
            with pytest.raises(ReadOnlyError):
                await kept.attach()
            with pytest.raises(ReadOnlyError):
                await kept.resize(5)
            with pytest.raises(ReadOnlyError):
                await kept.punch(0, 5)
            with pytest.raises(OSError, match="30"):
                await write(kept, 0, b"x")
            await flush(kept)
            await kept.close()
        with pytest.raises(ReadOnlyError):
            await mounts.here.set_attributes(made.id, mode=0o644)
        with pytest.raises(ReadOnlyError):
            await mounts.here.set_attributes(made.id, modified=5.0)
        await mounts.here.set_attributes(made.id, mode=0o440, uid=5, gid=6)
        found = await mounts.here.get(made.id)
        assert (found.mode, found.uid, found.gid) == (0o440, 5, 6)

    async def test_snapshot_names_follow_their_vdi(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        made = await mounts.here.snapshot(vdi.id, "daily")
        await mounts.here.rename("vm.raw", "new.raw", replace=False)
        assert await names(mounts.here) == ["new.raw", "new@daily.raw"]
        assert (await mounts.here.lookup("new@daily.raw")).id == made.id

    async def test_rename_of_a_snapshot_changes_its_tag_alone(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        await mounts.here.create("other.raw", 0o644, 0, 0)
        made = await mounts.here.snapshot(vdi.id, "a")
        await mounts.here.snapshot(vdi.id, "b")
        for new in ("plain.raw", "other@a.raw", "other.raw", "vm@.x.raw"):
            with pytest.raises(UsageError):
                await mounts.here.rename("vm@a.raw", new, replace=False)
        with pytest.raises(UsageError):
            await mounts.here.rename("other.raw", "vm@c.raw", replace=False)
        with pytest.raises(VdiExistsError):
            await mounts.here.rename("vm@a.raw", "vm@b.raw", replace=False)
        await mounts.here.rename("vm@a.raw", "vm@c.raw", replace=False)
        assert (await mounts.here.lookup("vm@c.raw")).id == made.id
        await mounts.here.rename("vm@c.raw", "vm@b.raw", replace=True)
        assert (await mounts.here.lookup("vm@b.raw")).id == made.id
        assert await names(mounts.here) == ["other.raw", "vm.raw", "vm@b.raw"]

    async def test_snapshot_outlives_its_vdi_and_keeps_the_name(self, mounts: Mounts) -> None:
        volume = await make(mounts.here)
        await write(volume, 0, b"data")
        made = await mounts.here.snapshot(volume.attributes().id, "daily")
        await volume.close()
        await mounts.here.delete("vm.raw")
        with pytest.raises(VdiExistsError):
            await mounts.here.create("vm.raw", 0o644, 0, 0)
        kept = await mounts.here.open(made.id)
        assert await read(kept, 0, 9) == b"data"
        await kept.close()
        await mounts.here.delete("vm@daily.raw")
        assert await names(mounts.here) == []
        await mounts.here.create("vm.raw", 0o644, 0, 0)

    async def test_deleting_a_snapshot_leaves_the_vdi_and_the_others(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=3 * OBJECT_SIZE)
        vdi = volume.attributes().id
        for number, tag in enumerate(("a", "b", "c")):
            await write(volume, number * OBJECT_SIZE, tag.encode())
            await mounts.here.snapshot(vdi, tag)
        await mounts.here.delete("vm@b.raw")
        kept = await mounts.here.open((await mounts.here.lookup("vm@c.raw")).id)
        for number, tag in enumerate(("a", "b", "c")):
            assert await read(kept, number * OBJECT_SIZE, 1) == tag.encode()
            assert await read(volume, number * OBJECT_SIZE, 1) == tag.encode()
        await kept.close()
        await volume.close()

    # -- copy_range -----------------------------------------------------------------------------

    async def test_copy_to_an_empty_vdi_joins_the_family(self, mounts: Mounts) -> None:
        source = await make(mounts.here, "a.raw")
        size = 3 * OBJECT_SIZE + 777
        data = random.Random(3).randbytes(100_000)
        await write(source, OBJECT_SIZE + 5, data)
        await write(source, size - 1, b"!")
        target = await make(mounts.here, "b.raw")
        assert target.attributes().family != source.attributes().family
        assert await copy(mounts.here, source, 0, target, 0, 1 << 40) == size
        assert target.attributes().family == source.attributes().family != 0
        assert target.size == target.attributes().size == size
        assert await read(target, OBJECT_SIZE + 5, len(data)) == data
        assert await read(target, size - 2, 9) == b"\0!"
        assert await target.seek_data(0) is not None
        # What is written to one of them never shows in the other.
        await write(source, OBJECT_SIZE + 10, b"source")
        await write(target, OBJECT_SIZE + 20, b"target")
        assert await read(target, OBJECT_SIZE + 5, 30) == data[:15] + b"target" + data[21:30]
        assert await read(source, OBJECT_SIZE + 5, 30) == data[:5] + b"source" + data[11:30]
        await source.close()
        await target.close()

    async def test_copy_survives_its_source(self, mounts: Mounts) -> None:
        source = await make(mounts.here, "a.raw")
        await write(source, 0, b"x" * (OBJECT_SIZE + 5))
        target = await make(mounts.here, "b.raw")
        await copy(mounts.here, source, 0, target, 0, OBJECT_SIZE + 5)
        await flush(target)
        await source.close()
        await mounts.here.delete("a.raw")
        await target.close()
        target = await mounts.there.open((await mounts.there.lookup("b.raw")).id)
        assert await read(target, 0, 2 * OBJECT_SIZE) == b"x" * (OBJECT_SIZE + 5)
        await target.close()

    async def test_copy_from_a_snapshot_and_from_a_vdi_held_elsewhere(self, mounts: Mounts) -> None:
        held = await make(mounts.there, "theirs.raw", size=2 * OBJECT_SIZE)
        await write(held, 5, b"there")
        await flush(held)
        made = await mounts.there.snapshot(held.attributes().id, "daily")
        await write(held, 5, b"later")
        await flush(held)
        target = await make(mounts.here, "b.raw")
        for vdi, expected in ((made.id, b"there"), (held.attributes().id, b"later")):
            source = await mounts.here.open(vdi)
            assert await copy(mounts.here, source, 0, target, 0, 1 << 30) == 2 * OBJECT_SIZE
            assert await read(target, 5, 5) == expected
            await source.close()
        await target.close()
        await held.close()

    async def test_copy_under_writes_has_old_or_new_blocks(self, mounts: Mounts) -> None:
        source = await make(mounts.here, "a.raw")
        blocks = 2 * OBJECT_SIZE // BLOCK
        await write(source, 0, (b"old!" * (BLOCK // 4)) * blocks)
        target = await make(mounts.here, "b.raw")
        written = 0

        async def overwrite() -> None:
            nonlocal written
            for block in range(0, blocks, 16):
                await write(source, block * BLOCK, b"new!" * (BLOCK // 4))
                written += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(overwrite)
            for at in (0, 1000):
                length = 2 * OBJECT_SIZE - at
                assert await copy(mounts.here, source, 0, target, at, length) == length
        assert written == blocks // 16
        data = await read(source, 0, 2 * OBJECT_SIZE)
        assert data.count(b"new!" * (BLOCK // 4)) == written
        # The last copy went to 1000 bytes further on.
        data = (await read(target, 0, 2 * OBJECT_SIZE))[1000:]
        for block in range(blocks - 1):
            assert data[block * BLOCK : (block + 1) * BLOCK] in (
                b"old!" * (BLOCK // 4),
                b"new!" * (BLOCK // 4),
            )
        await source.close()
        await target.close()

    async def test_copied_holes_replace_data(self, mounts: Mounts) -> None:
        source = await make(mounts.here, "a.raw", size=2 * OBJECT_SIZE)
        target = await make(mounts.here, "b.raw")
        await write(target, 0, b"x" * (2 * OBJECT_SIZE + 10))
        assert await copy(mounts.here, source, 0, target, 0, 2 * OBJECT_SIZE) == 2 * OBJECT_SIZE
        assert await read(target, 0, 3 * OBJECT_SIZE) == bytes(2 * OBJECT_SIZE) + b"x" * 10
        assert await copy(mounts.here, source, 100, target, 2 * OBJECT_SIZE + 5, 5) == 5
        assert await read(target, 2 * OBJECT_SIZE, 100) == b"x" * 5 + bytes(5)
        await source.close()
        await target.close()

    async def test_copy_at_or_beyond_the_end_of_the_source_does_nothing(
        self, mounts: Mounts
    ) -> None:
        source = await make(mounts.here, "a.raw", size=5000)
        target = await make(mounts.here, "b.raw", size=10)
        for start in (5000, 90_000):
            assert await mounts.here.copy_range(source, start, target, 0, 100) == 0
        assert target.size == 10
        assert await copy(mounts.here, source, 4990, target, 50, 100) == 10
        assert target.size == 60
        await source.close()
        await target.close()

    async def test_copy_that_cannot_be_is_refused(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=OBJECT_SIZE)
        made = await mounts.here.snapshot(volume.attributes().id, "daily")
        kept = await mounts.here.open(made.id)
        with pytest.raises(ReadOnlyError):
            await mounts.here.copy_range(volume, 0, kept, 0, 100)
        with pytest.raises(UsageError):
            await mounts.here.copy_range(volume, 0, volume, 99, 100)
        with pytest.raises(UsageError):
            await mounts.here.copy_range(volume, 0, volume, MAX_VDI_SIZE - 99, 100)
        other = await mounts.there.open(volume.attributes().id)
        theirs = await mounts.there.open(made.id)
        with pytest.raises(HeldElsewhereError):
            await mounts.there.copy_range(theirs, 0, other, 0, 100)
        for opened in (theirs, other, kept, volume):
            await opened.close()

    async def test_random_copies_agree_with_arrays(self, mounts: Mounts) -> None:
        chance = random.Random(11)
        volumes: list[OpenVolume] = []
        oracles: list[bytearray] = []
        for name in ("a.raw", "b.raw", "c.raw"):
            volumes.append(await make(mounts.here, name))
            oracles.append(bytearray())
        limit = 3 * OBJECT_SIZE

        def border() -> int:
            near = chance.choice((0, 0, 0, 1, -1, BLOCK, chance.randrange(-50_000, 50_000)))
            return max(0, chance.randrange(4) * OBJECT_SIZE + near)

        for step in range(60):
            number = chance.randrange(3)
            volume, oracle = volumes[number], oracles[number]
            action = chance.choice(("write", "copy", "copy", "copy", "punch", "resize"))
            if action == "write":
                offset, data = min(border(), limit), chance.randbytes(chance.randrange(1, 70_000))
                oracle.extend(bytes(max(0, offset - len(oracle))))
                oracle[offset : offset + len(data)] = data
                await write(volume, offset, data)
            elif action == "copy":
                origin = chance.randrange(3)
                start, stop = sorted((min(border(), limit), min(border(), limit)))
                at = chance.choice((start, start, min(border(), limit)))
                length = stop - start
                if not length or (origin == number and abs(start - at) < length):
                    continue
                piece = bytes(oracles[origin][start:stop])
                assert await copy(mounts.here, volumes[origin], start, volume, at, length) == len(
                    piece
                )
                if piece:
                    oracle.extend(bytes(max(0, at - len(oracle))))
                    oracle[at : at + len(piece)] = piece
            elif action == "punch":
                start, stop = sorted((border(), border()))
                stop = min(stop, len(oracle))
                if start < stop:
                    oracle[start:stop] = bytes(stop - start)
                    await volume.punch(start, stop - start)
            elif step % 2:
                size = border()
                oracles[number] = oracle = oracle[:size] + bytes(max(0, size - len(oracle)))
                await volume.resize(size)
            assert volume.size == len(oracle)
        for volume, oracle in zip(volumes, oracles, strict=True):
            # In pieces, so that a failure shows where.
            for offset in range(0, len(oracle), OBJECT_SIZE // 4):
                length = min(OBJECT_SIZE // 4, len(oracle) - offset)
                same = await read(volume, offset, length) == oracle[offset : offset + length]
                assert same, f"{volume.attributes().name} differs within {length} from {offset}"
            await volume.close()

    # -- user attributes and changes by others --------------------------------------------------

    async def test_user_attributes_are_kept(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        assert await mounts.here.get_user_attributes(vdi.id) == {}
        await mounts.here.set_user_attribute(vdi.id, "owner", "ann")
        await mounts.here.set_user_attribute(vdi.id, "bytes", "\udcff\0 ü")
        await mounts.here.set_user_attribute(vdi.id, "owner", "bob")
        expected = {"owner": "bob", "bytes": "\udcff\0 ü"}
        assert await mounts.here.get_user_attributes(vdi.id) == expected
        await mounts.here.rename("vm.raw", "new.raw", replace=False)
        await mounts.here.set_user_attribute(vdi.id, "bytes", None)
        await mounts.here.set_user_attribute(vdi.id, "bytes", None)
        assert await mounts.here.get_user_attributes(vdi.id) == {"owner": "bob"}
        made = await mounts.here.snapshot(vdi.id, "daily")
        await mounts.here.set_user_attribute(made.id, "why", "upgrade")
        assert (await mounts.here.get_user_attributes(made.id))["why"] == "upgrade"
        assert await mounts.here.get_user_attributes(vdi.id) == {"owner": "bob"}

    async def test_user_attributes_survive_an_attached_vdi(self, mounts: Mounts) -> None:
        volume = await make(mounts.here, size=BLOCK)
        vdi = volume.attributes().id
        await mounts.there.set_user_attribute(vdi, "owner", "ann")
        await write(volume, 0, b"x")
        await volume.close()
        assert await mounts.there.get_user_attributes(vdi) == {"owner": "ann"}

    async def test_too_many_user_attributes_are_refused(self, mounts: Mounts) -> None:
        vdi = await mounts.here.create("vm.raw", 0o644, 0, 0)
        await mounts.here.set_user_attribute(vdi.id, "a", "x" * 3000)
        for name, value in (("b", "x" * 3000), ("", "x"), ("n" * 201, "x")):
            with pytest.raises(UsageError):
                await mounts.here.set_user_attribute(vdi.id, name, value)
        with pytest.raises(VdiNotFoundError):
            await mounts.here.get_user_attributes(12345)
        with pytest.raises(VdiNotFoundError):
            await mounts.here.set_user_attribute(12345, "a", "x")
        assert list(await mounts.here.get_user_attributes(vdi.id)) == ["a"]

    async def test_size_changed_by_another_mount_is_told(self, mounts: Mounts) -> None:
        vdi = (await mounts.here.create("vm.raw", 0o644, 0, 0)).id
        reader = await mounts.here.open(vdi)
        told = trio.Event()
        sizes: list[int] = []

        def changed(found: int) -> None:
            if found == vdi:
                sizes.append(reader.attributes().size)
                if sizes[-1] == 5000:
                    told.set()

        mounts.here.on_change.append(changed)
        writer = await mounts.there.open(vdi)
        await writer.attach()
        await writer.resize(5000)
        await flush(writer)
        with trio.fail_after(WAIT_S):
            await told.wait()
        assert (await mounts.here.get(vdi)).size == reader.size == 5000
        mounts.here.on_change.remove(changed)
        await writer.close()
        await reader.close()
