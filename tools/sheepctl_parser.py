"""The command line of sheepctl: --help, shell completion and the man page are made of it."""

from __future__ import annotations

import argparse

from sheepfs_tools.sheepctl_commandline import SNAPSHOT, TRASH, VDI, Area, common_options
from sheepfs_tools.sheepctl_parser_look import add_object, add_top
from sheepfs_tools.sheepctl_parser_node import add_node, add_recover
from sheepfs_tools.sheepctl_parser_rescue import add_rescue
from sheepfs_tools.sheepctl_parser_scrub import add_scrub
from sheepfs_tools.sheepctl_parser_vdi import add_vdi

DESCRIPTION = "Administer a sheepfs cluster: disks, snapshots, the trash, the cluster itself."

EPILOG = """\
examples:
  sheepctl cluster status                  is all well?
  sheepctl top                             who does how much, and how fast it goes
  sheepctl vdi create vm1 20G              a virtual disk; the mount shows it as vm1.raw
  sheepctl vdi create scratch 1T --copies 1
  sheepctl vdi resize vm1 40G
  sheepctl vdi check vm1                   do all replicas agree?
  sheepctl snapshot list vm1               its snapshots
  sheepctl vdi delete vm1                  into the trash, for an hour
  sheepctl trash restore vm1               and back
  sheepctl metadata export /backup/etcd    what etcd keeps, for the day it is lost
  sheepctl rescue --list --data /mnt/disk1 VDIs from disks alone

names:
  vm1 means the VDI vm1.raw. Its snapshot daily is vm1@daily, vm1.raw@daily or vm1@daily.raw,
  which is its file in the mount.

environment:
  SHEEPFS_ETCD      where etcd is, as --etcd          (default 127.0.0.1:2379)
  SHEEPFS_CLUSTER   which cluster, as --cluster       (default default)

exit status:
  0 done, 1 it failed (or the answer is bad news), 2 wrong usage, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Give the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sheepctl",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(True)],
    )
    areas = parser.add_subparsers(dest="area", metavar="COMMAND", required=True)
    _add_cluster(Area(areas, "cluster", "the cluster as a whole", "sheepctl_cluster"))
    add_node(Area(areas, "node", "storage daemons", "sheepctl_cluster"))
    add_scrub(Area(areas, "scrub", "the background check of all replicas", "sheepctl_scrub"))
    add_top(areas)
    add_vdi(Area(areas, "vdi", "virtual disk images", "sheepctl_vdi"))
    add_object(Area(areas, "object", "pieces of 4 MiB that VDIs are made of", "sheepctl_locate"))
    _add_snapshot(Area(areas, "snapshot", "snapshots of VDIs", "sheepctl_snapshot"))
    _add_trash(Area(areas, "trash", "what is deleted and can be restored", "sheepctl_trash"))
    add_rescue(areas)
    completion = areas.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Print a completion script for a shell.",
        epilog="examples:\n"
        '  eval "$(sheepctl completion bash)"       in ~/.bashrc; likewise in ~/.zshrc\n'
        "  sheepctl completion fish | source        in ~/.config/fish/config.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    man = areas.add_parser(
        "man",
        help="write the man pages of all programs",
        description="Write the man pages of sheepctl, sheepfs, sheepfs-storaged and sheep-cp.",
        epilog="examples:\n"
        "  sheepctl man /usr/local/share/man/man1   then: man sheepctl\n"
        "  sheepctl man /tmp && man /tmp/sheepctl.1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    man.add_argument(
        "directory", metavar="DIR", nargs="?", default="man", help="made if it is not there (man)"
    )
    return parser


def _add_cluster(area: Area) -> None:
    area.verb(
        "status",
        "health, nodes, placement groups, counters",
        "Exits with 1 when a placement group has no member that serves: writes wait there.",
        ["cluster status", "cluster status --json", "cluster status --watch 5"],
    ).watch()
    area.verb(
        "check",
        "do maps and objects agree?",
        "Looks for objects that a map names and no node has, and for objects that no map names.\n"
        "May run while VDIs are in use. Exits with 1 when something is found.",
        ["cluster check", "cluster check --repair"],
        "sheepctl_consistency",
    ).flag("--repair", "remove what no map names; copy what a replica lacks")
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
        "sheepctl_recovery",
    )
    recovery.number("--parallel", "N", "objects that a node copies at once (default 4)")
    recovery.option("--bandwidth", "SIZE", "bytes per second of each node, or 'unlimited'")
    recovery.option("--out-after", "TIME", "how long a node may be down (default 10m)")
    recovery.flag("--pause", "copy nothing more").flag("--resume", "go on")
    recovery.flag("--watch", "show it every 2 seconds until it is done")
    add_recover(area)


def _add_snapshot(area: Area) -> None:
    listing = area.verb(
        "list",
        "all snapshots, or those of one VDI",
        "VDI may be deleted, as long as there are snapshots of it.",
        ["snapshot list", "snapshot list vm1", "snapshot list --json"],
    )
    listing.thing("vdi", VDI, nargs="?", metavar="VDI").flag("--names", "names only, one a line")
    tree = area.verb(
        "tree",
        "what was made of what: snapshots, VDIs, clones",
        "A VDI stands below the snapshot last taken of it, rolled back to, or cloned. VDIs\n"
        "without any are left out.",
        ["snapshot tree", "snapshot tree vm1"],
    )
    tree.thing("vdi", VDI, "only where this one is", nargs="?", metavar="VDI")
    area.verb("info", "all about one snapshot", examples=["snapshot info vm1@daily"]).thing(
        "name", SNAPSHOT, metavar="VDI@TAG"
    )
    delete = area.verb(
        "delete",
        "delete snapshots",
        "A deleted snapshot lies in the trash for an hour (sheepctl trash restore). VDIs, clones\n"
        "and other snapshots lose nothing. A protected one is refused.",
        ["snapshot delete vm1@monday vm1@tuesday", "snapshot delete vm1@daily --now"],
    )
    delete.thing("name", SNAPSHOT, nargs="+", metavar="VDI@TAG")
    delete.flag("--now", "for good: not into the trash")
    rename = area.verb(
        "rename", "give a snapshot another tag", examples=["snapshot rename vm1@daily monday"]
    )
    rename.thing("name", SNAPSHOT, metavar="VDI@TAG").word("new", "its new tag", metavar="NEWTAG")
    for name, summary in (
        ("protect", "forbid to delete snapshots"),
        ("unprotect", "allow again to delete snapshots"),
    ):
        area.verb(name, summary, examples=[f"snapshot {name} vm1@release"]).thing(
            "name", SNAPSHOT, nargs="+", metavar="VDI@TAG"
        )


def _add_trash(area: Area) -> None:
    area.verb("list", "what is in the trash", examples=["trash list"]).flag(
        "--ids", "ids only, one a line"
    )
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
    purge = area.verb(
        "purge",
        "give up for good what is in the trash",
        "Space that nothing else uses comes back soon.",
        ["trash purge 17 18", "trash purge --all"],
    )
    purge.thing("id", TRASH, "of sheepctl trash list, or a name", nargs="*", metavar="ID")
    purge.flag("--all", "all of it")
