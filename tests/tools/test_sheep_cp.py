"""sheep-cp on local files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sheepfs_tools import sheep_cp

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


def test_an_existing_target_is_kept_without_force(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = sparse.with_name("copy.raw")
    target.write_bytes(b"precious")
    assert run(monkeypatch, sparse, target) == 1
    assert "-f overwrites" in capsys.readouterr().err
    assert run(monkeypatch, "-n", sparse, target) == 0
    assert target.read_bytes() == b"precious"
    assert run(monkeypatch, "-f", sparse, target) == 0
    assert target.read_bytes() == sparse.read_bytes()


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

    monkeypatch.setattr(sheep_cp, "copy_ranges", fail)
    target = sparse.with_name("copy.raw")
    assert run(monkeypatch, sparse, target) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("source", ["missing", "."])
def test_what_cannot_be_copied_is_one_line_and_exit_1(
    tmp_path: Path,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path / source, tmp_path / "copy") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_reflink_always_says_that_this_version_has_none(
    sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = sparse.with_name("copy.raw")
    assert run(monkeypatch, "--reflink=always", sparse, target) == 1
    assert "no clones yet" in capsys.readouterr().err
    assert not target.exists()
