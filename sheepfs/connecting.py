"""Connecting to a cluster: etcd, the storage daemons, and what runs as long as that lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sheepfs.accounts import Reporter
from sheepfs.cluster import START_TIMEOUT_S, Cluster
from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import UnreachableError
from sheepfs.core.keys import Keys
from sheepfs.holding import requests as holder_requests
from sheepfs.holding.abandoned import level_abandoned
from sheepfs.logs import watch_slow
from sheepfs.net.catalog import Catalog
from sheepfs.net.etcd import Etcd
from sheepfs.net.groups import plain_errors
from sheepfs.net.link import Link
from sheepfs.net.restored import refuse_restored
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.net.transport import TCP, Network


async def fetch_map(store: Store, keys: Keys) -> ClusterMap | None:
    """Read the cluster map from etcd."""
    found = await store.get(keys.map)
    return None if found is None else ClusterMap.decode(found.value)


@asynccontextmanager
async def join(
    store: Store, cluster: str, owner: str, *, stays: bool = False, network: Network = TCP
) -> AsyncIterator[Cluster]:
    """Do as `connect`; at the end nothing is flushed or detached."""
    keys = Keys(cluster)
    store.trust(keys.fencing)
    catalog = Catalog(store, keys)
    config = await catalog.config()
    router = Router(config.cluster, lambda: fetch_map(store, keys), network=network)
    first = await fetch_map(store, keys)
    if first is not None:
        router.take_map(first)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            await nursery.start(router.run)
            await _wait_for_a_node(router)
            witnesses = [(f"node {link.node}", link.seen) for link in router.links.values()]
            await refuse_restored(store, keys, witnesses)
            me = Cluster(store, keys, catalog, router, owner, nursery)
            nursery.start_soon(me.report_stalls)
            nursery.start_soon(holder_requests.serve, store, keys, me.serve_request)
            nursery.start_soon(me.follow)
            if stays:
                nursery.start_soon(me.tend, level_abandoned)
                nursery.start_soon(Reporter(router, owner, me.accounts).run)
                nursery.start_soon(watch_slow, lambda: [(a.name, a.traffic) for a in me.accounts()])
            yield me
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect(
    etcd: str, cluster: str, owner: str, *, stays: bool = False
) -> AsyncIterator[Cluster]:
    """Connect to a cluster for as long as the block runs.

    Args:
        etcd: `HOST:PORT[,HOST:PORT]`.
        owner: names this mount in messages to others.
        stays: it also does what nobody waits for: levels what dead mounts left.

    Raises:
        UnreachableError: etcd does not answer, or no storage daemon is up.
        UsageError: there is no such cluster, or a storage daemon has seen more than etcd knows.
    """
    async with Etcd(etcd) as store, join(store, cluster, owner, stays=stays) as me:
        try:
            yield me
        finally:
            with trio.CancelScope(shield=True):
                await me.close()


async def _wait_for_a_node(router: Router) -> None:
    linked = trio.Event()

    def on_link(link: Link) -> None:
        linked.set()

    router.on_link.append(on_link)
    try:
        with trio.move_on_after(START_TIMEOUT_S):
            if not router.links:
                await linked.wait()
            return
    finally:
        router.on_link.remove(on_link)
    known = ", ".join(f"{n.id} at {n.address}" for n in router.map.nodes.values())
    raise UnreachableError(
        "no storage daemon can be reached; "
        + (f"the cluster has nodes {known}" if known else "the cluster has no nodes yet")
        + ": start sheepfs-storaged on them"
    )
