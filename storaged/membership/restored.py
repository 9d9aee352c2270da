"""An etcd that was restored from older data: what a data directory knows better than that etcd.

Always holds:
- A daemon whose data directory has seen more than etcd knows does not start, and mounts and tools
  that start hear of it in its greeting if it runs (`sheepfs.net.restored`).
- The directory's memory never goes back, and is at least as old as its last quiet second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from sheepfs.core.errors import NoSpaceError, SheepError
from sheepfs.core.keys import Keys
from sheepfs.core.seen import Seen
from sheepfs.logs import Complaint
from sheepfs.net import restored
from sheepfs.net.store import Store

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


def seen_by(directory: Directory, epoch: int = 0) -> Seen:
    """Give what a data directory has seen, and a daemon that serves by the map of `epoch`."""
    token = max(directory.tokens().values(), default=0)
    return Seen(max(directory.epoch, epoch), token, directory.last_layer)


async def refuse_restored(store: Store, keys: Keys, directory: Directory, epoch: int = 0) -> None:
    """Compare what etcd knows with what a data directory has seen.

    Args:
        epoch: of the map that the daemon serves by, if it runs.

    Raises:
        UsageError: etcd knows less.
        UnreachableError: etcd does not answer.
        ProtocolError: what it holds cannot be read.
    """
    seen = seen_by(directory, epoch)
    await restored.refuse_restored(store, keys, [("this data directory", seen)])


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
        complaint = Complaint()
        while True:
            await self._news.wait()
            self._news = trio.Event()
            try:
                await trio.to_thread.run_sync(self._directory.set_epoch, self._epoch)
            except NoSpaceError as error:
                self._news.set()
                if complaint.due():
                    log.warning("the epoch is not written down, trying on: %s", error)
            except SheepError as error:
                self._on_disk_error(error)
                return
            await trio.sleep(WRITE_EVERY_S)
