"""The superblock `sheepfs.json`: which cluster and node a data directory belongs to.

Always holds:
- It is the last file that making a store writes, so a directory without it holds no data of
  ours; it is refused unless it is empty or such a half-made store.
- It is replaced as a whole, and carries a checksum.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass

from xxhash import xxh3_64_hexdigest

from sheepfs.core.errors import CorruptError, WrongClusterError
from storaged.store.disk import Disk, make_directory, read_file, replace_file
from storaged.store.format import FORMAT

NAME = "sheepfs.json"
LOCK = "lock"
_DIRECTORIES = ("objects", "quarantine", "tmp")
_SKELETON = {*_DIRECTORIES, LOCK, "dirty.log", "tokens.log", "lost+found"}


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a data directory knows of itself.

    Attributes:
        node: None until the cluster gave an id.
        epoch: the highest of the cluster maps that it was served by, written a little later; 0:
            none yet, or written by a version that did not keep it.
    """

    cluster: str
    uuid: str
    node: int | None = None
    epoch: int = 0


def _checksum(fields: dict[str, object]) -> str:
    return xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def write(disk: Disk, superblock: Superblock) -> None:
    """Replace the superblock durably (OSError)."""
    fields: dict[str, object] = {"format": FORMAT, **asdict(superblock)}
    fields["check"] = _checksum(fields)
    replace_file(disk, NAME, json.dumps(fields, indent=1).encode() + b"\n")


def read(disk: Disk) -> Superblock | None:
    """Read the superblock; None if there is none.

    Raises:
        WrongClusterError: the directory was made by a version with another format.
        CorruptError: the file is damaged.
        OSError: the disk failed.
    """
    try:
        data = read_file(disk, NAME)
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(data)
        found = int(fields["format"])
        if found > FORMAT:
            raise WrongClusterError(
                f"the data directory has format {found}; this version knows up to {FORMAT}"
            )
        if found < FORMAT:
            raise WrongClusterError(
                f"the data directory has format {found}, which was never released; this version"
                f" needs {FORMAT}: give it an empty directory, and the peers fill it"
            )
        check = fields.pop("check")
        if check != _checksum(fields):
            raise CorruptError(f"{NAME}: the checksum does not match")
        node = fields["node"]
        return Superblock(
            str(fields["cluster"]),
            str(fields["uuid"]),
            None if node is None else int(node),
            int(fields.get("epoch", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{NAME} is damaged: {error!r}") from error


def check_vacant(disk: Disk) -> None:
    """Refuse a directory that holds anything but what a half-made store leaves.

    Raises:
        WrongClusterError: there is something else in it.
    """
    foreign = set(disk.listdir("")) - _SKELETON
    if not foreign and "objects" in disk.listdir(""):
        foreign = set(disk.listdir("objects"))
    if foreign:
        raise WrongClusterError(
            f"the directory holds {sorted(foreign)[0]!r} and no {NAME}: it is not an empty"
            " directory and not a data directory of sheepfs"
        )


def make_directories(disk: Disk) -> None:
    """Make the directories of a store (OSError)."""
    made = [make_directory(disk, name) for name in _DIRECTORIES]
    if any(made):
        disk.fsync_dir("")


def fresh(cluster: str, node_uuid: str) -> Superblock:
    """Give the superblock of a new store; an empty `node_uuid` makes one up."""
    return Superblock(cluster, node_uuid or uuid.uuid4().hex)
