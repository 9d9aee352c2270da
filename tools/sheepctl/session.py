"""A sheepctl command's view of the cluster: etcd, the map, and the daemons that answer."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from sheepfs.core.clustermap import ClusterMap, Node
from sheepfs.core.errors import SheepError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import ClusterConfig
from sheepfs.core.seen import Seen
from sheepfs.core.wire import Op
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd
from sheepfs.net.link import connect_node
from sheepfs.net.restored import refuse_restored
from sheepfs.net.store import Store

NODE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """What every command takes: where etcd is, and which cluster is meant."""

    etcd: str
    cluster: str


def options(arguments: argparse.Namespace) -> Options:
    """Give what every command takes from its command line."""
    return Options(arguments.etcd, arguments.cluster)


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to the metadata of one cluster."""

    options: Options
    store: Store
    keys: Keys
    catalog: Catalog
    config: ClusterConfig

    async def cluster_map(self) -> ClusterMap:
        """Read the map; epoch 0 when no leader has made one yet."""
        found = await self.store.get(self.keys.map)
        return (
            ClusterMap(0, self.config.cluster) if found is None else ClusterMap.decode(found.value)
        )

    async def refuse_restored(self) -> None:
        """Refuse an etcd that was restored from older data, as far as a storage daemon tells.

        One of them is enough; if none answers, there is nobody to know better.

        Raises:
            UsageError: a daemon has seen more than etcd knows.
        """
        cluster_map = await self.cluster_map()
        witnesses: list[tuple[str, Seen]] = []

        async def ask(node: Node, nursery: trio.Nursery) -> None:
            with suppress(SheepError):
                async with connect_node(node.address, self.config.cluster) as link:
                    witnesses.append((f"node {node.id}", link.seen))
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for node in cluster_map.nodes.values():
                nursery.start_soon(ask, node, nursery)
        await refuse_restored(self.store, self.keys, witnesses)

    async def statuses(self, cluster_map: ClusterMap) -> dict[int, dict[str, Any] | str]:
        """Ask all nodes at the same time; a text says why a node gave no status."""
        return await self.ask_all(cluster_map, Op.STATUS)

    async def ask_all(self, cluster_map: ClusterMap, op: Op) -> dict[int, dict[str, Any] | str]:
        """Ask all nodes for something in JSON; a text says why a node gave no answer."""
        answers: dict[int, dict[str, Any] | str] = {}

        async def ask(node: int, address: str) -> None:
            answers[node] = f"no answer within {NODE_TIMEOUT_S:g} s"
            with trio.move_on_after(NODE_TIMEOUT_S):
                try:
                    async with connect_node(address, self.config.cluster) as link:
                        answers[node] = await link.call_json(op)
                except* SheepError as group:
                    answers[node] = str(first_error(group))

        async with trio.open_nursery() as nursery:
            for node in cluster_map.nodes.values():
                nursery.start_soon(ask, node.id, node.address)
        return answers


def first_error(error: BaseException) -> BaseException:
    """Give the first error inside of (nested) groups: one line for people has room for one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def open_session(options: Options) -> AsyncIterator[Session]:
    """Connect for as long as the block runs.

    Raises:
        UnreachableError: etcd does not answer.
        UsageError: there is no such cluster.
    """
    keys = Keys(options.cluster)
    store = Etcd(options.etcd)
    try:
        catalog = Catalog(store, keys)
        yield Session(options, store, keys, catalog, await catalog.config())
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()
