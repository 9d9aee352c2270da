"""Marking objects before they change and flushing them, for all requests at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from sheepfs.core.errors import (
    SheepError,
)
from sheepfs.core.wire import Buffer, Header
from storaged.logic.gate import check_token
from storaged.operations.requests import Client, Request, Requests
from storaged.store.objects import ObjectStore

log = logging.getLogger(__name__)


class Durability(Requests):
    """Marks and flushes."""

    def __init__(
        self,
        store: ObjectStore,
        node: int,
        incarnation: int,
        nursery: trio.Nursery,
        on_disk_error: Callable[[SheepError], None],
    ) -> None:
        super().__init__(store, node, incarnation, nursery, on_disk_error)
        self._to_mark: list[int] = []
        self._mark_wanted = trio.Event()
        self._flushes: list[Request] = []
        self._flush_wanted = trio.Event()

    async def run(self) -> None:
        """Mark and flush for all requests; runs as long as the daemon."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._marker)
            nursery.start_soon(self._flusher)
            nursery.start_soon(self.pacer.run)

    def _mark_first(self, client: Client, header: Header, payload: Buffer) -> None:
        """Hold the object until it is marked, then carry out the request."""
        oid = header.oid
        self.hold(oid)
        self._queue(self._held[oid], client, header, payload)
        self._to_mark.append(oid)
        self._mark_wanted.set()

    async def _marker(self) -> None:
        """Mark objects dirty on disk before their first write; one fdatasync for all waiting."""
        while True:
            await self._mark_wanted.wait()
            self._mark_wanted = trio.Event()
            oids, self._to_mark = self._to_mark, []
            try:
                await trio.to_thread.run_sync(self.store.mark, oids)
            except SheepError as error:
                # A full disk is no failed one; `fail` tells them apart.
                for oid in oids:
                    self.fail_held(oid, error)
                continue
            for oid in oids:
                self.release(oid)

    def _flush(self, client: Client, header: Header, payload: Buffer) -> None:
        self.counters.client_requests += 1
        check_token(header, self.tokens)
        self._flushes.append(Request(client, header, b"", client.received_ns))
        self._flush_wanted.set()

    async def _flusher(self) -> None:
        """Flush for everyone who asked before it began: concurrent flushes share one."""
        while True:
            await self._flush_wanted.wait()
            self._flush_wanted = trio.Event()
            flushes, self._flushes = self._flushes, []
            layers = {request.header.version for request in flushes}
            try:
                await self.flush_store(layers.pop() if len(layers) == 1 else None)
            except SheepError as error:
                for client, header, *_ in flushes:
                    self.fail(client, header, error)
                continue
            for client, header, _, received_ns in flushes:
                client.received_ns = received_ns
                client.reply(header)

    async def flush_store(self, layer: int | None) -> None:
        """Make every change applied before this call durable (of one layer, or all).

        Durability: all of it, on return. Raises DiskError, for good: the node must leave (I5).
        """
        job = self.store.begin_flush(layer or None)
        while job is not None:
            try:
                await trio.to_thread.run_sync(job.run)
            except SheepError as error:
                self._on_disk_error(error)
                raise
            job = self.store.end_flush(job)
        if self.store.needs_trim:
            await trio.to_thread.run_sync(self.store.trim_marks)
