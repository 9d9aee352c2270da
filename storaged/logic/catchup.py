"""What a joining node must do to be level with a sync member: pure comparison of two lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol


class Listed(NamedTuple):
    """An object as its node lists it; equal version and lineage mean equal bytes."""

    oid: int
    version: int
    lineage: int
    suspect: bool


class Copy(Protocol):
    """What the comparison reads of a listed object."""

    @property
    def oid(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def lineage(self) -> int: ...
    @property
    def suspect(self) -> bool: ...


class Plan(NamedTuple):
    """Objects to pull, objects found equal, objects that the sync member does not have."""

    pull: list[int]
    equal: list[int]
    strays: list[int]


def plan(ours: Iterable[Copy], theirs: Iterable[Copy], fresh: Collection[int]) -> Plan:
    """Compare this node's objects of a group with a sync member's.

    Args:
        fresh: objects already level since this node began to join; writes keep them so.
    """
    own = {copy.oid: copy for copy in ours}
    pull, equal, seen = [], [], set()
    for copy in theirs:
        seen.add(copy.oid)
        mine = own.get(copy.oid)
        if copy.oid in fresh:
            continue
        if (
            mine is not None
            and not (mine.suspect or copy.suspect)
            and (mine.version, mine.lineage) == (copy.version, copy.lineage)
        ):
            equal.append(copy.oid)
        else:
            pull.append(copy.oid)
    return Plan(pull, equal, [oid for oid in own if oid not in seen and oid not in fresh])
