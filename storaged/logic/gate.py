"""The gate that stands before every request: is the sender's view of the world still valid?

Pure: takes the map, the tokens and a request's header, gives a verdict. DESIGN I6, I7, I8.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from sheepfs.core.clustermap import ClusterMap, PlacementGroup
from sheepfs.core.errors import Status
from sheepfs.core.geometry import pg_of
from sheepfs.core.wire import Header


class Role(Enum):
    """What this node is for a placement group."""

    SYNC = "sync"
    JOINING = "joining"


class Refusal(Exception):
    """The request must not be carried out; carries the status and a sentence for the reply."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_token(header: Header, tokens: Mapping[int, int]) -> None:
    """Refuse a holder that another one has replaced. Token 0 claims nothing (plain readers)."""
    if header.token and header.token < tokens.get(header.vdi, 0):
        raise Refusal(
            Status.FENCED,
            f"VDI {header.vdi} was taken over: token {header.token} is older than "
            f"{tokens[header.vdi]}",
        )


def check_write_token(header: Header, tokens: Mapping[int, int]) -> None:
    """Like `check_token`, and a writer must have one."""
    if not header.token:
        raise Refusal(Status.BAD_REQUEST, "a write needs the token of an attach")
    check_token(header, tokens)


def check_epoch(header: Header, cluster_map: ClusterMap, node: int) -> Role:
    """Give this node's role for the request's placement group, or refuse.

    Raises:
        Refusal: STALE_EPOCH when the group changed after the sender's epoch; BUSY when the
            sender knows a newer map than this node (it must see that one first); NOT_MEMBER;
            BAD_REQUEST for a pool or group that is not there or is not the object's.
    """
    pgs = cluster_map.pools.get(header.pool)
    if header.epoch > cluster_map.epoch:
        raise Refusal(Status.BUSY, f"this node only knows epoch {cluster_map.epoch}")
    if pgs is None or header.pg >= len(pgs):
        raise Refusal(Status.BAD_REQUEST, f"there is no group {header.pg} in pool {header.pool}")
    if header.oid and pg_of(header.oid, len(pgs)) != header.pg:
        raise Refusal(Status.BAD_REQUEST, f"object {header.oid:016x} is not of group {header.pg}")
    group = pgs[header.pg]
    if header.epoch < group.changed:
        raise Refusal(Status.STALE_EPOCH, f"group {header.pg} changed in epoch {group.changed}")
    return role_of(group, node, header.pg)


def role_of(group: PlacementGroup, node: int, pg: int) -> Role:
    """Give this node's role in a group, or refuse with NOT_MEMBER."""
    if node in group.sync:
        return Role.SYNC
    if node in group.joining:
        return Role.JOINING
    raise Refusal(Status.NOT_MEMBER, f"this node is not a member of group {pg}")
