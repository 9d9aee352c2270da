"""Is an export of the metadata older than the data? Asked of data directories before an import."""

from __future__ import annotations

from collections.abc import Iterator

from sheepfs.core.errors import UsageError
from sheepfs.core.geometry import OBJECT_SIZE, layer_of, serial_of
from sheepfs.core.metadata_export import Export, named_maps
from storaged.store.salvage import Salvage
from storaged.store.storedmap import map_layers, read_map


def refuse_older(export: Export, salvage: Salvage) -> None:
    """Raise UsageError, with reasons, if the directories know of what the export does not.

    That they do not proves nothing: a node that was voted out since, for example, leaves no trace.
    """
    if reasons := reasons_for_older(export, salvage):
        raise UsageError(
            "the export is older than the data: " + "; ".join(reasons) + ". Rescue what came"
            " later (sheepctl rescue --list --metadata); then import without --data"
        )


def reasons_for_older(export: Export, salvage: Salvage) -> list[str]:
    """Give what the directories know of and the export does not, in words.

    Raises:
        UsageError: they are of another cluster.
    """
    for directory in salvage.directories:
        if directory.superblock.cluster != export.cluster:
            raise UsageError(
                f"{directory.path} is of cluster {directory.superblock.cluster}, not"
                f" {export.cluster}"
            )
    return list(_newer(export, salvage))


def _newer(export: Export, salvage: Salvage) -> Iterator[str]:
    known = export.fencing().base + export.revision
    attached = {
        vdi
        for directory in salvage.directories
        for vdi, token in directory.tokens.items()
        if token > known
    }
    if attached:
        yield f"VDIs were attached later (id {', '.join(map(str, sorted(attached)))})"
    last = export.counter("layer")
    if any(serial_of(layer_of(oid)) > last for oid in salvage.oids()):
        yield "VDIs or snapshots were made later"
    there = map_layers(salvage)
    for one in named_maps(export):
        numbers = there.get(one.map, [])
        if any(not one.maps >> number & 1 for number in numbers):
            yield f"{one.name} was written to for the first time later"
        elif (read_map(salvage, one.map, numbers).end - 1) * OBJECT_SIZE >= max(one.size, 1):
            yield f"{one.name} grew later"
