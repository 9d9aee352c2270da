"""Placement: which nodes should hold each placement group. A pure function of its arguments.

Always holds:
- A PG's members are distinct nodes, over as many zones as there can be: with enough zones no two
  members share one, else the members are spread over all zones as evenly as the zones allow.
- Every node gets its weight's share, rounded down or up, as far as the spread allows.
- Members move only to fill a gap, to even out a surplus, or to restore the spread.

How: quotas are computed first (weights, cut to what the spread allows, rounded towards what is
there). Gaps are filled and surpluses moved by weighted rendezvous hashing over zones then nodes
among those below their quota; where that is stuck, the shortest chain of moves is taken.
Source: Thaler and Ravishankar, "A name-based mapping scheme for rendezvous" (1996); weights as in
Schindelhain and Schomaker, "Weighted distributed hash tables" (2005).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from xxhash import xxh3_64_intdigest

_WINDOW = 64
"""Most candidates scored for one gap; more would cost time and spread nothing better."""
_EPSILON = 1e-9
"""Shares this near to a whole number are whole."""


_Key = TypeVar("_Key", bound=Hashable)


class Candidate(NamedTuple):
    """A node that may hold data. `zone` is its failure domain, `weight` its relative share."""

    zone: str
    weight: float


def place(
    nodes: Mapping[int, Candidate],
    copies: int,
    pg_count: int,
    previous: Sequence[Sequence[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Give the members that each of `pg_count` placement groups should have.

    Args:
        nodes: candidates; those of weight 0 get nothing unless there are no others.
        copies: members wanted for each PG; with fewer candidates, all are members.
        previous: for each PG the members it has, those to keep first; may be more than `copies`.
    """
    usable = {n: c for n, c in nodes.items() if c.weight > 0}
    usable = usable or {n: Candidate(c.zone, 1.0) for n, c in nodes.items()}
    copies = min(copies, len(usable))
    if not copies:
        return [()] * pg_count
    board = _Board(usable, copies, pg_count, previous or [()] * pg_count)
    board.fill_gaps()
    board.even_out()
    return [tuple(row) for row in board.rows]


