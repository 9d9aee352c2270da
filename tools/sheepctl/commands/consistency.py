"""`sheepctl cluster check`: do maps and objects agree?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from sheepfs.core.geometry import describe_oid
from sheepfs_tools.sheepctl.analysis.cluster_check import ClusterCheck, Findings
from sheepfs_tools.sheepctl.commands.copies import as_mount
from sheepfs_tools.sheepctl.output import print_json, print_table, printable
from sheepfs_tools.sizes import format_size

SHOWN = 20
"""Objects of each kind that are listed for people; JSON has all."""


async def cluster_check(arguments: argparse.Namespace) -> int:
    """Compare all maps with all objects. Exit 1 when they do not agree."""
    async with as_mount(arguments) as cluster:
        check = ClusterCheck(cluster)
        findings = await check.run()
        if arguments.repair and not findings.clean:
            await check.repair(findings)
            findings = await check.run()
    if arguments.json:
        print_json(_as_json(findings))
        return 0 if findings.clean else 1
    rows = [
        *_rows("named, and no node has it", findings.dangling),
        *_rows("missing on nodes", findings.missing),
        *_rows("named by no map, on nodes", findings.orphans),
        *_rows("on nodes that are no members", findings.misplaced),
    ]
    if rows:
        print_table(("WHAT", "OBJECT", "WHERE"), rows)
    for node, problem in findings.unanswered.items():
        print(f"node {node} could not be asked: {printable(problem)}")
    verdict = "maps and objects agree" if findings.clean else "NOT PROVEN TO AGREE"
    print(
        f"{findings.objects} objects, {findings.replicas} replicas,"
        f" {format_size(findings.own_bytes)} in all: {verdict}"
    )
    if findings.orphans and not arguments.repair:
        print("sheepctl cluster check --repair has what no map names removed")
    return 0 if findings.clean else 1


def _rows(what: str, found: Mapping[int, Sequence[object]]) -> list[tuple[str, str, str]]:
    rows = [
        (what, describe_oid(oid), ", ".join(map(str, where)))
        for oid, where in sorted(found.items())[:SHOWN]
    ]
    if len(found) > SHOWN:
        rows.append((what, f"and {len(found) - SHOWN} more", ""))
    return rows


def _as_json(findings: Findings) -> dict[str, object]:
    def objects(found: Mapping[int, Sequence[object]]) -> dict[str, Sequence[object]]:
        return {describe_oid(oid): where for oid, where in sorted(found.items())}

    return {
        "clean": findings.clean,
        "objects": findings.objects,
        "replicas": findings.replicas,
        "bytes": findings.own_bytes,
        "dangling": objects(findings.dangling),
        "missing": objects(findings.missing),
        "orphans": objects(findings.orphans),
        "misplaced": objects(findings.misplaced),
        "unanswered": findings.unanswered,
    }
