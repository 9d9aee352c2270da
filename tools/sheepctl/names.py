"""Names as people type them: `vm1` is `vm1.raw`, `vm1@daily` is `vm1@daily.raw`."""

from __future__ import annotations

from contextlib import suppress

from sheepfs.core.errors import SnapshotNotFoundError, UsageError, VdiNotFoundError
from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.core.names import full_name, snapshot_file, split_name
from sheepfs.net.catalog import Catalog, Snapshot
from sheepfs_tools.sheepctl.output import printable


def candidates(name: str) -> list[str]:
    """Give the names that a VDI may have that was called `name`, the likelier first."""
    return list(dict.fromkeys((full_name(name), name)))


def vdi_only(text: str) -> str:
    """Refuse a snapshot's name where a VDI's is wanted (UsageError)."""
    if "@" in text:
        raise UsageError(f"{printable(text)} is a snapshot, a VDI is wanted here")
    return text


def snapshot_name(text: str) -> tuple[str, str]:
    """Give (VDI, tag) of a snapshot's name, `.raw` as it was typed (UsageError)."""
    name, tag = split_name(text)
    if not name or not tag:
        raise UsageError(f"{printable(text)} names no snapshot: write VDI@TAG, like vm1@daily")
    return name, tag


async def find_vdi(catalog: Catalog, text: str) -> tuple[str, VdiRecord]:
    """Find a VDI by its name, with or without `.raw` (VdiNotFoundError)."""
    for candidate in candidates(vdi_only(text)):
        with suppress(VdiNotFoundError):
            record, _ = await catalog.vdi(candidate)
            return candidate, record
    raise VdiNotFoundError(
        f"there is no VDI {printable(full_name(text))!r}: sheepctl vdi list shows all"
    )


async def find_snapshot(catalog: Catalog, text: str) -> Snapshot:
    """Find a snapshot by `vm1@daily`, `vm1.raw@daily` or `vm1@daily.raw`.

    Raises:
        SnapshotNotFoundError: there is none.
        UsageError: this is no name of a snapshot.
    """
    name, tag = snapshot_name(text)
    for candidate in candidates(name):
        with suppress(SnapshotNotFoundError):
            return await catalog.snapshot(candidate, tag)
    raise SnapshotNotFoundError(
        f"there is no snapshot {printable(snapshot_file(full_name(name), tag))!r}:"
        " sheepctl snapshot list shows all"
    )


async def find_either(catalog: Catalog, text: str) -> tuple[str, VdiRecord | SnapshotRecord]:
    """Find a VDI or a snapshot; gives its name in the mount and its record."""
    if "@" in text:
        found = await find_snapshot(catalog, text)
        return found.file, found.record
    return await find_vdi(catalog, text)


async def find_id(catalog: Catalog, text: str) -> int:
    """Give the id of a VDI, which may be deleted if it has snapshots (VdiNotFoundError)."""
    for candidate in candidates(vdi_only(text)):
        if (vdi := await catalog.id_of(candidate)) is not None:
            return vdi
    raise VdiNotFoundError(
        f"there is no VDI {printable(full_name(text))!r}, and no snapshot of one:"
        " sheepctl snapshot list shows all"
    )
