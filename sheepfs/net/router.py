"""The cluster as a client sees it: the newest map, and a live link to every node in it.

Always holds:
- `map` only moves to higher epochs of the same cluster.
- A link in `links` goes to the incarnation that the map names; to another one, nothing is sent.
- A node that cannot be reached is reported to the leader, by way of every node that can be.
- A connection over which nothing comes is given up for a new one: when a network is whole again
  after a long cut, TCP repeats what was lost only after as long a time once more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from uuid import uuid4

import trio

from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.errors import ProtocolError, SheepError
from sheepfs.core.wire import Buffer, Header, Op
from sheepfs.net.connection import Connection, connect
from sheepfs.net.groups import plain_errors
from sheepfs.net.link import Link, next_request
from sheepfs.net.transport import TCP, Network

log = logging.getLogger(__name__)

RECONNECT_MIN_S = 0.02
RECONNECT_MAX_S = 1.0
CONNECT_TIMEOUT_S = 2.0
MAP_POLL_S = 1.0
PING_EVERY_S = 1.0
PING_TIMEOUT_S = 4.0


class Router:
    """Keeps links to all nodes of the map; tells listeners what changes.

    Args:
        cluster: the cluster's unique id.
        fetch_map: reads the map from etcd; asked when no daemon tells of a new one.
        skip_node: a daemon does not link to itself.
    """

    def __init__(
        self,
        cluster: str,
        fetch_map: Callable[[], Awaitable[ClusterMap | None]],
        skip_node: int = 0,
        network: Network = TCP,
    ) -> None:
        self.map = ClusterMap(0, cluster)
        self.links: dict[int, Link] = {}
        self.client = uuid4().hex
        self.on_map: list[Callable[[ClusterMap, ClusterMap], None]] = []
        """Called with (old, new) after each new map."""
        self.on_link: list[Callable[[Link], None]] = []
        """Called when a link is up."""
        self.on_end: list[Callable[[], None]] = []
        """Called when no more links will be: what waits for a node would wait for ever."""
        self._fetch_map = fetch_map
        self._skip_node = skip_node
        self._network = network
        self._nursery: trio.Nursery | None = None
        self._keepers: dict[int, trio.CancelScope] = {}
        self._map_event = trio.Event()
        self._retry = trio.Event()
        self._output: list[Connection] = []
        self._output_wanted = trio.Event()

    def link(self, node: int) -> Link | None:
        """Give the live link to a node, if there is one."""
        link = self.links.get(node)
        return None if link is None or link.lost else link

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the links until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._keep_links()
                nursery.start_soon(self._poll_map)
                nursery.start_soon(self._pump)
                task_status.started()
        finally:
            for listener in list(self.on_end):
                listener()

    def take_map(self, new: ClusterMap) -> None:
        """Take a map from wherever it came; older ones and other clusters' are dropped."""
        old = self.map
        if new.cluster != old.cluster or new.epoch <= old.epoch:
            return
        self.map = new
        self._map_event.set()
        self._map_event = trio.Event()
        self._keep_links()
        for listener in self.on_map:
            listener(old, new)
        self._give_up_on_lost(old)

    def _give_up_on_lost(self, old: ClusterMap) -> None:
        """Break the links to nodes that were voted out: a hung one would never answer.

        What waits for an answer goes to whoever is left. A node that lives is linked to again.
        """
        for node in self.map.nodes.values():
            former = old.nodes.get(node.id)
            was_up = former is not None and former.state is not NodeState.DOWN
            if was_up and node.state is NodeState.DOWN and (link := self.link(node.id)):
                link.close()

    def take_encoded(self, data: Buffer) -> None:
        """Take a map as it came in a frame."""
        try:
            self.take_map(ClusterMap.decode(data))
        except ProtocolError as error:
            log.warning("dropped a cluster map: %s", error)

    async def refresh(self) -> None:
        """Take the map that etcd has now. Raises UnreachableError, ProtocolError."""
        found = await self._fetch_map()
        if found is not None:
            self.take_map(found)

    async def wait_map(self) -> None:
        """Wait for the next map."""
        await self._map_event.wait()

    def _keep_links(self) -> None:
        """One task for each incarnation that may be up; all others end."""
        if self._nursery is None:
            return
        for removed in self._keepers.keys() - self.map.nodes.keys():
            self._keepers.pop(removed).cancel()
            link = self.links.pop(removed, None)
            if link is not None:
                link.close()
        for node in self.map.nodes.values():
            link = self.links.get(node.id)
            if link is not None and link.incarnation != node.incarnation:
                self._keepers.pop(node.id).cancel()
                del self.links[node.id]
                link.close()
            if node.id not in self._keepers and node.id != self._skip_node:
                scope = self._keepers[node.id] = trio.CancelScope()
                self._nursery.start_soon(self._keep, node.id, scope)
        self._retry.set()
        self._retry = trio.Event()

    async def _keep(self, node_id: int, scope: trio.CancelScope) -> None:
        delay_s = RECONNECT_MIN_S
        with scope:
            while True:
                node = self.map.nodes.get(node_id)
                if node is None:
                    return
                link = None if self._is_replaced(node) else await self._connect(node)
                if link is not None:
                    delay_s = RECONNECT_MIN_S
                    log.info("connected to node %d at %s", node.id, node.address)
                    with plain_errors():
                        await self._serve(link)
                    log.info("lost node %d at %s", node.id, node.address)
                if node.state is not NodeState.DOWN:
                    self.report(node)
                retry = self._retry
                with trio.move_on_after(delay_s):
                    await retry.wait()
                delay_s = min(2 * delay_s, RECONNECT_MAX_S)

    def _is_replaced(self, node: Node) -> bool:
        """Tell whether another node, with a new disk, runs at this one's address.

        To connect there again would break the link to that one.
        """
        return any(
            other.address == node.address
            and other.state is not NodeState.DOWN
            and (node.state is NodeState.DOWN or other.id > node.id)
            for other in self.map.nodes.values()
        )

    async def _connect(self, node: Node) -> Link | None:
        try:
            connection, greeting = await connect(
                node.address,
                self.map.cluster,
                self.client,
                timeout_s=CONNECT_TIMEOUT_S,
                maps=True,
                network=self._network,
            )
        except SheepError as error:
            log.debug("node %d: %s", node.id, error)
            return None
        link = Link(connection, greeting)
        if (link.node, link.incarnation) != (node.id, node.incarnation):
            link.close()
            return None
        link.on_map = self.take_encoded
        connection.on_output = partial(self._send_soon, connection)
        return link

    async def _serve(self, link: Link) -> None:
        current = self.map.nodes.get(link.node)
        if current is None or current.incarnation != link.incarnation:
            link.close()
            return
        async with trio.open_nursery() as nursery:
            self.links[link.node] = link
            nursery.start_soon(self._ping, link)
            for listener in self.on_link:
                listener(link)
            try:
                await link.run()
            except ProtocolError as error:
                log.error("node %d speaks another protocol: %s", link.node, error)
            finally:
                if self.links.get(link.node) is link:
                    del self.links[link.node]
                link.close()
            nursery.cancel_scope.cancel()

    def _send_soon(self, connection: Connection) -> None:
        self._output.append(connection)
        self._output_wanted.set()

    async def _pump(self) -> None:
        """Send what was queued on any link: one task to wake for a burst to all replicas."""
        while True:
            await self._output_wanted.wait()
            self._output_wanted = trio.Event()
            connections, self._output = self._output, []
            for connection in dict.fromkeys(connections):
                if not connection.closed:
                    try:
                        if connection.transmit():
                            continue
                    except OSError as error:
                        log.debug("a link broke: %s", error)
                    # The writer waits until the kernel takes more, or meets the same error.
                    connection.wake_writer()

    async def _ping(self, link: Link) -> None:
        """Notice a node that went silent while its connection still looks alive."""
        while True:
            await trio.sleep(PING_EVERY_S)
            received_bytes = link.connection.received_bytes
            try:
                await link.call(Op.PING, timeout_s=PING_TIMEOUT_S)
            except SheepError:
                node = self.map.nodes.get(link.node)
                if node is not None and not link.lost:
                    log.warning("node %d does not answer", link.node)
                    self.report(node)
                    if link.connection.received_bytes == received_bytes:
                        # Not merely slow: else all that is under way would be sent anew.
                        link.close()

    def report(self, node: Node) -> None:
        """Tell the leader, by way of everyone, that a node's incarnation cannot be reached."""
        body = json.dumps({"node": node.id, "incarnation": node.incarnation}).encode()
        for link in list(self.links.values()):
            if link.node != node.id:
                link.request(Op.REPORT, next_request(), _ignore, body)

    async def _poll_map(self) -> None:
        """Ask etcd when no link tells of new maps; while links are up, only now and then."""
        quiet = 0
        while True:
            quiet += 1
            if not self.links or quiet >= 10:
                quiet = 0
                try:
                    await self.refresh()
                except SheepError as error:
                    log.debug("no map from etcd: %s", error)
            await trio.sleep(MAP_POLL_S if self.map.epoch else 0.1)


def _ignore(link: Link, header: Header | None, payload: memoryview | None) -> None:
    """The outcome of a report shows in the next map."""
