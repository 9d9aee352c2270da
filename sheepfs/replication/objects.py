"""Reading objects: from any `sync` member, and from another one when that fails.

Always holds:
- Only `sync` members are asked; the request carries the epoch, so a member that was voted out
  and does not know it yet is never believed by a holder that does.
- Missing is never zeros (I3): an object that no member can give is an error.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

import trio

from sheepfs.backend import ReadDone
from sheepfs.callbacks import ignore_answer
from sheepfs.core.errors import (
    CorruptError,
    LostWritesError,
    ObjectNotFoundError,
    RetryableError,
    SheepError,
    StaleEpochError,
)
from sheepfs.core.geometry import describe_oid, pg_of, pool_of
from sheepfs.core.wire import Header, Op, prepare
from sheepfs.net.link import Link, next_request
from sheepfs.net.router import Router

log = logging.getLogger(__name__)

RETRY_S = 0.02
CALL_TIMEOUT_S = 5.0

Later = Callable[[Callable[[], Coroutine[Any, Any, None]], Callable[[int], None]], None]


class ObjectReader:
    """Reads the objects of one VDI; `token` is 0 for a reader that does not hold it."""

    def __init__(self, router: Router, vdi: int) -> None:
        self.token = 0
        self.is_unsure: Callable[[], bool] = lambda: False
        """Tells whether what was just read may be of no meaning now (sheepfs.volume.losses)."""
        self._router = router
        self._vdi = vdi
        self._turn = count()

    def _fields(self, oid: int) -> dict[str, int]:
        cluster_map = self._router.map
        pool = pool_of(oid)
        return {
            "oid": oid,
            "pool": pool,
            "pg": pg_of(oid, len(cluster_map.pools[pool])),
            "epoch": cluster_map.epoch,
            "vdi": self._vdi,
            "token": self.token,
        }

    def read(self, oid: int, offset: int, length: int, done: ReadDone, later: Later) -> None:
        """Read from one member; the buffers are valid during `done` only."""
        cluster_map = self._router.map
        pool = pool_of(oid)
        pgs = cluster_map.pools[pool]
        pg = pg_of(oid, len(pgs))
        sync = pgs[pg].sync
        link = self._router.links.get(sync[next(self._turn) % len(sync)]) if sync else None
        if link is None or link.lost:
            later(lambda: self._read_slowly(oid, offset, length, done), _failed(done))
            return

        def answer(link: Link, header: Header | None, payload: memoryview | None) -> None:
            if header is None or header.status or payload is None or len(payload) != length:
                # Asked once more it is told to repair what it has not.
                first = 0 if header is None else link.node
                later(lambda: self._read_slowly(oid, offset, length, done, first), _failed(done))
            else:
                done(0, (payload,))

        request = next_request()
        link.pending[request] = answer
        unsealed = prepare(
            Op.READ, 0, request, cluster_map.epoch, self._vdi, pool, pg, self.token, oid,
            offset, length, 0, 0, 0, 0,
        )  # fmt: skip
        link.connection.send_frame(unsealed.seal(link.session))

    async def _read_slowly(
        self, oid: int, offset: int, length: int, done: ReadDone, first: int = 0
    ) -> None:
        done(0, (await self._fetch(oid, offset, length, self.is_unsure, first),))

    async def fetch(self, oid: int, offset: int, length: int) -> bytes:
        """Read, going from member to member and through map changes until one gives it.

        Raises:
            CorruptError, ObjectNotFoundError: no member has a good copy.
            SheepError: fenced, or refused for good.
        """
        return await self._fetch(oid, offset, length, lambda: False)

    async def _fetch(
        self, oid: int, offset: int, length: int, is_unsure: Callable[[], bool], first: int = 0
    ) -> bytes:
        data = await self._ask(oid, Op.READ, offset, length, is_unsure, first)
        if len(data) != length:
            raise CorruptError(f"{describe_oid(oid)}: {len(data)} bytes instead of {length}")
        return data

    async def extents(self, oid: int) -> bytes:
        """Give the 128-byte bitmap of the object's blocks that may hold data."""
        return await self._ask(oid, Op.EXTENTS, 0, 0)

    async def sums(self, oid: int) -> bytes:
        """Give the 8 KiB table of the object's block checksums; 0 for a block of zeros."""
        return await self._ask(oid, Op.SUMS, 0, 0)

    async def _ask(
        self,
        oid: int,
        op: int,
        offset: int,
        span: int,
        is_unsure: Callable[[], bool] = lambda: False,
        first: int = 0,
    ) -> bytes:
        """Ask one member after the other, beginning with `first` if it is one."""
        while True:
            if is_unsure():
                raise LostWritesError(f"{describe_oid(oid)}: what it held may be lost")
            fields = self._fields(oid)
            sync = self._router.map.pools[fields["pool"]][fields["pg"]].sync
            bad: dict[int, SheepError] = {}
            for node in sorted(sync, key=lambda node: node != first):
                link = self._router.link(node)
                if link is None:
                    continue
                try:
                    _, body = await link.call(
                        op, b"", offset=offset, span=span, timeout_s=CALL_TIMEOUT_S, **fields
                    )
                except (CorruptError, ObjectNotFoundError) as error:
                    bad[node] = error
                except StaleEpochError:
                    await self._refresh()
                except RetryableError as error:
                    # A node whose disk failed leaves; until then the others have the data.
                    log.debug("%s from node %d: %s", describe_oid(oid), node, error)
                else:
                    for other in bad:
                        self._repair_soon(other, fields)
                    return body
            if len(bad) == len(sync) and sync:
                log.error("%s: no replica can give it: %s", describe_oid(oid), bad)
                raise bad[sync[0]]
            with trio.move_on_after(RETRY_S):
                await self._router.wait_map()

    async def _refresh(self) -> None:
        with trio.move_on_after(RETRY_S):
            await self._router.wait_map()

    def _repair_soon(self, node: int, fields: dict[str, int]) -> None:
        link = self._router.link(node)
        if link is not None:
            log.warning(
                "%s: node %d cannot give it; it repairs its copy", describe_oid(fields["oid"]), node
            )
            link.request(Op.REPAIR, next_request(), ignore_answer, b"", **fields)


def _failed(done: ReadDone) -> Callable[[int], None]:
    return lambda code: done(code or errno.EIO, ())
