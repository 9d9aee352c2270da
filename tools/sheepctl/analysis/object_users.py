"""Which VDIs and snapshots use an object? By their maps, as they are stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

from sheepfs.cluster import Cluster
from sheepfs.core.errors import SheepError
from sheepfs.core.geometry import (
    MAP_ENTRIES_PER_OBJECT,
    MAP_ENTRY_SIZE,
    OBJECT_SIZE,
    index_of,
    is_map_object,
    layer_of,
    map_object,
)
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.replication.objects import ObjectReader


class User(NamedTuple):
    """Who uses an object. `offset`: of the object in it, in bytes; None: as a part of its map."""

    name: str
    offset: int | None


async def users_of(cluster: Cluster, oids: Collection[int]) -> dict[int, list[User]]:
    """Find who uses some objects; maps that cannot be read are left out.

    Raises:
        UnreachableError: etcd does not answer.
    """
    catalog = cluster.catalog
    records: list[tuple[str, VdiRecord | SnapshotRecord]] = [
        (name, record) for name, record, _ in await catalog.vdis()
    ]
    records += [(snapshot.file, snapshot.record) for snapshot in await catalog.snapshots()]
    reader = ObjectReader(cluster.router, 0)
    users: dict[int, list[User]] = defaultdict(list)
    for name, record in records:
        for oid in oids:
            index = index_of(oid)
            if is_map_object(oid):
                if layer_of(oid) == record.map and record.maps >> index & 1:
                    users[oid].append(User(name, None))
                continue
            number, entry = divmod(index, MAP_ENTRIES_PER_OBJECT)
            if record.maps >> number & 1:
                where = map_object(record.map, number)
                try:
                    data = await reader.fetch(where, entry * MAP_ENTRY_SIZE, MAP_ENTRY_SIZE)
                except SheepError:
                    continue
                if int.from_bytes(data, "little") == layer_of(oid):
                    users[oid].append(User(name, index * OBJECT_SIZE))
    return users
