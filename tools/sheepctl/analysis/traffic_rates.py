"""The arithmetic of `sheepctl top`: from two samples of counters to rates. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from sheepfs.core.errors import ProtocolError
from sheepfs.core.traffic import KINDS, Meter, Traffic


@dataclass(frozen=True, slots=True)
class NodeSample:
    """A node's counters at second `at` of its own clock."""

    incarnation: int
    at: float
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class MountSample:
    """A mount's counters at second `at` of its own clock: VDI id -> (name, counters)."""

    mount: str
    at: float
    vdis: Mapping[int, tuple[str, Traffic]]


@dataclass(frozen=True, slots=True)
class Sample:
    """What all daemons told at about one time."""

    nodes: Mapping[int, NodeSample]
    mounts: Mapping[str, MountSample]
    """By the mount's client id: its newest report, whichever daemon has it."""

    @classmethod
    def of(cls, answers: Iterable[Any]) -> Self:
        """Put the daemons' answers together. Raises ProtocolError."""
        nodes: dict[int, NodeSample] = {}
        mounts: dict[str, MountSample] = {}
        for answer in answers:
            try:
                nodes[int(answer["node"])] = NodeSample(
                    int(answer["incarnation"]), float(answer["at"]), Traffic.decode(answer)
                )
                for told in answer["mounts"]:
                    mount = MountSample(
                        str(told["mount"]),
                        float(told["at"]),
                        {int(v["id"]): (str(v["name"]), Traffic.decode(v)) for v in told["vdis"]},
                    )
                    known = mounts.get(str(told["client"]))
                    if known is None or known.at < mount.at:
                        mounts[str(told["client"])] = mount
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(f"a daemon's figures cannot be read: {error!r}") from error
        return cls(nodes, mounts)


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests of one kind in a window of time."""

    per_s: float
    bytes_per_s: float
    errors_per_s: float
    mean_s: float
    p99_s: float


@dataclass(slots=True)
class Row:
    """One node or VDI: sums over windows, which may differ from mount to mount."""

    per_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    bytes_per_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    errors_per_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    name: str = ""
    mounts: list[str] = field(default_factory=list)
    _traffic: Traffic = field(default_factory=Traffic)

    def add(self, traffic: Traffic, window_s: float) -> None:
        """Add what was done within `window_s` seconds."""
        for kind in KINDS:
            meter: Meter = getattr(traffic, kind)
            self.per_s[kind] += meter.count / window_s
            self.bytes_per_s[kind] += meter.bytes / window_s
            self.errors_per_s[kind] += meter.errors / window_s
        self._traffic = self._traffic.plus(traffic)

    def rate(self, kind: str) -> Rate:
        """Give the rate of reads, writes or flushes."""
        meter: Meter = getattr(self._traffic, kind)
        return Rate(
            self.per_s[kind],
            self.bytes_per_s[kind],
            self.errors_per_s[kind],
            meter.mean_s,
            meter.quantile_s(0.99),
        )

    @property
    def total_per_s(self) -> float:
        """Requests of all kinds, failed ones too."""
        return sum(self.per_s.values()) + sum(self.errors_per_s.values())


def node_rates(before: Sample, after: Sample) -> dict[int, Row]:
    """Give the rates of each node that has run since `before`, by node id."""
    rows = {}
    for node, new in sorted(after.nodes.items()):
        old = before.nodes.get(node)
        if old is not None and old.incarnation == new.incarnation and new.at > old.at:
            row = rows[node] = Row()
            row.add(new.traffic.since(old.traffic), new.at - old.at)
    return rows


def vdi_rates(before: Sample, after: Sample) -> dict[int, Row]:
    """Give the rates of each VDI as its mounts saw them, by id; the busiest first.

    A mount that has not reported since `before` says nothing.
    """
    rows: dict[int, Row] = {}
    for client, new in after.mounts.items():
        old = before.mounts.get(client)
        if old is None or new.at <= old.at:
            continue
        for vdi, (name, traffic) in new.vdis.items():
            # One that was not there has been opened since.
            _, earlier = old.vdis.get(vdi, ("", Traffic()))
            row = rows.setdefault(vdi, Row())
            done = traffic.since(earlier)
            row.name = name
            row.add(done, new.at - old.at)
            if done.total:
                row.mounts.append(new.mount)
    return dict(sorted(rows.items(), key=lambda item: (-item[1].total_per_s, item[1].name)))
