"""Helpers of the store's tests."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from storaged.store.disk import Disk
from storaged.store.entry import OK, SUSPECT
from storaged.store.objects import ObjectStore
from storaged.store.patch import Patch, PatchBuilder

CLUSTER = "c0ffee"
_versions = itertools.count(1)


def open_store(disk: Disk, **options: Any) -> ObjectStore:
    options.setdefault("cluster", CLUSTER)
    options.setdefault("create", True)
    return ObjectStore.open(Path("/nowhere"), disk=disk, **options)


def put(store: ObjectStore, oid: int, offset: int = 0, data: bytes = b"", **options: Any) -> int:
    """Mark and write with a version of its own; give the version."""
    version = next(_versions)
    if not store.is_marked(oid):
        store.mark([oid])
    if options.get("create"):
        options.setdefault("pool", 3)
        options.setdefault("pg", oid % 4)
    store.write(oid, offset, data, version, **options)
    return version


def get(store: ObjectStore, oid: int, offset: int = 0, length: int = 4 << 20) -> bytes:
    pieces = store.read(oid, offset, length, wait=True)
    assert pieces is not None
    return b"".join(pieces)


def flush(store: ObjectStore, layer: int | None = None) -> None:
    job = store.begin_flush(layer)
    while job is not None:
        job.run()
        job = store.end_flush(job)


def copy(store: ObjectStore, base: int, oid: int, offset: int = 0, data: bytes = b"") -> int:
    """Mark an object, make it a copy of another and write to it; give the version."""
    return put(store, oid, offset, data, create=True, pg=base % 4, base=base)


def level(store: ObjectStore, source: int, target: int, version: int, pg: int = 0) -> Patch:
    """Make one object equal to another of the same store, as if that were a peer's."""
    digests = store.digests(target)
    found = store.difference(source, digests)
    builder = PatchBuilder(digests)
    builder.add(found.encode())
    patch = builder.patch(version, found.lineage)
    store.mark([target])
    apply(store, target, patch, pg=pg)
    return patch


def apply(store: ObjectStore, oid: int, patch: Patch, *, pg: int = 0) -> None:
    """Patch an object as pulling does."""
    job = store.begin_patch(oid, patch, pool=3, pg=pg)
    job.run()
    store.end_patch(job)


def trust(store: ObjectStore, oid: int) -> None:
    """Look into a suspect as it is; its blocks are still checked when read."""
    entry = store.get(oid)
    assert entry is not None
    assert entry.state == SUSPECT
    entry.state = OK
