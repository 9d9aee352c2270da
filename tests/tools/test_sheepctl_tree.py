"""The forest of VDIs and snapshots."""

from __future__ import annotations

from sheepfs.core.metadata import SnapshotRecord, VdiRecord
from sheepfs.net.catalog import Snapshot
from sheepfs_tools.sheepctl.analysis.tree import draw, forest, of_vdi, with_snapshots


def vdi(name: str, number: int, parent: int = 0) -> tuple[str, VdiRecord, int]:
    return name, VdiRecord(number, 1, 3, 9, 9, 9, parent=parent), 1


def snapshot(name: str, owner: int, tag: str, number: int, parent: int = 0) -> Snapshot:
    record = SnapshotRecord(number, owner, 1, 3, 9, 9, parent=parent, created=float(number))
    return Snapshot(name, tag, record, 1)


VDIS = [vdi("alone", 2), vdi("clone.raw", 7, parent=5), vdi("vm1.raw", 3, parent=6)]
SNAPSHOTS = [
    snapshot("vm1.raw", 3, "a", 4),
    snapshot("vm1.raw", 3, "b", 5, parent=4),
    snapshot("vm1.raw", 3, "c", 6, parent=5),
    snapshot("gone.raw", 20, "z", 21, parent=19),
]


def lines(*trees: object) -> list[str]:
    return [indent + branch.name for indent, branch in draw(trees)]  # type: ignore[arg-type]


def test_everything_stands_below_what_it_was_made_of() -> None:
    assert lines(*forest(VDIS, SNAPSHOTS)) == [
        "vm1@a.raw",
        "└─ vm1@b.raw",
        "   ├─ vm1@c.raw",
        "   │  └─ vm1.raw",
        "   └─ clone.raw",
        "gone@z.raw",
        "alone",
    ]


def test_vdis_that_stand_alone_can_be_left_out() -> None:
    assert [tree.name for tree in with_snapshots(forest(VDIS, SNAPSHOTS))] == [
        "vm1@a.raw",
        "gone@z.raw",
    ]


def test_trees_of_one_vdi_are_those_with_it_or_its_snapshots() -> None:
    trees = forest(VDIS, SNAPSHOTS)
    assert [tree.name for tree in of_vdi(trees, 7)] == ["vm1@a.raw"]
    assert [tree.name for tree in of_vdi(trees, 20)] == ["gone@z.raw"]
    assert [tree.name for tree in of_vdi(trees, 2)] == ["alone"]
    assert of_vdi(trees, 99) == []


def test_records_that_name_each_other_as_parents_are_all_shown() -> None:
    ring = [
        snapshot("a", 2, "x", 10, parent=11),
        snapshot("a", 2, "y", 11, parent=10),
        snapshot("a", 2, "z", 12, parent=12),
    ]
    names = [branch.name for tree in forest([], ring) for branch in tree.all()]
    assert sorted(names) == ["a@x", "a@y", "a@z"]


def test_tree_as_json() -> None:
    (tree,) = of_vdi(forest(VDIS, SNAPSHOTS), 7)
    content = tree.as_json()
    assert (content["name"], content["kind"], content["id"]) == ("vm1@a.raw", "snapshot", 4)
    below = content["children"][0]["children"]
    assert [child["name"] for child in below] == ["vm1@c.raw", "clone.raw"]
