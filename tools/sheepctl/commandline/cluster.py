"""The command line of `sheepctl cluster`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import Area


def add_cluster(area: Area) -> None:
    """Add the commands of the area."""
    _add_status(area)
    _add_check(area)
    _add_recovery(area)
    _add_recover(area)


def _add_status(area: Area) -> None:
    area.verb(
        "status",
        "health, nodes, placement groups, counters",
        "Exits with 1 when a placement group has no member that serves: writes wait there.",
        ["cluster status", "cluster status --json", "cluster status --watch 5"],
    ).watch()


def _add_check(area: Area) -> None:
    area.verb(
        "check",
        "do maps and objects agree?",
        "Looks for objects that a map names and no node has, and for objects that no map names.\n"
        "May run while VDIs are in use. Exits with 1 when something is found.",
        ["cluster check", "cluster check --repair"],
        "consistency",
    ).flag("--repair", "remove what no map names; copy what a replica lacks")


def _add_recovery(area: Area) -> None:
    recovery = area.verb(
        "recovery",
        "how far is recovery, how fast may it be?",
        "Nodes copy what they lack: what changed while they were away, or everything. They yield\n"
        "to clients by themselves; limits are for when that is not enough. What is set here holds\n"
        "for all nodes, at once and until it is set again.",
        [
            "cluster recovery                      progress, rate, time left; and the limits",
            "cluster recovery --watch              again and again, until it is done",
            "cluster recovery --bandwidth 100M     each node copies 100 MiB/s at most",
            "cluster recovery --bandwidth unlimited --parallel 8",
            "cluster recovery --pause              until --resume",
            "cluster recovery --out-after 30m      give a node up when it is down for so long",
        ],
        "recovery",
    )
    recovery.number("--parallel", "N", "objects that a node copies at once (default 4)")
    recovery.option("--bandwidth", "SIZE", "bytes per second of each node, or 'unlimited'")
    recovery.option("--out-after", "TIME", "how long a node may be down (default 10m)")
    recovery.flag("--pause", "copy nothing more").flag("--resume", "go on")
    recovery.flag("--watch", "show it every 2 seconds until it is done")


def _add_recover(area: Area) -> None:
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
        "recover",
    )
    recover.flag("--accept-loss", "give up what only the nodes that are down have")
    recover.flag("--yes", "do not ask")
