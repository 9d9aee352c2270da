"""The command line of sheepctl: --help, shell completion and the man page are made of it."""

from __future__ import annotations

import argparse

from sheepfs_tools.sheepctl.commandline.areas import Area, common_options
from sheepfs_tools.sheepctl.commandline.cluster import add_cluster
from sheepfs_tools.sheepctl.commandline.look import add_object, add_top
from sheepfs_tools.sheepctl.commandline.metadata import add_metadata
from sheepfs_tools.sheepctl.commandline.node import add_node
from sheepfs_tools.sheepctl.commandline.rescue import add_rescue
from sheepfs_tools.sheepctl.commandline.scrub import add_scrub
from sheepfs_tools.sheepctl.commandline.snapshot import add_snapshot
from sheepfs_tools.sheepctl.commandline.trash import add_trash
from sheepfs_tools.sheepctl.commandline.vdi import add_vdi

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
    add_cluster(Area(areas, "cluster", "the cluster as a whole", "cluster"))
    add_node(Area(areas, "node", "storage daemons", "cluster"))
    add_scrub(Area(areas, "scrub", "the background check of all replicas", "scrub"))
    add_top(areas)
    add_vdi(Area(areas, "vdi", "virtual disk images", "vdi"))
    add_object(Area(areas, "object", "pieces of 4 MiB that VDIs are made of", "locate"))
    add_snapshot(Area(areas, "snapshot", "snapshots of VDIs", "snapshot"))
    add_trash(Area(areas, "trash", "what is deleted and can be restored", "trash"))
    add_metadata(Area(areas, "metadata", "what etcd keeps, as a file", "metadata"))
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
