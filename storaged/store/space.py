"""The reserve: writes stop while deletes, discards and logs still have room (I14)."""

from __future__ import annotations

from sheepfs.core.errors import NoSpaceError
from storaged.store.disk import Disk, DiskSpace

_MAX_RESERVE = 1 << 30
_STRIDE = 64 << 20
"""Bytes handed out between two looks at the disk, at most; other users of it are seen by then."""


class SpaceGuard:
    """Hands out bytes of the disk above the reserve; asks the file system only now and then."""

    def __init__(self, disk: Disk, reserve_bytes: int | None) -> None:
        """None reserves 5 % of the disk, at most 1 GiB. Raises OSError."""
        self._disk = disk
        if reserve_bytes is None:
            reserve_bytes = min(_MAX_RESERVE, disk.space().total // 20)
        self._reserve = reserve_bytes
        self._budget = 0

    def take(self, need_bytes: int) -> None:
        """Take `need_bytes` of new space. Loop only.

        Raises:
            NoSpaceError: only the reserve is left; nothing changed.
        """
        self._budget -= need_bytes
        if self._budget < 0:
            self._budget = 0
            available = self.check(need_bytes)
            # Look more often the fuller the disk is.
            self._budget = min(_STRIDE, available // 8)

    def check(self, need_bytes: int) -> int:
        """Look at the disk; give what stays available after `need_bytes`. Any thread.

        Raises:
            NoSpaceError: only the reserve is left.
        """
        try:
            available = self._disk.space().free - self._reserve - need_bytes
        except OSError as error:
            raise NoSpaceError(f"the disk does not say how full it is: {error}") from error
        if available < 0:
            raise NoSpaceError("only the reserve is left on the disk")
        return available

    def look(self) -> DiskSpace:
        """Give the disk's size and the bytes above the reserve (OSError). Any thread."""
        total, free = self._disk.space()
        return DiskSpace(total, max(0, free - self._reserve))
