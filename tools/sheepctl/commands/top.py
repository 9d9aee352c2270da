"""The command `sheepctl top`: who does how much, and how fast it goes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import trio

from sheepfs.core.errors import UnreachableError
from sheepfs.core.traffic import KINDS
from sheepfs.core.wire import Op
from sheepfs_tools.sheepctl.analysis.traffic_rates import Row, Sample, node_rates, vdi_rates
from sheepfs_tools.sheepctl.output import print_json, print_table
from sheepfs_tools.sheepctl.session import Session, open_session, options
from sheepfs_tools.sheepctl.watch import watch

_COLUMNS = (
    *(">READ/s", ">WRITE/s", ">FLUSH/s", ">READ MB/s", ">WRITE MB/s"),
    *(">READ ms", ">99 %", ">WRITE ms", ">99 %", ">FLUSH ms"),
)


class Top:
    """Rates between the last two looks."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before = Sample({}, {})
        self._problems: dict[int, str] = {}

    async def begin(self) -> None:
        """Take the first sample. Raises UnreachableError: no daemon tells its figures."""
        self._before = await self._sample()
        if not self._before.nodes:
            why = "; ".join(f"node {n}: {text}" for n, text in sorted(self._problems.items()))
            raise UnreachableError(
                f"no storage daemon tells its figures ({why or 'there is none'}):"
                " sheepctl cluster status tells more"
            )

    async def look(self) -> dict[str, Any]:
        """Give the rates since the last look."""
        after = await self._sample()
        before, self._before = self._before, after
        return {
            "nodes": [_encode(row, node=n) for n, row in node_rates(before, after).items()],
            "vdis": [
                _encode(row, vdi=v, name=row.name, mounts=row.mounts)
                for v, row in vdi_rates(before, after).items()
            ],
            "problems": {str(node): text for node, text in sorted(self._problems.items())},
        }

    async def _sample(self) -> Sample:
        cluster_map = await self._session.cluster_map()
        answers = await self._session.ask_all(cluster_map, Op.TRAFFIC)
        self._problems = {n: a for n, a in answers.items() if isinstance(a, str)}
        return Sample.of(answer for answer in answers.values() if not isinstance(answer, str))


def _encode(row: Row, **who: Any) -> dict[str, Any]:
    return {**who, **{kind: asdict(row.rate(kind)) for kind in KINDS}}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    read, write, flush = (row[kind] for kind in KINDS)

    def milliseconds(rate: dict[str, float], key: str) -> str:
        return f"{rate[key] * 1000:,.2f}" if rate["per_s"] else "-"

    return (
        *(f"{rate['per_s']:,.0f}" for rate in (read, write, flush)),
        *(f"{rate['bytes_per_s'] / 1e6:,.1f}" for rate in (read, write)),
        *(milliseconds(read, "mean_s"), milliseconds(read, "p99_s")),
        *(milliseconds(write, "mean_s"), milliseconds(write, "p99_s")),
        milliseconds(flush, "mean_s"),
    )


def _print(found: dict[str, Any]) -> None:
    print_table(("NODE", *_COLUMNS), ((row["node"], *_cells(row)) for row in found["nodes"]))
    for node, problem in found["problems"].items():
        print(f"node {node} tells nothing: {problem}")
    print()
    busy = [row for row in found["vdis"] if any(_is_busy(row[kind]) for kind in KINDS)]
    print_table(
        ("VDI", *_COLUMNS, "MOUNT"),
        ((row["name"], *_cells(row), _hosts(row["mounts"])) for row in busy),
    )
    idle = len(found["vdis"]) - len(busy)
    if idle:
        print(f"and {idle} without any request")


def _is_busy(rate: dict[str, float]) -> bool:
    return bool(rate["per_s"] or rate["errors_per_s"])


def _hosts(mounts: list[str]) -> str:
    """A mount calls itself `host:pid:directory`."""
    return ", ".join(sorted({mount.partition(":")[0] for mount in mounts}))


async def top(arguments: argparse.Namespace) -> int:
    """Show rates and latencies of nodes and VDIs."""

    def show(found: dict[str, Any]) -> int:
        if arguments.json:
            print_json(found, in_one_line=not arguments.once)
        else:
            _print(found)
        return 0

    async with open_session(options(arguments)) as session:
        state = Top(session)
        await state.begin()
        await trio.sleep(arguments.interval)
        return await watch(None if arguments.once else arguments.interval, state.look, show)
