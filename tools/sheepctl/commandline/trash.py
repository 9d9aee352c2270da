"""The command line of `sheepctl trash`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import TRASH, Area


def add_trash(area: Area) -> None:
    """Add the commands of the area."""
    _add_list(area)
    _add_restore(area)
    _add_purge(area)


def _add_list(area: Area) -> None:
    area.verb("list", "what is in the trash", examples=["trash list"]).flag(
        "--ids", "ids only, one a line"
    )


def _add_restore(area: Area) -> None:
    restore = area.verb(
        "restore",
        "bring a VDI or a snapshot back",
        "As it was when it was deleted. When its name is taken meanwhile, give it another. A\n"
        "snapshot whose VDI is gone comes back alone: it can be read, cloned and deleted.",
        [
            "trash restore vm1",
            "trash restore 17 --name vm1-old",
            "trash restore 18 --name vm1@older     a snapshot",
        ],
    )
    restore.thing("id", TRASH, "of sheepctl trash list, or its name", metavar="ID")
    restore.option("--name", "NAME", "another name than it had")


def _add_purge(area: Area) -> None:
    purge = area.verb(
        "purge",
        "give up for good what is in the trash",
        "Space that nothing else uses comes back soon.",
        ["trash purge 17 18", "trash purge --all"],
    )
    purge.thing("id", TRASH, "of sheepctl trash list, or a name", nargs="*", metavar="ID")
    purge.flag("--all", "all of it")
