"""Import, export and comparison on a cluster in memory; other formats by the real qemu-img."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fakes.memory_access import MemoryAccess
from fakes.memory_backend import MemoryCluster, MemoryVolume, memory_namespace
from sheepfs.backend import Done
from sheepfs.core.errors import (
    HeldElsewhereError,
    NoSpaceError,
    SheepError,
    UsageError,
    VdiExistsError,
    VdiNotFoundError,
)
from sheepfs.layers.image import Change
from sheepfs.net.groups import plain_errors
from sheepfs_tools.transfer.access import incoming_name, parse_name, without_zeros
from sheepfs_tools.transfer.images import diff, export_image, import_image

MIB = 1 << 20
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")


@asynccontextmanager
async def cluster() -> AsyncIterator[MemoryAccess]:
    with plain_errors():
        async with memory_namespace(MemoryCluster(), asynchronous=True) as namespace:
            yield MemoryAccess(namespace)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """13 MiB and 1 KiB, data at 3 to 5 MiB and in the last KiB, and written zeros."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(bytes(MIB))
        file.seek(3 * MIB)
        file.write(os.urandom(2 * MIB))
        file.seek(13 * MIB)
        file.write(b"x" * 1024)
    return path


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=8), st.integers(0, 4095))
def test_what_is_left_out_of_a_chunk_is_zeros(runs: list[tuple[int, bool]], tail: int) -> None:
    data = b"".join((b"\0\0\0x" if full else bytes(4)) * 1024 * n for n, full in runs)
    data += b"y" * tail
    rebuilt = bytearray(len(data))
    for start, part in without_zeros(1000, data):
        assert part
        assert part[-4096:].strip(b"\0")
        rebuilt[start - 1000 : start - 1000 + len(part)] = part
    assert bytes(rebuilt) == data


def test_names_of_snapshots() -> None:
    for text in ("vm1@daily", "vm1@daily.raw", "vm1.raw@daily"):
        assert parse_name(text) == ("vm1.raw", "daily")
    assert parse_name("vm1") == ("vm1", "")
    assert len(incoming_name("é" * 60 + ".raw").encode()) <= 128


async def test_an_import_is_equal_and_stores_no_zeros(image_file: Path) -> None:
    async with cluster() as access:
        done = await import_image(access, str(image_file), "vm1", copies=2)
        assert access.contents("vm1") == image_file.read_bytes()
        assert access.names == ["vm1.raw"]
        assert (done.name, done.size, done.data) == (
            "vm1.raw",
            13 * MIB + 1024,
            2 * MIB + 1024,
        )
        assert (await access.find("vm1")).copies == 2
        assert (await access.find("vm1")).allocated == 2 * MIB + 4096


async def test_an_import_from_a_pipe_ends_where_the_pipe_does(
    image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image_file.read_bytes() + bytes(5 * MIB)
    async with cluster() as access:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
            assert cat.stdin is not None
            assert cat.stdout is not None
            monkeypatch.setattr("sys.stdin", cat.stdout)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _feed, cat.stdin, content)
                done = await import_image(access, "-", "vm1")
        assert done.size == len(content)
        assert access.contents("vm1") == content


def _feed(file: object, content: bytes) -> None:
    file.write(content)  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]


def failing_write(
    self: MemoryVolume, offset: int, data: bytes, done: Done
) -> None:  # pragma: no cover
    done(errno.ENOSPC)


def endless_write(self: MemoryVolume, offset: int, data: bytes, done: Done) -> None:
    pass


async def test_a_failed_import_leaves_nothing(
    image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryVolume, "write", failing_write)
    async with cluster() as access:
        with pytest.raises(NoSpaceError, match=r"vm1\.raw cannot be written"):
            await import_image(access, str(image_file), "vm1")
        assert access.names == []


async def test_an_interrupted_import_leaves_nothing(
    image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryVolume, "write", endless_write)
    async with cluster() as access:
        with trio.move_on_after(0.1) as scope:
            await import_image(access, str(image_file), "vm1")
        assert scope.cancelled_caught
        assert access.names == []


async def test_an_import_never_replaces_a_vdi_even_one_made_meanwhile(
    image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster() as access:
        await access.create("vm1.raw", MIB, 3)
        with pytest.raises(VdiExistsError):
            await import_image(access, str(image_file), "vm1")

        async def blind(name: str, tag: str = "") -> None:
            raise VdiNotFoundError(name)

        monkeypatch.setattr(access, "find", blind)
        with pytest.raises(VdiExistsError):
            await import_image(access, str(image_file), "vm1")
        assert access.names == ["vm1.raw"]
        assert access.vdi("vm1").size == MIB


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("a@b", {}, "reserved for snapshots"),
        ("vm1", {"copies": 9}, "9 copies"),
        ("vm1", {"image_format": "iso"}, "use one of raw, qcow2"),
    ],
)
async def test_what_cannot_be_imported_is_refused_before_it_begins(
    image_file: Path, name: str, options: dict[str, object], what: str
) -> None:
    async with cluster() as access:
        with pytest.raises(UsageError, match=what):
            await import_image(access, str(image_file), name, **options)  # type: ignore[arg-type]
        assert access.names == []


