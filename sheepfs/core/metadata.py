"""The metadata model: the keys that a cluster keeps in etcd, and the records behind them.

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

from sheepfs.core.clustermap import MAX_COPIES
from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.geometry import MAX_VDI_SIZE

FORMAT = 2
"""2: layer ids carry family and copies; snapshots, trash."""
MAX_NAME_BYTES = 128
MAX_TAG_BYTES = 64
MAX_ATTRIBUTES_BYTES = 4096
"""All attributes of a VDI or snapshot together, names and values."""


class Keys:
    """Names of a cluster's keys, all below `/sheepfs/<cluster>/`."""

    def __init__(self, cluster: str) -> None:
        check_cluster_name(cluster)
        self.root = f"/sheepfs/{cluster}/"
        self.config = self.root + "config"
        self.map = self.root + "map"
        self.leader = self.root + "leader"
        self.nodes = self.root + "nodes/"
        self.alive = self.root + "alive/"
        self.pools = self.root + "pools/"
        self.vdis = self.root + "vdis/"
        self.vdi_names = self.root + "vdi-names/"
        self.locks = self.root + "locks/"
        self.layers = self.root + "layers/"
        self.trash = self.root + "trash/"
        self.snapshots = self.root + "snapshots/"
        self.retired = self.root + "retired/"
        self.requests = self.root + "requests/"
        self.building = self.root + "building/"
        self.reclaim = self.root + "reclaim/"
        self.counters = self.root + "counters/"
        self.settings = self.root + "settings/"
        self.fencing = self.root + "fencing"
        self.importing = self.root + "importing"
        self.wishes = self.root + "wishes/"
        self.accepted_loss = self.root + "accepted-loss"

    def node(self, node: int) -> str:
        """Key of a node's permanent facts."""
        return f"{self.nodes}{node}"

    def alive_node(self, node: int) -> str:
        """Leased key of a running node."""
        return f"{self.alive}{node}"

    def pool(self, copies: int) -> str:
        """Key that asks the leader for a pool of `copies`."""
        return f"{self.pools}{copies}"

    def vdi(self, name: str) -> str:
        """Key of a VDI's record."""
        return self.vdis + name

    def vdi_name(self, vdi: int) -> str:
        """Key of a VDI's current name, to find its record by id."""
        return f"{self.vdi_names}{vdi}"

    def lock(self, vdi: int) -> str:
        """Leased key of the mount that holds a VDI."""
        return f"{self.locks}{vdi}"

    def layer(self, layer: int) -> str:
        """Key of a layer's birth."""
        return f"{self.layers}{layer}"

    def trashed(self, item: int) -> str:
        """Key of a deleted VDI or snapshot that can still be restored."""
        return f"{self.trash}{item}"

    def snapshots_of(self, vdi: int) -> str:
        """Prefix of a VDI's snapshots."""
        return f"{self.snapshots}{vdi}/"

    def snapshot(self, vdi: int, tag: str) -> str:
        """Key of a snapshot's record."""
        return f"{self.snapshots}{vdi}/{tag}"

    def retired_name(self, name: str) -> str:
        """Key that keeps the name of a deleted VDI for its snapshots."""
        return self.retired + name

    def requests_to(self, vdi: int) -> str:
        """Prefix of what others ask of a VDI's holder."""
        return f"{self.requests}{vdi}/"

    def request(self, vdi: int, number: str) -> str:
        """Leased key of one request to a VDI's holder."""
        return f"{self.requests}{vdi}/{number}"

    def building_layer(self, layer: int) -> str:
        """Leased key of a layer whose map is being made: reclaim leaves it alone."""
        return f"{self.building}{layer}"

    def reclaim_family(self, family: int) -> str:
        """Key that asks for a look at what a family does not use any more."""
        return f"{self.reclaim}{family}"

    def setting(self, what: str) -> str:
        """Key of what operators have set for all daemons, for example `recovery`."""
        return self.settings + what

    def wish(self, node: int) -> str:
        """Key of what operators want of a node."""
        return f"{self.wishes}{node}"

    def counter(self, what: str) -> str:
        """Key of the last id given out: `node`, `vdi` or `layer`."""
        return self.counters + what


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


