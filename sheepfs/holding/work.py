"""What only a VDI's holder may do with it: done here if this mount may hold it, else by its holder.

Each piece of work is named in `_WORK`, for both: who asks another mount names it in a request
(`holder_requests`), who is asked finds it there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from sheepfs.core.errors import (
    HeldElsewhereError,
    RetryableError,
    UnreachableError,
    UsageError,
)
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import RequestRecord
from sheepfs.holding.holding import Holding
from sheepfs.holding.requests import GIVE_WAY, Progress, ask
from sheepfs.layers.rewriting import Rewriting
from sheepfs.layers.snapshots import Snapshots
from sheepfs.net.store import Store
from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

HOLDER_TRIES = 5


class HolderWork:
    """Does such work for one mount."""

    def __init__(
        self, store: Store, keys: Keys, holding: Holding, snapshots: Snapshots, rewriting: Rewriting
    ) -> None:
        self._store = store
        self._keys = keys
        self._holding = holding
        self.snapshots = snapshots
        self.rewriting = rewriting

    async def do(
        self, volume: Volume, what: str, arguments: dict[str, str], told: Progress
    ) -> None:
        """Do something with an open volume, as its holder, or have its holder do it.

        Raises:
            UnreachableError: it is held, now here, now there.
            SheepError: it could not be done; of another holder: RefusedByHolderError.
        """
        for _ in range(HOLDER_TRIES):
            try:
                await volume.borrow()
                try:
                    await _WORK[what](self, volume, arguments, told)
                finally:
                    with trio.CancelScope(shield=True):
                        await volume.give_back()
                return
            except HeldElsewhereError:
                lease = (await self._holding.lease()).lease
                vdi = volume.record.id
                try:
                    await ask(self._store, self._keys, vdi, what, arguments, lease, told)
                    return
                except RetryableError as error:
                    # The holder let it go meanwhile, or another took it.
                    log.info("%s of %s: %s", what, volume.name, error)
        raise UnreachableError(f"{volume.name} goes from mount to mount: try again")

    async def serve(self, volume: Volume, request: RequestRecord, told: Progress) -> bool:
        """Do what another asks of the holder; False: the volume is not held here.

        Raises:
            UsageError: there is no such work, or its arguments are bad.
            SheepError: it could not be done.
        """
        if request.what == GIVE_WAY:
            # Its lock is seen before it is attached, and whoever asks would not ask again soon.
            # Nothing else waits: by then another may have done it, and it would be done twice.
            await volume.settled()
        if volume.attachment is None:
            return False
        work = _WORK.get(request.what)
        if work is None:
            raise UsageError(f"this mount is too old to do {request.what!r}")
        try:
            await work(self, volume, request.arguments, told)
        except (KeyError, ValueError) as error:
            raise UsageError(f"a bad request for {request.what!r}: {error}") from error
        return True


_Work = Callable[[HolderWork, Volume, Mapping[str, str], Progress], Awaitable[object]]

_WORK: dict[str, _Work] = {
    "snapshot": lambda of, volume, words, told: of.snapshots.snapshot(volume, words["tag"]),
    "clone": lambda of, volume, words, told: of.snapshots.clone(volume, words["name"]),
    "freeze": lambda of, volume, words, told: of.snapshots.freeze(volume),
    "flatten": lambda of, volume, words, told: of.rewriting.flatten(volume, told),
    "copies": lambda of, volume, words, told: of.rewriting.change_copies(
        volume, int(words["copies"]), told
    ),
    "resize": lambda of, volume, words, told: volume.resize(int(words["size"])),
    "sweep": lambda of, volume, words, told: volume.sweep(),
    GIVE_WAY: lambda of, volume, words, told: volume.give_way(),
}
