"""The metadata model: the records that a cluster keeps in etcd (their keys are in keys.py).

Always holds:
- About 1 KB for each VDI; never a record for each object.
- Every record is JSON with a `format`; a newer format is refused, not guessed at.
- Ids (node, VDI, layer) come from counters that only grow.
Source: docs/etcd.md lists every key with an example.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from sheepfs.core.errors import ProtocolError

FORMAT = 2
"""2: layer ids carry family and copies; snapshots, trash."""


class Record:
    """JSON encoding shared by all records below (each is a frozen dataclass)."""

    def encode(self) -> bytes:
        """Give the record as it is kept in etcd."""
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()  # type: ignore[call-overload]

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """Parse `encode`'s bytes; fields that this version does not know are an error.

        Raises:
            ProtocolError: the bytes are no such record, or of a newer format.
        """
        try:
            raw: dict[str, Any] = json.loads(bytes(data))
            found = raw.pop("format")
            if found != FORMAT:
                raise ProtocolError(
                    f"{cls.__name__} of format {found}; this version knows {FORMAT}"
                )
            kinds = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]
            for name, value in raw.items():
                kind = kinds[name]
                good = {
                    "int": isinstance(value, int) and not isinstance(value, bool),
                    "float": isinstance(value, int | float) and not isinstance(value, bool),
                    "str": isinstance(value, str),
                    "bool": isinstance(value, bool),
                    "dict[str, str]": isinstance(value, dict)
                    and all(isinstance(v, str) for v in value.values()),
                }[str(kind)]
                if not good:
                    raise ProtocolError(f"{cls.__name__}.{name} is {value!r}, not {kind}")
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"not a {cls.__name__}: {error!r}") from error


@dataclass(frozen=True, slots=True)
class ClusterConfig(Record):
    """`config`: what is fixed when the first node makes the cluster."""

    cluster: str
    """Unique id of the cluster (32 hex digits)."""
    pg_count: int = 256
    """Placement groups of each pool."""
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeRecord(Record):
    """`nodes/<id>`: permanent facts of a node; the id is never reused."""

    id: int
    uuid: str
    """Written to the data directory too: the two must agree."""
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class AliveRecord(Record):
    """`alive/<id>`, leased: a running daemon."""

    id: int
    incarnation: int
    address: str
    zone: str
    weight: float


MAX_WEIGHT = 1e9
BY_CAPACITY = -1.0
"""A wish's weight: what the node announces, by default the size of its disk in GiB."""


@dataclass(frozen=True, slots=True)
class NodeWish(Record):
    """`wishes/<id>`: what operators want of a node, whether it runs or not; none: nothing."""

    id: int
    draining: bool = False
    """Its data is to move to others."""
    removed: bool = False
    """It leaves the cluster for good, as soon as no placement group needs it."""
    weight: float = BY_CAPACITY

    @property
    def has_weight(self) -> bool:
        """Whether operators have set its weight; what is none counts as not set."""
        return 0 <= self.weight < MAX_WEIGHT

    @property
    def leaves(self) -> bool:
        """Whether it is to be given no data."""
        return self.draining or self.removed


@dataclass(frozen=True, slots=True)
class Patience(Record):
    """`settings/patience`: with nodes that come and go."""

    returns: int = 3
    """So many returns in a row cost nothing."""
    longest_s: float = 300.0
    """A node is held out for no longer; 0: nobody is ever held out."""


