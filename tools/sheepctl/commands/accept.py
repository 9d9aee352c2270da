"""`sheepctl metadata accept`: go on with an etcd that was restored from older data.

Always holds:
- Nothing is changed while a storage daemon runs, as far as etcd and the nodes' addresses tell.
- The operator sees first what will be lost; all numbers go on in one transaction, or none.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import TerminalError, UsageError
from sheepfs.core.metadata_export import EPOCH_GAP, Export
from sheepfs.net.metadata_transfer import accept, propose_acceptance
from sheepfs_tools.sheepctl.analysis.export_age import reasons_for_older
from sheepfs_tools.sheepctl.output import print_json
from sheepfs_tools.sheepctl.session import Session, open_session, options
from storaged.store.offline import OfflineDirectory
from storaged.store.salvage import Salvage

_MEANING = """\
It is taken for all there is. VDIs and snapshots that were made after it was saved have no name any
more, and sheepctl cluster check --repair frees their space. A VDI that was there is served as the
nodes have it; it has its former size, and a part of 2 TiB that was first written to since then
reads as zeros. All numbers that are given out (ids, tokens, epochs) go on beyond those that may
have been used."""


async def metadata_accept(arguments: argparse.Namespace) -> int:
    """Show what it means; with the operator's word, let the cluster go on with what etcd holds."""
    if arguments.json and not arguments.yes:
        raise UsageError("nothing was accepted: with --json, add --yes")
    async with open_session(options(arguments)) as session:
        acceptance = await propose_acceptance(session.store, session.keys, time.time())
        await _refuse_running(session)
        export = acceptance.export
        reasons = _reasons(export, arguments.data)
        if not arguments.json:
            _print(export, reasons, bool(arguments.data))
        if not arguments.yes:
            _ask()
        await accept(session.store, acceptance)
    if arguments.json:
        print_json(
            {
                "cluster": export.cluster,
                "name": export.name,
                "revision": export.revision,
                "epoch": export.epoch() + EPOCH_GAP if export.epoch() else 0,
                "reasons": reasons,
            }
        )
    else:
        print(
            f"Accepted. Start the storage daemons of cluster {export.name} now, then start all"
            " mounts anew: those that run may hold what etcd does not know."
        )
    return 0


async def _refuse_running(session: Session) -> None:
    """A daemon that saw etcd go back does not announce itself there, and serves all the same."""
    cluster_map: ClusterMap = await session.cluster_map()
    answers = await session.statuses(cluster_map)
    running = [node for node, answer in sorted(answers.items()) if not isinstance(answer, str)]
    if running:
        places = ", ".join(f"node {n} at {cluster_map.nodes[n].address}" for n in running)
        raise UsageError(f"storage daemons still serve ({places}): stop all of them, then accept")


def _reasons(export: Export, paths: list[str]) -> list[str]:
    with ExitStack() as stack:
        directories = [
            stack.enter_context(OfflineDirectory.open(path))
            for path in dict.fromkeys(map(Path, paths))
        ]
        if not directories:
            return []
        reasons = reasons_for_older(export, Salvage(directories))
        epoch = max(directory.superblock.epoch for directory in directories)
    if epoch > export.epoch():
        reasons.append(
            f"the cluster map changed later, up to epoch {epoch}: a node that missed writes since"
            " may be taken for a full member (sheepctl cluster check)"
        )
    return reasons


def _print(export: Export, reasons: list[str], looked: bool) -> None:
    vdis = sum(key.startswith("vdis/") for key in export.keys)
    print(
        f"etcd holds cluster {export.name} as of its revision {export.revision}: {vdis} VDIs, epoch"
        f" {export.epoch()} of the cluster map.\n{_MEANING}\n"
    )
    if reasons:
        print("The data directories know of more:")
        for reason in reasons:
            print(f"  {reason}")
        print("Rescue that first (sheepctl rescue --list).")
    elif looked:
        print("These data directories know of nothing that etcd does not.")
    else:
        print("With --data DIR... data directories are asked what they know of that etcd does not.")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageError("nothing was accepted: add --yes where nobody can answer")
    print("\nGo on with what etcd holds? What it does not know of is given up for good.")
    if input("Type yes to do it: ").strip() != "yes":
        raise TerminalError("nothing was accepted")