class _Board:
    """Rows of members being changed until every quota is met.

    Always holds: every row can still be completed within the spread (`fits` refuses anything else).
    """

    def __init__(
        self,
        nodes: Mapping[int, Candidate],
        copies: int,
        pg_count: int,
        previous: Sequence[Sequence[int]],
    ) -> None:
        self.copies = copies
        self.previous = previous
        self.zone = {n: nodes[n].zone for n in sorted(nodes)}
        self.by_zone: dict[str, list[int]] = defaultdict(list)
        for node, zone in self.zone.items():
            self.by_zone[zone].append(node)
        self.low, self.high = _spread({z: len(ids) for z, ids in self.by_zone.items()}, copies)
        self.node_key = {n: n.to_bytes(8, "little") for n in self.zone}
        self.zone_key = {z: z.encode(errors="surrogateescape") for z in self.by_zone}
        self.rows: list[list[int]] = [[] for _ in range(pg_count)]
        self.pgs_of: dict[int, dict[int, None]] = {n: {} for n in self.zone}
        self.lacking = dict.fromkeys(self.zone, 0)
        """Quota less what the node has; negative is surplus."""
        self.zone_lacking = dict.fromkeys(self.by_zone, 0)
        for pg, row in enumerate(self.rows):
            for node in previous[pg]:
                if node in self.zone and self.fits(pg, node):
                    row.append(node)
                    self.pgs_of[node][pg] = None
        self._set_quotas(nodes)
        by_hash = sorted(self.by_zone, key=lambda z: (xxh3_64_intdigest(self.zone_key[z]), z))
        self.lacking_in = {
            z: {n for n in self.by_zone[z] if self.lacking[n] > 0}
            for z in by_hash
            if any(self.lacking[n] > 0 for n in self.by_zone[z])
        }

    def _set_quotas(self, nodes: Mapping[int, Candidate]) -> None:
        """Set how many PGs each node should have; the sums fit the spread exactly."""
        pg_count = len(self.rows)
        total = self.copies * pg_count
        shares = _share(
            total,
            {z: sum(nodes[n].weight for n in ids) for z, ids in self.by_zone.items()},
            {z: low * pg_count for z, low in self.low.items()},
            {z: high * pg_count for z, high in self.high.items()},
        )
        have = {n: len(pgs) for n, pgs in self.pgs_of.items()}
        have_in = {z: sum(have[n] for n in ids) for z, ids in self.by_zone.items()}
        self.zone_quota = _round(total, shares, have_in)
        self.quota: dict[int, int] = {}
        for zone, ids in self.by_zone.items():
            weights = {n: nodes[n].weight for n in ids}
            wanted = _share(
                shares[zone], weights, dict.fromkeys(ids, 0), dict.fromkeys(ids, pg_count)
            )
            self.quota.update(_round(self.zone_quota[zone], wanted, have))
            self.zone_lacking[zone] = self.zone_quota[zone] - have_in[zone]
        self.lacking = {n: quota - have[n] for n, quota in self.quota.items()}

    def put(self, pg: int, node: int) -> None:
        """Make a node a member."""
        self.rows[pg].append(node)
        self.pgs_of[node][pg] = None
        self._count(node, -1)

    def take(self, pg: int, node: int) -> None:
        """Make a node a member no more."""
        self.rows[pg].remove(node)
        del self.pgs_of[node][pg]
        self._count(node, 1)

    def _count(self, node: int, step: int) -> None:
        zone = self.zone[node]
        self.lacking[node] += step
        self.zone_lacking[zone] += step
        if self.lacking[node] > 0:
            self.lacking_in.setdefault(zone, set()).add(node)
        elif zone in self.lacking_in:
            self.lacking_in[zone].discard(node)
            if not self.lacking_in[zone]:
                del self.lacking_in[zone]

    def closed_zones(self, pg: int) -> set[str]:
        """Give the zones that may not take one more member of a PG that has a gap."""
        row = self.rows[pg]
        used = Counter([self.zone[n] for n in row])
        if len(self.by_zone) < self.copies:
            owed = {z: low - used[z] for z, low in self.low.items() if used[z] < low}
            if sum(owed.values()) >= self.copies - len(row):
                return self.by_zone.keys() - owed
        return {z for z, count in used.items() if count >= self.high[z]}

    def fits(self, pg: int, node: int) -> bool:
        """Tell whether the PG has a gap that the node may fill."""
        row = self.rows[pg]
        return (
            len(row) < self.copies
            and node not in row
            and self.zone[node] not in self.closed_zones(pg)
        )

    def pick(self, pg: int, remaining: int = 0) -> int | None:
        """Choose a node below its quota for the PG's gap; None if none fits.

        Args:
            remaining: PGs with gaps, this one included; who lacks as many must be in each of them.
        """
        for node in self.previous[pg]:
            if self.lacking.get(node, 0) > 0 and self.fits(pg, node):
                return node
        closed = self.closed_zones(pg)
        row = set(self.rows[pg])

        def choose(zones: Iterable[str]) -> int | None:
            best = [z for z in zones if z not in closed and not self.lacking_in[z] <= row]
            if not best:
                return None
            zone = min(best, key=lambda z: (_draw(self.zone_key[z], pg, self.zone_quota[z]), z))
            inside = list(self.lacking_in[zone] - row)
            must = [n for n in inside if self.lacking[n] >= remaining] if remaining else []
            return min(
                must or _window(inside, pg),
                key=lambda n: (_draw(self.node_key[n], pg, self.quota[n]), n),
            )

        zones = list(self.lacking_in)
        if remaining:
            forced = choose([z for z in zones if self.zone_lacking[z] >= remaining])
            if forced is not None:
                return forced
        chosen = choose(_window(zones, pg))
        return choose(zones) if chosen is None and len(zones) > _WINDOW else chosen

    def fill_gaps(self) -> None:
        """Complete every row, with nodes below their quota as long as they fit."""
        gaps = [pg for pg, row in enumerate(self.rows) if len(row) < self.copies]
        for done, pg in enumerate(gaps):
            while len(self.rows[pg]) < self.copies:
                node = self.pick(pg, len(gaps) - done)
                if node is None:
                    break
                self.put(pg, node)
        for pg in gaps:
            while len(self.rows[pg]) < self.copies:
                if not self._chain([(pg, None)]):
                    fitting = [n for n in self.zone if self.fits(pg, n)]
                    self.put(pg, min(fitting, key=lambda n: _draw(self.node_key[n], pg, 1)))

    def even_out(self) -> None:
        """Move members from nodes above their quota to nodes below it."""
        for node in [n for n, lack in self.lacking.items() if lack < 0]:
            self._unload(node)
        for node, lack in list(self.lacking.items()):
            for _ in range(2 * -lack):
                if self.lacking[node] < 0:
                    self._chain([(pg, node) for pg in self.pgs_of[node]])

    def _unload(self, node: int) -> None:
        """Hand PGs of `node` straight to nodes that lack some; first those that it fits least."""

        def order(pg: int) -> tuple[bool, float]:
            free = any(self.lacking.get(n, 0) > 0 for n in self.previous[pg])
            return not free, -_draw(self.node_key[node], pg, 1)

        for pg in sorted(self.pgs_of[node], key=order):
            if self.lacking[node] >= 0:
                return
            self.take(pg, node)
            other = self.pick(pg)
            self.put(pg, node if other is None else other)

    def _chain(self, starts: Iterable[tuple[int, int | None]]) -> bool:
        """Make the shortest chain of moves that ends at a node below its quota.

        Breadth first over (PG, member that leaves it). Each member that enters a PG leaves
        another one, where the next of the chain takes its place.
        """
        seen: set[int] = set()
        came: dict[tuple[int, int | None], tuple[int, int | None] | None] = dict.fromkeys(starts)
        queue = deque(came)
        while queue:
            state = queue.popleft()
            pg, leaving = state
            if leaving is not None:
                self.take(pg, leaving)
            closed = self.closed_zones(pg)
            row = self.rows[pg]
            goal = self._goal(pg, closed, leaving)
            enter = [] if goal is not None else self._open_nodes(closed, seen, row, leaving)
            if leaving is not None:
                self.put(pg, leaving)
            if goal is not None:
                return self._apply(state, goal, came)
            seen.update(enter)
            for node in enter:
                for other in self.pgs_of[node]:
                    if other != pg and (other, node) not in came:
                        came[other, node] = state
                        queue.append((other, node))
        return False

    def _goal(self, pg: int, closed: set[str], leaving: int | None) -> int | None:
        row = {*self.rows[pg], leaving}
        open_ = [z for z in self.lacking_in if z not in closed]
        fitting = [n for z in open_ for n in self.lacking_in[z] if n not in row]
        return min(fitting, key=lambda n: _draw(self.node_key[n], pg, 1), default=None)

    def _open_nodes(
        self, closed: set[str], seen: set[int], row: list[int], leaving: int | None
    ) -> list[int]:
        return [
            n
            for z, ids in self.by_zone.items()
            if z not in closed
            for n in ids
            if n not in seen and n != leaving and n not in row
        ]

    def _apply(
        self,
        state: tuple[int, int | None] | None,
        node: int,
        came: Mapping[tuple[int, int | None], tuple[int, int | None] | None],
    ) -> bool:
        # From the end of the chain to its start, so that every step alone is a legal move.
        while state is not None:
            pg, leaving = state
            if leaving is not None:
                self.take(pg, leaving)
            if not self.fits(pg, node):
                # An earlier step of this chain changed this PG; what was done is legal as it is.
                if leaving is not None:
                    self.put(pg, leaving)
                return False
            self.put(pg, node)
            if leaving is not None:
                node = leaving
            state = came[state]
        return True


