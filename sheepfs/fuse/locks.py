"""POSIX and OFD byte-range locks of one file within one mount: a pure table.

Always holds:
- Two locks of different owners overlap only if both are shared.
- Locks of one owner never overlap: a new one replaces what it covers, as fcntl(2) says.
- A range is `[start, end]`: the kernel's protocol names the last byte, not the one after it.

An owner is the kernel's number for a process (POSIX locks) or an open file (OFD locks); FUSE
does not tell them apart, so POSIX deadlocks are not detected: a waiting lock can be interrupted.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_OFFSET = (1 << 63) - 1
"""`end` of a lock to the end of the file, wherever that will be."""


class Lock(NamedTuple):
    """One locked range.

    Attributes:
        owner: who may overlap it freely and unlock it.
        handle: file handle it was last taken through; its release drops the lock.
        pid: process shown by F_GETLK, 0 if it is on another host.
    """

    owner: int
    handle: int
    pid: int
    start: int
    end: int
    exclusive: bool

    def overlaps(self, start: int, end: int) -> bool:
        """Tell whether the two ranges share a byte."""
        return self.start <= end and start <= self.end


class LockTable:
    """Locks held on one file. Not thread-safe; no method waits."""

    def __init__(self) -> None:
        self.held: list[Lock] = []

    def __bool__(self) -> bool:
        return bool(self.held)

    def conflict(self, wanted: Lock) -> Lock | None:
        """Give the held lock with the lowest start that `wanted` must wait for, if any."""
        blockers = [
            lock
            for lock in self.held
            if lock.owner != wanted.owner
            and (lock.exclusive or wanted.exclusive)
            and lock.overlaps(wanted.start, wanted.end)
        ]
        return min(blockers, key=lambda lock: lock.start, default=None)

    def acquire(self, wanted: Lock) -> Lock | None:
        """Take a lock, replacing the owner's own in its range; give the conflict if it cannot."""
        blocker = self.conflict(wanted)
        if blocker is None:
            self.release(wanted.owner, wanted.start, wanted.end)
            self.held.append(self._merged(wanted))
        return blocker

    def _merged(self, lock: Lock) -> Lock:
        """Join `lock` with its owner's equal neighbours, which leave the table."""
        for other in [o for o in self.held if o.owner == lock.owner]:
            same = other.exclusive == lock.exclusive and other.handle == lock.handle
            if same and other.overlaps(lock.start - 1, lock.end + 1):
                self.held.remove(other)
                lock = lock._replace(
                    start=min(lock.start, other.start), end=max(lock.end, other.end)
                )
        return lock

    def release(self, owner: int, start: int = 0, end: int = MAX_OFFSET) -> bool:
        """Unlock the owner's part of a range; tell whether anything was locked there."""
        kept: list[Lock] = []
        changed = False
        for lock in self.held:
            if lock.owner != owner or not lock.overlaps(start, end):
                kept.append(lock)
                continue
            changed = True
            if lock.start < start:
                kept.append(lock._replace(end=start - 1))
            if lock.end > end:
                kept.append(lock._replace(start=end + 1))
        self.held = kept
        return changed

    def release_handle(self, handle: int) -> bool:
        """Unlock all that was taken through a handle; tell whether there was anything."""
        kept = [lock for lock in self.held if lock.handle != handle]
        changed = len(kept) != len(self.held)
        self.held = kept
        return changed


def means_to_write(wanted: Lock, table: LockTable) -> bool:
    """Tell whether the owner is a QEMU that locks the bytes of writing or resizing, or did before.

    It locks them through a read-only file first and opens for writing only then.
    """
    mine = [wanted, *(lock for lock in table.held if lock.owner == wanted.owner)]
    return any(
        lock.overlaps(byte, byte)
        for lock in mine
        if any(lock.start in span and lock.end in span for span in _QEMU_RANGES)
        for byte in _QEMU_WRITER[:2]
    )


_QEMU_RANGES = (range(100, 104), range(200, 204))
_QEMU_WRITER = (101, 103, 201, 203)


def foreign_conflict(wanted: Lock) -> Lock | None:
    """Give the lock in the way of `wanted` when another mount holds the VDI.

    The other mount's locks are not known here. It is taken for a QEMU that writes: read locks on
    the bytes of the permissions it has (write 101, resize 103) and of those it does not share
    (201, 203), so that a QEMU here finds what it finds beside one on the same host and prints
    `Failed to get "write" lock`. Everything else is locked as a whole.

    Source: QEMU block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE.
    """
    if any(wanted.start in span and wanted.end in span for span in _QEMU_RANGES):
        for byte in _QEMU_WRITER:
            if wanted.exclusive and wanted.start <= byte <= wanted.end:
                return Lock(0, 0, 0, byte, byte, exclusive=False)
        return None
    return Lock(0, 0, 0, 0, MAX_OFFSET, exclusive=True)
