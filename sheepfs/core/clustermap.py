"""The cluster map: which nodes there are, and which of them hold each placement group.

Always holds:
- A map never changes; each change makes a new one whose epoch is one higher.
- A PG's `changed` is the epoch in which its members last changed; a request made with an older
  epoch is refused by every member (the epoch gate).
- A PG that ever had a `sync` member always has one: the last one is never voted out (I8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from sheepfs.core.errors import ProtocolError

MAX_COPIES = 5


class NodeState(StrEnum):
    """What the leader thinks of a node."""

    ACTIVE = "active"
    RECOVERING = "recovering"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Node:
    """One storage daemon with one data directory.

    Attributes:
        weight: share of data relative to other nodes; by default the disk's size in GiB.
        incarnation: number of the daemon's run, never reused; a new run is not trusted until
            it has caught up.
        address: host:port at which this incarnation listens.
        returns: how often it came back without having stayed for long in between.
        up_since: when it came (back), in seconds since 1970; 0: not known.
        held_until: it comes and goes, and is not let in before; 0: it may come at once.
    """

    id: int
    state: NodeState
    address: str
    incarnation: int
    zone: str
    weight: float
    down_since: float = 0.0
    returns: int = 0
    up_since: float = 0.0
    held_until: float = 0.0


@dataclass(frozen=True, slots=True)
class PlacementGroup:
    """Members of one placement group: `sync` ones hold everything, `joining` ones catch up.

    Attributes:
        away: nodes that were voted out and are still expected back, so that a return costs only
            what they missed. Not members: they get no writes and give no reads.
        lost: epoch in which the group last went on though each `sync` member had ended since it
            was one: what they had acknowledged and not flushed may be gone; 0: never.
    """

    changed: int
    sync: tuple[int, ...]
    joining: tuple[int, ...] = ()
    away: tuple[int, ...] = ()
    lost: int = 0

    @property
    def members(self) -> tuple[int, ...]:
        """All nodes that every write must reach."""
        return self.sync + self.joining


@dataclass(frozen=True)
class ClusterMap:
    """One epoch's map.

    Attributes:
        cluster: the cluster's unique id (hex), so that no node talks to another cluster's.
        pools: number of copies -> its placement groups.
    """

    epoch: int
    cluster: str
    nodes: Mapping[int, Node] = field(default_factory=dict)
    pools: Mapping[int, tuple[PlacementGroup, ...]] = field(default_factory=dict)

    def needed(self, copies: int) -> int:
        """Give how many `sync` members a PG of `copies` needs to take writes.

        Half of the copies, rounded up; with fewer nodes than copies, of what there is.
        """
        return max(1, -(-min(copies, len(self.nodes)) // 2))

    def writable(self, copies: int, pg: int) -> bool:
        """Tell whether PG `pg` of the pool takes writes."""
        return len(self.pools[copies][pg].sync) >= self.needed(copies)

    @cached_property
    def encoded(self) -> bytes:
        """The map as JSON bytes, as it is kept in etcd and sent to peers."""
        return json.dumps(self._as_json(), separators=(",", ":")).encode()

    def _as_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "epoch": self.epoch,
            "cluster": self.cluster,
            "nodes": [
                [
                    *(n.id, n.state, n.address, n.incarnation, n.zone, n.weight, n.down_since),
                    *(n.returns, n.up_since, n.held_until),
                ]
                for n in self.nodes.values()
            ],
            "pools": {
                str(copies): [_row(group) for group in pgs] for copies, pgs in self.pools.items()
            },
        }

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> ClusterMap:
        """Parse `encoded`.

        Raises:
            ProtocolError: the bytes are no map of a format that this version knows.
        """
        try:
            raw = json.loads(bytes(data))
            if raw["format"] != 1:
                raise ProtocolError(f"cluster map of format {raw['format']}; this version knows 1")
            nodes = {node.id: node for node in map(_node, raw["nodes"])}
            pools = {int(copies): tuple(map(_group, pgs)) for copies, pgs in raw["pools"].items()}
            return cls(int(raw["epoch"]), str(raw["cluster"]), nodes, pools)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ProtocolError(f"not a cluster map: {error}") from error

    def with_changes(
        self,
        nodes: Mapping[int, Node] | None = None,
        pools: Mapping[int, tuple[PlacementGroup, ...]] | None = None,
    ) -> ClusterMap:
        """Give the next epoch's map; the caller stamps `changed` of PGs with `self.epoch + 1`."""
        return replace(
            self,
            epoch=self.epoch + 1,
            nodes=self.nodes if nodes is None else nodes,
            pools=self.pools if pools is None else pools,
        )


def _row(group: PlacementGroup) -> list[Any]:
    """Give a group's JSON, without what is empty at its end: there are thousands in a map."""
    row = [group.changed, group.sync, group.joining, group.away, group.lost]
    while not row[-1] and len(row) > 3:
        row.pop()
    return row


def _group(row: list[Any]) -> PlacementGroup:
    changed, sync, joining, *more = row
    away, lost = (*more, *((), 0)[len(more) :])[:2]
    sync, joining, away = (tuple(map(int, ids)) for ids in (sync, joining, away))
    return PlacementGroup(int(changed), sync, joining, away, int(lost))


def _node(row: list[Any]) -> Node:
    # Maps of versions that did not know the last three do not have them.
    returns, up_since, held_until = row[7:10] if len(row) > 7 else (0, 0.0, 0.0)
    return Node(
        int(row[0]),
        NodeState(row[1]),
        str(row[2]),
        int(row[3]),
        str(row[4]),
        float(row[5]),
        float(row[6]),
        int(returns),
        float(up_since),
        float(held_until),
    )
