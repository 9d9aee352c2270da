"""`sheepctl cluster recovery`: how far it is, and how fast it may be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import trio

from sheepfs.core.errors import UsageError
from sheepfs.core.kv import KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import RecoveryRecord
from sheepfs_tools.durations import format_duration, parse_duration
from sheepfs_tools.sheepctl.analysis.recovery_view import (
    NodeRecovery,
    node_recoveries,
    sentence,
    whole_recovery,
)
from sheepfs_tools.sheepctl.output import print_facts, print_json, print_table
from sheepfs_tools.sheepctl.session import Session, open_session, options
from sheepfs_tools.sizes import format_size, parse_size

WATCH_S = 2.0


async def cluster_recovery(arguments: argparse.Namespace) -> int:
    """Show the progress of recovery, or set its limits."""
    changes = _changes(arguments)
    async with open_session(options(arguments)) as session:
        if changes:
            setting = await _set(session, changes)
            if arguments.json:
                print_json(asdict(setting))
            else:
                _print_setting(setting)
            return 0
        while await _show(session, arguments.json) and arguments.watch:
            sys.stdout.flush()
            await trio.sleep(WATCH_S)
            if not arguments.json:
                print()
    return 0


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the fields that the command line sets (UsageError)."""
    changes: dict[str, Any] = {}
    if arguments.pause and arguments.resume:
        raise UsageError("--pause and --resume: choose one")
    if arguments.pause or arguments.resume:
        changes["paused"] = bool(arguments.pause)
    if arguments.parallel is not None:
        changes["parallel"] = arguments.parallel
    try:
        if arguments.bandwidth is not None:
            is_free = arguments.bandwidth == "unlimited"
            changes["bandwidth"] = 0 if is_free else parse_size(arguments.bandwidth)
            if not is_free and not changes["bandwidth"]:
                raise ValueError("--bandwidth 0: use --pause to stop, or 'unlimited'")
        if arguments.out_after is not None:
            changes["out_after_s"] = parse_duration(arguments.out_after)
        replace(RecoveryRecord(), **changes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if changes and arguments.watch:
        raise UsageError("--watch shows; set limits first, then watch")
    return changes


async def _read(session: Session) -> tuple[RecoveryRecord, KeyValue | None]:
    found = await session.store.get(session.keys.setting("recovery"))
    return (RecoveryRecord() if found is None else RecoveryRecord.decode(found.value)), found


async def _set(session: Session, changes: Mapping[str, Any]) -> RecoveryRecord:
    """Change some fields; what others set at the same time stays."""
    key = session.keys.setting("recovery")
    while True:
        setting, found = await _read(session)
        setting = replace(setting, **changes)
        condition = Unchanged(key, found.mod_revision if found else 0)
        if await session.store.commit(Transaction([condition], [Put(key, setting.encode())])):
            return setting


async def _show(session: Session, as_json: bool) -> bool:
    """Print how far it is; tells whether there is anything left."""
    setting, _ = await _read(session)
    cluster_map = await session.cluster_map()
    nodes = node_recoveries(await session.statuses(cluster_map))
    whole = whole_recovery(nodes)
    if as_json:
        rows = [{**asdict(node), "left_s": node.left_s} for node in nodes]
        in_all = None if whole is None else asdict(whole)
        print_json({"setting": asdict(setting), "recovery": in_all, "nodes": rows})
        return whole is not None
    print("nothing is to be recovered" if whole is None else sentence(whole))
    _print_setting(setting)
    if whole is not None:
        print()
        _print_nodes([node for node in nodes if node.groups_left])
    return whole is not None


def _print_setting(setting: RecoveryRecord) -> None:
    bandwidth = f"{format_size(setting.bandwidth)}/s" if setting.bandwidth else "unlimited"
    print_facts(
        (
            ("limits", f"{setting.parallel} objects at once, {bandwidth}, for each node"),
            ("paused", "yes: sheepctl cluster recovery --resume" if setting.paused else "no"),
            ("given up", f"a node that is down for {format_duration(setting.out_after_s)}"),
        )
    )


def _print_nodes(nodes: list[NodeRecovery]) -> None:
    print_table(
        ("NODE", ">OBJECTS LEFT", ">LEFT", ">COPIED", ">RATE", ">TIME LEFT", ""),
        (
            (
                node.node,
                node.objects_left,
                format_size(node.bytes_left),
                format_size(node.bytes_done),
                f"{format_size(node.bytes_per_s)}/s",
                "-" if node.left_s is None else format_duration(node.left_s),
                node.waits,
            )
            for node in nodes
        ),
    )
