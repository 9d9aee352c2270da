"""The commands of `sheepctl cluster` and `sheepctl node`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from sheepfs_tools.sheepctl.analysis.health import Health, assess, held_until
from sheepfs_tools.sheepctl.output import (
    print_facts,
    print_json,
    print_table,
    print_verdict,
    size_or_dash,
    time_of_day,
)
from sheepfs_tools.sheepctl.session import Session, open_session, options
from sheepfs_tools.sheepctl.watch import watch
from sheepfs_tools.sizes import format_size


async def _node_rows(session: Session) -> tuple[list[dict[str, Any]], Health, int]:
    cluster_map = await session.cluster_map()
    statuses = await session.statuses(cluster_map)
    rows = []
    for node in sorted(cluster_map.nodes.values(), key=lambda node: node.id):
        status = statuses[node.id]
        told = {} if isinstance(status, str) else status
        rows.append(
            {
                "node": node.id,
                "state": str(node.state),
                "address": node.address,
                "zone": node.zone,
                "weight": node.weight,
                "returns": node.returns,
                "held_until": held_until(node) or None,
                "answers": bool(told),
                "problem": status if isinstance(status, str) else None,
                **{
                    key: told.get(key)
                    for key in (
                        *("leader", "objects", "used", "free", "total", "joining", "suspects"),
                        *("corrupt_blocks", "repaired_blocks", "restored_objects"),
                        *("pulled_objects", "pulled_bytes", "recovery"),
                        *("connections", "version"),
                    )
                },
            }
        )
    return rows, assess(cluster_map, statuses), cluster_map.epoch


def _print_nodes(rows: list[dict[str, Any]]) -> None:
    columns = ("NODE", "STATE", "ADDRESS", "ZONE", ">OBJECTS", ">USED", ">FREE", ">JOINING", "")
    print_table(
        columns,
        (
            (
                row["node"],
                row["state"],
                row["address"],
                row["zone"],
                "-" if row["objects"] is None else row["objects"],
                size_or_dash(row["used"]),
                size_or_dash(row["free"]),
                "-" if row["joining"] is None else row["joining"],
                _remark(row),
            )
            for row in rows
        ),
    )


def _remark(row: dict[str, Any]) -> str:
    if row["held_until"]:
        return (
            f"held out until {time_of_day(row['held_until'])}: it came back {row['returns']} times"
        )
    return "leader" if row["leader"] else row["problem"] or ""


@dataclass(frozen=True, slots=True)
class _Status:
    rows: list[dict[str, Any]]
    health: Health
    epoch: int
    vdis: int


async def cluster_status(arguments: argparse.Namespace) -> int:
    """Show health, nodes, placement groups, counters. Exit 1 when writes are stopped."""
    async with open_session(options(arguments)) as session:

        async def look() -> _Status:
            rows, health, epoch = await _node_rows(session)
            return _Status(rows, health, epoch, len(await session.catalog.vdis()))

        def show(found: _Status) -> int:
            if arguments.json:
                head = {"cluster": arguments.cluster, "uuid": session.config.cluster}
                print_json(
                    {
                        **head,
                        "epoch": found.epoch,
                        **asdict(found.health),
                        "vdis": found.vdis,
                        "nodes": found.rows,
                    },
                    in_one_line=arguments.watch is not None,
                )
            else:
                _print_status(f"{arguments.cluster} ({session.config.cluster})", found)
            return 1 if found.health.verdict == "down" else 0

        return await watch(arguments.watch, look, show)


def _print_status(cluster: str, found: _Status) -> None:
    health = found.health
    print_verdict(health.verdict, health.reasons)
    print_facts(
        (
            ("cluster", f"{cluster}, epoch {found.epoch}"),
            ("VDIs", found.vdis),
            (
                "space",
                f"{format_size(health.free_bytes)} free of {format_size(health.total_bytes)}"
                " (all copies counted)",
            ),
            (
                "blocks",
                f"{health.corrupt_blocks} found corrupt, {health.repaired_blocks} repaired,"
                f" {health.restored_objects} missing objects restored,"
                f" {health.suspects} objects to be compared",
            ),
            ("stalled", "; ".join(health.stalled) or "no volume"),
        )
    )
    print()
    if health.pools:
        print_table(
            ("POOL", ">GROUPS", ">WHOLE", ">DEGRADED", ">STOPPED", ">CATCHING UP"),
            (
                (f"{p.copies} copies", p.groups, p.whole, p.degraded, p.stopped, p.joining)
                for p in health.pools
            ),
        )
        print()
    _print_nodes(found.rows)


async def node_list(arguments: argparse.Namespace) -> int:
    """Show all nodes."""
    async with open_session(options(arguments)) as session:
        if arguments.ids:
            print("\n".join(map(str, sorted((await session.cluster_map()).nodes))))
            return 0

        async def look() -> list[dict[str, Any]]:
            return (await _node_rows(session))[0]

        def show(rows: list[dict[str, Any]]) -> int:
            if arguments.json:
                print_json(rows, in_one_line=arguments.watch is not None)
            else:
                _print_nodes(rows)
            return 0

        return await watch(arguments.watch, look, show)
