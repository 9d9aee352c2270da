"""The commands of sheepctl: each does its work, prints, and gives the exit code."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sheepfs.core.errors import HeldElsewhereError, UsageError, VdiNotFoundError
from sheepfs.core.metadata import (
    LockRecord,
    VdiRecord,
    check_copies,
    check_vdi_name,
    check_vdi_size,
    full_name,
)
from sheepfs_tools.sheepctl_check import Checker
from sheepfs_tools.sheepctl_health import Health, assess
from sheepfs_tools.sheepctl_output import (
    moment,
    print_facts,
    print_json,
    print_table,
    print_verdict,
    printable,
    size_or_dash,
)
from sheepfs_tools.sheepctl_session import Options, Session, open_session
from sheepfs_tools.sizes import format_size, parse_size


def _options(arguments: argparse.Namespace) -> Options:
    return Options(arguments.etcd, arguments.cluster)


def size_argument(text: str) -> int:
    """Parse and check a VDI's size (UsageError)."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_vdi_size(size)
    return size


# -- cluster and nodes ----------------------------------------------------------------------


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
                "answers": bool(told),
                "problem": status if isinstance(status, str) else None,
                **{
                    key: told.get(key)
                    for key in (
                        *("leader", "objects", "used", "free", "total", "joining", "suspects"),
                        *("corrupt_blocks", "repaired_blocks", "restored_objects"),
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
                "leader" if row["leader"] else row["problem"] or "",
            )
            for row in rows
        ),
    )


