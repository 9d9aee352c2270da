"""Holding VDIs: the mount's one lease in etcd, attach, save, detach.

Always holds:
- One lease for all VDIs that a mount holds. When etcd says that it has ended, what nobody took
  meanwhile is taken back under a new one, with the same token. No user of a VDI hears of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import trio

from sheepfs.core.errors import FencedError, HeldElsewhereError, SheepError, UnreachableError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import VdiRecord
from sheepfs.holding.requests import make_way
from sheepfs.net.attach import (
    LEVELLING,
    Attachment,
    attach,
    detach,
    reclaim_after_lease_loss,
    save,
)
from sheepfs.net.catalog import Catalog
from sheepfs.net.fencing import fence_everywhere
from sheepfs.net.history import WentBackError
from sheepfs.net.router import Router
from sheepfs.net.store import LeaseGoneError, LeaseKeeper, Store

if TYPE_CHECKING:
    from sheepfs.volume.volume import Volume

log = logging.getLogger(__name__)

LEASE_TTL_S = 10
TOOL = ":sheepctl"
"""How the owner ends that a tool calls itself; it holds a VDI for a moment only."""
PATIENCE_S = 2.0
"""How long a mount waits for a tool: a VM must not fail to start beside a snapshot."""
TOOL_POLL_S = 0.02


class Attacher(Protocol):
    """The etcd side of holding a VDI (sheepfs.cluster)."""

    async def attach(self, vdi: int, *, gives_way: bool = False) -> Attachment:
        """Become the one holder; every node refuses the former one on return."""
        ...

    async def is_held(self, vdi: int) -> bool:
        """Tell whether any mount holds the VDI."""
        ...

    async def read_record(self, vdi: int) -> tuple[str, VdiRecord]:
        """Give a VDI's name and record as they are now. Raises VdiNotFoundError."""
        ...

    async def save(self, attachment: Attachment, record: VdiRecord) -> None:
        """Keep size and usage in etcd."""
        ...

    async def detach(
        self, attachment: Attachment, record: VdiRecord, *, clean: bool, dropped: bool
    ) -> None:
        """Let others attach; `dropped`: objects of frozen layers may be dead now."""
        ...

    async def want_reclaim(self, family: int) -> None:
        """Ask for a look at what a family does not use any more."""
        ...


class Holding:
    """What one mount holds; implements `Attacher`.

    Args:
        volumes: gives the VDIs that the mount has open.
        changed: told that a record was changed.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        catalog: Catalog,
        router: Router,
        owner: str,
        nursery: trio.Nursery,
        volumes: Callable[[], Iterable[Volume]],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._keys = keys
        self._catalog = catalog
        self._router = router
        self._owner = owner
        self._nursery = nursery
        self._volumes = volumes
        self._changed = changed
        self._keeper: LeaseKeeper | None = None
        self._keeper_lock = trio.Lock()

    async def attach(self, vdi: int, *, gives_way: bool = False) -> Attachment:
        """Become the holder of a VDI (for Volume).

        Args:
            gives_way: to whoever else wants it.

        Raises: HeldElsewhereError.
        """
        owner = self._owner + LEVELLING if gives_way else self._owner
        give_up = trio.current_time() + PATIENCE_S
        while True:
            await self._refuse_went_back()
            keeper = await self.lease()
            try:
                attachment = await attach(self._store, self._keys, vdi, owner, keeper, self._fence)
            except LeaseGoneError:
                # Its keeper asks only now and then. Who writes waits for the next lease.
                keeper.lost.set()
            except HeldElsewhereError as error:
                if gives_way or trio.current_time() > give_up:
                    raise
                if not await self._may_be_free(vdi, error.owner):
                    raise
            else:
                self._changed()
                return attachment

    async def _refuse_went_back(self) -> None:
        """Raise WentBackError where no lease would ever come."""
        if self._keeper is None or self._keeper.lost.is_set():
            try:
                await self._store.get(self._keys.config)
            except WentBackError:
                raise
            except UnreachableError:
                return  # It comes back, and the lease is waited for.

    async def _may_be_free(self, vdi: int, owner: str) -> bool:
        """Tell whether a VDI may be free now, of one that holds it for a moment only."""
        if owner.endswith(TOOL):
            await trio.sleep(TOOL_POLL_S)
            return True
        return owner.endswith(LEVELLING) and await make_way(self._store, self._keys, vdi)

    async def _fence(self, vdi: int, token: int) -> None:
        await fence_everywhere(self._router, vdi, token)

    async def is_held(self, vdi: int) -> bool:
        """Tell whether any mount holds the VDI."""
        return await self._store.get(self._keys.lock(vdi)) is not None

    async def read_record(self, vdi: int) -> tuple[str, VdiRecord]:
        """Give a VDI's name and record as they are now. Raises VdiNotFoundError."""
        name, record, _ = await self._catalog.find(vdi)
        return name, record

    async def save(self, attachment: Attachment, record: VdiRecord) -> None:
        """Keep a held VDI's size and usage in etcd."""
        await save(
            attachment,
            lambda r: dataclasses.replace(
                r, size=record.size, maps=record.maps, allocated=record.allocated,
                modified=record.modified,
            ),
        )  # fmt: skip
        self._changed()

    async def detach(
        self, attachment: Attachment, record: VdiRecord, *, clean: bool, dropped: bool
    ) -> None:
        """Let a VDI go; `dropped`: some frozen objects may be of no use to anyone now."""
        try:
            await detach(
                attachment,
                lambda r: dataclasses.replace(
                    r, size=record.size, maps=record.maps, allocated=record.allocated,
                    modified=record.modified, layer=record.layer, next=0,
                ),
                clean=clean,
                reclaim=dropped,
            )  # fmt: skip
        except FencedError as error:
            log.warning("VDI %d: %s", record.id, error)
        self._changed()

    async def want_reclaim(self, family: int) -> None:
        """Ask the leader for a look at what a family does not use any more. (SheepError)"""
        await self._catalog.want_reclaim(family)

    async def lease(self) -> LeaseKeeper:
        """One lease for all VDIs that this mount holds."""
        async with self._keeper_lock:
            if self._keeper is None or self._keeper.lost.is_set():
                keeper = LeaseKeeper(self._store, LEASE_TTL_S)
                await self._nursery.start(keeper.run)
                self._nursery.start_soon(self._watch_lease, keeper)
                self._keeper = keeper
            return self._keeper

    async def _watch_lease(self, keeper: LeaseKeeper) -> None:
        """After an etcd outage our lease may be gone: hold on to what nobody took meanwhile."""
        await keeper.lost.wait()
        held = [volume for volume in self._volumes() if volume.attachment is not None]
        if not held:
            return
        log.warning("the lease in etcd has ended; taking %d VDIs back", len(held))
        new = await self.lease()
        for volume in held:
            if volume.attachment is None:
                continue
            try:
                await reclaim_after_lease_loss(volume.attachment, new)
            except SheepError as error:
                log.error("VDI %s: %s", volume.name, error)
            if volume.attachment is not None and volume.attachment.lost.is_set():
                volume.fence("another mount took it over")

    async def end(self) -> None:
        """End the lease: nothing is held any more. Raises UnreachableError."""
        if self._keeper is not None and not self._keeper.lost.is_set():
            await self._store.revoke(self._keeper.lease)
