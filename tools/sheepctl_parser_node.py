"""The command line of `sheepctl node` and `sheepctl cluster recover`."""

from __future__ import annotations

from sheepfs_tools.sheepctl_commandline import NODE, Area


def add_node(area: Area) -> None:
    """Add the commands about storage daemons."""
    area.verb("list", "all nodes", examples=["node list", "node list --watch"]).flag(
        "--ids", "ids only, one a line"
    ).watch()
    area.verb(
        "info",
        "all about one node",
        "What it holds, who needs it, what is wanted of it, and whether it can be removed.",
        ["node info 4"],
        "sheepctl_node",
    ).thing("node", NODE, "its number, see sheepctl node list", metavar="NODE")
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
        "sheepctl_node",
    )
    drain.thing("node", NODE, "see sheepctl node list", nargs="+", metavar="NODE")
    drain.flag("--undo", "end it: the node gets its share again")
    drain.flag("--wait", "return when the nodes are empty")
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
        "sheepctl_node",
    )
    remove.thing("node", NODE, "see sheepctl node list", nargs="+", metavar="NODE")
    remove.flag("--drain", "move the data away first, and wait for that")
    weight = area.verb(
        "weight",
        "set the share of data that a node gets",
        "By default the size of its disk in GiB, or what its daemon was started with. 0: it gets\n"
        "no data, and what it has moves away.",
        ["node weight 4 2000", "node weight 4 auto               by its disk again"],
        "sheepctl_node",
    )
    weight.thing("node", NODE, "its number, see sheepctl node list", metavar="NODE")
    weight.word("weight", "relative to other nodes, or auto", metavar="WEIGHT|auto")
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
        "sheepctl_node",
    )
    patience.number("--returns", "N", "so many returns cost nothing (at first 3)")
    patience.number("--longest", "SECONDS", "hold nobody out for longer (at first 300)")


def add_recover(area: Area) -> None:
    """Add the command for nodes that are lost for good."""
    recover = area.verb(
        "recover",
        "go on without nodes that will never come back",
        "A placement group whose nodes are all down waits for one of them. This shows which wait\n"
        "for which nodes, and what each VDI and snapshot would lose without them; it changes\n"
        "nothing and exits with 1 if any group waits. With --accept-loss the groups go on with\n"
        "the newest data that is left. What is lost reads as an I/O error, never as zeros. There\n"
        "is no way back: what the lost nodes have is overwritten if they join later.",
        [
            "cluster recover                      what is waited for, what would be lost",
            "cluster recover --accept-loss        go on; asks first",
            "cluster recover --accept-loss --yes  do not ask",
        ],
        "sheepctl_recover",
    )
    recover.flag("--accept-loss", "give up what only the nodes that are down have")
    recover.flag("--yes", "do not ask")
