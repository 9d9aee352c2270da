"""The commands of `sheepctl trash`."""

from __future__ import annotations

import argparse
from typing import Any

from sheepfs.core.errors import ProtocolError, UsageError, VdiNotFoundError
from sheepfs.core.metadata import SnapshotRecord, TrashRecord, VdiRecord
from sheepfs.core.names import full_name, snapshot_file, split_name
from sheepfs.net.catalog import Catalog
from sheepfs_tools.sheepctl.output import moment, print_json, print_table, printable, size_or_dash
from sheepfs_tools.sheepctl.session import open_session, options


def _file(item: TrashRecord) -> str:
    return snapshot_file(item.name, item.tag) if item.tag else item.name


def _facts(item: TrashRecord) -> dict[str, Any]:
    kind = SnapshotRecord if item.tag else VdiRecord
    try:
        record = kind.decode(item.record.encode())
    except ProtocolError:
        record = None
    return {
        "id": item.id,
        "name": _file(item),
        "kind": "snapshot" if item.tag else "vdi",
        "size": record.size if record else None,
        "allocated": record.allocated if record else None,
        "deleted": item.deleted,
        "until": item.until,
    }


def _typed_name(text: str) -> str:
    """Give the name in the mount for what was typed, a VDI's or a snapshot's."""
    name, tag = split_name(text)
    return snapshot_file(full_name(name), tag) if tag else full_name(name)


async def _find(catalog: Catalog, text: str) -> TrashRecord:
    """Find what is in the trash by its id, or by its name if only one has it."""
    items = [item for item, _ in await catalog.trash()]
    found = [item for item in items if str(item.id) == text]
    found = found or [item for item in items if _file(item) in (text, _typed_name(text))]
    if not found:
        raise VdiNotFoundError(
            f"there is no {printable(text)!r} in the trash: sheepctl trash list shows all"
        )
    if len(found) > 1:
        ids = ", ".join(str(item.id) for item in found)
        raise UsageError(
            f"{printable(text)} is in the trash {len(found)} times: give its id ({ids})"
        )
    return found[0]


async def trash_list(arguments: argparse.Namespace) -> int:
    """Show what is deleted and can be restored."""
    async with open_session(options(arguments)) as session:
        facts = [_facts(item) for item, _ in await session.catalog.trash()]
    if arguments.json:
        print_json(facts)
    elif arguments.ids:
        for fact in facts:
            print(fact["id"])
    elif not facts:
        print("The trash is empty")
    else:
        print_table(
            (">ID", "NAME", ">SIZE", ">ALLOCATED", "DELETED", "GONE AFTER"),
            (
                (
                    fact["id"],
                    fact["name"],
                    size_or_dash(fact["size"]),
                    size_or_dash(fact["allocated"]),
                    moment(fact["deleted"]),
                    moment(fact["until"]),
                )
                for fact in facts
            ),
        )
    return 0


async def trash_restore(arguments: argparse.Namespace) -> int:
    """Bring a VDI or a snapshot back."""
    name = None if arguments.name is None else _typed_name(arguments.name)
    async with open_session(options(arguments)) as session:
        item = await _find(session.catalog, arguments.id)
        restored = await session.catalog.restore(item.id, name)
    if arguments.json:
        print_json({"id": item.id, "name": restored})
    else:
        print(f"{printable(restored)} is back")
    return 0


async def trash_purge(arguments: argparse.Namespace) -> int:
    """Give up for good what is in the trash."""
    if bool(arguments.id) == arguments.all:
        raise UsageError("say what is to go for good: ids (sheepctl trash list), or --all")
    async with open_session(options(arguments)) as session:
        catalog = session.catalog
        if arguments.all:
            purged = await catalog.purge()
        else:
            found = [await _find(catalog, text) for text in arguments.id]
            purged = [record for item in found for record in await catalog.purge(item.id)]
    if arguments.json:
        print_json({"purged": [{"id": item.id, "name": _file(item)} for item in purged]})
    else:
        for item in purged:
            print(f"{printable(_file(item))} ({item.id}) is gone; its space is being freed")
        if not purged:
            print("The trash is empty")
    return 0
