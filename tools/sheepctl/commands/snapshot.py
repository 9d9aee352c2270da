"""The commands of `sheepctl snapshot`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sheepfs.core.names import check_tag, snapshot_file
from sheepfs.net.catalog import TRASH_KEEP_S, Snapshot
from sheepfs_tools.sheepctl.analysis.tree import draw, forest, of_vdi, with_snapshots
from sheepfs_tools.sheepctl.names import find_id, find_snapshot, snapshot_name
from sheepfs_tools.sheepctl.output import (
    moment,
    print_facts,
    print_json,
    print_table,
    printable,
)
from sheepfs_tools.sheepctl.session import open_session, options
from sheepfs_tools.sizes import format_size


def _facts(snapshot: Snapshot, living: set[int] | None = None) -> dict[str, Any]:
    facts = asdict(snapshot.record)
    del facts["maps"]
    vdi = facts.pop("vdi")
    told = {"name": snapshot.file, "vdi": snapshot.vdi_name, "tag": snapshot.tag, "vdi_id": vdi}
    return {**told, **facts, **({} if living is None else {"vdi_deleted": vdi not in living})}


async def snapshot_list(arguments: argparse.Namespace) -> int:
    """Show all snapshots, or those of one VDI."""
    async with open_session(options(arguments)) as session:
        catalog = session.catalog
        vdi = None if arguments.vdi is None else await find_id(catalog, arguments.vdi)
        snapshots = await catalog.snapshots(vdi)
        living = {record.id for _, record, _ in await catalog.vdis()}
    if arguments.json:
        print_json([_facts(snapshot, living) for snapshot in snapshots])
    elif arguments.names:
        for snapshot in snapshots:
            print(printable(snapshot.file))
    elif not snapshots:
        print("No snapshots yet. Take one: sheepctl vdi snapshot vm1 --tag daily")
    else:
        print_table(
            ("NAME", ">SIZE", ">ALLOCATED", ">COPIES", "CREATED", "PROTECTED", ""),
            (
                (
                    snapshot.file,
                    format_size(record.size),
                    format_size(record.allocated),
                    record.copies,
                    moment(record.created),
                    "yes" if record.protected else "",
                    "" if record.vdi in living else "VDI deleted",
                )
                for snapshot in snapshots
                for record in (snapshot.record,)
            ),
        )
    return 0


async def snapshot_tree(arguments: argparse.Namespace) -> int:
    """Show what was made of what."""
    async with open_session(options(arguments)) as session:
        catalog = session.catalog
        vdi = None if arguments.vdi is None else await find_id(catalog, arguments.vdi)
        trees = forest(await catalog.vdis(), await catalog.snapshots())
    trees = with_snapshots(trees) if vdi is None else of_vdi(trees, vdi)
    if arguments.json:
        print_json([tree.as_json() for tree in trees])
        return 0
    lines = [(indent + printable(branch.name), branch) for indent, branch in draw(trees)]
    width = max((len(line) for line, _ in lines), default=0)
    for line, branch in lines:
        when = moment(branch.created) if branch.is_snapshot else "VDI"
        print(f"{line:<{width}}  {when}".rstrip())
    if not lines:
        print("No snapshots yet. Take one: sheepctl vdi snapshot vm1 --tag daily")
    return 0


async def snapshot_info(arguments: argparse.Namespace) -> int:
    """Show all about one snapshot."""
    async with open_session(options(arguments)) as session:
        catalog = session.catalog
        snapshot = await find_snapshot(catalog, arguments.name)
        living = {record.id: name for name, record, _ in await catalog.vdis()}
        others = await catalog.snapshots()
    record = snapshot.record
    if arguments.json:
        print_json(_facts(snapshot, set(living)))
        return 0
    parents = [other.file for other in others if other.record.id == record.parent]
    print_facts(
        (
            ("name", snapshot.file),
            ("id", record.id),
            ("of VDI", snapshot.vdi_name + ("" if record.vdi in living else " (deleted)")),
            ("size", f"{format_size(record.size)} ({record.size} bytes)"),
            ("allocated", f"{format_size(record.allocated)} in each copy, shared parts included"),
            ("copies", record.copies),
            ("map", f"{record.map:#x} of family {record.family:#x}"),
            ("made after", parents[0] if parents else "-"),
            ("created", moment(record.created)),
            ("protected", "yes" if record.protected else "no"),
            ("mode", f"{record.mode:o} uid {record.uid} gid {record.gid}"),
            *((f"user.{key}", value) for key, value in sorted(record.attributes.items())),
        )
    )
    return 0


async def snapshot_delete(arguments: argparse.Namespace) -> int:
    """Delete snapshots. Nothing is deleted when one of them is not there."""
    for name in arguments.name:
        snapshot_name(name)
    deleted = []
    async with open_session(options(arguments)) as session:
        found = [await find_snapshot(session.catalog, wanted) for wanted in arguments.name]
        for snapshot in found:
            record = await session.catalog.delete_snapshot(
                snapshot.vdi_name, snapshot.tag, 0 if arguments.now else TRASH_KEEP_S
            )
            deleted.append({"name": snapshot.file, "id": record.id})
            if arguments.json:
                continue
            if arguments.now:
                print(f"Deleted {printable(snapshot.file)}; its space is being freed")
            else:
                print(
                    f"Deleted {printable(snapshot.file)}:"
                    f" sheepctl trash restore {record.id} brings it back"
                )
    if arguments.json:
        print_json({"deleted": deleted, "kept_s": 0 if arguments.now else TRASH_KEEP_S})
    return 0


async def snapshot_rename(arguments: argparse.Namespace) -> int:
    """Give a snapshot another tag."""
    snapshot_name(arguments.name)
    tag = arguments.new
    check_tag(tag)
    async with open_session(options(arguments)) as session:
        old = await find_snapshot(session.catalog, arguments.name)
        await session.catalog.rename_snapshot(old.vdi_name, old.tag, tag)
    new = snapshot_file(old.vdi_name, tag)
    if arguments.json:
        print_json({"name": new, "old_name": old.file})
    else:
        print(f"{printable(old.file)} is {printable(new)} now")
    return 0


async def snapshot_protect(arguments: argparse.Namespace) -> int:
    """Forbid to delete snapshots."""
    return await _protect(arguments, True)


async def snapshot_unprotect(arguments: argparse.Namespace) -> int:
    """Allow again to delete snapshots."""
    return await _protect(arguments, False)


async def _protect(arguments: argparse.Namespace, protected: bool) -> int:
    for name in arguments.name:
        snapshot_name(name)
    done = []
    async with open_session(options(arguments)) as session:
        found = [await find_snapshot(session.catalog, wanted) for wanted in arguments.name]
        for snapshot in found:
            await session.catalog.protect(snapshot.vdi_name, snapshot.tag, protected)
            done.append(snapshot.file)
            if not arguments.json:
                state = "protected now" if protected else "not protected any more"
                print(f"{printable(snapshot.file)} is {state}")
    if arguments.json:
        print_json({"protected" if protected else "unprotected": done})
    return 0
