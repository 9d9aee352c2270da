"""How an etcd revision becomes a fencing token, also after etcd's data was lost and imported."""

from __future__ import annotations

from typing import NamedTuple

from sheepfs.core.keys import Keys
from sheepfs.core.kv import Unchanged
from sheepfs.core.metadata import FencingRecord
from sheepfs.net.store import Store


class Floor(NamedTuple):
    """What tokens and generations of this cluster begin at.

    Attributes:
        unchanged: that it still holds; a condition of each transaction that makes a token.
    """

    record: FencingRecord
    unchanged: Unchanged

    def token(self, revision: int) -> int:
        """Give the token of a transaction that etcd did at `revision`."""
        return self.record.base + revision

    def generation_after(self, last: int) -> int:
        """Give the generation of the attach after one of generation `last`."""
        return max(last + 1, self.record.generation)


async def read_floor(store: Store, keys: Keys) -> Floor:
    """Read `fencing`; where nothing was ever imported, tokens are etcd's revisions.

    Raises:
        UnreachableError: etcd does not answer.
        ProtocolError: the record is of a format that this version does not know.
    """
    found = await store.get(keys.fencing)
    if found is None:
        return Floor(FencingRecord(), Unchanged(keys.fencing, 0))
    return Floor(FencingRecord.decode(found.value), Unchanged(keys.fencing, found.mod_revision))
