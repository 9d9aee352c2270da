"""The metadata model: the keys that a cluster keeps in etcd, and the records behind them.

Always holds:
- About 1 KB for each VDI; never a record for each object.
- Every record is JSON with a `format`; a newer format is refused, not guessed at.
- Ids (node, VDI, layer) come from counters that only grow.
Source: docs/etcd.md lists every key with an example.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from sheepfs.core.clustermap import MAX_COPIES
from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.geometry import MAX_VDI_SIZE

FORMAT = 1
MAX_NAME_BYTES = 128


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
        self.counters = self.root + "counters/"

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

    def trashed(self, layer: int) -> str:
        """Key of a layer whose VDI was deleted and whose objects are still to be freed."""
        return f"{self.trash}{layer}"

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
    draining: bool = False


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
    """The active layer: its map objects tell where every object of the VDI is."""
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
    """Bit i is set when the active layer's map object i exists: missing is never zeros (I3)."""
    allocated: int = 0
    """Bytes of objects that the VDI owned when it was last flushed."""


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
class NameRecord(Record):
    """`vdi-names/<vdi id>`: changes in the same transaction as `vdis/<name>`."""

    name: str


@dataclass(frozen=True, slots=True)
class LayerRecord(Record):
    """`layers/<id>`: one generation of a VDI's data."""

    vdi: int
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class TrashRecord(Record):
    """`trash/<layer id>`: what is needed to free the objects of a deleted VDI's layer."""

    layer: int
    vdi: int
    copies: int
    size: int
    """Bytes; objects may lie beyond it if the VDI was cut while a node was away."""
    maps: int = 0
    """Bit i is set when map object i of the layer existed."""
    deleted: float = 0.0


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
