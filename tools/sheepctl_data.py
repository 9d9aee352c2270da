"""The commands that move data in and out: import, export, backup, restore, diff."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from sheepfs_tools import sheepctl_backup, sheepctl_transfer
from sheepfs_tools.cluster_access import ClusterAccess
from sheepfs_tools.sheepctl_copies import as_mount
from sheepfs_tools.sheepctl_output import print_json, print_table, printable
from sheepfs_tools.sizes import format_size


@asynccontextmanager
async def _access(arguments: argparse.Namespace) -> AsyncIterator[ClusterAccess]:
    async with as_mount(arguments) as cluster:
        yield ClusterAccess(cluster)


def _say(arguments: argparse.Namespace, outcome: object, text: str) -> int:
    """Print an outcome: JSON, or a line that does not go where the data goes."""
    if arguments.json:
        if getattr(arguments, "file", "") == "-" and arguments.verb in ("export", "backup"):
            return 0
        print_json(asdict(outcome))  # type: ignore[call-overload]
    else:
        print(text, file=sys.stderr if getattr(arguments, "file", "") == "-" else sys.stdout)
    return 0


async def vdi_import(arguments: argparse.Namespace) -> int:
    """Make a VDI of a disk image; zeros are not stored."""
    async with _access(arguments) as access:
        done = await sheepctl_transfer.import_image(
            access,
            arguments.file,
            arguments.name,
            image_format=arguments.format,
            copies=arguments.copies,
            quiet=arguments.json,
        )
    text = f"{done.name}: {format_size(done.size)}, {format_size(done.data)} of it data"
    return _say(arguments, done, text)


async def vdi_export(arguments: argparse.Namespace) -> int:
    """Write a VDI or snapshot to a disk image; holes stay holes."""
    async with _access(arguments) as access:
        done = await sheepctl_transfer.export_image(
            access,
            arguments.name,
            arguments.file,
            image_format=arguments.format,
            force=arguments.force,
            quiet=arguments.json,
        )
    text = f"{printable(done.source)}: {format_size(done.data)} of data written ({done.format})"
    return _say(arguments, done, text)


async def vdi_backup(arguments: argparse.Namespace) -> int:
    """Write a snapshot, or what changed since an older one, as a checked stream."""
    async with _access(arguments) as access:
        done = await sheepctl_backup.backup(
            access,
            arguments.name,
            arguments.file,
            since=arguments.since,
            compress=arguments.compress,
            force=arguments.force,
            quiet=arguments.json,
        )
    return _say(arguments, done, f"{printable(done.source)}: {format_size(done.data)} of data")


async def vdi_restore(arguments: argparse.Namespace) -> int:
    """Make a VDI of a backup, or bring one up to an increment; all is checked before."""
    async with _access(arguments) as access:
        done = await sheepctl_backup.restore(
            access,
            arguments.file,
            arguments.name,
            copies=arguments.copies,
            quiet=arguments.json,
        )
    return _say(arguments, done, f"{printable(done.name)} is as its snapshot {done.tag} was")


async def vdi_diff(arguments: argparse.Namespace) -> int:
    """Show which ranges differ between two snapshots of a VDI, or a snapshot and the VDI."""
    async with _access(arguments) as access:
        done = await sheepctl_transfer.diff(access, arguments.older, arguments.newer)
    if arguments.json:
        print_json(asdict(done))
        return 0
    if done.changes:
        print_table(
            (">OFFSET", ">LENGTH", "NOW"),
            ((c.start, c.end - c.start, "data" if c.is_data else "zeros") for c in done.changes),
        )
    print(
        f"{format_size(done.data)} changed, {format_size(done.zeros)} became zeros"
        f" ({format_size(done.older_size)}, now {format_size(done.newer_size)})"
    )
    return 0
