"""The command `sheepctl object locate`: which object holds a byte, and who has it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.geometry import (
    OBJECT_SIZE,
    data_object,
    describe_oid,
    format_oid,
    pg_of,
    pool_of,
)
from sheepfs.core.metadata import SnapshotRecord
from sheepfs.core.wire import Op
from sheepfs.layers.image import Image
from sheepfs.net.link import connect_node
from sheepfs.replication.objects import ObjectReader
from sheepfs_tools.sheepctl.commands.copies import as_mount
from sheepfs_tools.sheepctl.names import find_either
from sheepfs_tools.sheepctl.output import print_facts, print_json, print_table
from sheepfs_tools.sheepctl.session import NODE_TIMEOUT_S, first_error
from sheepfs_tools.sizes import format_size, parse_size
from storaged.store.entry import path_of


@dataclass(frozen=True, slots=True)
class Place:
    """Where a byte is; `layer` 0: in a hole, and nothing below it is known."""

    index: int
    within: int
    """Bytes from the start of the object."""
    layer: int
    oid: int = 0
    pool: int = 0
    pg: int = 0
    changed: int = 0
    """The epoch in which the group's members last changed."""
    sync: tuple[int, ...] = ()
    joining: tuple[int, ...] = ()


def locate(cluster_map: ClusterMap, offset: int, layer: int) -> Place:
    """Give where byte `offset` of a VDI is, if `layer` owns it.

    Raises:
        UsageError: the cluster map has no such pool.
    """
    index, within = divmod(offset, OBJECT_SIZE)
    if not layer:
        return Place(index, within, 0)
    oid = data_object(layer, index)
    pool = pool_of(oid)
    if pool not in cluster_map.pools:
        raise UsageError(f"{describe_oid(oid)}: the cluster has no pool of {pool} copies")
    groups = cluster_map.pools[pool]
    pg = pg_of(oid, len(groups))
    group = groups[pg]
    return Place(index, within, layer, oid, pool, pg, group.changed, group.sync, group.joining)


async def ask_members(cluster_map: ClusterMap, place: Place, vdi: int) -> list[dict[str, Any]]:
    """Ask each member which version it has; what none gives is said in `problem`."""
    members: dict[int, dict[str, Any]] = {}

    async def ask(node: int, state: str) -> None:
        known = cluster_map.nodes.get(node)
        address = known.address if known else ""
        row = {"node": node, "address": address, "state": state, "version": None, "problem": ""}
        members[node] = row
        row["problem"] = f"no answer within {NODE_TIMEOUT_S:g} s"
        with trio.move_on_after(NODE_TIMEOUT_S):
            try:
                async with connect_node(address, cluster_map.cluster) as link:
                    header, _ = await link.call(
                        Op.STAT, oid=place.oid, pool=place.pool, pg=place.pg,
                        epoch=cluster_map.epoch, vdi=vdi,
                    )  # fmt: skip
                    row.update(version=f"{header.version:016x}", problem="")
            except* SheepError as group:
                row["problem"] = str(first_error(group))

    async with trio.open_nursery() as nursery:
        for node in place.sync:
            nursery.start_soon(ask, node, "sync")
        for node in place.joining:
            nursery.start_soon(ask, node, "joining")
    return [members[node] for node in (*place.sync, *place.joining)]


async def object_locate(arguments: argparse.Namespace) -> int:
    """Show the object that holds a byte, and its replicas. Exit 1 if a member lacks it."""
    try:
        offset = parse_size(arguments.offset)
    except ValueError as error:
        raise UsageError(str(error)) from error
    async with as_mount(arguments) as cluster:
        name, record = await find_either(cluster.catalog, arguments.name)
        if offset >= record.size:
            raise UsageError(
                f"{name} ends at {record.size} ({format_size(record.size)}):"
                f" there is no byte {offset}"
            )
        vdi = record.vdi if isinstance(record, SnapshotRecord) else record.id
        image = Image(ObjectReader(cluster.router, vdi), record.size, record.map, record.maps)
        owner = await image.owner(offset // OBJECT_SIZE)
        place = locate(cluster.router.map, offset, owner)
        members = await ask_members(cluster.router.map, place, vdi) if owner else []
    _show(name, offset, place, members, as_json=arguments.json)
    return 1 if any(member["version"] is None for member in members) else 0


def _show(
    name: str, offset: int, place: Place, members: list[dict[str, Any]], *, as_json: bool
) -> None:
    path = path_of(place.oid, place.pool, place.pg) if place.layer else None
    if as_json:
        content = {"name": name, "offset": offset, "hole": not place.layer, **asdict(place)}
        content["oid"] = format_oid(place.oid) if place.layer else None
        del content["sync"], content["joining"]
        print_json({**content, "path": path, "members": members})
        return
    facts: list[tuple[str, object]] = [
        ("name", name),
        ("offset", f"{offset} (object {place.index}, byte {place.within} of it)"),
    ]
    if not place.layer:
        print_facts([*facts, ("object", "none: a hole, which reads as zeros")])
        return
    print_facts(
        [
            *facts,
            ("object", format_oid(place.oid)),
            ("layer", f"{place.layer:#x}"),
            ("pool", f"{place.pool} copies"),
            ("group", f"{place.pg}, members as of epoch {place.changed}"),
            ("file", f"{path} in each member's data directory"),
        ]
    )
    print()
    print_table(
        ("NODE", "ADDRESS", "STATE", "VERSION", ""),
        ((m["node"], m["address"], m["state"], m["version"] or "-", m["problem"]) for m in members),
    )
