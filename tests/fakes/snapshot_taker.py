"""What tests of the catalog share: snapshots as a holder would make them."""

from __future__ import annotations

from dataclasses import replace

from fakes.etcd import FakeEtcd
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, Put, Transaction, Unchanged
from sheepfs.core.metadata import SnapshotRecord
from sheepfs.net.catalog import Catalog

KEYS = Keys("test")
NOW = 1_700_000_000.0
FIRST_SNAPSHOT = 1000
"""Ids of snapshots made here are the map's serial and this: none is a VDI's."""


async def put(etcd: FakeEtcd, key: str, value: bytes) -> None:
    await etcd.commit(Transaction([], [Put(key, value)]))


async def remove(etcd: FakeEtcd, key: str) -> None:
    await etcd.commit(Transaction([], [Delete(key)]))


async def take_snapshot(
    catalog: Catalog, etcd: FakeEtcd, vdi_name: str, tag: str, protected: bool = False
) -> SnapshotRecord:
    """Do what the holder does in the end: one transaction, built on the VDI's record."""
    record, revision = await catalog.vdi(vdi_name)
    lease = await etcd.grant(10)
    layer, opened = await catalog.begin_layers(record.id, record.family, record.copies, 2, lease)
    number = FIRST_SNAPSHOT + layer
    snapshot = SnapshotRecord(
        number, record.id, record.size, record.copies, layer, record.family,
        parent=record.parent, created=NOW + layer, protected=protected,
    )  # fmt: skip
    conditions: list[Unchanged] = []
    changes: list[Put | Delete] = []
    for each in (layer, opened):
        condition, change = catalog.built(await catalog.building(each))
        conditions.append(condition)
        changes.append(change)

    txn = Transaction(
        [Unchanged(KEYS.vdi(vdi_name), revision), *conditions],
        [
            *changes,
            Put(KEYS.vdi(vdi_name), replace(record, layer=opened, parent=number).encode()),
            Put(KEYS.snapshot(record.id, tag), snapshot.encode()),
        ],
    )
    assert await etcd.commit(txn) is not None
    return snapshot
