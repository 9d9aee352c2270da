"""Measure a file with fio (direct I/O, libaio) and print one table: what `tools/bench` runs.

Works on any file: one in the mount, a local one, a block device. The file is overwritten.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepfs_tools.sizes import parse_size

MIB = 1 << 20
EPILOG = "`tools/bench recovery` measures recovery, on a cluster of its own: see its --help."


@dataclass(frozen=True, slots=True)
class Job:
    """One row: fio's options, and whether its figure is MB/s or operations/s."""

    title: str
    options: tuple[str, ...]
    unit: str = "IOPS"


def _job(title: str, rw: str, block: str, depth: int, *more: str, unit: str = "IOPS") -> Job:
    return Job(title, (f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", *more), unit)


JOBS = (
    _job("1 MiB write, depth 4", "write", "1M", 4, unit="MB/s"),
    _job("1 MiB read, depth 4", "read", "1M", 4, unit="MB/s"),
    _job("4 KiB random read, depth 1", "randread", "4k", 1),
    _job("4 KiB random read, depth 32", "randread", "4k", 32),
    _job("4 KiB random write, depth 1", "randwrite", "4k", 1),
    _job("4 KiB random write, depth 32", "randwrite", "4k", 32),
    _job("4 KiB random write, depth 1, fsync after each", "randwrite", "4k", 1, "--fsync=1"),
    _job("4 KiB 70/30, depth 16", "randrw", "4k", 16, "--rwmixread=70"),
    _job("64 KiB random write, depth 8", "randwrite", "64k", 8),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one job gave. `value` is in `unit`; latencies in milliseconds."""

    job: str
    value: float
    unit: str
    mean_ms: float
    p99_ms: float
    max_ms: float


def command(job: Job, path: Path, size_bytes: int, runtime_s: float) -> list[str]:
    """Give fio's command line for a job."""
    return [
        *("fio", "--name=bench", f"--filename={path}", f"--size={size_bytes}"),
        *("--ioengine=libaio", "--direct=1", "--time_based", f"--runtime={runtime_s}s"),
        *("--randrepeat=0", "--norandommap", "--allow_mounted_write=0", "--output-format=json"),
        *job.options,
    ]


def evaluate(job: Job, output: str) -> Result:
    """Read fio's JSON: sum of the reads and writes; the worse one's latencies."""
    # fio may print notes before the JSON object.
    report: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    sides = [report[side] for side in ("read", "write") if report[side]["total_ios"]]
    worst = max(sides, key=lambda side: float(side["clat_ns"]["mean"]))["clat_ns"]
    value = (
        sum(side["bw_bytes"] for side in sides) / 1e6
        if job.unit == "MB/s"
        else sum(side["iops"] for side in sides)
    )
    return Result(
        job.title,
        value,
        job.unit,
        worst["mean"] / 1e6,
        worst.get("percentile", {}).get("99.000000", 0) / 1e6,
        worst["max"] / 1e6,
    )


def lay_out(path: Path, size_bytes: int) -> None:
    """Fill the file once, so that reads find data and not holes."""
    subprocess.run(
        [
            *("fio", "--name=layout", f"--filename={path}", f"--size={size_bytes}"),
            *("--rw=write", "--bs=1M", "--iodepth=4", "--ioengine=libaio", "--direct=1"),
            *("--end_fsync=1", "--output-format=terse"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def measure(path: Path, size_bytes: int, runtime_s: float, quiet: bool) -> list[Result]:
    """Run all jobs one after the other."""
    lay_out(path, size_bytes)
    results = []
    for number, job in enumerate(JOBS, 1):
        if not quiet:
            print(f"\r{number}/{len(JOBS)} {job.title:<50}", end="", file=sys.stderr, flush=True)
        done = subprocess.run(
            command(job, path, size_bytes, runtime_s), check=True, stdout=subprocess.PIPE, text=True
        )
        results.append(evaluate(job, done.stdout))
    if not quiet:
        print(f"\r{'':<55}\r", end="", file=sys.stderr)
    return results


def table(results: Sequence[Result]) -> str:
    """Give the results as a Markdown table, ready for docs/performance.md."""
    lines = ["| job | result | mean ms | 99 % ms | max ms |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r.job} | {r.value:,.0f} {r.unit} | {r.mean_ms:.2f} | {r.p99_ms:.2f} | {r.max_ms:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    if sys.argv[1:2] == ["recovery"]:
        from sheepfs_tools.benchmarks import recovery

        del sys.argv[1]
        return recovery.main()
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__, epilog=EPILOG)
    parser.add_argument("file", type=Path, help="the file to measure; ITS CONTENT IS OVERWRITTEN")
    parser.add_argument("--runtime", type=float, default=10, metavar="S", help="seconds per job")
    parser.add_argument("--size", default="1G", help="how much of the file is used (default 1G)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        size = max(16 * MIB, parse_size(arguments.size))
    except ValueError as error:
        parser.error(str(error))
    if not shutil.which("fio"):
        print("bench: fio is not installed: apt-get install fio", file=sys.stderr)
        return 1
    try:
        results = measure(arguments.file, size, arguments.runtime, arguments.json)
    except subprocess.CalledProcessError as error:
        print(f"bench: fio failed on {arguments.file} (exit {error.returncode})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    if arguments.json:
        keys = Result.__slots__
        print(json.dumps([{key: getattr(r, key) for key in keys} for r in results], indent=1))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
