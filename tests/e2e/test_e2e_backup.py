"""Backups of a VDI that changes, restored on another one: full, increments, damaged streams."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from e2e.cluster import Mounted, run
from sheepfs.core.geometry import OBJECT_SIZE

SIZE = 5 * OBJECT_SIZE + 4096


def change(path: Path, random: Random) -> None:
    """Write, punch and grow at random, and let the VDI go."""
    with path.open("r+b", buffering=0) as file:
        for _ in range(12):
            file.seek(random.randrange(SIZE - 70_000))
            file.write(random.randbytes(random.choice((1, 4096, 9_000, 65_536))))
        os.fsync(file.fileno())
    if random.random() < 0.5:
        offset = random.randrange(0, SIZE, OBJECT_SIZE)
        run("fallocate", "--punch-hole", "--offset", str(offset), "--length", "5000000", path)
    if random.random() < 0.3:
        os.truncate(path, os.path.getsize(path) + 8192)


@pytest.fixture
def chain(mounted: Mounted, tmp_path: Path, soak: bool) -> list[Path]:
    """A full backup of `source`, and increments; `source@t0` ... are the states."""
    random = Random(11)
    source = mounted.create("source", str(SIZE))
    files = []
    for i in range(11 if soak else 6):
        change(source, random)
        mounted.cluster.sheepctl("vdi", "snapshot", "source", "--tag", f"t{i}")
        file = tmp_path / f"backup{i}"
        since = ["--since", f"source@t{i - 1}"] if i else []
        mounted.cluster.sheepctl("vdi", "backup", f"source@t{i}", str(file), *since)
        files.append(file)
    return files


def test_a_chain_of_increments_restores_every_state_and_refuses_damage(
    mounted: Mounted, chain: list[Path], tmp_path: Path
) -> None:
    cluster = mounted.cluster
    random = Random(12)
    damaged = tmp_path / "damaged"
    target = mounted.path / "target.raw"
    for i, file in enumerate(chain):
        before = target.read_bytes() if i else b""
        whole = file.read_bytes()
        for _ in range(4):
            if random.random() < 0.5:
                damaged.write_bytes(whole[: random.randrange(len(whole))])
            else:
                at = random.randrange(len(whole))
                flipped = bytes([whole[at] ^ 1 << random.randrange(8)])
                damaged.write_bytes(whole[:at] + flipped + whole[at + 1 :])
            done = cluster.sheepctl("vdi", "restore", str(damaged), "target", check=False)
            assert done.returncode == 1, done
            assert str(damaged) in done.stderr
            if i:
                assert target.read_bytes() == before
            else:
                assert not target.exists()
        if i > 1:
            # An increment that does not follow on what is there.
            done = cluster.sheepctl("vdi", "restore", str(chain[i - 1]), "target", check=False)
            assert done.returncode != 0
            assert target.read_bytes() == before
        cluster.sheepctl("vdi", "restore", str(file), "target")
        assert target.read_bytes() == (mounted.path / f"source@t{i}.raw").read_bytes()
    for i in range(len(chain)):
        was = (mounted.path / f"source@t{i}.raw").read_bytes()
        assert (mounted.path / f"target@t{i}.raw").read_bytes() == was


def test_an_image_goes_in_and_out_unchanged(mounted: Mounted, tmp_path: Path) -> None:
    cluster = mounted.cluster
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        file.seek(OBJECT_SIZE - 700)
        file.write(Random(5).randbytes(100_000))
    run("qemu-img", "convert", "-O", "qcow2", raw, tmp_path / "disk.qcow2")
    cluster.sheepctl("vdi", "import", str(tmp_path / "disk.qcow2"), "imported")
    run("cmp", raw, mounted.path / "imported.raw")
    assert (mounted.path / "imported.raw").stat().st_blocks * 512 <= 120_000
    for name in ("out.raw", "out.qcow2", "out.vmdk"):
        cluster.sheepctl("vdi", "export", "imported", str(tmp_path / name))
        run("qemu-img", "compare", "-U", raw, tmp_path / name)
    cluster.sheepctl("vdi", "delete", "imported", "--now")
