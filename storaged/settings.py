"""Settings that operators change while daemons run: one record in etcd for each.

Always holds: a daemon goes by the last value that it could read; where there is none, or none
that it understands, by the default.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

import trio

from sheepfs.core.errors import ProtocolError, UnreachableError
from sheepfs.core.metadata import Record
from sheepfs.logs import Complaint
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

RecordType = TypeVar("RecordType", bound=Record)


class Setting(Generic[RecordType]):
    """One record, as last read.

    Args:
        key: where it is in etcd (`Keys.setting`).
        default: what holds while there is no such key.
    """

    def __init__(self, store: Store, key: str, default: RecordType) -> None:
        self.value = default
        self.changed = trio.Event()
        """Set, and replaced by another, when the value changes."""
        self._default = default
        self._store = store
        self._key = key

    async def run(self) -> None:
        """Follow the record until cancelled. A watch only hints: the record is always read."""
        complaint = Complaint()
        async with self._store.watch(self._key) as hints:
            async for _ in hints:
                try:
                    await self.refresh()
                except (UnreachableError, ProtocolError) as error:
                    if complaint.due():
                        log.warning("cannot read %s, going by the last: %s", self._key, error)

    async def refresh(self) -> None:
        """Read the record now.

        Raises:
            UnreachableError: etcd does not answer.
            ProtocolError: the record is of a format that this version does not know.
        """
        found = await self._store.get(self._key)
        default = self._default
        value = default if found is None else type(default).decode(found.value)
        if value != self.value:
            self.value = value
            self.changed.set()
            self.changed = trio.Event()
