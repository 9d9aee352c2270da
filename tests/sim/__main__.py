"""Run seeds: `python -m sim [--seeds FIRST-LAST | SEED …]`; a failing one prints its history."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sim.planted import PLANTED
from sim.scenario import Outcome, Size, run

SHOWN = 300


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def _outcomes(seeds: list[int], size: Size, jobs: int) -> Iterator[Outcome]:
    if jobs == 1 or len(seeds) == 1:
        yield from (run(seed, size) for seed in seeds)
        return
    with multiprocessing.Pool(jobs) as pool:
        yield from pool.imap(partial(run, size=size), seeds)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("seeds", nargs="*", default=["0-9"], metavar="SEED|FIRST-LAST")
    parser.add_argument("--operations", type=int, default=Size.operations)
    parser.add_argument("--faults", type=int, default=Size.faults)
    parser.add_argument("--nodes", type=int, default=Size.nodes)
    parser.add_argument("--clients", type=int, default=Size.clients)
    parser.add_argument("--bug", default="", choices=["", *PLANTED], help="plant a bug")
    parser.add_argument("--without", default="", metavar="FAULT,…", help="leave faults out")
    parser.add_argument("--first", action="store_true", help="end with the first seed that fails")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--history", metavar="FILE", help="write the last seed's history there")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # A seed must mean the same run everywhere.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "sim", *sys.argv[1:]])
    size = Size(
        arguments.nodes,
        arguments.clients,
        arguments.operations,
        arguments.faults,
        tuple(arguments.without.split(",")),
        arguments.bug,
    )
    seeds = [seed for text in arguments.seeds for seed in _seeds(text)]
    failed = []
    for outcome in _outcomes(seeds, size, arguments.jobs):
        print(
            f"seed {outcome.seed}: {'FAILED' if outcome.problem else 'ok'},"
            f" {outcome.operations} operations, {outcome.faults} faults,"
            f" {outcome.simulated_s:.0f} s simulated in {outcome.took_s:.1f} s",
            flush=True,
        )
        if outcome.problem:
            failed.append(outcome.seed)
            print("\n".join(outcome.history[-SHOWN:]))
            print(outcome.problem)
            if arguments.first:
                break
        if arguments.history:
            Path(arguments.history).write_text("\n".join(outcome.history))
    if failed:
        print(f"failed: {' '.join(map(str, failed))}; again: python -m sim SEED", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
