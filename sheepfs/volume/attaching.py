"""Becoming a VDI's one writer, and letting it go.

Always holds:
- Nothing is changed before the attach is complete, that is before the old holder is fenced.
- A VDI is let go as clean only when everything is durable and all replicas are equal.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable

import trio

from sheepfs.callbacks import completion
from sheepfs.core.errors import HeldElsewhereError, SheepError
from sheepfs.core.geometry import copies_of
from sheepfs.core.metadata import VdiRecord
from sheepfs.holding.holding import Attacher
from sheepfs.logs import fields
from sheepfs.net.router import Router
from sheepfs.replication.replicator import Replicator
from sheepfs.volume.convergence import Convergence
from sheepfs.volume.flusher import Flusher
from sheepfs.volume.recording import RecordKeeper
from sheepfs.volume.sweeping import find_orphans
from sheepfs.volume.vdimap import VdiMap
from sheepfs.volume.writing import GATE_POLL_S

log = logging.getLogger(__name__)

MEASURE_AT_DETACH_S = 0.5
DISCARD_TRIES = 100


class Holder(RecordKeeper):
    """Attaches and detaches a VDI."""

    def __init__(
        self,
        name: str,
        record: VdiRecord,
        router: Router,
        attacher: Attacher,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(name, record, router, attacher, nursery)
        self.gives_way = False
        """Attached by `level` alone: whoever else wants the VDI may have it."""
        self._capturing = trio.Lock()
        self._borrowed = False
        """Attached for a moment only, by `borrow`."""
        self._scope: trio.CancelScope | None = None

    async def _clear_end(self) -> None:
        """Make holes of what is beyond the VDI's end."""
        raise NotImplementedError

    # -- attach -----------------------------------------------------------------------------

    async def attach(self) -> None:
        """Become the one writer.

        Raises:
            HeldElsewhereError: another mount holds it; at once.
        """
        await self._attach()
        self._borrowed = False

    async def borrow(self) -> None:
        """Become the writer until `give_back`, unless somebody attaches meanwhile.

        Raises:
            HeldElsewhereError: another mount holds it; at once.
        """
        self._borrowed = await self._attach() or self._borrowed

    async def level(self) -> None:
        """Make all replicas equal, as a holder does first, unless another wants the VDI meanwhile.

        Raises: HeldElsewhereError, SheepError.
        """
        self._borrowed = await self._attach(gives_way=True) or self._borrowed
        await self._convergence.ended.wait()
        await self.give_back()

    async def settled(self) -> None:
        """Wait for an attach or detach that is under way."""
        async with self._attaching:
            pass

    async def give_way(self) -> None:
        """Let another have the VDI, if `level` alone holds it.

        Raises:
            HeldElsewhereError: it is in use here.
        """
        if self.gives_way:
            try:
                await self._detach_if(lambda: self.gives_way)
            except SheepError as error:
                # It is let go all the same, and the next holder begins again.
                log.warning("%s is given away: %s", self.name, error)
        if self.attachment is not None:
            raise HeldElsewhereError(f"{self.name} is in use")

    async def give_back(self) -> None:
        """Let the VDI go if it was attached by `borrow` alone."""
        if self._borrowed:
            await self._detach_if(lambda: self._borrowed)

    async def _attach(self, *, gives_way: bool = False) -> bool:
        """Attach, if that is not done; tell whether it was this call that did."""
        async with self._attaching:
            if self.attachment is not None:
                self.gives_way = self.gives_way and gives_way
                return False
            attachment = await self._attacher.attach(self.record.id, gives_way=gives_way)
            self.gives_way = gives_way
            record = attachment.record
            self._size = self._saved_size = record.size
            self._allocated = record.allocated
            self.record = record
            self.open_layer = record.layer
            self._convergence = Convergence(not attachment.was_clean)
            self._reader.token = attachment.token
            self.replicator = Replicator(
                self._router, self._nursery, record.id, attachment.token, attachment.generation
            )
            self.replicator.unflushed.on_loss = self._is_losing
            self._use_map(self.replicator)
            if self._convergence.pending:
                # What the last holder had acknowledged and not flushed is this one's to flush.
                self.replicator.unflushed.add_everything(
                    {copies_of(record.layer), copies_of(record.map)}
                )
                self._nursery.start_soon(
                    self._convergence.run,
                    self.name,
                    self._map,
                    self.replicator,
                    self._clear_end,
                    self._sweep,
                )
            self.attachment = attachment
            self._direct = True
            log.info(
                "%s is attached%s", self.name,
                "" if attachment.was_clean else ": its last holder ended uncleanly",
                extra=fields(event="attach", vdi=record.id, token=attachment.token),
            )  # fmt: skip
            self._scope = trio.CancelScope()
            assert self.flusher is not None
            self._nursery.start_soon(
                _run_all,
                self._scope,
                self.replicator.run,
                self.flusher.run,
                self._mend_losses,
                self._measure_now_and_then,
                self._reclaim_now_and_then,
            )
            return True

    def _use_map(self, replicator: Replicator) -> None:
        """Begin with the map that the record names."""
        record = self.record
        self._map = VdiMap(record.maps, self._load_map)
        self.flusher = Flusher(
            self.name, record.map, replicator, self._map, self._save_if_changed, self._is_saved
        )
        self._copies = self._new_copies(replicator)

    # -- detach -----------------------------------------------------------------------------

    async def detach(self) -> None:
        """Flush everything and let other mounts attach.

        Raises:
            SheepError: not everything could be made durable; the VDI is let go all the same,
                marked so that the next holder compares its replicas.
        """
        await self._detach_if(lambda: True)

    async def _detach_if(self, is_wanted: Callable[[], bool]) -> None:
        """Detach, unless it is not wanted any more once no attach or snapshot is under way."""
        async with self._capturing, self._attaching:
            attachment, replicator, flusher = self.attachment, self.replicator, self.flusher
            if attachment is None or replicator is None or flusher is None or not is_wanted():
                return
            self._leaving = True
            self._convergence.stop()
            with trio.move_on_after(MEASURE_AT_DETACH_S):
                await self._measure_if_changed()
            problem: SheepError | None = None
            patience = DISCARD_TRIES
            while problem is None and not replicator.fenced:
                await self._settle(replicator)
                try:
                    await completion(flusher.flush)
                except SheepError as error:
                    problem = error
                unflushed = self._is_busy(replicator) or replicator.unflushed.groups
                if unflushed or self._map.is_dirty or flusher.is_asked:
                    continue
                if not flusher.discarded or not patience:
                    break
                # A discarded object is in use, by a read that was issued before.
                patience -= 1
                await trio.sleep(GATE_POLL_S)
            dropped = not attachment.was_clean or (
                self._copies is not None and self._copies.copied > 0
            )
            self._leaving = self._borrowed = False
            # Nothing was changed since that flush, and from here on all changes attach again.
            self.attachment = self.replicator = self.flusher = self._copies = None
            self._direct = False
            if self._scope:
                self._scope.cancel()
            replicator.close()
            self._has_mended()
            self._reader.token = 0
            flusher.fail_waiting()
            durable = problem is None and not replicator.fenced
            record = self._current_record(durable=durable)
            self.record = dataclasses.replace(record, layer=self.open_layer, next=0)
            self._map = VdiMap(self.record.maps, self._load_map)
            clean = durable and replicator.level and not self._convergence.pending
            await self._attacher.detach(attachment, self.record, clean=clean, dropped=dropped)
            self.record = dataclasses.replace(self.record, clean=clean)
            log.info(
                "%s is let go%s", self.name, "" if clean else ", marked as unclean",
                extra=fields(event="detach", vdi=record.id),
            )  # fmt: skip
            if problem is not None:
                raise problem

    # -- what the former holder left --------------------------------------------------------

    async def sweep(self) -> None:
        """As the holder: remove what former ones made and the map does not name. Raises SheepError.

        Durability: what is found is deleted by the next flush. Ordering: no snapshot begins
        meanwhile, since what that freezes is named by another map.
        """
        await self._convergence.ended.wait()
        async with self._capturing:
            await self.load_map()
            await self._sweep()

    async def _sweep(self) -> None:
        """Remove what the former holder made and the map does not name; best effort."""
        replicator, flusher = self.replicator, self.flusher
        if replicator is None or flusher is None:
            return
        try:
            orphans = await find_orphans(replicator, self._map, self.open_layer, self.record.map)
        except SheepError as error:
            log.warning("%s: orphans of the last holder stay: %s", self.name, error)
            return
        if orphans:
            log.info("%s: removing %d objects that the map never named", self.name, len(orphans))
            flusher.discarded = {**orphans, **flusher.discarded}


async def _run_all(scope: trio.CancelScope, *tasks: Callable[[], Awaitable[None]]) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)
