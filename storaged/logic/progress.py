"""How far a node's recovery is: what is left, what was done, how fast, how long yet. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW_S = 10.0
"""The rate is that of the last so many seconds."""

Group = tuple[int, int, int]
"""Pool, number, and the epoch of the group's last change."""


class Progress:
    """What is left of one node's recovery, by placement group."""

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        """Done since this recovery began. Bytes are those that moved."""
        self.since = 0.0
        """When it began; 0 while there is nothing to recover."""
        self.waits = ""
        """Why it does not go on; empty if it does."""
        self._left: dict[Group, list[int]] = {}
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, groups: Sequence[Group], now: float) -> None:
        """Only these groups are to be recovered; those that are new here are not known yet."""
        if not groups:
            self.since, self.waits = 0.0, ""
        elif not self._left:
            self.since, self.objects, self.bytes = now, 0, 0
            self._samples = deque([(now, 0)])
        self._left = {group: self._left.get(group, [-1, 0]) for group in groups}

    def unknown(self) -> list[Group]:
        """Give the groups of which it is not known how much is left."""
        return [group for group, (objects, _) in self._left.items() if objects < 0]

    def found(self, group: Group, objects: int, size_bytes: int) -> None:
        """So much is left of a group."""
        if group in self._left:
            self._left[group] = [objects, size_bytes]

    def done(self, group: Group, expected_bytes: int, moved_bytes: int, now: float) -> None:
        """An object of a group is level, of which `expected_bytes` were thought to be missing."""
        left = self._left.get(group)
        if left is not None:
            left[0], left[1] = max(0, left[0] - 1), max(0, left[1] - expected_bytes)
        self.objects += 1
        self.bytes += moved_bytes
        if not self._samples or now - self._samples[-1][0] >= WINDOW_S / 20:
            self._samples.append((now, self.bytes))
        while now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float) -> float:
        """Give bytes per second, of late."""
        while self._samples and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()
        if not self._samples:
            return 0.0
        began, before = self._samples[0]
        return (self.bytes - before) / max(now - began, WINDOW_S / 20)

    def status(self, now: float) -> dict[str, Any]:
        """Give what STATUS shows; sizes in bytes, times in seconds."""
        left = [max(0, objects) for objects, _ in self._left.values()]
        return {
            "groups_left": len(self._left),
            "objects_left": sum(left),
            "bytes_left": sum(size for _, size in self._left.values()),
            "objects_done": self.objects,
            "bytes_done": self.bytes,
            "bytes_per_s": round(self.rate(now)) if self._left else 0,
            "for_s": round(now - self.since, 1) if self._left else 0,
            "waits": self.waits,
        }