def _spread(zones: Mapping[str, int], copies: int) -> tuple[dict[str, int], dict[str, int]]:
    """Give the fewest and the most members of one PG in each zone, from the zones' node counts."""
    level = 1
    while sum(min(count, level) for count in zones.values()) < copies:
        level += 1
    return (
        {z: min(count, level - 1) for z, count in zones.items()},
        {z: min(count, level) for z, count in zones.items()},
    )


def _share(
    total: float, weights: Mapping[_Key, float], low: Mapping[_Key, int], high: Mapping[_Key, int]
) -> dict[_Key, float]:
    """Divide `total` in proportion to weights, each share kept within its bounds."""

    def shares(factor: float) -> dict[_Key, float]:
        return {k: min(max(w * factor, low[k]), high[k]) for k, w in weights.items()}

    points = sorted(bound[k] / w for k, w in weights.items() for bound in (low, high))
    first, last = 0, len(points) - 1
    while first < last:
        middle = (first + last + 1) // 2
        if math.fsum(shares(points[middle]).values()) <= total:
            first = middle
        else:
            last = middle - 1
    # Between this point and the next, the sum grows by the weights of those within bounds.
    factor = points[first]
    free = {k for k, w in weights.items() if low[k] <= w * factor < high[k]}
    fixed = {k: min(max(w * factor, low[k]), high[k]) for k, w in weights.items() if k not in free}
    rest, weight = total - math.fsum(fixed.values()), math.fsum(weights[k] for k in free)
    return {
        k: fixed[k] if k in fixed else min(max(rest * w / weight, low[k]), high[k])
        for k, w in weights.items()
    }


def _round(total: int, shares: Mapping[_Key, float], have: Mapping[_Key, int]) -> dict[_Key, int]:
    """Round shares down or up so that they sum to `total`; up first where it saves a move."""
    quota = {k: math.floor(share + _EPSILON) for k, share in shares.items()}
    up = sorted(
        (k for k, share in shares.items() if share - quota[k] > _EPSILON),
        key=lambda k: (have[k] <= quota[k], quota[k] - shares[k], _tie(k)),
    )
    for key in up[: total - sum(quota.values())]:
        quota[key] += 1
    return quota


def _window(candidates: list[_Key], pg: int) -> list[_Key]:
    """Give the few of many candidates that are scored for the PG."""
    if len(candidates) <= _WINDOW:
        return candidates
    start = xxh3_64_intdigest(b"window", pg) % len(candidates)
    return (candidates[start:] + candidates[:start])[:_WINDOW]


def _tie(key: Hashable) -> int:
    """Order equals by hash, so that no end of the list is favoured."""
    return xxh3_64_intdigest(str(key).encode(errors="surrogateescape"))


def _draw(key: bytes, pg: int, weight: float) -> float:
    """Give an exponentially distributed number of rate `weight`; the least one wins."""
    return -math.log((xxh3_64_intdigest(key, pg) + 1) / (1 << 64)) / weight if weight else math.inf
