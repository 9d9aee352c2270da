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
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from sheepfs_tools.benchmarks.bench import lay_out
from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import StartError, wait_for
from sheepfs_tools.sizes import format_size, parse_size

PATIENCE_S = 3600.0
LOOK_EVERY_S = 0.5
NO_ANSWER_S = 30.0
RAMP_S = 2
COPIES = 3
SPARE_BYTES = 2 << 30
"""The nodes' reserve, and what is not data."""


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


class Observer:
    """One program that shows the cluster's status again and again, from before the first figure.

    A program for each look kept one of two processors half busy, and made most of what it measured.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self._process = cluster.start_sheepctl(
            "cluster", "status", "--json", "--watch", str(LOOK_EVERY_S)
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def next(self) -> dict[str, Any]:
        """Wait for the next look."""
        try:
            line = self._lines.get(timeout=NO_ANSWER_S)
        except Empty:
            raise StartError(f"no status of the cluster within {NO_ANSWER_S:g} s") from None
        if not line:
            raise StartError("the program that shows the cluster's status has ended")
        status: dict[str, Any] = json.loads(line)
        return status

    def skip(self) -> dict[str, Any]:
        """Let go of what has not been read, and wait for a look that begins after this."""
        for _ in range(self._lines.qsize() + 1):
            self.next()
        return self.next()

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._reader.join()
        self._process.communicate()


class Bench:
    """A cluster with one VDI."""

    observer: Observer

    def __init__(self, directory: Path, nodes: int, size_bytes: int, iops: int) -> None:
        self.cluster = LocalCluster(directory / "data", nodes)
        self._mount = directory / "mnt"
        self._size = size_bytes
        self._iops = iops

    def prepare(self) -> None:
        """Start everything and fill the VDI."""
        self.cluster.start()
        self.cluster.mount(self._mount)
        self.cluster.sheepctl("vdi", "create", "bench", str(self._size), "--copies", str(COPIES))
        self._file = self._mount / "bench.raw"
        wait_for(self._file.exists, 10, "the VDI's file")
        lay_out(self._file, self._size)
        self.observer = Observer(self.cluster)

    def lose(self, number: int) -> None:
        """Kill a node, for long enough to be noticed, not to be given up."""
        self.cluster.sheepctl("cluster", "recovery", "--out-after", "1h")
        self.cluster.nodes[number].kill()
        self._lost = time.monotonic()
        wait_for(lambda: self._state(number) == "down", 30, f"node {number} to be missed")

    def give_up(self, in_s: float) -> None:
        """Let the lost node's share be copied, so many seconds from now."""
        self._before = _pulled(self.observer.skip())
        out_after_s = time.monotonic() - self._lost + in_s
        self.cluster.sheepctl("cluster", "recovery", "--out-after", f"{out_after_s:.0f}s")

    def recovered(self) -> Copied:
        """Wait until all copies are there again; timed from the last look that saw nothing move."""
        began = time.monotonic()
        deadline = began + PATIENCE_S
        while True:
            status, now = self.observer.next(), time.monotonic()
            moved = _pulled(status) - self._before
            if not moved:
                began = now
            elif all(p["whole"] == p["groups"] for p in status["pools"]):
                return Copied(moved, now - began)
            if now > deadline:
                raise StartError("recovery does not end")

    def load(self, seconds: float) -> subprocess.Popen[str]:
        """Start fio: 4 KiB random reads and writes, at a steady rate; the first do not count."""
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

    def _state(self, number: int) -> str:
        port = f":{self.cluster.ports[f'node{number}']}"
        rows = self.observer.skip()["nodes"]
        return str(next(row["state"] for row in rows if row["address"].endswith(port)))

    def close(self) -> None:
        """End everything."""
        if hasattr(self, "observer"):
            self.observer.close()
        self.cluster.destroy()


def _pulled(status: dict[str, Any]) -> int:
    return sum(row["pulled_bytes"] or 0 for row in status["nodes"])


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
    """Run it all; without the part beside clients if `quiet_s` is 0."""
    say("filling the VDI")
    bench.prepare()
    say("a node is lost, no clients")
    bench.lose(nodes)
    bench.give_up(1)
    idle = bench.recovered()
    results: dict[str, Any] = {"idle": {**asdict(idle), "mb_per_s": idle.mb_per_s}}
    if not quiet_s:
        return results
    say(f"{idle.mb_per_s:,.0f} MB/s; now clients, without recovery")
    quiet = latencies(bench.load(quiet_s))
    say("another node is lost, with clients")
    bench.lose(nodes - 1)
    bench.give_up(RAMP_S + 1)
    fio = bench.load(PATIENCE_S)
    try:
        beside = bench.recovered()
        fio.send_signal(signal.SIGINT)
        during = latencies(fio)
    finally:
        fio.kill()
        fio.wait()
    return {
        **results,
        "beside_clients": {**asdict(beside), "mb_per_s": beside.mb_per_s},
        "quiet": {side: asdict(found) for side, found in quiet.items()},
        "during": {side: asdict(found) for side, found in during.items()},
    }


def table(results: dict[str, Any]) -> str:
    """Give the results as Markdown tables, ready for docs/performance.md."""
    lines = ["| recovery | moved | seconds | MB/s |", "| --- | --- | --- | --- |"]
    for key, title in (("idle", "without clients"), ("beside_clients", "beside clients")):
        if row := results.get(key):
            size, rate = format_size(row["bytes"]), row["mb_per_s"]
            lines.append(f"| {title} | {size} | {row['seconds']:.1f} | {rate:,.0f} |")
    if "quiet" not in results:
        return "\n".join(lines)
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


def space_needed(size: int, nodes: int, losses: int) -> int:
    """Bytes that all nodes together take on one disk; with less, recovery stops at the reserve."""
    return COPIES * size + COPIES * size * losses // nodes + SPARE_BYTES


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tools/bench recovery", description=__doc__)
    parser.add_argument("--size", default="1G", help="size of the VDI, of 3 copies (default 1G)")
    parser.add_argument("--nodes", type=int, default=5, help="storage daemons (default 5)")
    parser.add_argument("--iops", type=int, default=400, help="requests of fio per second (400)")
    parser.add_argument("--quiet", type=float, default=20, metavar="S", help="seconds without (20)")
    parser.add_argument("--idle", action="store_true", help="only the speed without clients")
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

    place = Path(arguments.directory or tempfile.gettempdir())
    if not place.is_dir():
        parser.error(f"{place} is no directory")
    needed = space_needed(size, arguments.nodes, losses=1 if arguments.idle else 2)
    if (free := shutil.disk_usage(place).free) < needed:
        parser.error(
            f"{place} has {format_size(free)} free, and {format_size(needed)} are needed:"
            " give --directory on a larger disk, or a smaller --size"
        )
    directory = Path(tempfile.mkdtemp(prefix="sheepfs-recovery-", dir=place))
    bench = Bench(directory, arguments.nodes, size, arguments.iops)
    try:
        results = measure(bench, arguments.nodes, 0 if arguments.idle else arguments.quiet, say)
    except (StartError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        bench.close()
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(results, indent=1) if arguments.json else table(results))
    return 0
