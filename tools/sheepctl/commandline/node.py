"""The command line of `sheepctl node`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import NODE, Area


def add_node(area: Area) -> None:
    """Add the commands about storage daemons."""
    _add_list(area)
    _add_info(area)
    _add_drain(area)
    _add_remove(area)
    _add_weight(area)
    _add_patience(area)


def _add_list(area: Area) -> None:
    area.verb("list", "all nodes", examples=["node list", "node list --watch"]).flag(
        "--ids", "ids only, one a line"
    ).watch()


def _add_info(area: Area) -> None:
    area.verb(
        "info",
        "all about one node",
        "What it holds, who needs it, what is wanted of it, and whether it can be removed.",
        ["node info 4"],
        "node",
    ).thing("node", NODE, "its number, see sheepctl node list", metavar="NODE")


def _add_drain(area: Area) -> None:
    drain = area.verb(
        "drain",
        "move all data of nodes to others",
        "A few placement groups at a time move; each has all its copies throughout. The nodes\n"
        "go on serving until they are empty, and get nothing new. It may be said while a node is\n"
        "down: others then get its share at once. With --wait, Ctrl-C ends the waiting, not the\n"
        "draining. Exits with 1 when there is nowhere to move to.",
        [
            "node drain 4                     then look with: sheepctl node info 4",
            "node drain 4 5 --wait            return when both are empty",
            "node drain 4 --undo              give it data again",
        ],
        "node",
    )
    drain.thing("node", NODE, "see sheepctl node list", nargs="+", metavar="NODE")
    drain.flag("--undo", "end it: the node gets its share again")
    drain.flag("--wait", "return when the nodes are empty")


def _add_remove(area: Area) -> None:
    remove = area.verb(
        "remove",
        "take nodes out of the cluster for good",
        "Refused while a node has what others lack: one that is up must be empty (--drain does\n"
        "that first); one that is down may go when others have all its data. Its daemon ends, and\n"
        "never comes back as this node: with an empty directory it joins as a new one.",
        [
            "node remove 4 --drain            empty it, wait, remove it",
            "node remove 4                    when it is empty, or down and not needed",
        ],
        "node",
    )
    remove.thing("node", NODE, "see sheepctl node list", nargs="+", metavar="NODE")
    remove.flag("--drain", "move the data away first, and wait for that")


def _add_weight(area: Area) -> None:
    weight = area.verb(
        "weight",
        "set the share of data that a node gets",
        "By default the size of its disk in GiB, or what its daemon was started with. 0: it gets\n"
        "no data, and what it has moves away.",
        ["node weight 4 2000", "node weight 4 auto               by its disk again"],
        "node",
    )
    weight.thing("node", NODE, "its number, see sheepctl node list", metavar="NODE")
    weight.word("weight", "relative to other nodes, or auto", metavar="WEIGHT|auto")


def _add_patience(area: Area) -> None:
    patience = area.verb(
        "patience",
        "how often nodes may come and go before they are held out",
        "A node that goes again and again without staying for 5 minutes is held out after some\n"
        "returns: for 5 s, then 10 s, and so on. Without options, shows what is set.",
        [
            "node patience",
            "node patience --returns 5 --longest 60",
            "node patience --longest 0        hold nobody out",
        ],
        "node",
    )
    patience.number("--returns", "N", "so many returns cost nothing (at first 3)")
    patience.number("--longest", "SECONDS", "hold nobody out for longer (at first 300)")