def check_cluster_name(name: str) -> None:
    """Refuse cluster names that cannot be part of a key (UsageError)."""
    if (
        not name
        or len(name) > 64
        or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
    ):
        raise UsageError(f"cluster name {name!r}: use 1 to 64 letters, digits, '-', '_' or '.'")


def check_vdi_name(name: str) -> None:
    """Refuse VDI names that cannot be a file name in the mount (UsageError)."""
    size = len(name.encode(errors="surrogateescape"))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise UsageError(f"VDI name of {size} bytes: use 1 to {MAX_NAME_BYTES}")
    if name.startswith("."):
        raise UsageError(f"VDI name {name!r} starts with a dot")
    if "@" in name:
        raise UsageError(f"VDI name {name!r}: '@' is reserved for snapshots")
    if "/" in name or not name.isprintable():
        raise UsageError(f"VDI name {name!r} has a '/' or a character that cannot be printed")


def check_tag(tag: str) -> None:
    """Refuse snapshot tags that cannot be part of a file name in the mount (UsageError)."""
    size = len(tag.encode(errors="surrogateescape"))
    if not 1 <= size <= MAX_TAG_BYTES:
        raise UsageError(f"snapshot tag of {size} bytes: use 1 to {MAX_TAG_BYTES}")
    if tag.startswith((".", "-")) or "@" in tag or "/" in tag or not tag.isprintable():
        raise UsageError(
            f"snapshot tag {tag!r}: no '@', '/' or control characters, no '.' or '-' in front"
        )
    if tag.endswith(".raw"):
        # `t.raw` of a VDI `vm1` and `t` of `vm1.raw` would be one file in the mount.
        raise UsageError(f"snapshot tag {tag!r}: leave out the .raw")


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Refuse attributes that do not fit in a record (UsageError)."""
    for name in attributes:
        if not name or len(name) > 200 or not name.isprintable():
            raise UsageError(f"attribute name {name!r}: use 1 to 200 printable characters")
    size = sum(len(k.encode(errors="surrogateescape")) for pair in attributes.items() for k in pair)
    if size > MAX_ATTRIBUTES_BYTES:
        raise UsageError(
            f"attributes of {size} bytes: all together may have {MAX_ATTRIBUTES_BYTES}"
        )


def check_vdi_size(size_bytes: int) -> None:
    """Refuse sizes that a VDI cannot have (UsageError)."""
    if not 0 <= size_bytes <= MAX_VDI_SIZE:
        raise UsageError(f"size of {size_bytes} bytes: a VDI has 0 to {MAX_VDI_SIZE} (1 PiB)")


def check_copies(copies: int) -> None:
    """Refuse numbers of copies that no pool can have (UsageError)."""
    if not 1 <= copies <= MAX_COPIES:
        raise UsageError(f"{copies} copies: a VDI has 1 to {MAX_COPIES}")


def full_name(name: str) -> str:
    """Give the name in the mount for a name from the command line: `vm1` means `vm1.raw`."""
    return name if name.endswith(".raw") else name + ".raw"


def snapshot_file(name: str, tag: str) -> str:
    """Give the file name of a snapshot: `daily` of `vm1.raw` is `vm1@daily.raw`."""
    stem, suffix = (name[:-4], ".raw") if name.endswith(".raw") else (name, "")
    return f"{stem}@{tag}{suffix}"


def split_name(text: str) -> tuple[str, str]:
    """Give (VDI, tag) for a file name in the mount; the tag is empty for a VDI's own name.

    `vm1@daily.raw` is (`vm1.raw`, `daily`), and so is `vm1.raw@daily`.
    """
    stem, at, tag = text.partition("@")
    if not at:
        return text, ""
    if tag.endswith(".raw"):
        return stem + ".raw", tag[:-4]
    return stem, tag
