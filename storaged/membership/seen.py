"""What the leader sees of etcd at one look: all that a decision is made from.

Always holds: what cannot be read is left out and complained about; it stops nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, SheepError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import KeyValue
from sheepfs.core.metadata import (
    AcceptedLoss,
    AliveRecord,
    NodeWish,
    Patience,
)
from sheepfs.net.store import Store
from storaged.logic.leader import DEFAULT_PATIENCE

Complain = Callable[[str, SheepError], None]
"""Called with a message that has a place for the error."""

_POOLS = frozenset("12345")
_NodeRecord = TypeVar("_NodeRecord", AliveRecord, NodeWish)


@dataclass(frozen=True, slots=True)
class Seen:
    """What etcd held.

    Attributes:
        accepted_revision: of the operator's word on losses; 0: there is none.
    """

    map: ClusterMap
    map_revision: int = 0
    alive: Mapping[int, AliveRecord] = field(default_factory=dict)
    pools: frozenset[int] = frozenset()
    wishes: Mapping[int, NodeWish] = field(default_factory=dict)
    accepted: AcceptedLoss | None = None
    accepted_revision: int = 0
    patience: Patience = DEFAULT_PATIENCE


async def look(
    store: Store, keys: Keys, known: Seen, revision: int, complain: Complain
) -> Seen | None:
    """Read what there is to judge; None when the leader key is not at `revision` any more.

    Args:
        known: the look before; its map is not decoded again if it is still the same.

    Raises:
        UnreachableError: etcd does not answer.
        ProtocolError: the map is of a format that this version does not know, or the cluster is
            not in etcd.
    """
    mine = await store.get(keys.leader)
    if mine is None or mine.mod_revision != revision:
        return None
    alive = _records(
        AliveRecord,
        (await store.list(keys.alive))[0],
        lambda error: complain("a daemon of another version wants to join: %s", error),
    )
    wishes = _records(
        NodeWish,
        (await store.list(keys.wishes))[0],
        lambda error: complain("what is wanted of a node cannot be read: %s", error),
    )
    wanted, _ = await store.list(keys.pools)
    pools = {kv.key.removeprefix(keys.pools) for kv in wanted}
    word = await store.get(keys.accepted_loss)
    accepted = None
    patience = DEFAULT_PATIENCE
    try:
        accepted = None if word is None else AcceptedLoss.decode(word.value).checked()
        if (setting := await store.get(keys.setting("patience"))) is not None:
            patience = Patience.decode(setting.value)
    except ProtocolError as error:
        complain("what operators said cannot be read: %s", error)
    found = await store.get(keys.map)
    revision = found.mod_revision if found else 0
    if found is None:
        if await store.get(keys.config) is None:
            # A map made from nothing would call groups whole that nobody has the data of.
            raise ProtocolError("the cluster is not in etcd any more: was etcd's data lost?")
        current = ClusterMap(0, known.map.cluster)
    elif revision == known.map_revision:
        current = known.map
    else:
        current = ClusterMap.decode(found.value)
    return Seen(
        map=current,
        map_revision=revision,
        alive=alive,
        pools=frozenset(int(copies) for copies in pools if copies in _POOLS),
        wishes=wishes,
        accepted=accepted,
        accepted_revision=word.mod_revision if word else 0,
        patience=patience,
    )


def _records(
    kind: type[_NodeRecord], found: list[KeyValue], complain: Callable[[SheepError], None]
) -> dict[int, _NodeRecord]:
    records = {}
    for kv in found:
        try:
            record = kind.decode(kv.value)
        except ProtocolError as error:
            complain(error)
        else:
            records[record.id] = record
    return records
