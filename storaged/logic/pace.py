"""How fast a node recovers: at full speed while clients ask for nothing, else as they suffer it.

Pure. Always holds:
- No more than the operators' limit is let through, but for one object.
- While clients' requests come and the node is late in serving them, the rate falls, down to
  `FLOOR` and never to nothing. While it serves them in time, the rate rises.
- Without requests for `IDLE_S` there is no limit but the operators'.
"""

from __future__ import annotations

FLOOR = float(8 << 20)
START = float(16 << 20)
CEILING = float(2 << 30)
"""Bytes per second: the least, what is tried first beside clients, and as good as no limit."""
IDLE_S = 0.5
LATE_S = 0.001
"""An event loop that is late by more makes clients wait."""
LESS = 0.7
"""What is left of the rate after a look that found the node late."""
MORE_PER_S = 2.0
"""How much the rate grows within a second in which it was not."""


class Pace:
    """The rate of one direction of one node.

    Args:
        now: seconds, on the clock of all later calls.

    Attributes:
        limit: bytes per second that operators allow; 0 for any.
    """

    def __init__(self, now: float, limit: float = 0) -> None:
        self.limit = limit
        self._rate = START
        self._owed = 0.0
        """Bytes let through that the rate has not paid for yet."""
        self._looked = self._requested = self._paid = now

    @property
    def rate(self) -> float:
        """Bytes per second let through now."""
        return min(self._rate, self.limit) if self.limit else self._rate

    @property
    def yields(self) -> bool:
        """Whether clients ask for something, so that it matters what they wait for."""
        return self._rate < CEILING

    def observe(self, now: float, requests: int, late_s: float) -> None:
        """Take a look at the node.

        Args:
            requests: of clients, since the last look.
            late_s: how late the event loop was meanwhile, in seconds.
        """
        self._pay(now)
        elapsed = now - self._looked
        self._looked = now
        if requests:
            if now - self._requested >= IDLE_S:
                self._rate = START
            self._requested = now
        if now - self._requested >= IDLE_S:
            self._rate = CEILING
        elif late_s > LATE_S:
            self._rate = max(FLOOR, self._rate * LESS)
        else:
            self._rate = min(CEILING, self._rate * MORE_PER_S ** min(elapsed, 1.0))

    def take(self, now: float, size_bytes: int) -> float:
        """Let so many bytes through now, and give 0; or give the seconds to wait for that."""
        self._pay(now)
        if self._owed >= 1:
            return self._owed / self.rate
        self._owed += size_bytes
        return 0.0

    def give_back(self, size_bytes: int) -> None:
        """What was let through did not move after all."""
        self._owed -= size_bytes

    def _pay(self, now: float) -> None:
        self._owed = max(0.0, self._owed - self.rate * (now - self._paid))
        self._paid = now
