"""What mounts report of their VDIs, for `sheepctl top`.

Always holds:
- A report is checked before any of it is kept, and what one mount can make the daemon keep is
  bounded; so is the reply.
- What a mount reported goes with its connection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.traffic import Traffic
from storaged.server import ClientConnection

MAX_VDIS = 1024
"""Of one mount."""
MAX_REPLY_BYTES = 3 << 20
MAX_TEXT = 500


class _Mount:
    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.rows: dict[int, bytes] = {}
        """By VDI, encoded: they are asked for as often as they change."""


class MountReports:
    """The last figures of each mount that reports here."""

    def __init__(self) -> None:
        self._mounts: dict[ClientConnection, _Mount] = {}

    def take(self, client: ClientConnection, content: object) -> None:
        """Take a report. Raises UsageError if it is none; then nothing of it is kept."""
        if not isinstance(content, Mapping):
            raise UsageError("traffic is not a JSON object")
        at, vdis = content.get("at"), content.get("vdis")
        if not isinstance(at, int | float) or not math.isfinite(at) or not isinstance(vdis, list):
            raise UsageError("a traffic report says when (at) and has a list of vdis")
        try:
            rows = dict(_check_row(row) for row in vdis)
        except ProtocolError as error:
            raise UsageError(str(error)) from error
        self._forget_gone()
        mount = self._mounts.setdefault(client, _Mount())
        mount.head = {
            "client": str(content.get("client"))[:MAX_TEXT],
            "mount": str(content.get("mount"))[:MAX_TEXT],
            "at": at,
        }
        for vdi, row in rows.items():
            mount.rows.pop(vdi, None)
            mount.rows[vdi] = row
        while len(mount.rows) > MAX_VDIS:
            del mount.rows[next(iter(mount.rows))]

    def encoded(self) -> bytes:
        """Give all as JSON; `left_out` counts VDIs that did not fit into a reply."""
        self._forget_gone()
        room = MAX_REPLY_BYTES
        mounts = []
        for mount in self._mounts.values():
            rows = []
            for row in reversed(mount.rows.values()):
                room -= len(row)
                if room > 0:
                    rows.append(row)
            head = json.dumps({**mount.head, "left_out": len(mount.rows) - len(rows)})
            mounts.append(head[:-1].encode() + b', "vdis": [' + b",".join(rows) + b"]}")
        return b"[" + b",".join(mounts) + b"]"

    def _forget_gone(self) -> None:
        self._mounts = {c: mount for c, mount in self._mounts.items() if not c.connection.closed}


def _check_row(row: object) -> tuple[int, bytes]:
    traffic = Traffic.decode(row)
    assert isinstance(row, Mapping)
    vdi, name = row.get("id"), row.get("name")
    if type(vdi) is not int or not 0 <= vdi < 1 << 32 or not isinstance(name, str):
        raise ProtocolError("a VDI's traffic has an id and a name")
    content = {"id": vdi, "name": name[:MAX_TEXT], **traffic.encode()}
    return vdi, json.dumps(content, separators=(",", ":")).encode()
