"""The commands of `sheepctl vdi` that need only a VDI's record."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.metadata import LockRecord, VdiRecord
from sheepfs.core.names import (
    check_copies,
    check_vdi_name,
    check_vdi_size,
    full_name,
)
from sheepfs.holding.requests import delete_vdi
from sheepfs.net.catalog import TRASH_KEEP_S
from sheepfs_tools.sheepctl.analysis.replica_check import Checker
from sheepfs_tools.sheepctl.names import find_either, find_vdi
from sheepfs_tools.sheepctl.output import (
    moment,
    print_facts,
    print_json,
    print_table,
    printable,
)
from sheepfs_tools.sheepctl.session import open_session, options
from sheepfs_tools.sizes import format_size, parse_size

if TYPE_CHECKING:
    from sheepfs.layers.inventory import Space


def size_argument(text: str) -> int:
    """Parse and check a VDI's size (UsageError)."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_vdi_size(size)
    return size


def _facts(name: str, record: VdiRecord, holder: LockRecord | None) -> dict[str, Any]:
    facts = asdict(record)
    for internal in ("generation", "maps"):
        del facts[internal]
    return {"name": name, **facts, "held_by": holder.owner if holder else None}


async def vdi_create(arguments: argparse.Namespace) -> int:
    """Make an empty VDI; uses no space until it is written to."""
    name, size = full_name(arguments.name), size_argument(arguments.size)
    check_vdi_name(name)
    check_copies(arguments.copies)
    async with open_session(options(arguments)) as session:
        await session.refuse_restored()
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
    async with open_session(options(arguments)) as session:
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
    async with open_session(options(arguments)) as session:
        name, record = await find_vdi(session.catalog, arguments.name)
        holder = (await session.catalog.locks()).get(record.id)
        kept = await session.catalog.snapshots(record.id)
    space = await _space(arguments, record)
    facts = {
        **_facts(name, record, holder),
        "snapshots": [s.tag for s in kept],
        "allocated": space.allocated if space else record.allocated,
        "exclusive": space.exclusive if space else None,
        "shared": space.shared if space else None,
    }
    if arguments.json:
        print_json(facts)
        return 0
    print_facts(
        (
            ("name", name),
            ("id", record.id),
            ("size", f"{format_size(record.size)} ({record.size} bytes)"),
            *_space_facts(record, space),
            ("copies", record.copies),
            ("layer", f"{record.layer:#x} of family {record.family:#x}, map {record.map:#x}"),
            ("snapshots", ", ".join(s.tag for s in kept) or "none"),
            ("held by", holder.owner if holder else "nobody"),
            (
                "last detach",
                "clean" if record.clean or holder else "unclean: recovered when opened",
            ),
            ("created", moment(record.created)),
            ("modified", moment(record.modified)),
            ("mode", f"{record.mode:o} uid {record.uid} gid {record.gid}"),
            *((f"user.{key}", value) for key, value in sorted(record.attributes.items())),
        )
    )
    return 0


async def _space(arguments: argparse.Namespace, record: VdiRecord) -> Space | None:
    """Count what a VDI takes; None when the nodes cannot tell."""
    from sheepfs.layers.inventory import space_of
    from sheepfs_tools.sheepctl.commands.copies import as_mount

    try:
        async with as_mount(arguments) as cluster:
            roots = await cluster.catalog.roots(record.family)
            return await space_of(cluster.router, roots, record.map)
    except SheepError:
        return None


def _space_facts(record: VdiRecord, space: Space | None) -> list[tuple[str, str]]:
    if space is None:
        return [("allocated", f"{format_size(record.allocated)} in each copy, when last counted")]
    return [
        ("allocated", f"{format_size(space.allocated)} of data in each copy"),
        ("exclusive", f"{format_size(space.exclusive)}: what its deletion would give back"),
        ("shared", f"{format_size(space.shared)} with snapshots and clones"),
    ]


async def vdi_resize(arguments: argparse.Namespace) -> int:
    """Grow a VDI, or cut it with --shrink, wherever it is in use."""
    from sheepfs_tools.sheepctl.commands.copies import as_mount

    size = size_argument(arguments.size)
    async with open_session(options(arguments)) as session:
        name, record = await find_vdi(session.catalog, arguments.name)
    if size < record.size and not arguments.shrink:
        raise UsageError(
            f"{name} has {format_size(record.size)}; making it smaller loses what is beyond"
            f" {format_size(size)}: say --shrink if you mean that"
        )
    async with as_mount(arguments) as cluster:
        await cluster.resize(record.id, size)
    if arguments.json:
        print_json({"name": name, "size": size})
    else:
        print(f"{name} has {format_size(size)} now")
    return 0


