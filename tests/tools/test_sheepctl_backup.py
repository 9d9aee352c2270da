"""Backup and restore on clusters in memory: full, increments, and everything that is refused."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fakes.memory_access import MemoryAccess
from fakes.memory_backend import MemoryCluster, MemoryVolume, memory_namespace
from sheepfs.backend import Done
from sheepfs.core.errors import (
    HeldElsewhereError,
    NoSpaceError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.net.groups import plain_errors
from sheepfs_tools.transfer import files as transfer_files
from sheepfs_tools.transfer.backup import backup
from sheepfs_tools.transfer.backup_stream import AlteredError, BackupError, TruncatedError
from sheepfs_tools.transfer.restore import ORIGIN, restore

MIB = 1 << 20


@asynccontextmanager
async def clusters() -> AsyncIterator[tuple[MemoryAccess, MemoryAccess]]:
    """One with a VDI vm1 of 12 MiB and snapshots a and b, and an empty one."""
    with plain_errors():
        async with (
            memory_namespace(MemoryCluster(), asynchronous=True) as one,
            memory_namespace(MemoryCluster(), asynchronous=True) as two,
        ):
            two.cluster.next_id = 100
            source = MemoryAccess(one, "c0ffee")
            await source.create("vm1.raw", 12 * MIB + 512, 2)
            source.vdi("vm1").put(3 * MIB, os.urandom(2 * MIB))
            source.vdi("vm1").put(12 * MIB, b"x" * 512)
            await source.snapshot("vm1.raw", "a", {})
            source.vdi("vm1").put(8 * MIB, os.urandom(8192))
            source.vdi("vm1").zero(3 * MIB, MIB)
            source.vdi("vm1").size = 14 * MIB
            await source.snapshot("vm1.raw", "b", {})
            yield source, MemoryAccess(two, "beef")


async def snapshot_contents(access: MemoryAccess, name: str, tag: str) -> bytes:
    image = await access.image(await access.find(name, tag))
    return await image.read(0, image.size)


async def write_both(source: MemoryAccess, folder: Path) -> tuple[str, str]:
    full, increment = str(folder / "full"), str(folder / "increment")
    await backup(source, "vm1@a", full)
    await backup(source, "vm1@b", increment, since="vm1@a")
    return full, increment


@pytest.mark.parametrize("compress", [False, True])
async def test_a_full_backup_makes_an_equal_vdi_with_its_snapshot(
    tmp_path: Path, compress: bool
) -> None:
    file = str(tmp_path / "full")
    async with clusters() as (source, target):
        done = await backup(source, "vm1@a", file, compress=compress)
        assert done.data == 2 * MIB + 512
        assert done.length == os.path.getsize(file)
        restored = await restore(target, file, "copy")
        assert (restored.name, restored.tag, restored.size) == ("copy.raw", "a", 12 * MIB + 512)
        wanted = await snapshot_contents(source, "vm1", "a")
        assert target.contents("copy") == wanted
        assert await snapshot_contents(target, "copy", "a") == wanted
        assert target.names == ["copy.raw"]
        assert (await target.find("copy")).copies == 2
        origin = (await target.find("copy", "a")).attributes[ORIGIN]
        assert origin.startswith("c0ffee/")
        assert os.listdir(tmp_path) == ["full"]


async def test_an_increment_has_only_what_changed_and_brings_the_vdi_there(tmp_path: Path) -> None:
    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        await restore(target, full, "copy")
        done = await restore(target, increment, "copy")
        assert (done.since, done.tag, done.data, done.zeros) == ("a", "b", 8192, MIB)
        assert target.contents("copy") == source.contents("vm1")
        assert await snapshot_contents(target, "copy", "b") == source.contents("vm1")
        source.vdi("vm1").size = 9 * MIB
        source.vdi("vm1").zero(9 * MIB, 5 * MIB)
        await source.snapshot("vm1.raw", "c", {})
        await backup(source, "vm1@c", str(tmp_path / "third"), since="vm1@b")
        await restore(target, str(tmp_path / "third"), "copy")
        assert target.contents("copy") == source.contents("vm1")


async def test_an_increment_fits_on_the_original_too(tmp_path: Path) -> None:
    async with clusters() as (source, _):
        _, increment = await write_both(source, tmp_path)
        wanted = source.contents("vm1")
        await source.rollback("vm1.raw", "a")
        source._snapshots[source.vdi("vm1").attributes.id].pop("b")
        await restore(source, increment, "vm1")
        assert source.contents("vm1") == wanted


async def test_an_increment_is_refused_where_its_base_is_not(tmp_path: Path) -> None:
    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        with pytest.raises(VdiNotFoundError):
            await restore(target, increment, "copy")
        await target.create("other.raw", 12 * MIB + 512, 3)
        await target.snapshot("other.raw", "a", {})
        with pytest.raises(UsageError, match=r"has no snapshot that is vm1\.raw@a"):
            await restore(target, increment, "other")
        await restore(target, full, "copy")
        with pytest.raises(UsageError, match="--copies"):
            await restore(target, increment, "copy", copies=1)
        with pytest.raises(UsageError, match="is a snapshot"):
            await restore(target, increment, "copy@a")
        await restore(target, increment, "copy")
        with pytest.raises(UsageError, match="has a snapshot 'b' already"):
            await restore(target, increment, "copy")


@pytest.mark.parametrize("change", ["write", "size"])
async def test_an_increment_is_refused_on_a_vdi_that_was_written_to(
    tmp_path: Path, change: str
) -> None:
    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        await restore(target, full, "copy")
        if change == "write":
            target.vdi("copy").put(10 * MIB, b"work")
        else:
            target.vdi("copy").size += MIB
        before = target.contents("copy")
        with pytest.raises(UsageError, match=r"vdi rollback copy\.raw@a"):
            await restore(target, increment, "copy")
        assert target.contents("copy") == before
        assert target.vdi("copy").holder is None


async def test_an_increment_is_refused_while_the_vdi_is_in_use(tmp_path: Path) -> None:
    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        await restore(target, full, "copy")
        target.vdi("copy").holder = object()
        with pytest.raises(HeldElsewhereError):
            await restore(target, increment, "copy")


@pytest.mark.parametrize("damage", ["cut", "flip", "more", "other"])
async def test_a_damaged_backup_touches_nothing(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("written")

    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        await restore(target, full, "copy")
        wanted: type[BackupError] = AlteredError
        for file in (full, increment):
            content = bytearray(Path(file).read_bytes())
            if damage == "cut":
                del content[-1]
                wanted = TruncatedError
            elif damage == "flip":
                content[-200] ^= 1
            elif damage == "more":
                content += b"\0"
            else:
                content = bytearray(b"x" * 1000)
                wanted = BackupError
            Path(file).write_bytes(content)
        before = target.contents("copy")
        monkeypatch.setattr(MemoryVolume, "write", never)
        monkeypatch.setattr(MemoryVolume, "punch", never)
        monkeypatch.setattr(target, "create", never)
        with pytest.raises(wanted, match="full: "):
            await restore(target, full, "second")
        with pytest.raises(wanted, match="increment: "):
            await restore(target, increment, "copy")
        assert target.names == ["copy.raw"]
        assert target.contents("copy") == before


def failing_write(self: MemoryVolume, offset: int, data: bytes, done: Done) -> None:
    self.vdi.put(offset, b"half")
    done(errno.ENOSPC)


def endless_write(self: MemoryVolume, offset: int, data: bytes, done: Done) -> None:
    self.vdi.put(offset, b"half")


async def test_a_full_restore_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clusters() as (source, target):
        full, _ = await write_both(source, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryVolume, "write", failing_write)
            with pytest.raises(NoSpaceError):
                await restore(target, full, "copy")
        assert target.names == []

        await target.create("copy.raw", MIB, 3)
        with pytest.raises(VdiExistsError):
            await restore(target, full, "copy")
        monkeypatch.setattr(MemoryAccess, "rename", _taken)
        with pytest.raises(VdiExistsError):
            await restore(target, full, "second")
        assert target.names == ["copy.raw"]
        assert not any(target._snapshots.values())


async def _taken(self: MemoryAccess, old: str, new: str) -> None:
    raise VdiExistsError(new)


@pytest.mark.parametrize("how", ["error", "cancelled"])
async def test_an_increment_that_fails_leaves_the_vdi_as_its_base(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clusters() as (source, target):
        full, increment = await write_both(source, tmp_path)
        await restore(target, full, "copy")
        before = target.contents("copy")
        if how == "error":
            monkeypatch.setattr(MemoryVolume, "write", failing_write)
            with pytest.raises(NoSpaceError):
                await restore(target, increment, "copy")
        else:
            monkeypatch.setattr(MemoryVolume, "write", endless_write)
            with trio.move_on_after(0.2) as scope:
                await restore(target, increment, "copy")
            assert scope.cancelled_caught
        assert target.contents("copy") == before
        with pytest.raises(VdiNotFoundError):
            await target.find("copy", "b")


async def test_a_pipe_is_kept_until_it_is_proven_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with clusters() as (source, target):
        full, _ = await write_both(source, tmp_path)
        for command, problem in (("cat", None), ("head -c 1000000", TruncatedError)):
            with subprocess.Popen(
                [*command.split(), full], stdout=subprocess.PIPE, text=False
            ) as process:
                monkeypatch.setattr("sys.stdin", process.stdout)
                if problem:
                    with pytest.raises(problem):
                        await restore(target, "-", "second")
                else:
                    await restore(target, "-", "copy")
            assert str(tmp_path) in capsys.readouterr().err
        assert target.contents("copy") == await snapshot_contents(source, "vm1", "a")
        assert target.names == ["copy.raw"]
        assert sorted(os.listdir(tmp_path)) == ["full", "increment"]


async def test_a_pipe_does_not_fill_the_disk_it_is_kept_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_files, "_SPOOL_RESERVE", 1 << 62)
    async with clusters() as (source, target):
        full, _ = await write_both(source, tmp_path)
        with subprocess.Popen(["cat", full], stdout=subprocess.PIPE) as cat:
            monkeypatch.setattr("sys.stdin", cat.stdout)
            with pytest.raises(Exception, match="set TMPDIR"):
                await restore(target, "-", "copy")
        assert target.names == []


async def test_a_backup_to_standard_output_is_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clusters() as (source, _):
        full, _ = await write_both(source, tmp_path)
        with (tmp_path / "out").open("wb") as file:
            monkeypatch.setattr("sys.stdout", file)
            await backup(source, "vm1@a", "-")
        assert (tmp_path / "out").read_bytes() == Path(full).read_bytes()


async def test_what_cannot_be_backed_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    async with clusters() as (source, _):
        with pytest.raises(UsageError, match="give NAME@TAG"):
            await backup(source, "vm1", str(file))
        with pytest.raises(VdiNotFoundError):
            await backup(source, "vm1@none", str(file))
        with pytest.raises(UsageError, match="no other snapshot"):
            await backup(source, "vm1@a", str(file), since="vm1@a")
        file.write_bytes(b"precious")
        with pytest.raises(UsageError, match="--force"):
            await backup(source, "vm1@a", str(file))

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr("sys.stdout", Terminal())
        with pytest.raises(UsageError, match="terminal"):
            await backup(source, "vm1@a", "-")
    assert file.read_bytes() == b"precious"
    assert ORIGIN == "sheepfs.origin"
