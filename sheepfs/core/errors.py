"""Errors, split by who must act, and the one table that ties them to wire statuses.

- `RetryableError`: the world is changing (a peer unreachable, a stale epoch, recovery): try again.
- `TerminalError`: trying again cannot help (fenced, corrupt, no space).
- `UsageError`: the caller asked for something that cannot be (a bad name, a wrong size).
Retry code tests `RetryableError` alone; `to_errno` is the only place that makes errno values.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar


class Status(IntEnum):
    """Outcome of a request, as it stands in a reply frame. Numbers are part of the protocol."""

    OK = 0
    STALE_EPOCH = 1
    STALE_OBJECT = 2
    NOT_MEMBER = 3
    RECOVERING = 4
    NOT_LEADER = 5
    BUSY = 6
    IN_DOUBT = 7
    FENCED = 16
    NOT_FOUND = 17
    CORRUPT = 18
    NO_SPACE = 19
    IO_ERROR = 20
    BAD_REQUEST = 32
    WRONG_CLUSTER = 33


class SheepError(Exception):
    """Root of all errors of sheepfs. `str(error)` is a sentence for people."""

    status: ClassVar[Status] = Status.IO_ERROR
    errno: ClassVar[int] = errno.EIO


class RetryableError(SheepError):
    """The operation may succeed when the cluster has moved on."""

    status = Status.BUSY
    errno = errno.EAGAIN


class StaleEpochError(RetryableError):
    """The sender's cluster map is older than the placement group's last change."""

    status = Status.STALE_EPOCH


class StaleObjectError(RetryableError):
    """The replica's version is not the one that the request builds on."""

    status = Status.STALE_OBJECT

    def __init__(self, message: str, version: int = 0) -> None:
        super().__init__(message)
        self.version = version


class NotMemberError(RetryableError):
    """The node does not (or may not yet) serve this placement group."""

    status = Status.NOT_MEMBER


class RecoveringError(RetryableError):
    """The object is being pulled from a peer."""

    status = Status.RECOVERING


class InDoubtError(RetryableError):
    """The copy asked for is a suspect that waits for what other copies say."""

    status = Status.IN_DOUBT


class NotLeaderError(RetryableError):
    """The node asked is not the leader."""

    status = Status.NOT_LEADER


class UnreachableError(RetryableError):
    """A node or etcd does not answer."""

    errno = errno.EHOSTUNREACH


class HeldElsewhereError(RetryableError):
    """The VDI is attached by another mount; `owner` is `host:pid:mountpoint`, if known."""

    errno = errno.EBUSY

    def __init__(self, message: str, owner: str = "") -> None:
        super().__init__(message)
        self.owner = owner


class TerminalError(SheepError):
    """Trying again cannot help."""


class FencedError(TerminalError):
    """Another holder took the VDI over; this one may never write again."""

    status = Status.FENCED


class ObjectNotFoundError(TerminalError):
    """The replica has no such object."""

    status = Status.NOT_FOUND


class LostWritesError(TerminalError):
    """What was written and not yet flushed may be gone: every node that had it was lost."""


class CorruptError(TerminalError):
    """A checksum does not match. `blocks` are the numbers of the bad blocks of the object."""

    status = Status.CORRUPT

    def __init__(self, message: str, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)


class NoSpaceError(TerminalError):
    """Only the reserve is left on the disk."""

    status = Status.NO_SPACE
    errno = errno.ENOSPC


class DiskError(TerminalError):
    """The disk failed; the node leaves the cluster."""

    status = Status.IO_ERROR


class UsageError(SheepError):
    """The caller asked for what cannot be."""

    status = Status.BAD_REQUEST
    errno = errno.EINVAL


class WrongClusterError(UsageError):
    """The peer or the data directory belongs to another cluster or format."""

    status = Status.WRONG_CLUSTER


class VdiNotFoundError(UsageError):
    """No VDI has that name."""

    errno = errno.ENOENT


class VdiExistsError(UsageError):
    """A VDI with that name exists."""

    errno = errno.EEXIST


class SnapshotNotFoundError(VdiNotFoundError):
    """No snapshot of that VDI has that tag."""


class SnapshotExistsError(VdiExistsError):
    """The VDI has a snapshot with that tag."""


class SnapshotProtectedError(UsageError):
    """The snapshot is not to be deleted."""

    errno = errno.EPERM


class ReadOnlyError(UsageError):
    """A snapshot never changes."""

    errno = errno.EROFS


class ProtocolError(SheepError):
    """The peer sent bytes that are not this protocol; the connection ends."""


_BY_STATUS: dict[Status, type[SheepError]] = {
    error.status: error
    for error in (
        StaleEpochError,
        StaleObjectError,
        NotMemberError,
        RecoveringError,
        InDoubtError,
        NotLeaderError,
        RetryableError,
        FencedError,
        ObjectNotFoundError,
        CorruptError,
        NoSpaceError,
        DiskError,
        UsageError,
        WrongClusterError,
    )
}


def error_for(status: int, message: str) -> SheepError:
    """Give the error that a reply's status stands for (an unknown status is a ProtocolError)."""
    try:
        return _BY_STATUS[Status(status)](message)
    except (ValueError, KeyError):
        return ProtocolError(f"unknown status {status}: {message}")


def to_errno(error: BaseException) -> int:
    """Give the errno that an application sees for `error`."""
    if isinstance(error, SheepError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
