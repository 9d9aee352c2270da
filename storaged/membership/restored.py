"""An etcd that was restored from older data: what a data directory knows better than that etcd.

Always holds:
- A daemon whose data directory has seen more than etcd knows does not start: numbers (tokens,
  epochs, layers) would be given out twice, and what is unknown to etcd would be freed.
- The directory's memory never goes back, and is at least as old as its last quiet second.
- What a directory has seen is read before etcd is asked: in between only etcd gets newer.
A running daemon that saw the higher revisions of the same etcd needs none of this
(`sheepfs.net.history`); this is for one that starts, and for an etcd whose revisions were raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import NoSpaceError, ProtocolError, SheepError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.net.store import COMPLAIN_S, Store
from sheepfs.net.tokens import read_floor

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
"""Epochs that come faster than this are written once."""


class Directory(Protocol):
    """What a data directory knows of the past (storaged.store.objects.ObjectStore)."""

    @property
    def epoch(self) -> int:
        """The highest epoch that it was served in, as it was written down."""
        ...

    @property
    def last_layer(self) -> int:
        """The highest serial of a layer that it has an object of; 0: none."""
        ...

    def tokens(self) -> dict[int, int]:
        """Give the highest token of each VDI."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Write down an epoch. Blocks. Raises NoSpaceError, DiskError."""
        ...


async def refuse_restored(store: Store, keys: Keys, directory: Directory, epoch: int = 0) -> None:
    """Compare what etcd knows with what a data directory has seen.

    Args:
        epoch: of the map that the daemon serves by, if it runs.

    Raises:
        UsageError: etcd knows less.
        UnreachableError: etcd does not answer.
        ProtocolError: what it holds cannot be read.
    """
    tokens, layer, epoch = directory.tokens(), directory.last_layer, max(directory.epoch, epoch)
    floor = await read_floor(store, keys)
    found, revision = await store.list(keys.map)
    maps = [ClusterMap.decode(kv.value).epoch for kv in found if kv.key == keys.map]
    known = max(maps, default=0)
    if known < epoch:
        raise _refusal(f"the cluster map there has epoch {known}, this node was in {epoch}")
    newest = max(tokens.values(), default=0)
    if floor.token(revision) < newest:
        raise _refusal(f"fencing tokens there end at {floor.token(revision)}, here at {newest}")
    counter = await store.get(keys.counter("layer"))
    try:
        last = 0 if counter is None else int(counter.value)
    except ValueError as error:
        raise ProtocolError(f"{keys.counter('layer')} in etcd is no number") from error
    if last < layer:
        raise _refusal(f"the last layer there is {last}, objects here are of {layer}")


def _refusal(reason: str) -> UsageError:
    return UsageError(
        f"etcd knows less than this data directory: {reason}. It was restored from older data, or"
        " is another's. Bring newer data back, or stop all storage daemons, accept what there is"
        " with: sheepctl metadata accept, and start daemons and mounts anew"
    )


class EpochMemory:
    """Writes down in which epochs a data directory was served, beside the serving.

    Args:
        on_disk_error: told when the disk failed.
    """

    def __init__(self, directory: Directory, on_disk_error: Callable[[SheepError], None]) -> None:
        self._directory = directory
        self._on_disk_error = on_disk_error
        self._epoch = directory.epoch
        self._news = trio.Event()

    def note(self, epoch: int) -> None:
        """Take the epoch of a map that is served by from now on."""
        if epoch > self._epoch:
            self._epoch = epoch
            self._news.set()

    async def run(self) -> None:
        """Write until cancelled, or until the disk fails. A full disk is tried again."""
        complained = -COMPLAIN_S
        while True:
            await self._news.wait()
            self._news = trio.Event()
            try:
                await trio.to_thread.run_sync(self._directory.set_epoch, self._epoch)
            except NoSpaceError as error:
                self._news.set()
                if trio.current_time() >= complained + COMPLAIN_S:
                    complained = trio.current_time()
                    log.warning("the epoch is not written down, trying on: %s", error)
            except SheepError as error:
                self._on_disk_error(error)
                return
            await trio.sleep(WRITE_EVERY_S)
