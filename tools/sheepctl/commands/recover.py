"""`sheepctl cluster recover`: go on without nodes that will never come back.

Always holds:
- Without `--accept-loss` nothing is changed.
- The operator's word is one record in etcd, put only if the map is as it was when the losses were
  shown. The leader acts upon it at most once, in a new epoch, and not in a group that changed.
- Before that, the nodes to go on with refuse every holder that any node knows to be replaced (I6):
  nobody else can tell them, as those that held the groups are gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict

import trio

from sheepfs.cluster import Cluster
from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.errors import (
    CorruptError,
    FencedError,
    ObjectNotFoundError,
    ProtocolError,
    TerminalError,
    UnreachableError,
    UsageError,
)
from sheepfs.core.geometry import OBJECT_SIZE, data_object, map_object
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Put, Transaction, Unchanged
from sheepfs.core.metadata import AcceptedLoss, LockRecord
from sheepfs.core.wire import Op
from sheepfs.layers.inventory import stored_entries, take_inventory
from sheepfs.net.catalog import RootMap
from sheepfs.net.link import Link
from sheepfs.net.router import Router
from sheepfs.net.store import Store
from sheepfs.replication.objects import ObjectReader
from sheepfs_tools.sheepctl.analysis.loss_assessment import (
    Assessment,
    Survivor,
    assess,
    group_of,
    waiting_groups,
)
from sheepfs_tools.sheepctl.commands.copies import as_mount
from sheepfs_tools.sheepctl.output import moment, print_json, print_table
from sheepfs_tools.sheepctl.session import open_session, options
from sheepfs_tools.sizes import format_size

LEADER_ACTS_S = 15.0
CALL_TIMEOUT_S = 10.0
LINKS_S = 5.0


async def cluster_recover(arguments: argparse.Namespace) -> int:
    """Show what is lost; with the operator's word, go on without it."""
    async with open_session(options(arguments)) as session:
        found = await session.store.get(session.keys.map)
    if found is None:
        raise UnreachableError("the cluster has no map yet: no storage daemon has joined")
    cluster_map = ClusterMap.decode(found.value)
    if not waiting_groups(cluster_map):
        if arguments.json:
            print_json({**asdict(Assessment()), "done": False})
        else:
            print("no group waits for nodes that are down: nothing is to be given up")
        return 0
    async with as_mount(arguments) as cluster:
        losses = await _look(cluster, cluster_map)
    if not arguments.json:
        _print(cluster_map, losses)
    if not arguments.accept_loss:
        if arguments.json:
            print_json({**asdict(losses), "done": False})
        else:
            print(
                "\nStart these nodes again if you can: then nothing is lost. If they will never"
                " come back:\n  sheepctl cluster recover --accept-loss"
            )
        return 1
    if not arguments.yes:
        _ask(losses)
    await _accept(arguments, cluster_map, found.mod_revision, losses)
    if arguments.json:
        print_json({**asdict(losses), "done": True})
    else:
        print(
            f"{len(losses.survivors)} groups go on. What is lost reads as an I/O error;"
            " sheepctl cluster check lists it"
        )
    return 0


async def _accept(
    arguments: argparse.Namespace, cluster_map: ClusterMap, map_revision: int, losses: Assessment
) -> None:
    """Give the operator's word, and wait until the groups go on. Raises SheepError: they do not."""
    chosen = {
        (s.pool, s.pg): (s.node, cluster_map.nodes[s.node].incarnation) for s in losses.survivors
    }
    word = AcceptedLoss.of(cluster_map.epoch, chosen)
    async with (
        open_session(options(arguments)) as session,
        as_mount(arguments) as cluster,
    ):
        await _fence(session.store, session.keys, cluster, losses.survivors)
        put = Put(session.keys.accepted_loss, word.encode())
        unchanged = Unchanged(session.keys.map, map_revision)
        if await session.store.commit(Transaction([unchanged], [put])) is None:
            raise TerminalError(
                "the cluster changed meanwhile, and nothing was given up: look again"
            )
        left = await _wait(session.store, session.keys)
    if left:
        raise TerminalError(
            f"{len(left)} groups still wait, as a node changed meanwhile: look again with"
            " sheepctl cluster recover"
        )


def _ask(losses: Assessment) -> None:
    if not sys.stdin.isatty():
        raise UsageError("nothing was given up: add --yes to --accept-loss where nobody can answer")
    nodes = ", ".join(map(str, losses.waits_for))
    print(f"\nGo on without what only nodes {nodes} have? What they have is given up for good.")
    if input("Type yes to do it: ").strip() != "yes":
        raise TerminalError("nothing was given up")


async def _look(cluster: Cluster, cluster_map: ClusterMap) -> Assessment:
    """Find out what is lost. Raises SheepError: a node or etcd does not answer."""
    await _linked(cluster.router)
    found = await take_inventory(cluster.router)
    for node in cluster_map.nodes.values():
        if node.state is not NodeState.DOWN and node.id in found.unanswered:
            raise UnreachableError(
                f"node {node.id} does not tell what it has ({found.unanswered[node.id]}): nothing"
                " can be said of what is lost"
            )
    named: list[tuple[str, int]] = []
    unreadable: set[str] = set()
    reader = ObjectReader(cluster.router, 0)
    for roots in (await cluster.catalog.all_roots()).values():
        for root in roots.maps:
            touched = _touched(cluster_map, reader, root, unreadable)
            named += [(root.what, oid) async for oid in touched]
    losses = assess(cluster_map, found.replicas, named)
    losses.unreadable = sorted(unreadable)
    return losses


