"""What a node checks next, how fast, and what it means when copies differ. Pure.

A *deep* pass reads every byte of this node's copies; a *light* pass compares versions and tables
of checksums with the other members of the groups that this node is the first `sync` member of.

Always holds:
- A pass goes through groups and objects in order; one that was interrupted goes on behind the last
  object that it has done. A light pass goes before a deep one, which may take days.
- No more than the limit is read, less while clients are busy, and never nothing for ever.
- A copy that fails its own checksums is the source of nothing, and no copy becomes an older one.
- Copies that are good by themselves and differ at one version and lineage stay as they are: nothing
  tells which of them is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

DAY_S = 86_400.0
MIN_INTERVAL_S = 1.0
MAX_DAYS = 3650.0
MIN_RATE = 1 << 16
"""Bytes per second; less would never end."""
QUIET_REQUESTS = 100.0
BUSY_REQUESTS = 1000.0
"""Requests of clients per second: up to the one a pass has its full rate, from the other on
`BUSY_SHARE` of it."""
BUSY_SHARE = 0.1
_GOLDEN = 0.6180339887498949


class Kind(StrEnum):
    """What a pass looks at."""

    LIGHT = "light"
    DEEP = "deep"


class Position(NamedTuple):
    """The last object that a pass has done; `oid` -1: none of the group yet."""

    pool: int
    pg: int
    oid: int


START = Position(0, 0, -1)
END_OF_GROUP = 1 << 64
"""As `oid`: the whole group is done."""

Groups = Sequence[tuple[int, int]]
"""(pool, pg), in order."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What operators have set. `intervals_s`: how often everything is looked at."""

    enabled: bool
    rate: float
    """Bytes per second."""
    intervals_s: Mapping[Kind, float]


def policy_of(enabled: bool, rate: float, light_days: float, deep_days: float) -> Policy:
    """Make a policy of numbers that somebody may have written by hand."""
    days = {Kind.LIGHT: light_days, Kind.DEEP: deep_days}
    # Not `max`: it lets NaN through.
    intervals = {
        kind: min(n, MAX_DAYS) * DAY_S if n * DAY_S >= MIN_INTERVAL_S else MIN_INTERVAL_S
        for kind, n in days.items()
    }
    return Policy(enabled, rate if rate >= MIN_RATE else MIN_RATE, intervals)


@dataclass(slots=True)
class Pass:
    """One kind's passes. Times are monotonic seconds.

    Attributes:
        finished: when the last one ended.
        position: how far the one under way is; None: none is.
        completed: how many there were.
        number: grows when one begins, so that who works for a former one can tell.
    """

    finished: float
    position: Position | None = None
    completed: int = 0
    number: int = 0

    def begin(self) -> None:
        """Begin anew, also if one is under way."""
        self.position = START
        self.number += 1

    def advance(self, number: int, position: Position) -> None:
        """Pass number `number` has come so far."""
        if self.number == number and self.position is not None:
            self.position = position

    def finish(self, number: int, now: float) -> bool:
        """Pass number `number` is through; tells whether that was the one under way."""
        if self.number != number or self.position is None:
            return False
        self.position = None
        self.finished = now
        self.completed += 1
        return True

    def left_of(self, groups: Groups) -> list[tuple[int, int]]:
        """Give the groups that the pass under way has not done, the one it is in first."""
        if self.position is None:
            return []
        here = self.position[:2]
        if self.position.oid >= END_OF_GROUP:
            return [group for group in groups if group > here]
        return [group for group in groups if group >= here]

    def progress(self, groups: Groups) -> float:
        """Give the share of groups that are done, 0 to 1."""
        if self.position is None or not groups:
            return 0.0
        return 1 - len(self.left_of(groups)) / len(groups)


