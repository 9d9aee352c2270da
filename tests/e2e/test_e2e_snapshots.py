"""Snapshots and clones of VDIs in use: what they hold, what they cost, what the writer notices."""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio

from e2e.cluster import Mounted, run, seconds
from sheepfs.connecting import connect
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs_tools.local.processes import wait_for

BLOCK = 4096
STALL_ALLOWED_S = 0.1
STAMP = struct.Struct("<QQ")
"""Number of the write, number of the block."""


class StampedWriter:
    """Writes numbered blocks one after the other, with O_DIRECT and now and then an fsync."""

    def __init__(self, path: Path, blocks: int, seed: int) -> None:
        self.log: list[int] = []
        """Block of each write, in order; entry i is write number i + 1."""
        self.completed = 0
        self.longest_s = 0.0
        self.problem: BaseException | None = None
        self._path = path
        self._blocks = blocks
        self._random = Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> StampedWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with mmap.mmap(-1, BLOCK) as buffer:
                fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
                try:
                    while not self._stop.is_set():
                        self._write(fd, buffer)
                finally:
                    os.close(fd)
        except BaseException as error:
            self.problem = error

    def _write(self, fd: int, buffer: mmap.mmap) -> None:
        block = self._random.randrange(self._blocks)
        self.log.append(block)
        number = len(self.log)
        buffer[:] = STAMP.pack(number, block) * (BLOCK // STAMP.size)
        start = time.monotonic()
        assert os.pwrite(fd, buffer, block * BLOCK) == BLOCK
        self.longest_s = max(self.longest_s, time.monotonic() - start)
        self.completed = number
        if number % 50 == 0:
            os.fsync(fd)


def assert_is_a_prefix(content: bytes, log: list[int], at_least: int, at_most: int) -> None:
    """Check that a disk holds exactly the writes 1..n, for some n between the two."""
    found: dict[int, int] = {}
    for block in range(len(content) // BLOCK):
        piece = content[block * BLOCK : (block + 1) * BLOCK]
        number, place = STAMP.unpack_from(piece)
        assert piece == STAMP.pack(number, place) * (BLOCK // STAMP.size), f"block {block} is torn"
        if number:
            assert place == block
            found[block] = number
    last = max(found.values(), default=0)
    assert at_least <= last <= at_most
    expected = {block: number for number, block in enumerate(log[:last], 1)}
    assert found == expected, f"it is no state between writes (newest write: {last})"


async def test_a_snapshot_under_load_is_a_state_between_two_writes(
    mounted: Mounted, soak: bool
) -> None:
    blocks = 3 * OBJECT_SIZE // BLOCK
    path = mounted.create("stamped", str(3 * OBJECT_SIZE))
    cluster = mounted.cluster
    count = 100 if soak else 12
    bounds: list[tuple[str, int, int]] = []
    async with connect(cluster.etcd_address, cluster.cluster, "snapshots") as here:
        with StampedWriter(path, blocks, seed=1) as writer:
            vdi = (await here.lookup("stamped.raw")).id
            for i in range(count):
                await trio.sleep(0.05)
                before = writer.completed
                made = await here.snapshot(vdi, f"t{i}")
                bounds.append((made.name, before, len(writer.log)))
        assert writer.problem is None
    for name, before, after in bounds:
        assert_is_a_prefix((mounted.path / name).read_bytes(), writer.log, before, after)


def fio(path: Path, runtime_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *("fio", "--name=load", f"--filename={path}", "--size=128M", "--direct=1"),
            *("--ioengine=libaio", "--iodepth=8", "--rw=randwrite", "--bs=4k", "--fsync=64"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1"),
            *("--verify_backlog=4096", "--time_based", f"--runtime={runtime_s:g}s"),
            *("--rate_iops=600", "--output-format=json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worst_of(process: subprocess.Popen[str]) -> float:
    """Give the longest request of an fio run in seconds, after checking that none failed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    job = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return max(float(job[side]["clat_ns"]["max"]) for side in ("read", "write")) / 1e9


async def test_snapshots_under_fio_cause_no_error_and_no_long_stall(
    mounted: Mounted, soak: bool
) -> None:
    path = mounted.create("fio", "128M")
    run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=128", "conv=fsync,notrunc")
    count, runtime_s = (100, 40.0) if soak else (10, 8.0)
    baseline_s = worst_of(fio(path, runtime_s))
    cluster = mounted.cluster
    async with connect(cluster.etcd_address, cluster.cluster, "snapshots") as here:
        load = fio(path, runtime_s)
        vdi = (await here.lookup("fio.raw")).id
        await trio.sleep(1)
        for i in range(count):
            await here.snapshot(vdi, f"f{i}")
            await trio.sleep((runtime_s - 3) / count / 2)
        assert load.poll() is None, "fio was done before the last snapshot"
        worst_s = await trio.to_thread.run_sync(worst_of, load)
    print(f"longest request: {baseline_s:.3f} s alone, {worst_s:.3f} s with {count} snapshots")
    if soak:
        assert worst_s < baseline_s + STALL_ALLOWED_S
    mounted.assert_replicas_agree("fio")


@pytest.fixture
def full_disk(mounted: Mounted, soak: bool) -> Iterator[tuple[str, Path]]:
    """A VDI that is written from end to end; one copy, so that the test's disk can hold it."""
    size = 20 << 30 if soak else 256 << 20
    path = mounted.create("full", str(size), copies=1)
    run("dd", "if=/dev/zero", "bs=1M", "count=1", f"of={path}", "conv=notrunc")
    chunk = Random(3).randbytes(4 << 20)
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in range(0, size, len(chunk)):
            os.pwrite(fd, chunk, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    yield "full", path
    mounted.cluster.sheepctl("snapshot", "delete", "full@now", "--now", check=False)
    mounted.cluster.sheepctl("vdi", "delete", "full-clone", "full", "--now", check=False)


def test_cp_and_sheep_cp_of_a_full_disk_share_its_data(mounted: Mounted, soak: bool) -> None:
    size = 4 << 30 if soak else 128 << 20
    base = mounted.create("base", str(size), copies=1 if soak else 3)
    chunk = Random(4).randbytes(4 << 20)
    with base.open("r+b", buffering=0) as file:
        for _ in range(size // len(chunk)):
            file.write(chunk)
        os.fsync(file.fileno())
    wait_for(lambda: base.stat().st_blocks * 512 == size, 30, "du to tell the truth")
    before = used(mounted)
    sheep_cp = Path(sys.executable).with_name("sheep-cp")
    copies = {
        "cp": mounted.path / "vm2.raw",
        "sheep-cp": mounted.path / "vm3.raw",
    }
    took = {
        "cp": seconds(lambda: run("cp", base, copies["cp"])),
        "sheep-cp": seconds(lambda: run(sheep_cp, "--reflink=always", base, copies["sheep-cp"])),
    }
    taken = used(mounted) - before
    print(f"{size >> 20} MiB: {took}, {taken} bytes taken by both")
    for path in copies.values():
        run("cmp", base, path, timeout_s=600)
    assert all(took_s < 1 for took_s in took.values())
    assert taken < 5_000_000
    with copies["cp"].open("r+b", buffering=0) as file:
        file.write(b"changed")
    with base.open("rb") as file:
        assert file.read(7) == chunk[:7]


def used(mounted: Mounted) -> int:
    return sum(int(node["used"]) for node in mounted.status()["nodes"])


def test_a_snapshot_and_a_clone_of_a_full_disk_are_instant_and_take_no_space(
    mounted: Mounted, full_disk: tuple[str, Path]
) -> None:
    name, _ = full_disk
    before = used(mounted)
    snapshot_s = seconds(lambda: mounted.cluster.sheepctl("vdi", "snapshot", name, "--tag", "now"))
    clone_s = seconds(lambda: mounted.cluster.sheepctl("vdi", "clone", f"{name}@now", "full-clone"))
    taken = used(mounted) - before
    print(f"snapshot {snapshot_s:.2f} s, clone {clone_s:.2f} s, {taken} bytes taken by both")
    assert taken < 5_000_000
    assert snapshot_s < 0.5
    assert clone_s < 0.5


async def test_a_thousand_snapshots_cost_as_little_each_as_ten(
    mounted: Mounted, soak: bool
) -> None:
    count, size = (1_000, 16 * OBJECT_SIZE) if soak else (60, 4 * OBJECT_SIZE)
    cluster = mounted.cluster
    path = mounted.create("chain", str(size))
    fresh = mounted.create("fresh", str(size))
    content = Random(6).randbytes(size)
    for target in (path, fresh):
        with target.open("r+b", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
    took: list[float] = []
    with path.open("r+b", buffering=0) as file:
        async with connect(cluster.etcd_address, cluster.cluster, "chain") as here:
            vdi = (await here.lookup("chain.raw")).id
            for i in range(count):
                # One block of the last object changes: the others stay as old as they are.
                os.pwrite(file.fileno(), STAMP.pack(i, 0) * 256, size - BLOCK)
                start = time.monotonic()
                await here.snapshot(vdi, f"n{i}")
                took.append(time.monotonic() - start)
    early, late = (sorted(part)[len(part) // 2] for part in (took[5:15], took[-10:]))
    oldest = mounted.path / "chain@n0.raw"

    def read(target: Path) -> float:
        return seconds(lambda: run("dd", f"if={target}", "of=/dev/null", "bs=1M", "iflag=direct"))

    # What the snapshots left to be written would be measured, too.
    os.sync()
    # The one, the other, and the other way round; of noise on both sides the quickest is free.
    pairs = [(read(path), read(fresh)) if i % 2 else (read(fresh), read(path)) for i in range(40)]
    behind = sorted(pair[1 - i % 2] for i, pair in enumerate(pairs))
    without = sorted(pair[i % 2] for i, pair in enumerate(pairs))
    ratio = sum(behind[:20]) / sum(without[:20])
    print(
        f"{count} snapshots: the 10th {early * 1000:.0f} ms, the last {late * 1000:.0f} ms;"
        f" reading behind the chain takes {ratio:.2f} times as long"
    )
    assert oldest.read_bytes()[: size - BLOCK] == content[: size - BLOCK]
    assert late < 2 * early
    if soak:
        assert ratio < 1.1
    opened = min(seconds(lambda: os.close(os.open(path, os.O_RDONLY))) for _ in range(5))
    assert opened < 0.1
