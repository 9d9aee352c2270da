"""The etcd part of a cluster as one file: its format, and what has to change to live on in another.

Always holds:
- The file has all keys that hang on no lease, of one revision, and a checksum of all that.
- Ids never come back (I4): whoever imports it goes on from numbers beyond all that may have been
  given out after the export. The gaps are fixed, so that the same file gives the same keys.
- Tokens stay above those that data directories remember: the base of `fencing` is set beyond the
  revision of the export, as the new etcd counts from 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from xxhash import xxh3_128_hexdigest

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, SheepError, UsageError
from sheepfs.core.geometry import MAX_SERIAL
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import (
    ClusterConfig,
    FencingRecord,
    NameRecord,
    NodeRecord,
    Record,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
)
from sheepfs.core.names import snapshot_file

_R = TypeVar("_R", bound=Record)
WHAT = "sheepfs metadata"
FORMAT = 1
TOKEN_GAP = 1 << 40
"""More revisions than an etcd does between an export and its loss."""
GENERATION_GAP = 1 << 16
"""More attaches of one VDI than that; of generations there are 2^24."""
MAX_GENERATION = (1 << 24) - 1
EPOCH_GAP = 1 << 20
"""Lineages in the data directories are epochs."""
ID_GAPS = {"node": 1 << 10, "vdi": 1 << 16, "layer": 1 << 16}
_MAX_ID = {"node": (1 << 31) - 1, "vdi": (1 << 32) - 1, "layer": MAX_SERIAL}
_KEYS = Keys("x")
_LEASED = tuple(
    key.removeprefix(_KEYS.root)
    for key in (_KEYS.alive, _KEYS.leader, _KEYS.locks, _KEYS.requests, _KEYS.building)
)
_IMPORTING = _KEYS.importing.removeprefix(_KEYS.root)
_CONFIG = _KEYS.config.removeprefix(_KEYS.root)
_MAP = _KEYS.map.removeprefix(_KEYS.root)
_FENCING = _KEYS.fencing.removeprefix(_KEYS.root)


@dataclass(frozen=True, slots=True)
class Export:
    """What a file holds.

    Attributes:
        cluster: unique id of the cluster.
        name: how the cluster was called in etcd.
        created: when it was exported, in seconds since 1970; for people.
        revision: etcd's, of which all keys are.
        keys: without the cluster's prefix -> value.
    """

    cluster: str
    name: str
    created: float
    revision: int
    keys: Mapping[str, bytes]

    def encode(self) -> bytes:
        """Give the file."""
        body = self._body()
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode() + b"\n"

    @property
    def checksum(self) -> str:
        """What tells this export from any other."""
        return _checksum(self._body())

    def _body(self) -> dict[str, Any]:
        return {
            "what": WHAT,
            "format": FORMAT,
            "cluster": self.cluster,
            "name": self.name,
            "created": self.created,
            "revision": self.revision,
            "keys": {
                key: value.decode(errors="surrogateescape")
                for key, value in sorted(self.keys.items())
            },
        }

    @classmethod
    def decode(cls, data: bytes) -> Export:
        """Parse and check a file.

        Raises:
            ProtocolError: it is no such file, cut short, altered, or of a newer format.
        """
        try:
            body = json.loads(data)
            if body.get("what") != WHAT:
                raise ProtocolError("this is no export of sheepfs metadata")
            if body["format"] != FORMAT:
                raise ProtocolError(
                    f"the export has format {body['format']}; this version knows {FORMAT}"
                )
            if body.pop("checksum") != _checksum(body):
                raise ProtocolError("the checksum does not match: the export was altered")
            export = cls(
                str(body["cluster"]),
                str(body["name"]),
                float(body["created"]),
                int(body["revision"]),
                {key: text.encode(errors="surrogateescape") for key, text in body["keys"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"this is no export of sheepfs metadata, or not all of it: {error!r}"
            ) from error
        export.check()
        return export

    def check(self) -> None:
        """Check that the keys are those of a whole cluster.

        Raises:
            ProtocolError: they are not, or what all depends on cannot be read.
        """
        for key in self.keys:
            if key.startswith(_LEASED) or key in ("", _IMPORTING):
                raise ProtocolError(f"the export has a key {key!r}, which is never exported")
        if _CONFIG not in self.keys:
            raise ProtocolError("the export has no 'config': it is not of a whole cluster")
        found = {ClusterConfig.decode(self.keys[_CONFIG]).cluster}
        if _MAP in self.keys:
            found.add(ClusterMap.decode(self.keys[_MAP]).cluster)
        if found != {self.cluster}:
            raise ProtocolError("the export has keys of another cluster")
        for key, value in self.keys.items():
            if key.startswith("nodes/"):
                NodeRecord.decode(value)
        for what in ID_GAPS:
            self.counter(what)
        self.fencing()

    def counter(self, what: str) -> int:
        """Give the last id given out (ProtocolError)."""
        value = self.keys.get(f"counters/{what}", b"0")
        if not value.isdigit():
            raise ProtocolError(f"the export has {value!r} as counter {what!r}")
        return int(value)

    def epoch(self) -> int:
        """Give the epoch of the cluster map; 0 if there is none (ProtocolError)."""
        return ClusterMap.decode(self.keys[_MAP]).epoch if _MAP in self.keys else 0

    def fencing(self) -> FencingRecord:
        """Give what tokens and generations began at (ProtocolError)."""
        value = self.keys.get(_FENCING)
        return FencingRecord() if value is None else FencingRecord.decode(value)


def imported(export: Export) -> dict[str, bytes]:
    """Give the keys to put into another etcd, without the prefix; the same for the same file.

    Raises:
        UsageError: numbers would run out.
    """
    keys = dict(export.keys)
    for what, gap in ID_GAPS.items():
        last = export.counter(what) + gap
        if last > _MAX_ID[what]:
            raise UsageError(f"the ids of {what}s are used up: they cannot be imported once more")
        keys[f"counters/{what}"] = b"%d" % last
    before = export.fencing()
    generation = max([before.generation, *_generations(export)]) + GENERATION_GAP
    if generation + GENERATION_GAP > MAX_GENERATION:
        raise UsageError("generations of attaches are used up: copy the data to a new cluster")
    base = before.base + export.revision + TOKEN_GAP
    keys[_FENCING] = FencingRecord(base, generation).encode()
    if _MAP in keys:
        found = ClusterMap.decode(keys[_MAP])
        keys[_MAP] = dataclasses.replace(found, epoch=found.epoch + EPOCH_GAP).encoded
    return keys


@dataclass(frozen=True, slots=True)
class NamedMap:
    """A VDI or snapshot of an export, and where its map is.

    Attributes:
        name: `vm1.raw` or `vm1@daily.raw`.
        trashed: it is in the trash.
        map: layer id of its map objects.
        maps: bit i is set when map object i exists.
    """

    name: str
    trashed: bool
    map: int
    maps: int
    size: int
    copies: int
    family: int


def named_maps(export: Export) -> list[NamedMap]:
    """Give all VDIs and snapshots that can be read, by name; those in the trash last."""
    names = {
        key.removeprefix("vdi-names/"): record.name
        for key, record in _records(export, "vdi-names/", NameRecord)
    }
    found = [
        _named(key.removeprefix("vdis/"), False, record)
        for key, record in _records(export, "vdis/", VdiRecord)
    ]
    for key, snapshot in _records(export, "snapshots/", SnapshotRecord):
        owner, _, tag = key.removeprefix("snapshots/").partition("/")
        name = names.get(owner, f"vdi-{owner}")
        found.append(_named(snapshot_file(name, tag), False, snapshot))
    for _, item in _records(export, "trash/", TrashRecord):
        kind = SnapshotRecord if item.tag else VdiRecord
        try:
            record = kind.decode(item.record.encode(errors="surrogateescape"))
        except ProtocolError:
            continue
        name = snapshot_file(item.name, item.tag) if item.tag else item.name
        found.append(_named(name, True, record))
    return sorted(found, key=lambda one: (one.trashed, one.name))


def _named(name: str, trashed: bool, record: VdiRecord | SnapshotRecord) -> NamedMap:
    return NamedMap(
        name, trashed, record.map, record.maps, record.size, record.copies, record.family
    )


def _records(export: Export, prefix: str, kind: type[_R]) -> list[tuple[str, _R]]:
    found = []
    for key, value in export.keys.items():
        if key.startswith(prefix):
            try:
                found.append((key, kind.decode(value)))
            except SheepError:
                continue
    return found


def _generations(export: Export) -> list[int]:
    """Give the generations of all VDIs, also of those in the trash."""
    found = [record.generation for _, record in _records(export, "vdis/", VdiRecord)]
    for _, item in _records(export, "trash/", TrashRecord):
        if not item.tag:
            try:
                record = VdiRecord.decode(item.record.encode(errors="surrogateescape"))
            except ProtocolError:
                continue
            found.append(record.generation)
    return found


def _checksum(body: dict[str, Any]) -> str:
    fields = {key: value for key, value in body.items() if key != "checksum"}
    return xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
