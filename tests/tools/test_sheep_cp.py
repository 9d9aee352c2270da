"""sheep-cp on local files."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepfs_tools import sheep_cp
from sheepfs_tools.transfer import file_copy

MIB = 1 << 20


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """20 MiB of which 2 MiB, at 9 MiB, are data, and the last byte."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.seek(9 * MIB)
        file.write(os.urandom(2 * MIB))
        file.truncate(20 * MIB + 1)
        file.seek(20 * MIB)
        file.write(b"x")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sheep-cp", *map(str, arguments)])
    return sheep_cp.main()


def test_a_copy_is_equal_and_as_sparse_as_its_source(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = sparse.with_name("copy.raw")
    assert run(monkeypatch, sparse, target) == 0
    assert target.read_bytes() == sparse.read_bytes()
    assert target.stat().st_blocks <= sparse.stat().st_blocks


def test_chunks_of_zeros_become_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "zeros"
    source.write_bytes(bytes(8 * MIB))
    target = tmp_path / "copy"
    assert run(monkeypatch, source, target) == 0
    assert target.stat().st_size == 8 * MIB
    assert target.stat().st_blocks == 0


def test_an_existing_target_is_overwritten_unless_told_otherwise(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = sparse.with_name("copy.raw")
    target.write_bytes(b"precious" * 4 * MIB)
    assert run(monkeypatch, "-n", sparse, target) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert run(monkeypatch, "-i", sparse, target) == 0
    assert f"overwrite '{target}'?" in capsys.readouterr().err
    os.utime(target, (2e9, 2e9))
    assert run(monkeypatch, "-u", sparse, target) == 0
    assert target.read_bytes() == b"precious" * 4 * MIB
    os.utime(target, (1e9, 1e9))
    assert run(monkeypatch, "-u", sparse, target) == 0
    assert target.read_bytes() == sparse.read_bytes()
    assert target.stat().st_blocks <= sparse.stat().st_blocks


def test_a_directory_as_target_takes_the_name_of_the_source(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    assert run(monkeypatch, sparse, tmp_path / "images") == 0
    assert (tmp_path / "images" / sparse.name).read_bytes() == sparse.read_bytes()


def test_a_file_is_never_copied_onto_itself(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sparse.read_bytes()
    assert run(monkeypatch, "-f", sparse, sparse) == 1
    assert "the same file" in capsys.readouterr().err
    assert sparse.read_bytes() == before


def test_a_failed_copy_leaves_no_target(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_copy, "copy_ranges", fail)
    target = sparse.with_name("copy.raw")
    assert run(monkeypatch, sparse, target) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not target.exists()


def test_a_failed_copy_leaves_an_existing_target_empty(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_copy, "copy_ranges", fail)
    target = sparse.with_name("copy.raw")
    target.write_bytes(b"old" * 1000)
    assert run(monkeypatch, sparse, target) == 1
    assert target.read_bytes() == b""


def test_a_signal_leaves_no_target(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):

        def interrupt(*_: object, number: signal.Signals = number) -> None:
            os.kill(os.getpid(), number)

        monkeypatch.setattr(file_copy, "copy_ranges", interrupt)
        target = sparse.with_name("copy.raw")
        assert run(monkeypatch, sparse, target) == 128 + number
        assert not target.exists()
        assert "interrupted" in capsys.readouterr().err


def test_several_sources_go_into_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_text("other")
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "-v", "a", "b", "d") == 0
    assert capsys.readouterr().out == "'a' -> 'd/a'\n'b' -> 'd/b'\n"
    assert (tmp_path / "d" / "b").read_text() == "b"
    # One that fails does not keep the others from being copied.
    assert run(monkeypatch, "-t", "d", "a", "s/a", "missing", "b") == 1
    assert capsys.readouterr().err == (
        "sheep-cp: will not overwrite just-created 'd/a' with 's/a'\n"
        "sheep-cp: cannot stat 'missing': No such file or directory\n"
    )


def _cp_version() -> str:
    told = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False).stdout
    return told.partition("\n")[0]


@pytest.mark.skipif(not _cp_version().endswith(" 9.1"), reason="other versions word it differently")
@pytest.mark.parametrize(
    "arguments",
    [
        (), ("a",), ("x", "y"), ("a", "b", "c"), ("a", "b", "x"), ("-t", "x", "a"),
        ("-t", "b", "a"), ("d", "e"), ("a", "a"), ("-T", "a", "d"), ("a", "nodir/x"),
        ("a", "nodir/"), ("-T", "a", "b", "x"), ("-t", "d", "-T", "a"),
        ("--reflink", "a", "/dev/shm/x"), ("--reflink", "a", "new"), ("-v", "it's", "g"),
        ("a", "b/"), ("a", "d/x/"),
        ("-nv", "a", "b"), ("--", "-x", "b"), ("-uv", "a", "b"), ("-n", "missing", "b"),
    ],
)  # fmt: skip
def test_messages_and_status_are_those_of_cp(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("a", "b", "it's"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d").mkdir()
    os.utime(tmp_path / "a", (1e9, 1e9))
    expected = subprocess.run(
        ["cp", *arguments], cwd=tmp_path, env={**os.environ, "LC_ALL": "C"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    for made in (tmp_path / "g", tmp_path / "new", Path("/dev/shm/x")):
        made.unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    try:
        code = run(monkeypatch, *arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    found = capsys.readouterr()
    said = (found.err.replace("sheep-cp:", "cp:").replace("'sheep-cp ", "'cp "), found.out, code)
    assert said == (expected.stderr, expected.stdout, expected.returncode)
    assert not (tmp_path / "new").exists()
    assert not Path("/dev/shm/x").exists()


def test_attributes_are_kept_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("x")
    source.chmod(0o640)
    os.utime(source, (1e9, 1e9))
    try:
        os.setxattr(source, "user.a", b"1")
    except OSError:
        pytest.skip("no user attributes here")
    assert run(monkeypatch, source, target) == 0
    assert (target.stat().st_mode & 0o777, target.stat().st_mtime > 1e9) == (0o640, True)
    assert os.listxattr(target) == []
    source.chmod(0o600)
    assert run(monkeypatch, "-p", source, target) == 0
    assert (target.stat().st_mode & 0o777, target.stat().st_mtime) == (0o600, 1e9)
    assert run(monkeypatch, "--preserve=xattr", source, target) == 0
    assert (os.listxattr(target), target.stat().st_mtime > 1e9) == (["user.a"], True)
    assert run(monkeypatch, "-a", source, target) == 0
    assert target.stat().st_mtime == 1e9


def test_a_locked_target_is_not_overwritten(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = sparse.with_name("copy.raw")
    target.write_bytes(b"disk")
    with target.open("r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert run(monkeypatch, sparse, target) == 1
        assert "in use" in capsys.readouterr().err
        assert target.read_bytes() == b"disk"
    assert run(monkeypatch, sparse, target) == 0


def test_force_removes_only_what_cannot_be_opened(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = sparse.with_name("copy.raw")
    target.write_bytes(b"disk")
    real, code = os.open, errno.EACCES

    def fail(path: str, flags: int, *mode: int) -> int:
        if path == str(target) and not flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", fail)
    assert run(monkeypatch, sparse, target) == 1
    code = errno.EROFS
    assert run(monkeypatch, "-f", sparse, target) == 1
    assert capsys.readouterr().err.count("cannot create regular file") == 2
    code = errno.EACCES
    assert run(monkeypatch, "-f", sparse, target) == 0
    monkeypatch.undo()
    assert target.stat().st_size == sparse.stat().st_size


@pytest.mark.parametrize("source", ["missing", "."])
def test_what_cannot_be_copied_is_one_line_and_exit_1(
    tmp_path: Path,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path / source, tmp_path / "copy") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_reflink_always_fails_where_data_cannot_be_shared(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path("/dev/shm/sheep-cp-source")  # another file system, which shares nothing
    source.write_bytes(b"x" * 10000)
    old = sparse.with_name("old.raw")
    old.write_bytes(b"old")
    for target in (sparse.with_name("copy.raw"), old):
        assert run(monkeypatch, "--reflink=always", source, target) == 1
        assert f"failed to clone '{target}' from '{source}'" in capsys.readouterr().err
    assert not sparse.with_name("copy.raw").exists()
    source.unlink()
    assert old.read_bytes() == b"old"
    assert run(monkeypatch, "--reflink=never", sparse, old) == 0
    assert old.read_bytes() == sparse.read_bytes()


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that has FICLONE."""
    if os.geteuid() or not shutil.which("mkfs.xfs"):
        pytest.skip("needs root and mkfs.xfs")
    image, path = tmp_path / "image", tmp_path / "xfs"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, path], check=False).returncode:
        pytest.skip("cannot mount XFS here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_files_are_cloned_where_the_file_system_has_ficlone(
    xfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (xfs / "a").write_bytes(os.urandom(50 * MIB + 77))
    (xfs / "longer").write_bytes(b"x" * 60 * MIB)
    free = shutil.disk_usage(xfs).free
    for target in ("b", "longer"):
        assert run(monkeypatch, "--reflink=always", xfs / "a", xfs / target) == 0
        assert (xfs / target).read_bytes() == (xfs / "a").read_bytes()
    assert shutil.disk_usage(xfs).free > free - 20 * MIB
