"""Measure recovery on a cluster of its own: what `tools/bench recovery` runs.

One of five nodes is killed and given up, twice: its share is copied to the others, first without
clients, for the speed, then beside fio, for what clients notice of it. All runs on this machine,
below one directory that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sheepfs_tools.bench import lay_out
from sheepfs_tools.local_cluster import LocalCluster
from sheepfs_tools.processes import StartError, wait_for
from sheepfs_tools.sizes import format_size, parse_size

PATIENCE_S = 3600.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Latency:
    """What fio saw of one kind of request, in milliseconds."""

    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Copied:
    """What one recovery moved, and how fast."""

    bytes: int
    seconds: float

    @property
    def mb_per_s(self) -> float:
        """Megabytes per second, all nodes together."""
        return self.bytes / 1e6 / self.seconds


class Bench:
    """A cluster with one VDI."""

    def __init__(self, directory: Path, nodes: int, size_bytes: int, iops: int) -> None:
        self.cluster = LocalCluster(directory / "data", nodes)
        self._mount = directory / "mnt"
        self._size = size_bytes
        self._iops = iops

    def prepare(self) -> None:
        """Start everything and fill the VDI."""
        self.cluster.start()
        self.cluster.mount(self._mount)
        self.cluster.sheepctl("vdi", "create", "bench", str(self._size), "--copies", "3")
        self._file = self._mount / "bench.raw"
        wait_for(self._file.exists, 10, "the VDI's file")
        lay_out(self._file, self._size)

    def lose(self, number: int) -> None:
        """Kill a node, for long enough to be noticed, not to be given up."""
        self.cluster.sheepctl("cluster", "recovery", "--out-after", "1h")
        self.cluster.nodes[number].kill()
        wait_for(lambda: self._state(number) == "down", 30, f"node {number} to be missed")

    def recover(self) -> Copied:
        """Give the lost node up, and wait until all copies are there again."""
        before, began = self._pulled(), 0.0
        self.cluster.sheepctl("cluster", "recovery", "--out-after", "1s")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            status = self._status()
            moved = self._pulled(status)
            if moved > before and not began:
                began, before = time.monotonic(), moved
            if began and all(p["whole"] == p["groups"] for p in status["pools"]):
                return Copied(moved - before, time.monotonic() - began)
            if time.monotonic() > deadline:
                raise StartError("recovery does not end")
            # Each look is a program of its own: often enough, and next to nothing of a processor.
            time.sleep(LOOK_EVERY_S)

    def load(self, seconds: float) -> subprocess.Popen[str]:
        """Start fio: 4 KiB random reads and writes, at a steady rate."""
        return subprocess.Popen(
            [
                *("fio", "--name=load", f"--filename={self._file}", f"--size={self._size}"),
                *("--ioengine=libaio", "--direct=1", "--rw=randrw", "--rwmixread=50"),
                *("--bs=4k", "--iodepth=4", "--time_based", f"--runtime={seconds}s"),
                *(f"--rate_iops={self._iops // 2},{self._iops // 2}", "--norandommap"),
                *("--randrepeat=0", "--output-format=json"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )

    def _status(self) -> dict[str, Any]:
        done = self.cluster.sheepctl("cluster", "status", "--json", check=False)
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def _state(self, number: int) -> str:
        port = f":{self.cluster.ports[f'node{number}']}"
        rows = self._status()["nodes"]
        return str(next(row["state"] for row in rows if row["address"].endswith(port)))

    def _pulled(self, status: dict[str, Any] | None = None) -> int:
        rows = (status or self._status())["nodes"]
        return sum(row["pulled_bytes"] or 0 for row in rows)


def latencies(fio: subprocess.Popen[str]) -> dict[str, Latency]:
    """Wait for fio and read what it saw."""
    output, _ = fio.communicate()
    job = json.loads(output[output.index("{") :])["jobs"][0]
    found = {}
    for side in ("read", "write"):
        times = job[side]["clat_ns"]
        found[side] = Latency(
            times["percentile"]["50.000000"] / 1e6,
            times["percentile"]["99.000000"] / 1e6,
            times["max"] / 1e6,
        )
    return found


def measure(bench: Bench, nodes: int, quiet_s: float, say: Any) -> dict[str, Any]:
    """Run it all."""
    say("filling the VDI")
    bench.prepare()
    say("a node is lost, no clients")
    bench.lose(nodes)
    idle = bench.recover()
    say(f"{idle.mb_per_s:,.0f} MB/s; now clients, without recovery")
    quiet = latencies(bench.load(quiet_s))
    say("another node is lost, with clients")
    bench.lose(nodes - 1)
    fio = bench.load(PATIENCE_S)
    try:
        beside = bench.recover()
        fio.send_signal(signal.SIGINT)
        during = latencies(fio)
    finally:
        fio.kill()
        fio.wait()
    return {
        "idle": {**asdict(idle), "mb_per_s": idle.mb_per_s},
        "beside_clients": {**asdict(beside), "mb_per_s": beside.mb_per_s},
        "quiet": {side: asdict(found) for side, found in quiet.items()},
        "during": {side: asdict(found) for side, found in during.items()},
    }


def table(results: dict[str, Any]) -> str:
    """Give the results as Markdown tables, ready for docs/performance.md."""
    lines = ["| recovery | moved | seconds | MB/s |", "| --- | --- | --- | --- |"]
    for key, title in (("idle", "without clients"), ("beside_clients", "beside clients")):
        row = results[key]
        size, rate = format_size(row["bytes"]), row["mb_per_s"]
        lines.append(f"| {title} | {size} | {row['seconds']:.1f} | {rate:,.0f} |")
    lines += ["", "| 4 KiB | quiet p50, p99, max ms | during recovery | p99 ratio |"]
    lines.append("| --- | --- | --- | --- |")
    for side in ("read", "write"):
        quiet, during = results["quiet"][side], results["during"][side]
        cells = [
            ", ".join(f"{found[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms"))
            for found in (quiet, during)
        ]
        ratio = during["p99_ms"] / quiet["p99_ms"]
        lines.append(f"| {side} | {cells[0]} | {cells[1]} | {ratio:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tools/bench recovery", description=__doc__)
    parser.add_argument("--size", default="1G", help="size of the VDI, of 3 copies (default 1G)")
    parser.add_argument("--nodes", type=int, default=5, help="storage daemons (default 5)")
    parser.add_argument("--iops", type=int, default=400, help="requests of fio per second (400)")
    parser.add_argument("--quiet", type=float, default=20, metavar="S", help="seconds without (20)")
    parser.add_argument("--directory", help="where the data goes (default: the temporary one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    try:
        size = parse_size(arguments.size)
    except ValueError as error:
        parser.error(str(error))
    if arguments.nodes < 5:
        parser.error("--nodes: two are lost and three must be left: use 5 or more")
    if not shutil.which("fio"):
        print("bench: fio is not installed: apt-get install fio", file=sys.stderr)
        return 1

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    directory = Path(tempfile.mkdtemp(prefix="sheepfs-recovery-", dir=arguments.directory))
    bench = Bench(directory, arguments.nodes, size, arguments.iops)
    try:
        results = measure(bench, arguments.nodes, arguments.quiet, say)
    except (StartError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        bench.cluster.destroy()
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(results, indent=1) if arguments.json else table(results))
    return 0
