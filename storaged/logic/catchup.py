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


class Level:
    """What is known of a joining node's copies of one group.

    Attributes:
        changed: the group's, in epochs; when it differs, nothing of this holds any more.
        fresh: objects level with a sync member since the node began to join. Writes keep them so.
        missed: other objects -> the newest version that this node acknowledged without having
            it, because a sync member has it: the copy to come must be as new. 0: any will do.
        is_complete: all is level, and the leader may have been told: nothing may be missed.
    """

    __slots__ = ("changed", "fresh", "is_complete", "missed")

    def __init__(self, changed: int) -> None:
        self.changed = changed
        self.fresh: set[int] = set()
        self.missed: dict[int, int] = {}
        self.is_complete = False

    def bring(self, oid: int) -> None:
        """An object is level with a sync member's."""
        self.fresh.add(oid)
        self.missed.pop(oid, None)

    def miss(self, oid: int, version: int) -> None:
        """An object is not level, and a sync member has this version of it."""
        self.fresh.discard(oid)
        self.missed[oid] = max(version, self.missed.get(oid, 0))

    def lack(self, oid: int) -> None:
        """An object is not level; what was missed of it may have been taken back since."""
        self.fresh.discard(oid)
        self.missed[oid] = 0


class Levels:
    """What a node knows of the groups that it joins.

    Whenever a group changes, nothing is known any more: the node may have been out of it in an
    epoch that it never saw.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], Level] = {}

    def of(self, pool: int, pg: int, changed: int) -> Level:
        """Give what is known of a group as of its change in epoch `changed`."""
        known = self._groups.get((pool, pg))
        if known is None or known.changed != changed:
            known = self._groups[pool, pg] = Level(changed)
        return known

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


def plan(
    ours: Iterable[Copy],
    theirs: Iterable[Copy],
    fresh: Collection[int],
    missed: Collection[int] = (),
) -> Plan:
    """Compare this node's objects of a group with a sync member's.

    Args:
        fresh: objects already level since this node began to join; writes keep them so.
        missed: objects whose copy here lacks a change, whatever the lists say.
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
            and copy.oid not in missed
        ):
            equal.append(copy.oid)
        else:
            pull.append(copy.oid)
    pull += [oid for oid in missed if oid not in seen]
    strays = [oid for oid in own if not (oid in seen or oid in fresh or oid in missed)]
    return Plan(pull, equal, strays)


def waves(oids: Iterable[int], missed: Collection[int] = ()) -> list[list[int]]:
    """Put objects in the order in which they may be pulled, each wave after the one before.

    A copy comes after what it may be made of: an object of an earlier layer. Within a wave, what
    clients write to comes first.
    """
    by_serial: dict[int, list[int]] = {}
    for oid in oids:
        by_serial.setdefault(serial_of(layer_of(oid)), []).append(oid)
    return [
        sorted(by_serial[serial], key=lambda oid: oid not in missed) for serial in sorted(by_serial)
    ]
