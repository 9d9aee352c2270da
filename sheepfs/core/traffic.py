"""How many requests there were, how long they took and what they moved: counters that only grow.

Always holds:
- A request is counted once, when it has succeeded; a failed one only as an error.
- Counting costs two readings of a clock and a few additions: nothing is allocated for a request.
- What comes from another process is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from sheepfs.core.errors import ProtocolError

KINDS = ("read", "write", "flush")
BUCKETS = 64
"""Bucket b counts what took less than 2^b microseconds, and no less than half of that; the last
ones hold what stalled for hours."""
_LIMIT = 1 << 63


class Meter:
    """Requests of one kind."""

    __slots__ = ("buckets", "bytes", "errors", "nanoseconds")

    def __init__(
        self,
        buckets: Sequence[int] = (),
        size_bytes: int = 0,
        nanoseconds: int = 0,
        errors: int = 0,
    ) -> None:
        self.buckets = [*buckets, *[0] * (BUCKETS - len(buckets))]
        self.bytes = size_bytes
        """Bytes that they moved."""
        self.nanoseconds = nanoseconds
        """How long they took, all together."""
        self.errors = errors
        """Requests that failed; they are in no other figure."""

    def add(self, took_ns: int, size_bytes: int) -> None:
        """Count a request."""
        self.buckets[(took_ns // 1000).bit_length()] += 1
        self.nanoseconds += took_ns
        self.bytes += size_bytes

    def add_many(self, count: int, took_ns: int, size_bytes: int) -> None:
        """Count requests that were answered together; each took `took_ns`."""
        self.buckets[(took_ns // 1000).bit_length()] += count
        self.nanoseconds += took_ns * count
        self.bytes += size_bytes

    @property
    def count(self) -> int:
        """Requests that succeeded."""
        return sum(self.buckets)

    @property
    def mean_s(self) -> float:
        """Mean time of a request in seconds; 0 when there was none."""
        count = self.count
        return self.nanoseconds / count / 1e9 if count else 0.0

    def slower_than(self, exponent: int) -> int:
        """Count requests that took 2^exponent microseconds or more."""
        return sum(self.buckets[exponent + 1 :])

    def quantile_s(self, share: float) -> float:
        """Give the time in seconds within which `share` (0 to 1) of the requests were done.

        Exact to the bucket; within it requests are taken to be spread evenly.
        """
        rank = share * self.count
        seen = 0
        for number, count in enumerate(self.buckets):
            if count and seen + count >= rank:
                upper = 1 << number
                lower = upper >> 1
                return (lower + (upper - lower) * (rank - seen) / count) / 1e6
            seen += count
        return 0.0

    def since(self, older: Meter) -> Meter:
        """Give what came after `older`; if that is no earlier state of this one, everything."""
        buckets = [new - old for new, old in zip(self.buckets, older.buckets, strict=True)]
        rest = (self.bytes - older.bytes, self.nanoseconds - older.nanoseconds)
        errors = self.errors - older.errors
        if min(*buckets, *rest, errors) < 0:
            return self
        return Meter(buckets, *rest, errors)

    def plus(self, other: Meter) -> Meter:
        """Give both together."""
        return Meter(
            [a + b for a, b in zip(self.buckets, other.buckets, strict=True)],
            self.bytes + other.bytes,
            self.nanoseconds + other.nanoseconds,
            self.errors + other.errors,
        )

    def encode(self) -> dict[str, Any]:
        """Give it as JSON; trailing empty buckets are left out."""
        used = BUCKETS
        while used and not self.buckets[used - 1]:
            used -= 1
        return {
            "buckets": self.buckets[:used],
            "bytes": self.bytes,
            "ns": self.nanoseconds,
            "errors": self.errors,
        }

    @classmethod
    def decode(cls, content: object) -> Self:
        """Check and take what `encode` gave. Raises ProtocolError."""
        if not isinstance(content, Mapping):
            raise ProtocolError("a meter that is no JSON object")
        buckets = content.get("buckets")
        rest = [content.get(key) for key in ("bytes", "ns", "errors")]
        if not isinstance(buckets, list) or len(buckets) > BUCKETS:
            raise ProtocolError("a meter whose buckets are no list of at most 64 numbers")
        for number in (*buckets, *rest):
            # JSON's true is an int, too.
            if type(number) is not int or not 0 <= number < _LIMIT:
                raise ProtocolError("a meter with something else than counts")
        return cls(buckets, *rest)  # type: ignore[arg-type]


class Traffic:
    """Reads, writes and flushes of one VDI or of one node."""

    __slots__ = KINDS

    def __init__(
        self, read: Meter | None = None, write: Meter | None = None, flush: Meter | None = None
    ) -> None:
        self.read = read or Meter()
        self.write = write or Meter()
        self.flush = flush or Meter()

    def since(self, older: Traffic) -> Traffic:
        """Give what came after `older`; if that is no earlier state of this one, everything."""
        return Traffic(
            self.read.since(older.read),
            self.write.since(older.write),
            self.flush.since(older.flush),
        )

    def plus(self, other: Traffic) -> Traffic:
        """Give both together."""
        return Traffic(
            self.read.plus(other.read), self.write.plus(other.write), self.flush.plus(other.flush)
        )

    @property
    def total(self) -> int:
        """Requests of all kinds, failed ones too: grows with whatever happens."""
        return sum(m.count + m.errors for m in (self.read, self.write, self.flush))

    def encode(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {kind: getattr(self, kind).encode() for kind in KINDS}

    @classmethod
    def decode(cls, content: object) -> Self:
        """Check and take what `encode` gave; other keys are let be. Raises ProtocolError."""
        if not isinstance(content, Mapping):
            raise ProtocolError("traffic that is no JSON object")
        return cls(*(Meter.decode(content.get(kind)) for kind in KINDS))
