"""What a joining node must do to be level with a sync member: pure comparison of two lists."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from sheepfs.core.geometry import layer_of, serial_of


class Listed(NamedTuple):
    """An object as its node lists it; equal version and lineage mean equal bytes."""

    oid: int
    version: int
    lineage: int
    suspect: bool


class Fresh:
    """Objects known to be level with a sync member since this node began to join their group.

    Writes keep them level. Whenever the group changes, nothing is known any more: the node may
    have been out of the group in an epoch that it never saw.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], tuple[int, set[int]]] = {}

    def of(self, pool: int, pg: int, changed: int) -> set[int]:
        """Give the level objects of a group as of its change in epoch `changed`."""
        known = self._groups.get((pool, pg))
        if known is None or known[0] != changed:
            known = self._groups[pool, pg] = (changed, set())
        return known[1]

    def forget(self, pool: int, pg: int) -> None:
        """This node is not joining the group (any more)."""
        self._groups.pop((pool, pg), None)


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


def waves(oids: Iterable[int]) -> list[list[int]]:
    """Put objects in the order in which they may be pulled, each wave after the one before.

    A copy comes after what it may be made of: an object of an earlier layer.
    """
    by_serial: dict[int, list[int]] = {}
    for oid in oids:
        by_serial.setdefault(serial_of(layer_of(oid)), []).append(oid)
    return [by_serial[serial] for serial in sorted(by_serial)]
