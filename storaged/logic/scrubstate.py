"""What scrubbing found, and what of it survives a restart. Pure.

Always holds:
- What is read back was checked; damage to it means that passes begin anew, nothing worse.
- Times are kept in seconds since 1970 and become monotonic ones once, at the start (I13): a clock
  that jumped makes a pass early or late, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_64_hexdigest

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import BLOCKS_PER_OBJECT, describe_oid
from storaged.logic.scrub import Kind, Pass, Position, Schedule

FORMAT = 1
MAX_PROBLEMS = 1000
"""More are counted, and not kept."""

DAMAGED = "damaged"
"""This node's copy is bad, and no other member could mend it."""
UNEQUAL = "unequal"
"""Copies of one group differ, and nothing tells which one is right."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What could not be repaired. `blocks`: of `DAMAGED`; empty: header or table."""

    oid: int
    what: str
    detail: str
    blocks: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Give what operators and `problem_of` read."""
        return {
            "oid": self.oid,
            "object": describe_oid(self.oid),
            "what": self.what,
            "detail": self.detail,
            "blocks": list(self.blocks),
        }


@dataclass(slots=True)
class Findings:
    """Counted since the node's directory was made."""

    checked_objects: int = 0
    checked_bytes: int = 0
    found: int = 0
    """Copies that were damaged, missing or behind."""
    repaired: int = 0
    problems: dict[int, Problem] = field(default_factory=dict)
    left_to_holders: int = 0
    """Objects that differed when their VDI was in use or not yet levelled, in the last pass."""
    left_out: int = 0
    """Groups whose members could not all be asked in the last pass."""

    def add(self, problem: Problem) -> bool:
        """Keep a problem; tells whether it is a new one."""
        known = self.problems.get(problem.oid)
        if known is None and len(self.problems) >= MAX_PROBLEMS:
            return False
        self.problems[problem.oid] = problem
        return known is None or (known.what, known.blocks) != (problem.what, problem.blocks)

    def solved(self, oid: int, what: str) -> None:
        """Forget a problem of an object, which is there no longer."""
        if (known := self.problems.get(oid)) is not None and known.what == what:
            del self.problems[oid]


def encode(schedule: Schedule, findings: Findings, now: float, wall: float) -> bytes:
    """Give what is to be kept; `wall` is the same moment as `now`, in seconds since 1970."""
    content = {
        "format": FORMAT,
        "passes": {
            kind: {
                "finished": wall - (now - done.finished),
                "position": done.position,
                "completed": done.completed,
            }
            for kind, done in schedule.passes.items()
        },
        "checked_objects": findings.checked_objects,
        "checked_bytes": findings.checked_bytes,
        "found": findings.found,
        "repaired": findings.repaired,
        "problems": [problem.as_json() for problem in findings.problems.values()],
    }
    return json.dumps({**content, "check": _checksum(content)}).encode()


def decode(data: bytes, now: float, wall: float) -> tuple[Schedule, Findings]:
    """Read what `encode` gave, in a later run.

    Raises:
        ProtocolError: it is damaged, or of another format.
    """
    try:
        content = json.loads(data)
        if content.pop("check") != _checksum(content) or content["format"] != FORMAT:
            raise ProtocolError("checksum or format do not match")
        schedule = Schedule()
        for kind in Kind:
            saved = content["passes"][kind]
            age_s = max(0.0, wall - float(saved["finished"]))
            position = None if saved["position"] is None else _position(saved["position"])
            schedule.passes[kind] = Pass(now - age_s, position, int(saved["completed"]))
        findings = Findings(
            int(content["checked_objects"]),
            int(content["checked_bytes"]),
            int(content["found"]),
            int(content["repaired"]),
            {problem.oid: problem for problem in problems_of(content["problems"])},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"not the state of scrubbing: {error!r}") from error
    return schedule, findings


def problems_of(rows: Iterable[Any]) -> list[Problem]:
    """Read what `Problem.as_json` gave (ValueError, KeyError, TypeError)."""
    problems = []
    for row in rows:
        blocks = tuple(int(block) for block in row["blocks"])
        oid = int(row["oid"])
        if not 0 <= oid < 1 << 64 or any(not 0 <= b < BLOCKS_PER_OBJECT for b in blocks):
            raise ValueError(f"no object, or no block of one: {row}")
        problems.append(Problem(oid, str(row["what"]), str(row["detail"]), blocks))
    return problems


def _position(row: Any) -> Position:
    pool, pg, oid = map(int, row)
    return Position(pool, pg, oid)


def _checksum(content: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
