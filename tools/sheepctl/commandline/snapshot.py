"""The command line of `sheepctl snapshot`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import SNAPSHOT, VDI, Area


def add_snapshot(area: Area) -> None:
    """Add the commands of the area."""
    _add_list(area)
    _add_tree(area)
    _add_info(area)
    _add_delete(area)
    _add_rename(area)
    _add_protection(area)


def _add_list(area: Area) -> None:
    listing = area.verb(
        "list",
        "all snapshots, or those of one VDI",
        "VDI may be deleted, as long as there are snapshots of it.",
        ["snapshot list", "snapshot list vm1", "snapshot list --json"],
    )
    listing.thing("vdi", VDI, nargs="?", metavar="VDI").flag("--names", "names only, one a line")


def _add_tree(area: Area) -> None:
    tree = area.verb(
        "tree",
        "what was made of what: snapshots, VDIs, clones",
        "A VDI stands below the snapshot last taken of it, rolled back to, or cloned. VDIs\n"
        "without any are left out.",
        ["snapshot tree", "snapshot tree vm1"],
    )
    tree.thing("vdi", VDI, "only where this one is", nargs="?", metavar="VDI")


def _add_info(area: Area) -> None:
    area.verb("info", "all about one snapshot", examples=["snapshot info vm1@daily"]).thing(
        "name", SNAPSHOT, metavar="VDI@TAG"
    )


def _add_delete(area: Area) -> None:
    delete = area.verb(
        "delete",
        "delete snapshots",
        "A deleted snapshot lies in the trash for an hour (sheepctl trash restore). VDIs, clones\n"
        "and other snapshots lose nothing. A protected one is refused.",
        ["snapshot delete vm1@monday vm1@tuesday", "snapshot delete vm1@daily --now"],
    )
    delete.thing("name", SNAPSHOT, nargs="+", metavar="VDI@TAG")
    delete.flag("--now", "for good: not into the trash")


def _add_rename(area: Area) -> None:
    rename = area.verb(
        "rename", "give a snapshot another tag", examples=["snapshot rename vm1@daily monday"]
    )
    rename.thing("name", SNAPSHOT, metavar="VDI@TAG").word("new", "its new tag", metavar="NEWTAG")


def _add_protection(area: Area) -> None:
    for name, summary in (
        ("protect", "forbid to delete snapshots"),
        ("unprotect", "allow again to delete snapshots"),
    ):
        area.verb(name, summary, examples=[f"snapshot {name} vm1@release"]).thing(
            "name", SNAPSHOT, nargs="+", metavar="VDI@TAG"
        )
