"""Noticing that the metadata store lost what it had answered before: restored from older data.

Always holds: a store that went back is not used again by this process. What it gives out, ids and
tokens and epochs, it has given out before; only an operator can say that this is to be so
(`sheepctl metadata accept`), and whoever starts after that begins with no memory.
"""

from __future__ import annotations

import logging
import threading
import time

from sheepfs.core.errors import UnreachableError

log = logging.getLogger(__name__)

REMIND_S = 300.0
"""A store that went back is logged this often (I12)."""


class WentBackError(UnreachableError):
    """The store has forgotten changes: it counts as away, for good, until an operator acts."""


class RevisionGuard:
    """The highest revision that a store has answered, and whether it went back. Thread-safe.

    Every reply that is read or decided at the store's latest state has a revision that is not
    lower than any that was answered before the request was sent.

    Args:
        what: the store, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen = 0
        self._reason = ""
        self._reminded = 0.0
        self._lock = threading.Lock()

    @property
    def seen(self) -> int:
        """The highest revision so far; to be read before a request is sent."""
        return self._seen

    def check(self) -> None:
        """Raise WentBackError if the store went back."""
        if self._reason:
            with self._lock:
                now = time.monotonic()
                is_due = now >= self._reminded + REMIND_S
                if is_due:
                    self._reminded = now
            if is_due:
                log.error("%s", self._reason)
            raise WentBackError(self._reason)

    def note(self, revision: int, seen: int) -> None:
        """Take the revision of a reply to a request that was sent when `seen` was the highest.

        Raises:
            WentBackError: it is lower.
        """
        with self._lock:
            if revision >= seen:
                self._seen = max(self._seen, revision)
            elif not self._reason:
                self._reason = _reason(self._what, revision, seen)
        self.check()


def _reason(what: str, revision: int, seen: int) -> str:
    return (
        f"{what} went back from revision {seen} to {revision}: it was restored from older data, and"
        " nothing is changed any more. Bring the newer data back, or stop all storage daemons,"
        " accept the older one with: sheepctl metadata accept, and start daemons and mounts anew"
    )
