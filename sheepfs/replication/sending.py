"""Getting the changes of one holder to all members of their groups, until they are answered.

Always holds:
- A change goes to all members of its group or to none: while the group takes no writes, or one of
  them is not linked, it is parked, and sent again as soon as that may have changed.
- When a group changes, what is under way is sent again to all its members, in the order of the
  versions; answers to the former sending are ignored.
"""

from __future__ import annotations

import logging
from operator import attrgetter

import trio

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.wire import prepare
from sheepfs.logs import fields
from sheepfs.net.link import Link, next_request
from sheepfs.net.router import Router
from sheepfs.replication.changes import Change, Group

log = logging.getLogger(__name__)

RETRY_S = 0.02
STALL_LOG_S = 5.0

_by_version = attrgetter("version")


class Sender:
    """Sends the changes of one attach.

    Attributes:
        under_way: what was submitted and is not complete, by version.
        stalled: why the oldest of it does not move, or empty.
    """

    def __init__(self, router: Router, vdi: int, token: int) -> None:
        self.under_way: dict[Change, None] = {}
        self.stalled = ""
        self._router = router
        self._vdi = vdi
        self._token = token
        self._parked: dict[Change, None] = {}
        self._routes: dict[Group, list[Link]] = {}
        self._retry = trio.Event()

    def send(self, change: Change) -> None:
        """Send what is under way to all members of its group, or park it."""
        state = change.state
        links = self._routes.get(state.group) or self._route(state.group)
        if links is None:
            self.park(change)
            return
        change.request = request = next_request()
        change.epoch = epoch = self._router.map.epoch
        change.left = len(links)
        payload = change.payload
        pool, pg = state.group
        unsealed = prepare(
            change.op, change.flags, request, epoch, self._vdi, pool, pg, self._token,
            state.oid, change.offset, change.span, change.prev, change.version,
            len(payload), change.checksum,
        )  # fmt: skip
        for link in links:
            if link.lost:
                self._routes.pop(state.group, None)
                self.park(change)
                return
            link.changes[request] = change
            link.connection.send_frame(unsealed.seal(link.session), payload)

    def _route(self, group: Group) -> list[Link] | None:
        """Give links to all members, if the group takes writes and all of them are linked."""
        cluster_map = self._router.map
        pool, pg = group
        if not cluster_map.writable(pool, pg):
            return None
        links = []
        for node in cluster_map.pools[pool][pg].members:
            link = self._router.link(node)
            if link is None:
                return None
            links.append(link)
        self._routes[group] = links
        return links

    def forget_routes(self) -> None:
        """Look for the members' links anew."""
        self._routes.clear()

    def take_back(self, change: Change) -> None:
        """Answers to a change are ignored from now on."""
        change.request = 0
        if change in self.under_way:
            del self.under_way[change]
            change.state.changes.remove(change)
        self._parked.pop(change, None)

    def park(self, change: Change) -> None:
        """Send a change again a little later, or as soon as the map or a link changes."""
        if change in self.under_way:
            change.request = 0
            self._parked[change] = None
            self._retry.set()

    def send_parked(self) -> None:
        """Send again what waits for links."""
        self._routes.clear()
        self._send_again(list(self._parked))

    def send_stale(self, new: ClusterMap) -> None:
        """Send again what was not sent in the group's current epoch, or is not known to arrive."""
        pools = new.pools

        def is_stale(change: Change) -> bool:
            pool, pg = change.state.group
            return not change.request or pools[pool][pg].changed > change.epoch

        self._send_again([change for change in self.under_way if is_stale(change)])

    def _send_again(self, changes: list[Change]) -> None:
        for change in sorted(changes, key=_by_version):
            if change in self.under_way:
                self._parked.pop(change, None)
                self.send(change)

    async def run(self) -> None:
        """Send parked changes again; say so when something stalls (I12)."""
        while True:
            with trio.move_on_after(1.0):
                await self._retry.wait()
            self._retry = trio.Event()
            if self._parked:
                await trio.sleep(RETRY_S)
                self.send_parked()
            self._watch_stall()

    def _watch_stall(self) -> None:
        now = trio.current_time()
        oldest = next(iter(self.under_way), None)
        if oldest is not None and not oldest.started:
            oldest.started = now
        if oldest is None or now - oldest.started < STALL_LOG_S:
            if self.stalled:
                log.warning(
                    "VDI %d goes on", self._vdi, extra=fields(event="goes-on", vdi=self._vdi)
                )
                self.stalled = ""
            return
        reason = self._why_stalled(*oldest.state.group)
        if reason != self.stalled:
            log.warning(
                "VDI %d is stalled: %s", self._vdi, reason,
                extra=fields(event="stalled", vdi=self._vdi),
            )  # fmt: skip
        self.stalled = reason

    def _why_stalled(self, pool: int, pg: int) -> str:
        cluster_map = self._router.map
        group = cluster_map.pools[pool][pg]
        needed = cluster_map.needed(pool)
        if len(group.sync) < needed:
            return f"group {pg} has {len(group.sync)} of {needed} needed members in sync"
        away = [n for n in group.members if self._router.link(n) is None]
        if away:
            return f"no connection to node {', '.join(map(str, away))}"
        return f"group {pg}: members {', '.join(map(str, group.members))} have not answered"
