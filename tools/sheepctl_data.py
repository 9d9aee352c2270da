"""The commands that move a VDI's data in and out, and the check of the whole cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict

from sheepfs.core.geometry import describe_oid
from sheepfs.image import Change
from sheepfs_tools.cluster_check import ClusterCheck, Findings
from sheepfs_tools.sheepctl_backup import BackedUp, Restored, backup, restore
from sheepfs_tools.sheepctl_copies import as_mount
from sheepfs_tools.sheepctl_output import print_json, print_table, printable
from sheepfs_tools.sheepctl_transfer import Exported, Imported, diff, export_image, import_image
from sheepfs_tools.sizes import format_size
from sheepfs_tools.transfer_access import Access
from sheepfs_tools.transfer_files import STREAM

SHOWN = 20
"""Objects of each kind that are shown; --json has all."""


def open_access(arguments: argparse.Namespace) -> AbstractAsyncContextManager[Access]:
    """Connect, as import, export, backup and restore want to see a cluster."""
    raise NotImplementedError


def _tell(
    arguments: argparse.Namespace, done: Imported | Exported | BackedUp | Restored, text: str
) -> int:
    """Print the outcome; not between the data when that goes to standard output."""
    is_output = isinstance(done, Exported | BackedUp) and done.file == STREAM
    if is_output:
        print(f"sheepctl: {text}", file=sys.stderr)
    elif arguments.json:
        print_json(asdict(done))
    else:
        print(text)
    return 0


async def vdi_import(arguments: argparse.Namespace) -> int:
    """Make a VDI of an image."""
    async with open_access(arguments) as access:
        done = await import_image(
            access,
            arguments.file,
            arguments.name,
            image_format=arguments.format,
            copies=arguments.copies,
            quiet=arguments.json,
        )
    text = f"Imported {done.name}: {format_size(done.size)}, {format_size(done.data)} of data"
    return _tell(arguments, done, text)


async def vdi_export(arguments: argparse.Namespace) -> int:
    """Write a snapshot or a VDI to an image."""
    async with open_access(arguments) as access:
        done = await export_image(
            access,
            arguments.name,
            arguments.file,
            image_format=arguments.format,
            force=arguments.force,
            quiet=arguments.json,
        )
    text = (
        f"Exported {printable(done.source)} as {done.format}: {format_size(done.size)},"
        f" {format_size(done.data)} of data"
    )
    return _tell(arguments, done, text)


async def vdi_backup(arguments: argparse.Namespace) -> int:
    """Write a snapshot, or what changed since another, to a backup."""
    async with open_access(arguments) as access:
        done = await backup(
            access,
            arguments.name,
            arguments.file,
            since=arguments.since,
            compress=arguments.compress,
            force=arguments.force,
            quiet=arguments.json,
        )
    since = f" since {printable(done.since)}" if done.since else ""
    text = (
        f"Backed up {printable(done.source)}{since}: {format_size(done.data)} of data in"
        f" {format_size(done.length)}"
    )
    return _tell(arguments, done, text)


async def vdi_restore(arguments: argparse.Namespace) -> int:
    """Make a VDI of a backup, or bring one forward."""
    async with open_access(arguments) as access:
        done = await restore(
            access, arguments.file, arguments.name, copies=arguments.copies, quiet=arguments.json
        )
    text = f"{printable(done.name)} is as {printable(done.tag)} was: {format_size(done.size)}"
    return _tell(arguments, done, text)


async def vdi_diff(arguments: argparse.Namespace) -> int:
    """Show in which parts two snapshots differ."""
    async with open_access(arguments) as access:
        found = await diff(access, arguments.old, arguments.new)
    if arguments.json:
        print_json(asdict(found))
        return 0
    rows = ((change.start, change.end - change.start, _kind(change)) for change in found.changes)
    if found.changes:
        print_table((">OFFSET", ">BYTES", ""), rows)
    if found.older_size != found.newer_size:
        print(f"size: {format_size(found.older_size)}, then {format_size(found.newer_size)}")
    print(f"{format_size(found.data)} of other data, {format_size(found.zeros)} of zeros instead")
    return 0


def _kind(change: Change) -> str:
    return "data" if change.is_data else "zeros"


async def cluster_check(arguments: argparse.Namespace) -> int:
    """Compare maps and objects. Exit 1 when something is wrong, and not repaired."""
    async with as_mount(arguments) as cluster:
        check = ClusterCheck(cluster)
        findings = await check.run()
        if arguments.repair and not findings.clean:
            if not arguments.json:
                _show(findings)
                print("repairing")
            await check.repair(findings)
            findings = await check.run()
    if arguments.json:
        print_json({"clean": findings.clean, **_as_json(findings)})
    else:
        _show(findings)
        verdict = "maps and objects agree" if findings.clean else "NOT ALL IS WELL"
        print(f"{findings.objects} objects, {findings.replicas} replicas: {verdict}")
    return 0 if findings.clean else 1


def _as_json(findings: Findings) -> dict[str, object]:
    facts = asdict(findings)
    for kind in ("dangling", "missing", "orphans", "misplaced"):
        facts[kind] = {describe_oid(oid): value for oid, value in facts[kind].items()}
    return facts


def _show(findings: Findings) -> None:
    kinds: tuple[tuple[Mapping[int, Sequence[object]], str], ...] = (
        (findings.dangling, "is on no node, and named by"),
        (findings.missing, "is missing on nodes"),
        (findings.orphans, "is named by nothing, and on nodes"),
        (findings.misplaced, "does not belong on nodes"),
    )
    for found, what in kinds:
        for oid, where in list(found.items())[:SHOWN]:
            places = ", ".join(printable(str(place)) for place in where)
            print(f"{describe_oid(oid)} {what} {places}")
        if len(found) > SHOWN:
            print(f"... and {len(found) - SHOWN} more: --json shows all")
    for node, problem in findings.unanswered.items():
        print(f"node {node} could not be asked: {problem}")
