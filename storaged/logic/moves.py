"""Which groups may begin to move to other nodes now: a few at a time.

Pure. Moves are made for balance, to empty a node, or to spread over zones; a group that lacks a
copy does not move, it recovers, and that is never held back.

Always holds:
- A move begins only in a group that is whole, and ends before the group's next one begins.
- No node takes part in more than `PER_NODE` changes of groups because of moves, and no more than
  `ALL` groups change at a time. Recovery counts, so moves wait for it, never the other way.
- A move that has not begun is nowhere: the next decision plans it anew from what is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

PER_NODE = 4
"""As many groups as a node catches up with at a time: each move is through before the next."""
ALL = 64
"""Each move is two epochs, which all nodes and mounts hear of."""


class Move(NamedTuple):
    """A group that could begin to move.

    Attributes:
        nodes: those that would take part: the members, and who joins.
        empties: it moves away from a node that is to be emptied.
    """

    pool: int
    pg: int
    nodes: frozenset[int]
    empties: bool


def to_begin(pending: Iterable[Move], under_way: Iterable[Collection[int]]) -> set[tuple[int, int]]:
    """Give (pool, pg) of the moves that begin now.

    Args:
        under_way: for each group in which somebody catches up, the nodes that take part.
    """
    busy: Counter[int] = Counter()
    count = 0
    for nodes in under_way:
        busy.update(nodes)
        count += 1
    begun = set()
    for move in sorted(pending, key=lambda move: (not move.empties, move.pool, move.pg)):
        if count >= ALL:
            break
        if all(busy[node] < PER_NODE for node in move.nodes):
            busy.update(move.nodes)
            count += 1
            begun.add((move.pool, move.pg))
    return begun