async def vdi_rename(arguments: argparse.Namespace) -> int:
    """Rename a VDI; an existing one is never replaced."""
    new = full_name(arguments.new)
    check_vdi_name(new)
    async with open_session(options(arguments)) as session:
        old, _ = await find_vdi(session.catalog, arguments.name)
        await session.catalog.rename(old, new, False)
    if arguments.json:
        print_json({"name": new, "old_name": old})
    else:
        print(f"{printable(old)} is {new} now")
    return 0


async def vdi_delete(arguments: argparse.Namespace) -> int:
    """Delete VDIs; one in use is refused. Nothing is deleted when one of them is not there."""
    deleted = []
    async with open_session(options(arguments)) as session:
        found = [await find_vdi(session.catalog, wanted) for wanted in arguments.name]
        for name, record in found:
            await delete_vdi(
                session.store, session.keys, session.catalog, name,
                keep_s=0 if arguments.now else TRASH_KEEP_S,
            )  # fmt: skip
            kept = await session.catalog.snapshots(record.id)
            deleted.append({"name": name, "id": record.id, "snapshots": [s.file for s in kept]})
            if arguments.json:
                continue
            if arguments.now:
                print(f"Deleted {printable(name)}; its space is being freed")
            else:
                print(
                    f"Deleted {printable(name)}: sheepctl trash restore {record.id} brings it back"
                )
            if kept:
                print(
                    f"  {len(kept)} snapshot{'s' * (len(kept) > 1)} of it stay, and keep its name:"
                    f" sheepctl snapshot list {printable(name)}"
                )
    if arguments.json:
        print_json({"deleted": deleted, "kept_s": 0 if arguments.now else TRASH_KEEP_S})
    return 0


def _pair(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r}: write KEY=VALUE to set, KEY= to remove")
    return name, value or None


async def vdi_set(arguments: argparse.Namespace) -> int:
    """Keep texts of one's own with a VDI or a snapshot; all or none of them."""
    changes = dict(_pair(text) for text in arguments.pair)
    async with open_session(options(arguments)) as session:
        name, _ = await find_either(session.catalog, arguments.name)
        record = await session.catalog.set_attributes(name, changes)
    if arguments.json:
        print_json({"name": name, "attributes": record.attributes})
    return 0


async def vdi_get(arguments: argparse.Namespace) -> int:
    """Show what is kept with a VDI or a snapshot. Exit 1 when KEY is not."""
    async with open_session(options(arguments)) as session:
        name, record = await find_either(session.catalog, arguments.name)
    attributes = record.attributes
    if arguments.key is not None and arguments.key not in attributes:
        print(f"sheepctl: {printable(name)} has no {arguments.key!r}", file=sys.stderr)
        return 1
    if arguments.json:
        print_json(attributes if arguments.key is None else attributes[arguments.key])
    elif arguments.key is not None:
        print(printable(attributes[arguments.key]))
    else:
        for key, value in sorted(attributes.items()):
            print(f"{printable(key)}={printable(value)}")
    return 0


async def vdi_unlock(arguments: argparse.Namespace) -> int:
    """Take a VDI from its holder at once: fence it at every node, then remove its lock."""
    from sheepfs_tools.sheepctl.unlock import unlock

    async with open_session(options(arguments)) as session:
        name, record = await find_vdi(session.catalog, arguments.name)
        holder = (await session.catalog.locks()).get(record.id)
        if holder is not None and not arguments.force:
            raise UsageError(
                f"{name} is in use by {holder.owner}: its writes fail from then on; say --force"
                " if it is dead or should lose the VDI"
            )
        owner = await unlock(session, record.id) if holder is not None else None
    if arguments.json:
        print_json({"name": name, "taken_from": owner})
    elif owner:
        print(f"{name} was taken from {owner}; any mount can open it for writing now")
    else:
        print(f"{name} is held by nobody: nothing to do")
    return 0


async def vdi_check(arguments: argparse.Namespace) -> int:
    """Compare all replicas of a VDI. Exit 1 when they differ or cannot all be asked."""
    async with open_session(options(arguments)) as session:
        name, record = await find_vdi(session.catalog, arguments.name)
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
