"""The command `sheepctl rescue`: a VDI from data directories alone, without etcd and daemons."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sheepfs.core.errors import UsageError, VdiNotFoundError
from sheepfs.core.geometry import OBJECT_SIZE, tag_of
from sheepfs.core.metadata_export import NamedMap, named_maps
from sheepfs.core.names import full_name, snapshot_file, split_name
from sheepfs_tools.progress import progress
from sheepfs_tools.sheepctl.commands.metadata import read_export
from sheepfs_tools.sheepctl.output import moment, print_json, print_table, printable
from sheepfs_tools.sizes import format_size
from sheepfs_tools.transfer.files import check_target, new_file, say
from sheepfs_tools.transfer.rescue_image import Range, Rescued, write_image
from storaged.store.offline import OfflineDirectory
from storaged.store.salvage import Salvage
from storaged.store.storedmap import StoredMap, map_layers, read_map

_SHOWN = 20
"""Damaged copies told to a person; programs get all."""


async def rescue(arguments: argparse.Namespace) -> int:
    """List what can be rescued, or rebuild one VDI or snapshot."""
    what, paths = _what_and_where(arguments)
    if not arguments.list:
        if arguments.out is None:
            raise UsageError("--out FILE says where the image goes")
        check_target(arguments.out, arguments.force)
    with ExitStack() as stack:
        directories = [
            stack.enter_context(OfflineDirectory.open(path)) for path in dict.fromkeys(paths)
        ]
        salvage = Salvage(directories)
        named = await _named(arguments.metadata, directories)
        layers = map_layers(salvage)
        for directory in directories:
            for where, why in directory.unlisted.items():
                say(f"{directory.path / where} cannot be listed: {why}")
        if arguments.list:
            return _list(salvage, layers, named, arguments.json)
        chosen = _choose(what, layers, named)
        return await _rebuild(salvage, chosen, layers, arguments)


def _what_and_where(arguments: argparse.Namespace) -> tuple[str, list[Path]]:
    """Give the name and the directories, also of `--data DIR... NAME`."""
    what, data = arguments.what, list(arguments.data)
    if what is None and not arguments.list and len(data) > 1 and not Path(data[-1]).is_dir():
        what = data.pop()
    if not data:
        raise UsageError("--data DIR says where the data directories are")
    if arguments.list and what is not None:
        raise UsageError("--list takes no name")
    if not arguments.list and what is None:
        raise UsageError("which VDI or map? --list shows what there is")
    return what or "", [Path(text) for text in data]


async def _named(path: str | None, directories: Sequence[OfflineDirectory]) -> list[NamedMap]:
    if path is None:
        return []
    export = await read_export(path)
    own = directories[0].superblock.cluster
    if export.cluster != own:
        raise UsageError(f"{path} is of cluster {export.cluster}, the directories are of {own}")
    return named_maps(export)


def _choose(what: str, layers: dict[int, list[int]], named: Sequence[NamedMap]) -> NamedMap:
    """Find a VDI or snapshot by its name, or a map by its number.

    Raises:
        VdiNotFoundError: there is none.
        UsageError: several have that name.
    """
    name, tag = split_name(what)
    file = snapshot_file(full_name(name), tag) if tag else full_name(name)
    found = [one for one in named if one.name == file]
    living = [one for one in found if not one.trashed]
    if len(living or found) > 1:
        maps = ", ".join(f"{one.map:#x}" for one in found)
        raise UsageError(f"{file} was deleted more than once: choose by the map, of {maps}")
    if found:
        return (living or found)[0]
    try:
        layer = int(what, 0)
    except ValueError:
        hint = "" if named else ": names are only known with --metadata FILE"
        raise VdiNotFoundError(
            f"there is no VDI {file!r}{hint}; --list shows what there is"
        ) from None
    by_number = [one for one in named if one.map == layer]
    if by_number:
        return by_number[0]
    if layer not in layers:
        raise VdiNotFoundError(f"there is no map {layer:#x} here; --list shows what there is")
    return NamedMap("", False, layer, 0, 0, 0, 0)


async def _rebuild(
    salvage: Salvage, chosen: NamedMap, layers: dict[int, list[int]], arguments: argparse.Namespace
) -> int:
    vdi_map = read_map(salvage, chosen.map, layers.get(chosen.map, []), chosen.maps)
    size = chosen.size
    if vdi_map.end and (vdi_map.end - 1) * OBJECT_SIZE >= size:
        size = vdi_map.end * OBJECT_SIZE
        if chosen.name:
            say(f"the map names more than {chosen.name} had when the metadata was exported")
    name = chosen.name or f"map {chosen.map:#x}"
    result = Rescued(name, chosen.map, arguments.out, size)
    total = sum(OBJECT_SIZE for _ in vdi_map.entries())
    with progress(name, total, arguments.json) as moved:
        async with new_file(arguments.out) as (fd, _):
            write_image(salvage, vdi_map, fd, result, moved)
    _report(result, arguments.json)
    return int(not result.whole)


def _report(result: Rescued, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result) | {"whole": result.whole})
        return
    for problem in result.problems[:_SHOWN]:
        print(printable(f"damaged copy: {problem}"))
    if len(result.problems) > _SHOWN:
        print(f"... and {len(result.problems) - _SHOWN} more (--json gives all)")
    for title, found in (("MISSING", result.missing), ("DOUBTFUL", result.doubtful)):
        if found:
            print_table((">START", ">END", ">LENGTH", title), map(_row, found))
    missing = sum(one.end - one.start for one in result.missing)
    verdict = "nothing is missing"
    if missing:
        verdict = f"{format_size(missing)} missing: holes in the file"
    elif result.doubtful:
        verdict = "nothing is missing, not all of it is proven"
    print(
        printable(
            f"Rescued {result.name} to {result.file}: {format_size(result.size)},"
            f" {format_size(result.data)} of data; {verdict}"
        )
    )


def _row(one: Range) -> tuple[object, ...]:
    return one.start, one.end, format_size(one.end - one.start), one.why


# -- what there is --------------------------------------------------------------------------


def _list(
    salvage: Salvage, layers: dict[int, list[int]], named: Sequence[NamedMap], as_json: bool
) -> int:
    known: dict[int, list[NamedMap]] = {}
    for one in named:
        known.setdefault(one.map, []).append(one)
    rows = []
    with progress("maps", len(layers), as_json, things=True) as moved:
        for layer in sorted({*layers, *known}):
            expected = max((one.maps for one in known.get(layer, ())), default=0)
            vdi_map = read_map(salvage, layer, layers.get(layer, []), expected)
            rows.append(_candidate(vdi_map, known.get(layer, [])))
            moved(1)
    bad = any(row["lost"] for row in rows)
    if as_json:
        print_json(rows)
    elif not rows:
        print("There are no maps: no VDI was ever flushed to these directories.")
    else:
        print_table(
            ("MAP", "NAME", ">TAG", ">OBJECTS", ">SIZE", ">ATTACH", "CHANGED", "NOTE"),
            (_candidate_row(row, bool(named)) for row in rows),
        )
    return int(bad)


def _candidate(vdi_map: StoredMap, records: Sequence[NamedMap]) -> dict[str, Any]:
    return {
        "map": vdi_map.layer,
        "names": [one.name for one in records],
        "trashed": bool(records) and all(one.trashed for one in records),
        "tag": tag_of(vdi_map.layer),
        "objects": sum(1 for _ in vdi_map.entries()),
        "least_size": vdi_map.end * OBJECT_SIZE,
        "size": max((one.size for one in records), default=None),
        "version": vdi_map.version,
        "changed": vdi_map.changed,
        "layers": sorted({layer for _, layer in vdi_map.entries()}),
        "lost": vdi_map.lost,
        "problems": vdi_map.problems,
    }


def _candidate_row(row: dict[str, Any], has_names: bool) -> tuple[object, ...]:
    notes = ["in the trash"] * row["trashed"]
    notes += ["no name has it"] * (has_names and not row["names"])
    notes += [f"parts of the map are lost: {len(row['lost'])}"] * bool(row["lost"])
    notes += ["nothing was ever stored"] * (not row["version"] and not row["lost"])
    size = row["size"]
    return (
        f"{row['map']:#x}",
        ", ".join(row["names"]),
        row["tag"],
        row["objects"],
        format_size(size) if size is not None else f"at least {format_size(row['least_size'])}",
        row["version"] >> 40,
        moment(row["changed"]),
        "; ".join(notes),
    )