async def cluster_status(arguments: argparse.Namespace) -> int:
    """Show health, nodes, placement groups, counters. Exit 1 when writes are stopped."""
    async with open_session(_options(arguments)) as session:
        rows, health, epoch = await _node_rows(session)
        vdis = len(await session.catalog.vdis())
    if arguments.json:
        content = {"cluster": arguments.cluster, "uuid": session.config.cluster, "epoch": epoch}
        print_json({**content, **asdict(health), "vdis": vdis, "nodes": rows})
    else:
        print_verdict(health.verdict, health.reasons)
        print_facts(
            (
                ("cluster", f"{arguments.cluster} ({session.config.cluster}), epoch {epoch}"),
                ("VDIs", vdis),
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
        _print_nodes(rows)
    return 1 if health.verdict == "down" else 0


async def node_list(arguments: argparse.Namespace) -> int:
    """Show all nodes."""
    async with open_session(_options(arguments)) as session:
        rows, _, _ = await _node_rows(session)
    if arguments.json:
        print_json(rows)
    else:
        _print_nodes(rows)
    return 0


# -- VDIs -----------------------------------------------------------------------------------


def _facts(name: str, record: VdiRecord, holder: LockRecord | None) -> dict[str, Any]:
    facts = asdict(record)
    for internal in ("generation", "maps"):
        del facts[internal]
    return {"name": name, **facts, "held_by": holder.owner if holder else None}


async def _find(session: Session, name: str) -> tuple[str, VdiRecord]:
    """Find a VDI by its name, with or without `.raw` (VdiNotFoundError)."""
    for candidate in dict.fromkeys((full_name(name), name)):
        with suppress(VdiNotFoundError):
            record, _ = await session.catalog.vdi(candidate)
            return candidate, record
    raise VdiNotFoundError(
        f"there is no VDI {printable(full_name(name))!r}: sheepctl vdi list shows all"
    )


async def vdi_create(arguments: argparse.Namespace) -> int:
    """Make an empty VDI; uses no space until it is written to."""
    name, size = full_name(arguments.name), size_argument(arguments.size)
    check_vdi_name(name)
    check_copies(arguments.copies)
    async with open_session(_options(arguments)) as session:
        record = await session.catalog.create(
            name, size, arguments.copies, 0o644, os.getuid(), os.getgid()
        )
        nodes = len((await session.cluster_map()).nodes)
    if arguments.json:
        print_json(_facts(name, record, None))
    else:
        print(f"Created {name}: {format_size(size)}, {record.copies} copies")
    if nodes < record.copies:
        print(
            f"sheepctl: note: the cluster has {nodes} nodes; {name} will have fewer than"
            f" {record.copies} copies until there are more",
            file=sys.stderr,
        )
    return 0


async def vdi_list(arguments: argparse.Namespace) -> int:
    """Show all VDIs."""
    async with open_session(_options(arguments)) as session:
        holders = await session.catalog.locks()
        found = sorted(await session.catalog.vdis(), key=lambda item: item[0])
    facts = [_facts(name, record, holders.get(record.id)) for name, record, _ in found]
    if arguments.json:
        print_json(facts)
    elif arguments.names:
        for fact in facts:
            print(printable(fact["name"]))
    elif not facts:
        print("No VDIs yet. Make one: sheepctl vdi create vm1 20G")
    else:
        print_table(
            ("NAME", ">SIZE", ">ALLOCATED", ">COPIES", "MODIFIED", "HELD BY"),
            (
                (
                    fact["name"],
                    format_size(fact["size"]),
                    format_size(fact["allocated"]),
                    fact["copies"],
                    moment(fact["modified"]),
                    fact["held_by"] or "",
                )
                for fact in facts
            ),
        )
    return 0


async def vdi_info(arguments: argparse.Namespace) -> int:
    """Show all about one VDI."""
    async with open_session(_options(arguments)) as session:
        name, record = await _find(session, arguments.name)
        holder = (await session.catalog.locks()).get(record.id)
    facts = _facts(name, record, holder)
    if arguments.json:
        print_json(facts)
        return 0
    print_facts(
        (
            ("name", name),
            ("id", record.id),
            ("size", f"{format_size(record.size)} ({record.size} bytes)"),
            ("allocated", f"{format_size(record.allocated)} in each copy, at the last flush"),
            ("copies", record.copies),
            ("layer", record.layer),
            ("held by", holder.owner if holder else "nobody"),
            (
                "last detach",
                "clean" if record.clean or holder else "unclean: recovered when opened",
            ),
            ("created", moment(record.created)),
            ("modified", moment(record.modified)),
            ("mode", f"{record.mode:o} uid {record.uid} gid {record.gid}"),
        )
    )
    return 0


async def vdi_resize(arguments: argparse.Namespace) -> int:
    """Grow a VDI, or cut it with --shrink; one in use elsewhere is refused."""
    from sheepfs.connecting import connect

    size = size_argument(arguments.size)
    async with open_session(_options(arguments)) as session:
        name, record = await _find(session, arguments.name)
        holder = (await session.catalog.locks()).get(record.id)
    if holder is not None:
        raise HeldElsewhereError(
            f"{name} is in use by {holder.owner}: detach it there first"
            " (a mount can resize what it holds itself: truncate -s SIZE FILE)"
        )
    if size < record.size and not arguments.shrink:
        raise UsageError(
            f"{name} has {format_size(record.size)}; making it smaller loses what is beyond"
            f" {format_size(size)}: say --shrink if you mean that"
        )
    owner = f"{socket.gethostname()}:{os.getpid()}:sheepctl"
    async with connect(arguments.etcd, arguments.cluster, owner) as cluster:
        volume = await cluster.open(record.id)
        try:
            await volume.resize(size)
        finally:
            await volume.close()
    if arguments.json:
        print_json({"name": name, "size": size})
    else:
        print(f"{name} has {format_size(size)} now")
    return 0


async def vdi_rename(arguments: argparse.Namespace) -> int:
    """Rename a VDI; an existing one is never replaced."""
    new = full_name(arguments.new)
    check_vdi_name(new)
    async with open_session(_options(arguments)) as session:
        old, _ = await _find(session, arguments.name)
        await session.catalog.rename(old, new, False)
    if arguments.json:
        print_json({"name": new, "old_name": old})
    else:
        print(f"{printable(old)} is {new} now")
    return 0


async def vdi_delete(arguments: argparse.Namespace) -> int:
    """Delete VDIs; one in use is refused."""
    deleted = []
    async with open_session(_options(arguments)) as session:
        for wanted in arguments.name:
            name, _ = await _find(session, wanted)
            await session.catalog.delete(name)
            deleted.append(name)
            if not arguments.json:
                print(f"Deleted {printable(name)}")
    if arguments.json:
        print_json({"deleted": deleted})
    return 0


async def vdi_unlock(arguments: argparse.Namespace) -> int:
    """Take a VDI from its holder at once: fence it at every node, then remove its lock."""
    from sheepfs_tools.sheepctl_unlock import unlock

    async with open_session(_options(arguments)) as session:
        name, record = await _find(session, arguments.name)
        holder = (await session.catalog.locks()).get(record.id)
        if holder is not None and not arguments.force:
            raise UsageError(
                f"{name} is in use by {holder.owner}: its writes fail from then on; say --force"
                " if it is dead or should lose the VDI"
            )
        if holder is not None:
            await unlock(session, record.id)
    owner = holder.owner if holder else None
    if arguments.json:
        print_json({"name": name, "taken_from": owner})
    elif owner:
        print(f"{name} was taken from {owner}; any mount can open it for writing now")
    else:
        print(f"{name} is held by nobody: nothing to do")
    return 0


async def vdi_check(arguments: argparse.Namespace) -> int:
    """Compare all replicas of a VDI. Exit 1 when they differ or cannot all be asked."""
    async with open_session(_options(arguments)) as session:
        name, record = await _find(session, arguments.name)
        report = await Checker(session, record, arguments.deep).run()
    if arguments.json:
        print_json({"name": name, "agree": report.agree, **asdict(report)})
        return 0 if report.agree else 1
    for thing, answers in report.differences.items():
        print(f"{thing} differs:")
        for node, answer in answers.items():
            print(f"  node {node}: {printable(answer)}")
    for node, problem in report.unanswered.items():
        print(f"node {node} could not be asked: {problem}")
    if report.joining_groups:
        print(f"{report.joining_groups} groups have members that catch up; those were not asked")
    verdict = "all agree" if report.agree else "NOT PROVEN EQUAL"
    print(f"{name}: {report.objects} objects, {report.replicas} replicas compared: {verdict}")
    return 0 if report.agree else 1
