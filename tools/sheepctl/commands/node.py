"""The commands of `sheepctl node` that change something, and `node info`.

Always holds: what is wanted of a node is one record in etcd (`wishes/<node>`), changed by
compare-and-swap; a removal also on condition that the map is as it was judged.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import trio

from sheepfs.core.clustermap import ClusterMap, NodeState
from sheepfs.core.errors import TerminalError, UnreachableError, UsageError
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import (
    BY_CAPACITY,
    MAX_WEIGHT,
    NodeWish,
    Patience,
)
from sheepfs_tools.progress import counting
from sheepfs_tools.sheepctl.analysis.node_groups import holding, nowhere_to_go, removal_problem
from sheepfs_tools.sheepctl.output import moment, print_facts, print_json, size_or_dash
from sheepfs_tools.sheepctl.session import Session, open_session, options

POLL_S = 0.3
LEADER_ACTS_S = 10.0
"""How long the leader may take to act upon a wish."""


async def node_drain(arguments: argparse.Namespace) -> int:
    """Have nodes emptied, or no longer."""
    async with open_session(options(arguments)) as session:
        nodes = node_ids(arguments.node)
        found, _ = await _map(session)
        for node in nodes:
            await _known(session, found, node)
        for node in nodes:
            await _wish(session, node, lambda wish: replace(wish, draining=not arguments.undo))
        if arguments.undo:
            problem = ""
        elif arguments.wait:
            problem = await _wait_empty(session, nodes, arguments.json)
        else:
            problem = nowhere_to_go(found, nodes)
        left = {node: holding(await session.cluster_map(), node).total for node in nodes}
    if arguments.json:
        rows = [
            {"node": node, "draining": not arguments.undo, "groups_left": count}
            for node, count in left.items()
        ]
        print_json({"nodes": rows, "problem": problem or None})
    else:
        for node, count in left.items():
            if arguments.undo:
                print(f"node {node} is drained no longer")
            elif count:
                print(f"node {node} is being drained: {count} groups are to move")
            else:
                print(f"node {node} is empty: sheepctl node remove {node}")
        if problem:
            print(problem)
    return 1 if problem else 0


async def node_remove(arguments: argparse.Namespace) -> int:
    """Remove nodes for good."""
    async with open_session(options(arguments)) as session:
        nodes = node_ids(arguments.node)
        found, _ = await _map(session)
        for node in nodes:
            await _known(session, found, node)
        if arguments.drain:
            up = [n for n in nodes if found.nodes[n].state is not NodeState.DOWN]
            for node in up:
                await _wish(session, node, lambda wish: replace(wish, draining=True))
            if problem := await _wait_empty(session, up, arguments.json):
                raise TerminalError(problem)
        for node in nodes:
            await _remove(session, node)
            if not arguments.json:
                print(f"node {node} is removed")
    if arguments.json:
        print_json([{"node": node, "removed": True} for node in nodes])
    return 0


async def node_weight(arguments: argparse.Namespace) -> int:
    """Set the share of data that a node gets."""
    weight = _weight(arguments.weight)
    async with open_session(options(arguments)) as session:
        (node,) = node_ids([arguments.node])
        found, _ = await _map(session)
        await _known(session, found, node)
        await _wish(session, node, lambda wish: replace(wish, weight=weight))
    if arguments.json:
        print_json({"node": node, "weight": None if weight == BY_CAPACITY else weight})
    elif weight == BY_CAPACITY:
        print(f"node {node} gets data by the size of its disk, or as its daemon says")
    else:
        print(f"node {node} has weight {weight:g}; data moves soon")
    return 0


async def node_info(arguments: argparse.Namespace) -> int:
    """Show all about one node."""
    async with open_session(options(arguments)) as session:
        (node_id,) = node_ids([arguments.node])
        found, _ = await _map(session)
        await _known(session, found, node_id)
        wish, _ = await _read_wish(session, node_id)
        node = found.nodes[node_id]
        alone = replace(found, nodes={node_id: node})
        status = (await session.statuses(alone))[node_id]
    told: dict[str, Any] = {} if isinstance(status, str) else status
    held = holding(found, node_id)
    problem = removal_problem(found, node_id)
    if arguments.json:
        content = {**asdict(node), "wish": asdict(wish), "groups": held._asdict()}
        print_json(
            {**content, "removable": not problem, "why_not": problem or None, "status": status}
        )
        return 0
    state = str(node.state)
    if node.state is NodeState.DOWN:
        state += f" since {moment(node.down_since)}"
    facts = [
        ("node", node_id),
        ("state", state),
        ("address", f"{node.address}, incarnation {node.incarnation}"),
        ("zone", node.zone),
        ("weight", f"{node.weight:g}" + (" (set)" if wish.has_weight else "")),
        ("groups", f"{held.sync} whole, {held.joining} catching up, {held.away} expected back"),
        ("objects", told.get("objects", "-")),
        ("space", f"{size_or_dash(told.get('free'))} free of {size_or_dash(told.get('total'))}"),
    ]
    if held.waiting:
        facts.append(("needed", f"{held.waiting} groups wait for it or another that is down"))
    if node.returns:
        facts.append(("returns", f"{node.returns} within a short time"))
    if node.state is NodeState.DOWN and node.held_until > node.down_since:
        facts.append(("held out", f"until {moment(node.held_until)}, as it comes and goes"))
    if wish.leaves:
        facts.append(("wanted", "removed" if wish.removed else "drained"))
    if isinstance(status, str):
        facts.append(("problem", status))
    facts.append(("to remove", problem or f"sheepctl node remove {node_id}"))
    print_facts(facts)
    return 0


async def node_patience(arguments: argparse.Namespace) -> int:
    """Show or set how often nodes may come and go."""
    async with open_session(options(arguments)) as session:
        key = session.keys.setting("patience")
        found = await session.store.get(key)
        patience = Patience() if found is None else Patience.decode(found.value)
        if arguments.returns is not None:
            patience = replace(patience, returns=_count("--returns", arguments.returns))
        if arguments.longest is not None:
            patience = replace(patience, longest_s=float(_count("--longest", arguments.longest)))
        if arguments.returns is not None or arguments.longest is not None:
            await session.store.commit(Transaction([], [Put(key, patience.encode())]))
    if arguments.json:
        print_json(asdict(patience))
    else:
        print(
            f"a node that comes back more than {patience.returns} times within a short time is held"
            f" out for longer each time, up to {patience.longest_s:g} s"
        )
    return 0


def _count(option: str, value: int) -> int:
    if not 0 <= value <= 86400:
        raise UsageError(f"{option} {value}: use 0 to 86400")
    return value


def node_ids(texts: Sequence[str]) -> list[int]:
    """Read node ids (UsageError)."""
    for text in texts:
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UsageError(f"node {text!r}: give its number, see sheepctl node list")
    return list(dict.fromkeys(map(int, texts)))


def _weight(text: str) -> float:
    if text == "auto":
        return BY_CAPACITY
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < MAX_WEIGHT:
        raise UsageError(f"weight {text!r}: give a number from 0 on, or auto")
    return weight


async def _map(session: Session) -> tuple[ClusterMap, int]:
    found = await session.store.get(session.keys.map)
    if found is None:
        raise UnreachableError("the cluster has no map yet: no storage daemon has joined")
    return ClusterMap.decode(found.value), found.mod_revision


async def _known(session: Session, cluster_map: ClusterMap, node: int) -> None:
    """Refuse what is no node of the cluster (UsageError)."""
    if node in cluster_map.nodes:
        return
    wish, _ = await _read_wish(session, node)
    if wish.removed:
        raise UsageError(f"node {node} was removed already")
    known = ", ".join(map(str, sorted(cluster_map.nodes)))
    raise UsageError(f"there is no node {node}; there are {known}")


async def _read_wish(session: Session, node: int) -> tuple[NodeWish, KeyValue | None]:
    found = await session.store.get(session.keys.wish(node))
    return NodeWish(node) if found is None else NodeWish.decode(found.value), found


async def _wish(
    session: Session,
    node: int,
    edit: Callable[[NodeWish], NodeWish],
    unless: Unchanged | None = None,
) -> bool:
    """Change what is wanted of a node; False: `unless` does not hold any more."""
    key = session.keys.wish(node)
    while True:
        wish, found = await _read_wish(session, node)
        wanted = edit(wish)
        if wanted == wish:
            return True
        put = Delete(key) if wanted == NodeWish(node) else Put(key, wanted.encode())
        conditions = [Unchanged(key, found.mod_revision if found else 0)]
        if unless is not None:
            conditions.append(unless)
        if await session.store.commit(Transaction(conditions, [put])) is not None:
            return True
        if unless is not None:
            return False


async def _remove(session: Session, node: int) -> None:
    while True:
        found, revision = await _map(session)
        if node not in found.nodes:
            return
        if problem := removal_problem(found, node):
            raise TerminalError(problem)
        as_judged = Unchanged(session.keys.map, revision)
        if await _wish(session, node, lambda _: NodeWish(node, removed=True), as_judged):
            break
    with trio.move_on_after(LEADER_ACTS_S):
        async with session.store.watch(session.keys.map) as hints:
            async for _ in hints:
                if node not in (await session.cluster_map()).nodes:
                    return
    raise UnreachableError(
        f"node {node} is to be removed, but no leader acts upon it: see sheepctl cluster status"
    )


async def _wait_empty(session: Session, nodes: Sequence[int], quiet: bool) -> str:
    """Wait until no group names the nodes; gives what is in the way for good, if anything."""
    found = await session.cluster_map()
    total = sum(holding(found, node).total for node in nodes)
    with counting("draining", total, "groups", quiet) as show:
        while True:
            found = await session.cluster_map()
            held = {node: holding(found, node) for node in nodes if node in found.nodes}
            left = sum(each.total for each in held.values())
            total = max(total, left)
            show(total - left)
            if not left:
                return ""
            if problem := nowhere_to_go(found, nodes):
                return problem
            for node, each in held.items():
                if each.waiting:
                    return removal_problem(found, node) or f"{each.waiting} groups are down"
            await trio.sleep(POLL_S)
