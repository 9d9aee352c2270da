"""Noticing that the metadata store lost what it had answered before: restored from older data.

Always holds: a store that went back is not used until it is vouched for. What it gives out, ids
and tokens and epochs, it has given out before. Only an operator can see to that, with `sheepctl
metadata import` or `accept`: both raise the base of `fencing` beyond all revisions before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

from sheepfs.core.errors import ProtocolError, UnreachableError
from sheepfs.core.metadata import FencingRecord

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
REMIND_S = 300.0
"""A store that went back is logged this often (I12)."""


class WentBackError(UnreachableError):
    """The store has forgotten changes: it counts as away until an operator acts."""


class Known(NamedTuple):
    """What was known of a store when a request was sent."""

    base: int
    revision: int


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
        self._base = 0
        self._reason = ""
        self._reminded = 0.0
        self._looked = 0.0
        self._lock = threading.Lock()

    @property
    def known(self) -> Known:
        """What is known so far; to be read before a request is sent."""
        with self._lock:
            return Known(self._base, self._seen)

    @property
    def went_back(self) -> bool:
        """Whether the store went back, and nobody has vouched for it since."""
        return bool(self._reason)

    def may_look(self) -> bool:
        """Tell whether it is time to look again whether the store is vouched for."""
        with self._lock:
            now = time.monotonic()
            is_due = now >= self._looked + LOOK_EVERY_S
            if is_due:
                self._looked = now
        return is_due

    def look(self, base: int, revision: int, known: Known) -> None:
        """Take the base of `fencing`, and the revision at which it was read, as `note` does.

        Raises:
            WentBackError: the revision is too low, and no higher base makes up for it.
        """
        with self._lock:
            if base > self._base and base + revision >= self._base + self._seen:
                if self._reason:
                    log.warning("%s went back and is vouched for: it is used again", self._what)
                self._base, self._seen, self._reason = base, revision, ""
                return
        self.note(revision, known)

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

    def note(self, revision: int, known: Known) -> None:
        """Take the revision of a reply to a request that was sent when so much was known.

        Raises:
            WentBackError: it is lower.
        """
        with self._lock:
            if known.base != self._base:
                pass  # Another request has found it vouched for meanwhile.
            elif revision >= known.revision:
                self._seen = max(self._seen, revision)
            elif not self._reason:
                self._reason = _reason(self._what, revision, known.revision)
        self.check()


def _reason(what: str, revision: int, seen: int) -> str:
    return (
        f"{what} went back from revision {seen} to {revision}: it was restored from older data, and"
        " nothing is changed any more. Bring the newer data back, or stop all storage daemons,"
        " accept the older one with: sheepctl metadata accept, and start daemons and mounts anew"
    )


class _HasValue(Protocol):
    """A key as a store gave it."""

    @property
    def value(self) -> bytes:
        """What it holds."""
        ...


def base_of(found: Iterable[_HasValue]) -> int:
    """Give the base of `fencing`, of the record that was found; 0 if there is none to read."""
    for kv in found:
        with suppress(ProtocolError):
            return FencingRecord.decode(kv.value).base
    return 0
