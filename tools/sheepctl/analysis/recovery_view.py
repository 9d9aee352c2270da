"""How far is recovery? Pure: from what the nodes say to one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sheepfs_tools.durations import format_duration


@dataclass(frozen=True, slots=True)
class NodeRecovery:
    """What one node has left to copy. Sizes in bytes, times in seconds."""

    node: int
    groups_left: int
    objects_left: int
    bytes_left: int
    objects_done: int
    bytes_done: int
    bytes_per_s: int
    for_s: float
    waits: str
    """Why it does not go on; empty if it does."""

    @property
    def left_s(self) -> float | None:
        """How long it takes yet; None if that cannot be told."""
        if not self.bytes_left:
            return 0.0 if not self.waits else None
        return self.bytes_left / self.bytes_per_s if self.bytes_per_s and not self.waits else None


def node_recoveries(statuses: Mapping[int, Mapping[str, Any] | str]) -> list[NodeRecovery]:
    """Give what each node that answers says, in order."""
    found = []
    for node, status in sorted(statuses.items()):
        told = {} if isinstance(status, str) else status.get("recovery")
        if isinstance(told, Mapping):
            fields = {
                name: told.get(name, 0)
                for name in NodeRecovery.__dataclass_fields__
                if name not in ("node", "waits")
            }
            if told:
                found.append(NodeRecovery(node, waits=str(told.get("waits") or ""), **fields))
    return found


@dataclass(frozen=True, slots=True)
class Recovery:
    """Recovery as a whole."""

    objects_left: int
    bytes_left: int
    bytes_per_s: int
    percent: int
    """Of what this recovery had to copy."""
    left_s: float | None
    """Until the last node is done; None if that cannot be told."""
    waits: tuple[str, ...]


def whole_recovery(nodes: list[NodeRecovery]) -> Recovery | None:
    """Put the nodes' answers together; None if nothing is being recovered."""
    busy = [node for node in nodes if node.groups_left]
    if not busy:
        return None
    left = sum(node.bytes_left for node in busy)
    done = sum(node.bytes_done for node in busy)
    times = [node.left_s for node in busy]
    return Recovery(
        sum(node.objects_left for node in busy),
        left,
        sum(node.bytes_per_s for node in busy),
        100 * done // (done + left) if left else 99,
        None if None in times else max(time for time in times if time is not None),
        tuple(f"node {node.node}: {node.waits}" for node in busy if node.waits),
    )


def sentence(recovery: Recovery) -> str:
    """Say in a few words how far it is."""
    text = f"recovery is at {recovery.percent} %"
    if recovery.left_s is not None and recovery.bytes_left:
        text += f", {format_duration(recovery.left_s)} left"
    if recovery.waits:
        text += f", and waits ({'; '.join(recovery.waits)})"
    return text