@dataclass(frozen=True, slots=True)
class AcceptedLoss(Record):
    """`accepted-loss`: the operator's word that the nodes which hold some groups won't come back.

    It counts for a group that has not changed since, and that no node holding it is back for. The
    leader acts upon it at most once, and removes it.
    """

    epoch: int
    """Of the map that the word was given on."""
    groups: dict[str, str]
    """`pool-pg` -> `node:incarnation`: what this run has of the group is all of it from now on."""

    @classmethod
    def of(cls, epoch: int, chosen: Mapping[tuple[int, int], tuple[int, int]]) -> AcceptedLoss:
        """Make the record of (pool, pg) -> (node, incarnation)."""
        groups = {f"{pool}-{pg}": f"{n}:{run}" for (pool, pg), (n, run) in chosen.items()}
        return cls(epoch, groups)

    def checked(self) -> AcceptedLoss:
        """Give the record if `chosen` can be read. Raises ProtocolError."""
        self.chosen()
        return self

    def chosen(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Give (pool, pg) -> (node, incarnation). Raises ProtocolError."""
        try:
            return {
                (int(pool), int(pg)): (int(node), int(run))
                for group, member in self.groups.items()
                for pool, pg in [group.split("-")]
                for node, run in [member.split(":")]
            }
        except ValueError as error:
            raise ProtocolError(f"not an AcceptedLoss: {error}") from error


@dataclass(frozen=True, slots=True)
class LeaderRecord(Record):
    """`leader`, leased: the daemon that writes the cluster map."""

    node: int
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class VdiRecord(Record):
    """`vdis/<name>`: a VDI. Sizes in bytes, times in seconds since 1970 (for people only)."""

    id: int
    size: int
    copies: int
    layer: int
    """The open layer: it takes writes."""
    map: int
    """The layer id under which the VDI's map objects are stored."""
    family: int
    """The first layer of the VDI that this one goes back to: what may share data."""
    next: int = 0
    """A second open layer, while a snapshot is under way."""
    parent: int = 0
    """Id of the snapshot made of it last, rolled back to, or cloned; 0: none."""
    generation: int = 0
    """Grows with each attach: high bits of the versions that the holder gives out."""
    clean: bool = True
    """False while attached: found so by the next holder, replicas may differ (I2)."""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    created: float = 0.0
    modified: float = 0.0
    changed: float = 0.0
    maps: int = 0
    """Bit i is set when map object i exists: missing is never zeros (I3)."""
    allocated: int = 0
    """Bytes of objects that the VDI's map named when it was last flushed."""
    attributes: dict[str, str] = field(default_factory=dict)
    """What users keep with it (`user.*` extended attributes, without the prefix)."""


@dataclass(frozen=True, slots=True)
class SnapshotRecord(Record):
    """`snapshots/<vdi id>/<tag>`: a VDI at one moment. Its id is of the VDIs' counter."""

    id: int
    vdi: int
    size: int
    copies: int
    map: int
    family: int
    maps: int = 0
    parent: int = 0
    """The snapshot before it, in the VDI that it was made of."""
    allocated: int = 0
    created: float = 0.0
    protected: bool = False
    """Not to be deleted."""
    mode: int = 0o444
    uid: int = 0
    gid: int = 0
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LockRecord(Record):
    """`locks/<vdi id>`, leased: the mount that holds a VDI."""

    vdi: int
    generation: int
    owner: str
    """`host:pid:mountpoint` for messages."""
    token: int = 0
    """Fencing number; 0 until a reclaim: the revision of the transaction that put this lock."""


@dataclass(frozen=True, slots=True)
class FencingRecord(Record):
    """`fencing`: what tokens and generations begin at; there only after an import."""

    base: int = 0
    """Added to etcd's revision, which makes a token: a new etcd counts from 1 again."""
    generation: int = 0
    """No attach has a lower one."""


@dataclass(frozen=True, slots=True)
class ImportRecord(Record):
    """`importing`: an import is under way, or ended half-way; there is no `config` yet."""

    checksum: str
    """Of the file that is imported: only the same one completes it."""
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class NameRecord(Record):
    """`vdi-names/<vdi id>`: changes in the same transaction as `vdis/<name>`."""

    name: str


@dataclass(frozen=True, slots=True)
class RetiredRecord(Record):
    """`retired/<name>`: the name stays with a deleted VDI that has snapshots."""

    vdi: int


@dataclass(frozen=True, slots=True)
class LayerRecord(Record):
    """`layers/<id>`: from a layer's birth until its last object is gone.

    Also what is in `building/<id>`, leased: a layer whose map is being made.
    """

    vdi: int
    family: int
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class TrashRecord(Record):
    """`trash/<id>`: a deleted VDI or snapshot; all its data is kept until it is purged."""

    id: int
    name: str
    """The VDI's name, `vm1.raw`."""
    tag: str
    """The snapshot's tag; empty for a VDI."""
    family: int
    deleted: float
    until: float
    """When it is purged, in seconds since 1970."""
    record: str
    """The VdiRecord or SnapshotRecord as it was, JSON."""


@dataclass(frozen=True, slots=True)
class RecoveryRecord(Record):
    """`settings/recovery`: how daemons recover. Without the key, these defaults hold."""

    parallel: int = 4
    """Objects that a node copies at the same time."""
    bandwidth: int = 0
    """Bytes per second that a node copies at most; 0: as fast as clients' requests let it."""
    paused: bool = False
    """Nothing is copied but what clients write to."""
    out_after_s: float = 600.0
    """A node down for longer is given up: its share is rebuilt elsewhere."""

    def __post_init__(self) -> None:
        """Refuse what no daemon could go by (ValueError, for people)."""
        if not 1 <= self.parallel <= 64:
            raise ValueError(f"{self.parallel} objects in parallel: use 1 to 64")
        if self.bandwidth and self.bandwidth < 1 << 20:
            raise ValueError("a bandwidth of less than 1 MiB/s: pause recovery instead")
        if not 1 <= self.out_after_s <= 1e9:
            raise ValueError("out-after: use a second or more")


@dataclass(frozen=True, slots=True)
class RequestRecord(Record):
    """`requests/<vdi id>/<number>`, leased by who asks: to be done by the VDI's holder."""

    what: str
    """`snapshot`, `clone`, `freeze`, `resize`, `flatten` or `copies`."""
    arguments: dict[str, str] = field(default_factory=dict)
    done: int = 0
    """Objects done, of what takes long; written by the holder now and then."""
    total: int = 0
    outcome: str = ""
    """Written by the holder: `done`, or `error: ` and the reason."""


@dataclass(frozen=True, slots=True)
class ScrubRecord(Record):
    """`settings/scrub`: how storage daemons check what they have."""

    enabled: bool = True
    rate: int = 20 << 20
    """Bytes per second that each node checks at most."""
    deep_days: float = 14.0
    """Days in which all bytes of every replica are read once."""
    light_days: float = 1.0
    """Days in which the replicas of every object are compared once."""
