"""`sheepctl scrub`: the nodes' background check of all replicas."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import trio

from sheepfs.core.clustermap import Node, NodeState
from sheepfs.core.errors import SheepError, UnreachableError, UsageError
from sheepfs.core.geometry import BLOCK_SIZE
from sheepfs.core.kv import Put, Transaction, Unchanged
from sheepfs.core.metadata import ScrubRecord
from sheepfs.core.wire import Op
from sheepfs.net.link import connect_node
from sheepfs_tools.sheepctl.analysis.object_users import User, users_of
from sheepfs_tools.sheepctl.commands.copies import as_mount
from sheepfs_tools.sheepctl.output import (
    moment,
    print_facts,
    print_json,
    print_table,
    printable,
)
from sheepfs_tools.sheepctl.session import (
    NODE_TIMEOUT_S,
    Session,
    first_error,
    open_session,
    options,
)
from sheepfs_tools.sizes import format_size, parse_size

USERS_TIMEOUT_S = 10.0
MIN_RATE = 1 << 16
ATTEMPTS = 10
Answers = dict[int, dict[str, Any] | str]
"""Node -> what it answered to SCRUB, or why it did not."""


async def scrub_status(arguments: argparse.Namespace) -> int:
    """Show how far all nodes are, and what they found. Exit 1 if something is unrepairable."""
    async with open_session(options(arguments)) as session:
        nodes = await _nodes(session, None)
        answers = await _ask(session, nodes, {})
    damaged = _damaged(answers)
    await _find_users(arguments, damaged)
    if arguments.json:
        print_json({"nodes": _rows(answers), "unrepairable": damaged})
    else:
        _print_nodes(answers)
        for item in damaged:
            print()
            _print_damaged(item)
    return 1 if damaged else 0


async def scrub_start(arguments: argparse.Namespace) -> int:
    """Begin passes on all nodes, or one. Exit 1 if a node could not be told."""
    both = arguments.deep == arguments.light
    kinds = [
        k for k, wanted in (("light", arguments.light), ("deep", arguments.deep)) if both or wanted
    ]
    async with open_session(options(arguments)) as session:
        if not (await _setting(session))[0].enabled:
            raise SheepError("scrubbing is paused: sheepctl scrub resume lets it go on")
        nodes = await _nodes(session, arguments.node)
        answers = await _ask(session, nodes, {"start": kinds})
    failed = {node: answer for node, answer in answers.items() if isinstance(answer, str)}
    if arguments.json:
        print_json({"started": kinds, "nodes": sorted(answers.keys() - failed), "failed": failed})
    else:
        for node, answer in sorted(answers.items()):
            print(f"node {node}: {printable(answer) if isinstance(answer, str) else 'started'}")
    return 1 if failed else 0


async def scrub_pause(arguments: argparse.Namespace) -> int:
    """Stop all passes where they are."""
    return await _change(arguments, lambda record: replace(record, enabled=False))


async def scrub_resume(arguments: argparse.Namespace) -> int:
    """Let them go on."""
    return await _change(arguments, lambda record: replace(record, enabled=True))


async def scrub_set(arguments: argparse.Namespace) -> int:
    """Change the rate and the intervals."""
    changes: dict[str, Any] = {}
    if arguments.rate is not None:
        try:
            changes["rate"] = parse_size(arguments.rate)
        except ValueError as error:
            raise UsageError(f"--rate: {error}") from error
        if changes["rate"] < MIN_RATE:
            raise UsageError(f"--rate {arguments.rate}: use {format_size(MIN_RATE)} or more")
    for name in ("deep_days", "light_days"):
        text = getattr(arguments, name)
        if text is not None:
            changes[name] = _days(f"--{name.replace('_', '-')}", text)
    return await _change(arguments, lambda record: replace(record, **changes))


def _days(option: str, text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0.001 <= days <= 3650:
        raise UsageError(f"{option} {printable(text)}: use a number of days, 0.001 to 3650")
    return days


async def _setting(session: Session) -> tuple[ScrubRecord, int]:
    """Give what is set, and its mod_revision."""
    found = await session.store.get(session.keys.setting("scrub"))
    return (
        (ScrubRecord(), 0)
        if found is None
        else (ScrubRecord.decode(found.value), found.mod_revision)
    )


async def _change(
    arguments: argparse.Namespace, change: Callable[[ScrubRecord], ScrubRecord]
) -> int:
    """Change what is set, if it changes, and show it."""
    async with open_session(options(arguments)) as session:
        key = session.keys.setting("scrub")
        for _ in range(ATTEMPTS):
            old, revision = await _setting(session)
            new = change(old)
            put = Transaction([Unchanged(key, revision)], [Put(key, new.encode())])
            if new == old or await session.store.commit(put) is not None:
                break
        else:
            raise UnreachableError("others change these settings all the time: try again")
    if arguments.json:
        print_json(asdict(new))
    else:
        print_facts(
            (
                ("scrubbing", "goes on" if new.enabled else "is paused"),
                ("rate", f"{format_size(new.rate)}/s at most, on each node"),
                ("deep", f"all bytes of every replica every {new.deep_days:g} days"),
                ("light", f"replicas compared every {new.light_days:g} days"),
            )
        )
    return 0


# -- asking nodes ---------------------------------------------------------------------------


async def _nodes(session: Session, only: int | None) -> Sequence[Node]:
    nodes = (await session.cluster_map()).nodes
    if only is None:
        return [node for node in nodes.values() if node.state is not NodeState.DOWN]
    if only not in nodes:
        raise UsageError(f"there is no node {only}: sheepctl node list shows all")
    return [nodes[only]]


async def _ask(session: Session, nodes: Sequence[Node], content: dict[str, Any]) -> Answers:
    answers: Answers = {}

    async def ask(node: Node) -> None:
        answers[node.id] = f"no answer within {NODE_TIMEOUT_S:g} s"
        with trio.move_on_after(NODE_TIMEOUT_S):
            try:
                async with connect_node(node.address, session.config.cluster) as link:
                    answers[node.id] = await link.call_json(Op.SCRUB, content)
            except* SheepError as group:
                answers[node.id] = str(first_error(group))

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(ask, node)
    return answers


def _damaged(answers: Answers) -> list[dict[str, Any]]:
    """Put together what nodes say of the same object."""
    found: dict[int, dict[str, Any]] = {}
    for node, answer in sorted(answers.items()):
        if isinstance(answer, str):
            continue
        for problem in answer["problems"]:
            item = found.setdefault(
                problem["oid"], {"object": problem["object"], "oid": problem["oid"], "nodes": {}}
            )
            keys = ("what", "detail", "blocks")
            item["nodes"][node] = {key: problem[key] for key in keys}
    return list(found.values())


async def _find_users(arguments: argparse.Namespace, damaged: list[dict[str, Any]]) -> None:
    """Add who uses each object, where that can be found out."""
    users: dict[int, list[User]] = {}
    if damaged:
        with trio.move_on_after(USERS_TIMEOUT_S):
            try:
                async with as_mount(arguments) as cluster:
                    users = await users_of(cluster, [item["oid"] for item in damaged])
            except* SheepError:
                pass  # The cluster is in trouble: the objects are told all the same.
    for item in damaged:
        blocks = sorted({b for told in item["nodes"].values() for b in told["blocks"]})
        item["used_by"] = [
            {
                "name": name,
                "offsets": [] if offset is None else [offset + b * BLOCK_SIZE for b in blocks],
            }
            for name, offset in users.get(item["oid"], [])
        ]


# -- showing --------------------------------------------------------------------------------


def _rows(answers: Answers) -> list[dict[str, Any]]:
    rows = []
    for node, answer in sorted(answers.items()):
        if isinstance(answer, str):
            rows.append({"node": node, "problem": answer})
        else:
            told = {key: value for key, value in answer.items() if key != "problems"}
            rows.append({"node": node, "problem": None, **told})
    return rows


def _print_nodes(answers: Answers) -> None:
    columns = (
        *("NODE", "STATE", ">RATE", ">CHECKED", "LAST DEEP", "LAST LIGHT"),
        *(">FOUND", ">REPAIRED", ">UNREPAIRABLE", ">IN USE, DIFFER"),
    )
    now = time.time()
    rows = []
    for node, told in sorted(answers.items()):
        if isinstance(told, str):
            rows.append((node, told, *[""] * 8))
            continue
        last = {
            kind: "never"
            if done["finished_s_ago"] is None
            else moment(now - done["finished_s_ago"])
            for kind, done in told["passes"].items()
        }
        rows.append(
            (
                *(node, _state(told), f"{format_size(told['rate'])}/s"),
                *(format_size(told["checked_bytes"]), last["deep"], last["light"]),
                *(told["found"], told["repaired"], told["unrepairable"], told["left_to_holders"]),
            )
        )
    print_table(columns, rows)


def _state(told: dict[str, Any]) -> str:
    running = [
        f"{kind} {int(done['progress'] * 100)} %"
        for kind, done in told["passes"].items()
        if done["running"]
    ]
    if not told["enabled"]:
        return "paused" + (f" ({', '.join(running)})" if running else "")
    return ", ".join(running) or "idle"


def _print_damaged(item: dict[str, Any]) -> None:
    print(f"{printable(item['object'])} cannot be repaired:")
    for node, told in item["nodes"].items():
        print(f"  node {node}: {printable(told['detail'])}")
    for user in item["used_by"]:
        where = ", ".join(str(offset) for offset in user["offsets"][:8])
        more = ", …" if len(user["offsets"]) > 8 else ""
        at = f" at offset {where}{more}, {BLOCK_SIZE} bytes each" if where else ""
        print(f"  used by {printable(user['name'])}{at}")
    if not item["used_by"]:
        print("  no VDI or snapshot was found that uses it")