async def _linked(router: Router) -> None:
    """Give the links to all nodes that are up some time to be made."""
    news = trio.Event()
    up = [n.id for n in router.map.nodes.values() if n.state is not NodeState.DOWN]

    def on_link(_: Link) -> None:
        if all(router.link(node) for node in up):
            news.set()

    router.on_link.append(on_link)
    with trio.move_on_after(LINKS_S):
        if not all(router.link(node) for node in up):
            await news.wait()
    router.on_link.remove(on_link)


async def _touched(
    cluster_map: ClusterMap, reader: ObjectReader, root: RootMap, unreadable: set[str]
) -> AsyncIterator[int]:
    """Yield those of a map's objects, and of what it names, whose groups wait."""
    waiting = waiting_groups(cluster_map)
    for number in range(root.maps.bit_length()):
        if not root.maps >> number & 1:
            continue
        oid = map_object(root.map, number)
        if group_of(cluster_map, oid) in waiting:
            yield oid
            continue
        try:
            async for index, layer in stored_entries(reader, root.map, 1 << number):
                oid = data_object(layer, index)
                if group_of(cluster_map, oid) in waiting:
                    yield oid
        except (ObjectNotFoundError, CorruptError):
            unreadable.add(root.what)


async def _fence(store: Store, keys: Keys, cluster: Cluster, survivors: Iterable[Survivor]) -> None:
    """Have the nodes to go on with refuse all tokens that anybody knows to be replaced."""
    router = cluster.router
    await _linked(router)
    tokens: dict[int, int] = {}

    def learn(vdi: int, token: int) -> None:
        tokens[vdi] = max(token, tokens.get(vdi, 0))

    for node in router.map.nodes.values():
        if node.state is NodeState.DOWN:
            continue
        link = router.link(node.id)
        if link is None:
            raise UnreachableError(f"node {node.id} cannot be reached: nothing was given up")
        known = await link.call_json(Op.LIST, epoch=router.map.epoch, timeout_s=CALL_TIMEOUT_S)
        try:
            for vdi, token in known.items():
                learn(int(vdi), int(token))
        except (AttributeError, TypeError, ValueError) as error:
            raise ProtocolError(f"node {node.id} tells its fences badly: {error}") from error
    for kv in (await store.list(keys.locks))[0]:
        lock = LockRecord.decode(kv.value)
        learn(lock.vdi, lock.token or kv.create_revision)
    for node_id in sorted({survivor.node for survivor in survivors}):
        link = router.link(node_id)
        if link is None:
            raise UnreachableError(f"node {node_id} cannot be reached: nothing was given up")
        for vdi, token in tokens.items():
            try:
                await link.call(Op.FENCE, vdi=vdi, token=token, timeout_s=CALL_TIMEOUT_S)
            except FencedError:
                continue  # It knows of a newer holder.


async def _wait(store: Store, keys: Keys) -> list[tuple[int, int]]:
    """Wait for the leader to act; gives the groups that wait all the same."""
    with trio.move_on_after(LEADER_ACTS_S):
        async with store.watch(keys.accepted_loss) as hints:
            async for _ in hints:
                if await store.get(keys.accepted_loss) is None:
                    found = await store.get(keys.map)
                    return list(waiting_groups(ClusterMap.decode(found.value))) if found else []
    raise UnreachableError("no leader acts upon it yet: see sheepctl cluster status")


def _print(cluster_map: ClusterMap, losses: Assessment) -> None:
    print(f"{len(losses.survivors)} groups wait for nodes that are down:")
    for node_id in losses.waits_for:
        node = cluster_map.nodes[node_id]
        state = f"down since {moment(node.down_since)}" if node.down_since else str(node.state)
        print(f"  node {node_id} at {node.address}, {state}")
    print()
    rows = []
    by_node: dict[tuple[tuple[int, ...], int], list[Survivor]] = {}
    for survivor in losses.survivors:
        by_node.setdefault((survivor.waits_for, survivor.node), []).append(survivor)
    for (waited, node_id), some in sorted(by_node.items()):
        objects = sum(s.objects for s in some)
        rows.append((len(some), ", ".join(map(str, waited)), f"node {node_id}", objects))
    print_table((">GROUPS", "WAIT FOR NODES", "WOULD GO ON WITH", ">OBJECTS THERE"), rows)
    print()
    if losses.unreadable:
        print(
            f"Parts of the maps of {', '.join(losses.unreadable)} were lost before: what they name"
            " is not counted."
        )
    if not losses.damage:
        print("No VDI and no snapshot has anything in these groups.")
        return
    print_table(
        ("VDI OR SNAPSHOT", ">LOST", ">MAY BE OLD", "ITS MAP"),
        (
            (
                what,
                format_size(damage.lost * OBJECT_SIZE),
                format_size(damage.old * OBJECT_SIZE),
                _map_state(damage.maps_lost, damage.maps_old),
            )
            for what, damage in sorted(losses.damage.items())
        ),
    )
    print(
        "\nLost: reads and writes there fail with an I/O error; restore it from a backup."
        "\nMay be old: reads as it was when the node that goes on with it last was a full member."
    )


def _map_state(lost: int, old: int) -> str:
    states = []
    if lost:
        states.append(f"LOST in {lost} parts of 2 TiB, with all data there")
    if old:
        states.append(f"may be old in {old} parts of 2 TiB")
    return ", ".join(states) or "good"
