"""What was made of what: VDIs and their snapshots as a forest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheepfs.core.metadata import VdiRecord
from sheepfs.net.catalog import Snapshot


@dataclass(slots=True)
class Branch:
    """A VDI or a snapshot, and what was made of it."""

    name: str
    id: int
    vdi: int
    """Its own id, for a VDI."""
    parent: int
    created: float
    size: int
    is_snapshot: bool
    children: list[Branch] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Give it, and all below, for JSON."""
        return {
            "name": self.name,
            "id": self.id,
            "kind": "snapshot" if self.is_snapshot else "vdi",
            "created": self.created,
            "size": self.size,
            "children": [child.as_json() for child in self.children],
        }

    def all(self) -> Iterator[Branch]:
        """Give it and all below."""
        yield self
        for child in self.children:
            yield from child.all()


def forest(
    vdis: Iterable[tuple[str, VdiRecord, int]], snapshots: Iterable[Snapshot]
) -> list[Branch]:
    """Give the trees: each snapshot and VDI below the snapshot that it was made of.

    What was made of a snapshot that is deleted is the root of a tree of its own.
    """
    branches = [
        Branch(s.file, r.id, r.vdi, r.parent, r.created, r.size, True)
        for s in snapshots
        for r in (s.record,)
    ] + [Branch(n, r.id, r.id, r.parent, r.created, r.size, False) for n, r, _ in vdis]
    by_id = {branch.id: branch for branch in branches if branch.is_snapshot}
    roots = []
    for branch in sorted(branches, key=lambda b: (not b.is_snapshot, b.created, b.name)):
        # A parent is older, and its id smaller, than what was made of it. A VDI that was rolled
        # back has a parent of whatever age, but nothing below it.
        parent = by_id.get(branch.parent)
        if parent is None or (branch.is_snapshot and parent.id >= branch.id):
            roots.append(branch)
        else:
            parent.children.append(branch)
    return roots


def of_vdi(trees: Sequence[Branch], vdi: int) -> list[Branch]:
    """Give the trees in which a VDI or a snapshot of it is."""
    return [tree for tree in trees if any(branch.vdi == vdi for branch in tree.all())]


def with_snapshots(trees: Sequence[Branch]) -> list[Branch]:
    """Leave out VDIs that stand alone."""
    return [tree for tree in trees if tree.is_snapshot]


def draw(trees: Sequence[Branch]) -> Iterator[tuple[str, Branch]]:
    """Give one line for each: what stands before its name, and itself."""

    def below(branch: Branch, indent: str) -> Iterator[tuple[str, Branch]]:
        for number, child in enumerate(branch.children, 1):
            is_last = number == len(branch.children)
            yield indent + ("└─ " if is_last else "├─ "), child
            yield from below(child, indent + ("   " if is_last else "│  "))

    for tree in trees:
        yield "", tree
        yield from below(tree, "")