@dataclass(slots=True)
class Schedule:
    """All passes of one node."""

    passes: dict[Kind, Pass] = field(default_factory=dict)

    @classmethod
    def fresh(cls, node: int, now: float, policy: Policy) -> Schedule:
        """Give the schedule of a node that has not checked anything yet.

        Nodes that started together do not check together: each waits half an interval at least,
        and up to a whole one.
        """
        waited = node * _GOLDEN % 1 / 2
        return cls({kind: Pass(now - policy.intervals_s[kind] * waited) for kind in Kind})

    def due_in_s(self, kind: Kind, now: float, policy: Policy) -> float:
        """Give the seconds until a pass is to be worked on; 0: now."""
        if self.passes[kind].position is not None:
            return 0.0
        return max(0.0, self.passes[kind].finished + policy.intervals_s[kind] - now)

    def next(self, now: float, policy: Policy) -> Kind | None:
        """Give what to work on now, begun if need be; None: nothing."""
        if not policy.enabled:
            return None
        for kind in (Kind.LIGHT, Kind.DEEP):
            if self.due_in_s(kind, now, policy) <= 0:
                if self.passes[kind].position is None:
                    self.passes[kind].begin()
                return kind
        return None


@dataclass(slots=True)
class Activity:
    """How much clients ask for."""

    per_second: float = 0.0
    _count: int = 0
    _at: float = float("-inf")

    def observe(self, count: int, now: float) -> None:
        """Take the number of requests served so far; looks half a second apart count."""
        passed = now - self._at
        if passed < 0.5:
            return
        self.per_second = max(0, count - self._count) / passed
        self._count, self._at = count, now


def allowed_rate(limit: float, requests_per_s: float) -> float:
    """Give the bytes per second to read now."""
    busy = (requests_per_s - QUIET_REQUESTS) / (BUSY_REQUESTS - QUIET_REQUESTS)
    return limit * (1 - (1 - BUSY_SHARE) * min(1.0, max(0.0, busy)))


# -- comparing ------------------------------------------------------------------------------


class State(NamedTuple):
    """What a member says of its copy.

    Attributes:
        table: the digest of its table of checksums.
        is_good: its data was not seen to differ from that.
    """

    version: int
    lineage: int
    table: bytes
    is_good: bool = True

    @property
    def age(self) -> tuple[int, int]:
        """What tells an older copy from a newer one."""
        return self.version, self.lineage


MISSING = "missing"
BAD = "bad"
"""Header or table do not match their checksums."""
Copy = State | str
"""`State`, `MISSING` or `BAD`."""
Copies = Mapping[int, Copy]
"""Node -> its copy, of all `sync` members."""


def are_equal(copies: Copies) -> bool:
    """Tell whether all members have the same good copy (or none has any)."""
    first, *others = set(copies.values())
    return not others and first != BAD and not (isinstance(first, State) and not first.is_good)


def hold_the_same(copies: Copies) -> bool:
    """Tell whether all members have the same good data of one version, whatever its lineages.

    One of them took its own as it was after a power cut, another one got the last change anew.
    """
    found = set(copies.values())
    return len({(c.version, c.table) for c in found if isinstance(c, State)}) == 1 and all(
        isinstance(copy, State) and copy.is_good for copy in found
    )


def ages_differ(copies: Copies) -> bool:
    """Tell whether members that have the object have it at different versions or lineages."""
    return len({copy.age for copy in copies.values() if isinstance(copy, State)}) > 1


def must_read(copies: Copies) -> bool:
    """Tell whether the data has to be read to know which of the copies are good."""
    return len({copy for copy in copies.values() if isinstance(copy, State)}) > 1


class Level(NamedTuple):
    """Make the copies of nodes `behind` equal to that of node `source`."""

    source: int
    behind: tuple[int, ...]


class Alarm(NamedTuple):
    """Nobody but the operator can tell what is right."""

    why: str


def judge(copies: Copies) -> Level | Alarm | None:
    """Tell what to do about an object's copies; None: they are equal."""
    if are_equal(copies):
        return None
    known = {node: copy for node, copy in copies.items() if isinstance(copy, State)}
    if not any(copy.is_good for copy in known.values()):
        return Alarm("no member has a good copy")
    newest = max(copy.age for copy in known.values())
    sources = [node for node, copy in known.items() if copy.age == newest and copy.is_good]
    if not sources:
        return Alarm("the newest copy is damaged, and the others are older")
    if len({known[node].table for node in sources}) > 1:
        nodes = ", ".join(map(str, sources))
        return Alarm(f"nodes {nodes} have different bytes of one version, all of them good")
    return Level(sources[0], tuple(node for node in copies if node not in sources))
