"""Operations that are not about objects: maps, reports, status."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import NotLeaderError, UsageError
from sheepfs.core.wire import Buffer, Header, Op
from storaged.recovery.recovery import JoinedGroup, parse_joined
from storaged.reports import MountReports
from storaged.server import ClientConnection, Handler, json_object


class Leading(Protocol):
    """The leader's ear (storaged.membership.leader); every daemon has one, one of them leads."""

    @property
    def is_leader(self) -> bool:
        """Whether this daemon leads now."""
        ...

    def report(self, node: int, incarnation: int) -> None:
        """Somebody cannot reach a node's incarnation."""
        ...

    def joined(self, node: int, incarnation: int, groups: list[JoinedGroup]) -> None:
        """A node has caught up with groups."""
        ...


class Control:
    """Handlers of the control operations."""

    def __init__(
        self,
        leader: Leading,
        current_map: Callable[[], ClusterMap],
        take_map: Callable[[ClusterMap], None],
        status: Callable[[], dict[str, Any]],
        holder: Callable[[int], str],
    ) -> None:
        """`holder`: names the client that holds a VDI and is present; empty if none is."""
        self._leader = leader
        self._current_map = current_map
        self._take_map = take_map
        self._status = status
        self.mounts = MountReports()
        self._holder = holder
        self.stalled: dict[ClientConnection, list[str]] = {}
        self.handlers: dict[int, Handler] = {
            Op.PING: self._ping,
            Op.MAP: self._map,
            Op.REPORT: self._report,
            Op.JOINED: self._joined,
            Op.STATUS: self._tell_status,
        }

    def _ping(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        client.pinged = trio.current_time()
        client.reply(header, epoch=self._current_map().epoch)

    def _map(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        """Take the map that a peer shows, or show this node's."""
        if payload:
            self._take_map(ClusterMap.decode(payload))
            client.reply(header)
        else:
            client.reply(header, self._current_map().encoded)

    def _report(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        content = json_object(payload)
        if "stalled" in content:
            stalled = content["stalled"]
            if not isinstance(stalled, list):
                raise UsageError("stalled is not a list")
            self.stalled[client] = [str(line)[:500] for line in stalled[:100]]
        elif "traffic" in content:
            self.mounts.take(client, content["traffic"])
        else:
            try:
                self._leader.report(int(content["node"]), int(content["incarnation"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"a report names node and incarnation: {error}") from error
        client.reply(header)

    def _joined(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        content = json_object(payload)
        if not self._leader.is_leader:
            raise NotLeaderError("this node does not lead")
        try:
            node, incarnation = int(content["node"]), int(content["incarnation"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"JOINED names node, incarnation and groups: {error}") from error
        self._leader.joined(node, incarnation, parse_joined(content.get("groups")))
        client.reply(header)

    def _tell_status(self, client: ClientConnection, header: Header, payload: Buffer) -> None:
        if payload:
            try:
                vdi = int(json_object(payload)["holder"])
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"a VDI's holder is asked for by its id: {error}") from error
            client.reply_json(header, {"holder": self._holder(vdi)})
            return
        status = self._status()
        status["stalled"] = self.stalled_volumes()
        client.reply(header, json.dumps(status).encode())

    def stalled_volumes(self) -> list[str]:
        """What connected mounts say cannot go on."""
        self.stalled = {
            client: lines for client, lines in self.stalled.items() if not client.connection.closed
        }
        return sorted({line for lines in self.stalled.values() for line in lines})
