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
        self._log = _log(disk)
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
        self._tokens, damaged = _load(self._log)
        if damaged:
            raise CorruptError("tokens.log is damaged: make the data directory anew")
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


def read_tokens(disk: Disk) -> tuple[dict[int, int], bool]:
    """Give VDI -> highest token, and whether any that was kept is gone; nothing is changed.

    Raises OSError.
    """
    return _load(_log(disk))


def _log(disk: Disk) -> RecordLog:
    return RecordLog(disk, "tokens.log", b"SHEEPTOK", "<QQ")


def _load(records: RecordLog) -> tuple[dict[int, int], bool]:
    tokens: dict[int, int] = {}
    good, damaged = records.load()
    for vdi, token in good:
        tokens[vdi] = max(token, tokens.get(vdi, 0))
    return tokens, damaged
