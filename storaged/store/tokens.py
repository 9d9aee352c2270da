"""Fencing tokens: the highest one seen for each VDI, which outlives every crash (I6)."""

from __future__ import annotations

import threading

from sheepfs.core.errors import CorruptError, NoSpaceError
from storaged.store.disk import Disk, Health, disk_error
from storaged.store.recordlog import RecordLog

_SLACK = 4096
"""Superseded records that the file may hold before it is rewritten."""


class TokenLog:
    """Highest token of each VDI, kept in `tokens.log`. Thread-safe."""

    def __init__(self, disk: Disk, health: Health) -> None:
        self._log = RecordLog(disk, "tokens.log", b"SHEEPTOK", "<QQ")
        self._health = health
        self._lock = threading.Lock()
        self._tokens: dict[int, int] = {}

    def create(self) -> None:
        """Make an empty file (OSError)."""
        self._log.rewrite(())

    def load(self) -> None:
        """Read the file and rewrite it compactly.

        Raises:
            CorruptError: a token that was kept is gone; a node that forgot whom it fenced off
                must not serve, its data directory is made anew and resynced from the peers.
            OSError: the disk failed.
        """
        records, damaged = self._log.load()
        if damaged:
            raise CorruptError("tokens.log is damaged: make the data directory anew")
        for vdi, token in records:
            self._tokens[vdi] = max(token, self._tokens.get(vdi, 0))
        self._log.rewrite(self._tokens.items())

    def all(self) -> dict[int, int]:
        """Give a copy: VDI -> highest token."""
        with self._lock:
            return dict(self._tokens)

    def set(self, vdi: int, token: int) -> None:
        """Raise the token of a VDI durably; a lower one changes nothing. Blocks.

        Raises:
            NoSpaceError: the file cannot grow; nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        with self._lock:
            self._health.check()
            if token <= self._tokens.get(vdi, 0):
                return
            known = False
            try:
                self._log.append([(vdi, token)])
                self._tokens[vdi] = token
                known = True
                if self._log.count > len(self._tokens) + _SLACK:
                    self._log.rewrite(self._tokens.items())
            except OSError as error:
                cause = disk_error(error, "tokens.log")
                if not isinstance(cause, NoSpaceError):
                    raise self._health.fail(error, "tokens.log") from error
                # Without space to make the file shorter the long one stays in use.
                if not known:
                    raise cause from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._log.close()
