"""Keeping recovery out of the clients' way: a node's own pulls, and those that it serves."""

from __future__ import annotations

from collections.abc import Callable

import trio

from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.metadata import RecoveryRecord
from storaged.logic.pace import Pace

LOOK_EVERY_S = 0.02
PIECE = 256 << 10
SERVE_PATIENCE_S = 2.0
"""A peer whose turn has not come by then is told to ask again."""
LOOK_FOR_S = 2.0
"""So long after the last object the node is looked at; then nothing runs here."""


def cost(read_bytes: int, moved_bytes: int) -> int:
    """Give what comparing so many bytes costs, of which only some moved."""
    return min(read_bytes, max(moved_bytes, read_bytes // 8))


class Pacer:
    """The pace of one node's recovery.

    Args:
        requests: gives the number of clients' requests so far.
    """

    def __init__(self, requests: Callable[[], int]) -> None:
        self._requests = requests
        self._setting: Callable[[], RecoveryRecord] = RecoveryRecord
        self._pulling = Pace(0.0)
        self._serving = Pace(0.0)
        self._look_until = float("-inf")
        self._wanted = trio.Event()

    @property
    def setting(self) -> RecoveryRecord:
        """What operators have set."""
        return self._setting()

    def follow(self, setting: Callable[[], RecoveryRecord]) -> None:
        """Go by what `setting` gives, instead of by the defaults."""
        self._setting = setting

    async def run(self) -> None:
        """Look at how the node fares, while there is something to pace."""
        while True:
            await self._wanted.wait()
            seen = self._requests()
            while (began := trio.current_time()) < self._look_until:
                await trio.sleep(LOOK_EVERY_S)
                now, count = trio.current_time(), self._requests()
                for pace in (self._pulling, self._serving):
                    pace.observe(now, count - seen, now - began - LOOK_EVERY_S)
                seen = count
            self._wanted = trio.Event()

    @property
    def piece_bytes(self) -> int:
        """How much to pull at once: beside clients little, so that none waits long for it."""
        return PIECE if self._pulling.yields else OBJECT_SIZE

    async def turn(self, size_bytes: int) -> None:
        """Wait until this node may pull so much more."""
        while True:
            self._pulling.limit = self._setting().bandwidth
            wait_s = self._pulling.take(self._look(), size_bytes)
            if not wait_s:
                return
            await trio.sleep(min(wait_s, LOOK_EVERY_S))

    def give_back(self, size_bytes: int) -> None:
        """What had its turn was not pulled."""
        self._pulling.give_back(size_bytes)

    async def turn_to_serve(self, size_bytes: int) -> bool:
        """Wait until a peer's pull of so much may be served; False if that takes too long."""
        give_up = trio.current_time() + SERVE_PATIENCE_S
        while wait_s := self._serving.take(self._look(), size_bytes):
            if trio.current_time() > give_up:
                return False
            await trio.sleep(min(wait_s, LOOK_EVERY_S))
        return True

    def served(self, size_bytes: int, moved_bytes: int) -> None:
        """Of what `turn_to_serve` let through, so much moved."""
        self._serving.give_back(size_bytes - cost(size_bytes, moved_bytes))

    def _look(self) -> float:
        """Have the node looked at for a while; give the time."""
        now = trio.current_time()
        self._look_until = now + LOOK_FOR_S
        self._wanted.set()
        return now
