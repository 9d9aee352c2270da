"""Who can be reached: what the leader makes of pings, pure.

A refusal, or another incarnation that answers, proves that a run is over: it counts at once. Mere
silence proves nothing, since the network or a busy disk may be slow: it counts when it lasts.
A run that was voted out must answer before it is let in again: its lease may outlive it, and a new
leader knows nothing of the refusal that its predecessor saw.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

SILENT_PINGS = 3
SILENT_AFTER_S = 3.0

Run = tuple[int, int]
"""One run of a daemon: (node, incarnation)."""


class Outcome(Enum):
    """What came of a ping."""

    ALIVE = "alive"
    DEAD = "dead"
    SILENT = "silent"


class Reachability:
    """Remembers the last pings of each run; time is monotonic, in seconds."""

    def __init__(self) -> None:
        self._dead: set[Run] = set()
        self._answered: set[Run] = set()
        self._heard: dict[Run, float] = {}
        """When a run last answered."""
        self._silent: dict[Run, tuple[int, float]] = {}
        """Pings unanswered in a row, and when the first of them was sent."""

    def note(self, run: Run, outcome: Outcome, sent: float, now: float) -> bool:
        """Take a ping's outcome; tells whether the run's reachability changed."""
        before = run in self._dead, run in self._answered
        if outcome is Outcome.ALIVE:
            self._silent.pop(run, None)
            self._dead.discard(run)
            self._answered.add(run)
            self._heard[run] = now
        elif outcome is Outcome.DEAD:
            self._dead.add(run)
        else:
            count, since = self._silent.get(run, (0, sent))
            self._silent[run] = count + 1, since
            if count + 1 >= SILENT_PINGS and now - since > SILENT_AFTER_S:
                self._dead.add(run)
        if run in self._dead:
            self._answered.discard(run)
        return (run in self._dead, run in self._answered) != before

    def has_answered(self, run: Run, since: float) -> bool:
        """Tell whether a run has answered a ping since then."""
        return self._heard.get(run, float("-inf")) >= since

    def unreachable(self, voted_out: Collection[Run] = ()) -> frozenset[Run]:
        """Give the runs that count as gone; those in `voted_out` do until they answer."""
        return frozenset(self._dead | (set(voted_out) - self._answered))

    def forget_all_but(self, runs: Collection[Run]) -> None:
        """Drop what is known of runs that nobody asks about any more."""
        self._dead.intersection_update(runs)
        self._answered.intersection_update(runs)
        for known in (self._silent, self._heard):
            for run in known.keys() - set(runs):
                del known[run]
