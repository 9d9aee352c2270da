"""An etcd that was restored from older data: who has seen more than it knows tells.

Numbers (tokens, epochs, layers) would be given out twice by it, and what it does not know would be
taken for free. A program that saw the higher revisions of the same etcd needs none of this
(`sheepfs.net.history`); this is for one that starts, and for an etcd whose revisions were raised.

Always holds:
- What was seen is read before etcd is asked: in between only etcd gets newer.
"""

from __future__ import annotations

from collections.abc import Iterable

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.core.seen import Seen
from sheepfs.net.store import Store
from sheepfs.net.tokens import read_floor


async def numbers_of(store: Store, keys: Keys) -> Seen:
    """Read what etcd knows.

    Raises:
        UnreachableError: etcd does not answer.
        ProtocolError: what it holds cannot be read.
    """
    floor = await read_floor(store, keys)
    found, revision = await store.list(keys.map)
    epochs = [ClusterMap.decode(kv.value).epoch for kv in found if kv.key == keys.map]
    counter = await store.get(keys.counter("layer"))
    try:
        layer = 0 if counter is None else int(counter.value)
    except ValueError as error:
        raise ProtocolError(f"{keys.counter('layer')} in etcd is no number") from error
    return Seen(max(epochs, default=0), floor.token(revision), layer)


async def refuse_restored(store: Store, keys: Keys, witnesses: Iterable[tuple[str, Seen]]) -> None:
    """Compare what etcd knows with what others have seen before this call.

    Args:
        witnesses: (who, what they have seen).

    Raises:
        UsageError: etcd knows less.
        UnreachableError: etcd does not answer.
        ProtocolError: what it holds cannot be read.
    """
    known = await numbers_of(store, keys)
    for who, seen in witnesses:
        for kind, there, here in zip(("epoch", "token", "layer"), known, seen, strict=True):
            if there < here:
                raise UsageError(
                    f"etcd knows less than {who}: the last {kind} there is {there}, here {here}. It"
                    " was restored from older data, or is another's. Bring newer data back, or stop"
                    " all storage daemons, accept what there is with: sheepctl metadata accept, and"
                    " start daemons and mounts anew"
                )
