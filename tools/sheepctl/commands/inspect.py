"""The command `sheepctl inspect DATA_DIR`: what a stopped daemon's directory holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sheepfs.core.errors import ObjectNotFoundError, UsageError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    copies_of,
    format_oid,
    index_of,
    is_map_object,
    layer_of,
    tag_of,
)
from sheepfs_tools.progress import progress
from sheepfs_tools.sheepctl.output import moment, print_facts, print_json, print_table, printable
from sheepfs_tools.sizes import format_size
from sheepfs_tools.transfer.files import STREAM, check_stdout, check_target, new_file, write_all
from storaged.logic.rescue import ranges
from storaged.store.format import FORMAT
from storaged.store.offline import OfflineDirectory, StoredCopy
from storaged.store.salvage import Salvage, Salvaged


@dataclass
class _Layer:
    data: int = 0
    maps: int = 0
    bytes: int = 0
    suspect: int = 0
    damaged: int = 0
    newest: int = 0


@dataclass
class _Found:
    """What a walk through all objects found."""

    layers: dict[int, _Layer] = field(default_factory=dict)
    damage: list[dict[str, Any]] = field(default_factory=list)

    def count(self, copy: StoredCopy) -> None:
        layer = self.layers.setdefault(layer_of(copy.oid), _Layer())
        if is_map_object(copy.oid):
            layer.maps += 1
        else:
            layer.data += 1
        layer.bytes += copy.blocks * BLOCK_SIZE
        layer.suspect += copy.suspect
        layer.damaged += bool(copy.problem)
        layer.newest = max(layer.newest, copy.version)


async def inspect(arguments: argparse.Namespace) -> int:
    """Look into a data directory; with `--verify` check every block."""
    modes = [name for name in ("list", "object", "dump") if getattr(arguments, name)]
    if len(modes) > 1 or (modes and arguments.verify):
        raise UsageError("--verify, --list, --object and --dump each stand alone")
    with OfflineDirectory.open(Path(arguments.directory)) as directory:
        if arguments.list:
            return _list(directory, arguments.json)
        if arguments.object is not None:
            return _show(directory, _oid(arguments.object), arguments.json)
        if arguments.dump is not None:
            return await _dump(directory, _oid(arguments.dump), arguments)
        return _summary(directory, arguments.verify, arguments.json)


def _oid(text: str) -> int:
    try:
        oid = int(text, 16)
    except ValueError:
        oid = -1
    if not 0 <= oid < 1 << 64:
        raise UsageError(
            f"object {text!r}: use its 16 hex digits, as sheepctl inspect --list shows"
        )
    return oid


# -- all of it ------------------------------------------------------------------------------


def _summary(directory: OfflineDirectory, verify: bool, as_json: bool) -> int:
    found = _walk(directory, verify, as_json)
    block = directory.superblock
    facts: dict[str, Any] = {
        "directory": str(directory.path),
        "cluster": block.cluster,
        "node": block.node,
        "uuid": block.uuid,
        "format": FORMAT,
        "clean": directory.clean,
        "marked": len(directory.marked),
        "marks_lost": directory.marks_lost,
        "tokens": len(directory.tokens),
        "tokens_lost": directory.tokens_lost,
        "quarantined": directory.quarantined,
        "unlisted": directory.unlisted,
        "verified": verify,
        "objects": sum(one.data + one.maps for one in found.layers.values()),
        "bytes": sum(one.bytes for one in found.layers.values()),
        "layers": [_layer_facts(layer, one) for layer, one in sorted(found.layers.items())],
        "damaged": found.damage,
    }
    bad = bool(found.damage or directory.marks_lost or directory.tokens_lost or directory.unlisted)
    if as_json:
        print_json(facts)
    else:
        _print_summary(facts)
    return int(bad)


def _walk(directory: OfflineDirectory, verify: bool, quiet: bool) -> _Found:
    """Read all headers, and all data if asked."""
    found = _Found()
    oids = directory.oids()
    with progress("verify" if verify else "headers", len(oids), quiet, things=True) as moved:
        for oid in oids:
            for copy in directory.copies(oid):
                found.count(copy)
                problem = copy.problem
                blocks: list[int] = []
                if not problem and verify:
                    blocks = directory.verify(copy)
                    if blocks:
                        problem = "blocks do not match their checksums"
                if problem:
                    found.damage.append(
                        {
                            "object": format_oid(oid),
                            "path": str(directory.path / copy.path),
                            "problem": problem,
                            "blocks": blocks,
                            "suspect": copy.suspect,
                        }
                    )
            moved(1)
    return found


def _layer_facts(layer: int, one: _Layer) -> dict[str, Any]:
    return {
        "layer": layer,
        "tag": tag_of(layer),
        "copies": copies_of(layer),
        "data": one.data,
        "maps": one.maps,
        "bytes": one.bytes,
        "suspect": one.suspect,
        "damaged": one.damaged,
        "newest": one.newest,
    }


def _print_summary(facts: dict[str, Any]) -> None:
    node = "none yet" if facts["node"] is None else facts["node"]
    marks = "all: dirty.log is damaged" if facts["marks_lost"] else facts["marked"]
    tokens = "damaged: the daemon will not start" if facts["tokens_lost"] else facts["tokens"]
    print_facts(
        [
            ("cluster", facts["cluster"]),
            ("node", f"{node} ({facts['uuid']})"),
            ("format", facts["format"]),
            ("last stop", "clean" if facts["clean"] else "not clean"),
            ("marked dirty", marks),
            ("fencing tokens", tokens),
            ("quarantine", len(facts["quarantined"])),
            ("objects", f"{facts['objects']}, {format_size(facts['bytes'])} in their own files"),
        ]
    )
    for path, why in facts["unlisted"].items():
        print(printable(f"cannot be listed: {path}: {why}"))
    if facts["layers"]:
        print()
        print_table(
            ("LAYER", ">TAG", ">COPIES", ">DATA", ">MAPS", ">SIZE", ">DIRTY", ">DAMAGED"),
            (
                (
                    f"{one['layer']:#x}",
                    one["tag"],
                    one["copies"],
                    one["data"],
                    one["maps"],
                    format_size(one["bytes"]),
                    one["suspect"],
                    one["damaged"],
                )
                for one in facts["layers"]
            ),
        )
    if facts["damaged"]:
        print()
    for one in facts["damaged"]:
        blocks = ", ".join(_runs(one["blocks"]))
        note = " (marked dirty: perhaps only written after the last flush)"
        print(
            printable(f"damaged: {one['path']}: {one['problem']}" + (blocks and f": {blocks}"))
            + (note if one["suspect"] and blocks else "")
        )
    if facts["verified"] and not facts["damaged"]:
        print("\nEvery block matches its checksum.")


def _runs(numbers: list[int]) -> Iterator[str]:
    for start, end in ranges(numbers):
        yield str(start) if end == start + 1 else f"{start}-{end - 1}"


# -- one line for each object ---------------------------------------------------------------


def _copy_facts(directory: OfflineDirectory, copy: StoredCopy) -> dict[str, Any]:
    return {
        "object": format_oid(copy.oid),
        "kind": "map" if is_map_object(copy.oid) else "data",
        "layer": layer_of(copy.oid),
        "index": index_of(copy.oid),
        "version": copy.version,
        "lineage": copy.lineage,
        "bytes": copy.blocks * BLOCK_SIZE,
        "bases": [] if copy.sources is None else list(copy.sources.layers),
        "suspect": copy.suspect,
        "problem": copy.problem,
        "path": str(directory.path / copy.path),
        "changed": copy.changed,
    }


def _list(directory: OfflineDirectory, as_json: bool) -> int:
    """Print the objects as they are read: there may be millions."""
    bad = 0
    write = sys.stdout.write
    if as_json:
        write("[")
    between = ""
    for oid in directory.oids():
        for copy in directory.copies(oid):
            bad += bool(copy.problem)
            facts = _copy_facts(directory, copy)
            if as_json:
                write(between + "\n" + json.dumps(facts))
                between = ","
            else:
                write(printable(_line(facts)) + "\n")
    if as_json:
        write("\n]\n")
    return int(bad > 0)


def _line(facts: dict[str, Any]) -> str:
    notes = ["dirty"] * facts["suspect"]
    notes += [f"{len(facts['bases'])} bases"] * bool(facts["bases"])
    notes += [f"DAMAGED: {facts['problem']}"] * bool(facts["problem"])
    return (
        f"{facts['object']}  {facts['kind']:<4}  layer {facts['layer']:#x}  index"
        f" {facts['index']:<8}  version {facts['version']:#x}  {format_size(facts['bytes']):>9}"
        + ("  " + ", ".join(notes) if notes else "")
    )


# -- one object -----------------------------------------------------------------------------


def _salvaged(directory: OfflineDirectory, oid: int) -> Salvaged:
    if oid not in directory:
        raise ObjectNotFoundError(f"there is no object {format_oid(oid)} in {directory.path}")
    return Salvage([directory]).object(oid)


def _show(directory: OfflineDirectory, oid: int, as_json: bool) -> int:
    whole = _salvaged(directory, oid)
    files = [_copy_facts(directory, copy) for copy in directory.copies(oid)]
    bad = bool(whole.lost or whole.unverified or whole.problems)
    if as_json:
        print_json(
            {
                "files": files,
                "data": len(whole.blocks) * BLOCK_SIZE,
                "lost": whole.lost,
                "unverified": whole.unverified,
                "problems": whole.problems,
            }
        )
        return int(bad)
    for facts in files:
        print_facts(
            [
                ("object", facts["object"]),
                ("kind", facts["kind"]),
                ("layer", f"{facts['layer']:#x}"),
                ("index", facts["index"]),
                ("version", f"{facts['version']:#x}"),
                ("lineage", facts["lineage"]),
                ("own data", format_size(facts["bytes"])),
                ("inherits from", ", ".join(f"{b:#x}" for b in facts["bases"]) or "nothing"),
                ("marked dirty", "yes" if facts["suspect"] else "no"),
                ("changed", moment(facts["changed"])),
                ("file", facts["path"]),
            ]
        )
    _tell(whole, print)
    return int(bad)


def _tell(whole: Salvaged, say: Callable[[str], None]) -> None:
    for problem in whole.problems:
        say(printable(f"damaged: {problem}"))
    if whole.lost:
        say(f"lost blocks: {', '.join(_runs(whole.lost))}")
    if whole.unverified:
        runs = ", ".join(_runs(whole.unverified))
        say(f"blocks that match no checksum, taken as they are: {runs}")


async def _dump(directory: OfflineDirectory, oid: int, arguments: argparse.Namespace) -> int:
    path = arguments.out
    if path != STREAM:
        check_target(path, arguments.force)
    whole = _salvaged(directory, oid)
    if not whole.version:
        raise ObjectNotFoundError("; ".join(whole.problems))
    if path == STREAM:
        await write_all(check_stdout(), whole.content())
    else:
        async with new_file(path) as (fd, _):
            await write_all(fd, whole.content())
    if arguments.json and path != STREAM:
        print_json(
            {
                "object": format_oid(oid),
                "file": path,
                "version": whole.version,
                "lost": whole.lost,
                "unverified": whole.unverified,
            }
        )
    else:
        _tell(whole, lambda line: print(f"sheepctl: {line}", file=sys.stderr))
    return int(bool(whole.lost or whole.unverified))
