"""The commands that move data in and out: import, export, backup, restore, diff."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sheepfs_tools.sheepctl.commands.copies import as_mount
from sheepfs_tools.transfer.backup import backup
from sheepfs_tools.transfer.cluster_access import ClusterAccess
from sheepfs_tools.transfer.images import diff, export_image, import_image
from sheepfs_tools.transfer.output import report
from sheepfs_tools.transfer.restore import restore


@asynccontextmanager
async def _access(arguments: argparse.Namespace) -> AsyncIterator[ClusterAccess]:
    async with as_mount(arguments) as cluster:
        yield ClusterAccess(cluster)


async def vdi_import(arguments: argparse.Namespace) -> int:
    """Make a VDI of a disk image; zeros are not stored."""
    async with _access(arguments) as access:
        done = await import_image(
            access,
            arguments.file,
            arguments.name,
            image_format=arguments.format,
            copies=arguments.copies,
            quiet=arguments.json,
        )
    report(done, arguments.json)
    return 0


async def vdi_export(arguments: argparse.Namespace) -> int:
    """Write a VDI or snapshot to a disk image; holes stay holes."""
    async with _access(arguments) as access:
        done = await export_image(
            access,
            arguments.name,
            arguments.file,
            image_format=arguments.format,
            force=arguments.force,
            quiet=arguments.json,
        )
    report(done, arguments.json)
    return 0


async def vdi_backup(arguments: argparse.Namespace) -> int:
    """Write a snapshot, or what changed since an older one, as a checked stream."""
    async with _access(arguments) as access:
        done = await backup(
            access,
            arguments.name,
            arguments.file,
            since=arguments.since,
            compress=arguments.compress,
            force=arguments.force,
            quiet=arguments.json,
        )
    report(done, arguments.json)
    return 0


async def vdi_restore(arguments: argparse.Namespace) -> int:
    """Make a VDI of a backup, or bring one up to an increment; all is checked before."""
    async with _access(arguments) as access:
        done = await restore(
            access,
            arguments.file,
            arguments.name,
            copies=arguments.copies,
            quiet=arguments.json,
        )
    report(done, arguments.json)
    return 0


async def vdi_diff(arguments: argparse.Namespace) -> int:
    """Show which ranges differ between two snapshots of a VDI, or a snapshot and the VDI."""
    async with _access(arguments) as access:
        done = await diff(access, arguments.older, arguments.newer)
    report(done, arguments.json)
    return 0
