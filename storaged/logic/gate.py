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


class Gate:
    """This node's roles in one epoch, looked up for every request.

    Args:
        incarnation: this run's; while the map names a former run, nothing passes: a restarted
            node must not act on what the map says of its former self (I8).
    """

    def __init__(self, cluster_map: ClusterMap, node: int, incarnation: int) -> None:
        self._epoch = cluster_map.epoch
        known = cluster_map.nodes.get(node)
        self._is_known = known is not None and known.incarnation == incarnation
        self._groups: dict[int, list[tuple[int, Role | None]]] = {
            pool: [(group.changed, _role_of(group, node)) for group in groups]
            for pool, groups in cluster_map.pools.items()
        }

    def check(self, header: Header) -> Role:
        """Give this node's role for the request's placement group, or refuse.

        Raises:
            Refusal: STALE_EPOCH when the group changed after the sender's epoch; BUSY when the
                sender knows a newer map than this node (it must see that one first), or this run
                is not in the map yet; NOT_MEMBER; BAD_REQUEST for a group that is not there.
        """
        epoch = header.epoch
        if not self._is_known:
            raise Refusal(Status.BUSY, "this node has just started and is not in the map")
        if epoch > self._epoch:
            raise Refusal(Status.BUSY, f"this node only knows epoch {self._epoch}")
        try:
            changed, role = self._groups[header.pool][header.pg]
        except (KeyError, IndexError):
            raise Refusal(
                Status.BAD_REQUEST, f"there is no group {header.pg} in pool {header.pool}"
            ) from None
        if epoch < changed:
            raise Refusal(Status.STALE_EPOCH, f"group {header.pg} changed in epoch {changed}")
        if role is None:
            raise Refusal(Status.NOT_MEMBER, f"this node is not a member of group {header.pg}")
        return role

    def check_sync(self, header: Header) -> None:
        """Like `check`, and only a member that has everything passes."""
        if self.check(header) is not Role.SYNC:
            raise Refusal(Status.NOT_MEMBER, "this node has not caught up yet")

    def check_object(self, header: Header) -> None:
        """Refuse an object that is not of the group that the request names."""
        if pg_of(header.oid, len(self._groups[header.pool])) != header.pg:
            raise Refusal(
                Status.BAD_REQUEST, f"object {header.oid:016x} is not of group {header.pg}"
            )


def _role_of(group: PlacementGroup, node: int) -> Role | None:
    if node in group.sync:
        return Role.SYNC
    return Role.JOINING if node in group.joining else None