async def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    async with cluster() as access:
        with pytest.raises(SheepError, match="No such file"):
            await import_image(access, str(tmp_path / "none"), "vm1")
        with pytest.raises(UsageError, match="is a directory"):
            await import_image(access, str(tmp_path), "vm1")


async def test_a_raw_file_that_looks_like_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb" + bytes(MIB))
    async with cluster() as access:
        with pytest.raises(UsageError, match="looks like qcow2"):
            await import_image(access, str(path), "vm1")
        await import_image(access, str(path), "vm1", image_format="raw")
        assert access.contents("vm1") == path.read_bytes()


@needs_qemu_img
@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
async def test_other_formats_go_out_and_come_back(
    image_file: Path, tmp_path: Path, image_format: str
) -> None:
    target = tmp_path / f"a:b.{image_format}"
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        await export_image(access, "vm1", str(target))
        told = subprocess.check_output(["qemu-img", "info", "file:" + str(target)], text=True)
        assert f"file format: {image_format}" in told
        assert sorted(os.listdir(tmp_path)) == sorted([target.name, "disk.raw"])
        await import_image(access, str(target), "vm2")
        content = image_file.read_bytes()
        assert access.contents("vm2")[: len(content)] == content
        assert not any(access.contents("vm2")[len(content) :])


@needs_qemu_img
async def test_an_image_that_names_other_files_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    overlay = tmp_path / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw"]
    subprocess.run([*command, str(overlay)], check=True)
    async with cluster() as access:
        with pytest.raises(UsageError, match=f"takes data from another file, {secret}"):
            await import_image(access, str(overlay), "vm1")
        assert access.names == []


@needs_qemu_img
async def test_a_broken_image_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + b"\xff" * 500)
    async with cluster() as access:
        with pytest.raises(SheepError, match=r"qemu-img: .*broken.qcow2"):
            await import_image(access, str(broken), "vm1")


async def test_an_export_is_equal_and_sparse(image_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        await access.snapshot("vm1", "daily", {})
        access.vdi("vm1").put(0, b"later")
        done = await export_image(access, "vm1@daily", str(target))
        assert target.read_bytes() == image_file.read_bytes()
        assert target.stat().st_blocks * 512 <= 3 * MIB
        assert done.data == 2 * MIB + 1024
        with pytest.raises(UsageError, match="--force"):
            await export_image(access, "vm1", str(target))
        await export_image(access, "vm1", str(target), force=True)
        assert target.read_bytes()[:5] == b"later"
        assert sorted(os.listdir(tmp_path)) == ["disk.raw", "out.raw"]


async def test_an_export_to_standard_output_has_every_byte(
    image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        with (tmp_path / "out").open("wb") as file:
            monkeypatch.setattr("sys.stdout", file)
            await export_image(access, "vm1", "-")
        assert (tmp_path / "out").read_bytes() == image_file.read_bytes()


async def test_a_failed_export_leaves_what_was_there(
    image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.raw"
    target.write_bytes(b"precious")
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        await access.snapshot("vm1", "daily", {})
        image = await access.image(await access.find("vm1", "daily"))
        access.objects.objects = {
            oid: blocks for oid, blocks in access.objects.objects.items() if oid >> 63
        }
        with pytest.raises(SheepError, match="no data layer"):
            await image.read(3 * MIB, 1)
        with pytest.raises(SheepError, match="no data layer"):
            await export_image(access, "vm1@daily", str(target), force=True)
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["disk.raw", "out.raw"]


async def test_a_vdi_in_use_elsewhere_is_not_exported(image_file: Path, tmp_path: Path) -> None:
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        access.vdi("vm1").holder = object()
        with pytest.raises(HeldElsewhereError, match="make a snapshot and export that"):
            await export_image(access, "vm1", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


async def test_diff_tells_changed_ranges_and_totals(image_file: Path) -> None:
    async with cluster() as access:
        await import_image(access, str(image_file), "vm1")
        await access.snapshot("vm1", "a", {})
        access.vdi("vm1").put(8192, b"new")
        access.vdi("vm1").zero(3 * MIB, MIB)
        await access.snapshot("vm1", "b", {})
        found = await diff(access, "vm1@a", "vm1@b")
    assert found.changes == [Change(8192, 12288, True), Change(3 * MIB, 4 * MIB, False)]
    assert (found.data, found.zeros) == (4096, MIB)
    assert (found.older, found.newer) == ("vm1.raw@a", "vm1.raw@b")
