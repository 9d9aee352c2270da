"""The command line of sheepctl: --help, shell completion and the man page are made of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

DESCRIPTION = "Administer a sheepfs cluster: disks, snapshots, the trash, the cluster itself."

EPILOG = """\
examples:
  sheepctl cluster status                  is all well?
  sheepctl vdi create vm1 20G              a virtual disk; the mount shows it as vm1.raw
  sheepctl vdi create scratch 1T --copies 1
  sheepctl vdi resize vm1 40G
  sheepctl vdi check vm1                   do all replicas agree?
  sheepctl snapshot list vm1               its snapshots
  sheepctl vdi delete vm1                  into the trash, for an hour
  sheepctl trash restore vm1               and back

names:
  vm1 means the VDI vm1.raw. Its snapshot daily is vm1@daily, vm1.raw@daily or vm1@daily.raw,
  which is its file in the mount.

environment:
  SHEEPFS_ETCD      where etcd is, as --etcd          (default 127.0.0.1:2379)
  SHEEPFS_CLUSTER   which cluster, as --cluster       (default default)

exit status:
  0 done, 1 it failed (or the answer is bad news), 2 wrong usage, 130 interrupted
"""

VDI, SNAPSHOT, ANY, TRASH = "vdi", "snapshot", "any", "trash"
"""What an argument names: completion offers those."""


def completes(action: argparse.Action) -> str:
    """Give what an argument names (VDI, SNAPSHOT, ANY, TRASH); empty: nothing that exists."""
    return str(getattr(action, "sheepctl_completes", ""))


def module_of(arguments: argparse.Namespace) -> str:
    """Give the module in which the function of a parsed command is."""
    return str(arguments.module)


def _common(defaults: bool) -> argparse.ArgumentParser:
    """Options that may stand before and after the command."""

    def default(variable: str, value: str) -> str:
        return os.environ.get(variable) or value if defaults else argparse.SUPPRESS

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--etcd",
        metavar="HOST:PORT[,...]",
        default=default("SHEEPFS_ETCD", "127.0.0.1:2379"),
        help="where etcd is (default: $SHEEPFS_ETCD or 127.0.0.1:2379)",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        default=default("SHEEPFS_CLUSTER", "default"),
        help="which cluster (default: $SHEEPFS_CLUSTER or 'default')",
    )
    return parser


class Verb:
    """One command, and its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def thing(
        self, dest: str, what: str, help: str = "", nargs: str | None = None, metavar: str = ""
    ) -> Verb:
        """Add an argument that names something that exists."""
        action = self._parser.add_argument(
            dest, nargs=nargs, metavar=metavar or None, help=help or None
        )
        action.sheepctl_completes = what  # type: ignore[attr-defined]
        return self

    def word(self, dest: str, help: str, nargs: str | None = None, metavar: str = "") -> Verb:
        """Add another argument."""
        self._parser.add_argument(dest, nargs=nargs, metavar=metavar or None, help=help)
        return self

    def flag(self, name: str, help: str) -> Verb:
        """Add an option that is there or not."""
        self._parser.add_argument(name, action="store_true", help=help)
        return self

    def option(self, name: str, metavar: str, help: str, default: str | None = None) -> Verb:
        """Add an option with a text."""
        self._parser.add_argument(name, metavar=metavar, default=default, help=help)
        return self

    def number(self, name: str, metavar: str, help: str, default: int | None = None) -> Verb:
        """Add an option, or an argument, with a number."""
        if name.startswith("-"):
            self._parser.add_argument(name, type=int, metavar=metavar, default=default, help=help)
        else:
            self._parser.add_argument(name, type=int, metavar=metavar, help=help)
        return self


class Area:
    """A group of commands, like `sheepctl vdi`."""

    def __init__(
        self,
        areas: argparse._SubParsersAction[argparse.ArgumentParser],
        name: str,
        summary: str,
        module: str,
    ) -> None:
        self._name = name
        self._module = module
        parser = areas.add_parser(name, help=summary, description=_sentence(summary))
        self._verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    def verb(
        self,
        name: str,
        summary: str,
        more: str = "",
        examples: Sequence[str] = (),
        module: str = "",
    ) -> Verb:
        """Add a command.

        Args:
            summary: one line for the list of commands, beginning its own help.
            more: further lines of its help.
            examples: command lines, the word `sheepctl` left out.
            module: where its function is, if not in the area's module.
        """
        parser: argparse.ArgumentParser = self._verbs.add_parser(
            name,
            help=summary,
            description=_sentence(summary) + ("\n" + more.strip("\n") if more else ""),
            epilog="examples:\n" + "\n".join(f"  sheepctl {line}" for line in examples)
            if examples
            else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[_common(False)],
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(module=module or self._module)
        return Verb(parser)


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."


def build_parser() -> argparse.ArgumentParser:
    """Give the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sheepctl",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(True)],
    )
    areas = parser.add_subparsers(dest="area", metavar="COMMAND", required=True)
    _add_cluster(Area(areas, "cluster", "the cluster as a whole", "sheepctl_cluster"))
    _add_node(Area(areas, "node", "storage daemons", "sheepctl_cluster"))
    _add_vdi(Area(areas, "vdi", "virtual disk images", "sheepctl_vdi"))
    _add_snapshot(Area(areas, "snapshot", "snapshots of VDIs", "sheepctl_snapshot"))
    _add_trash(Area(areas, "trash", "what is deleted and can be restored", "sheepctl_trash"))
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
        ["cluster status", "cluster status --json"],
    )


def _add_node(area: Area) -> None:
    area.verb("list", "all nodes", examples=["node list"])


def _add_vdi(area: Area) -> None:
    create = area.verb(
        "create",
        "make an empty VDI; it uses no space until it is written to",
        examples=["vdi create vm1 20G", "vdi create scratch 1.5TiB --copies 1"],
    )
    create.word("name", "vm1 makes vm1.raw").word("size", "like 20G or 10TiB")
    create.number("--copies", "N", "1 to 5 (default 3)", 3)
    area.verb("list", "all VDIs", examples=["vdi list", "vdi list --json"]).flag(
        "--names", "names only, one a line"
    )
    area.verb("info", "all about one VDI", examples=["vdi info vm1"]).thing("name", VDI)
    resize = area.verb(
        "resize",
        "grow a VDI (or cut it)",
        "A VDI in use is resized where it is in use: truncate -s SIZE FILE in that mount.",
        ["vdi resize vm1 40G", "vdi resize vm1 10G --shrink"],
    )
    resize.thing("name", VDI).word("size", "the new size, like 40G")
    resize.flag("--shrink", "allow to cut off what is beyond")
    rename = area.verb(
        "rename",
        "give a VDI another name",
        "Also while it is in use. Its snapshots go with it.",
        ["vdi rename vm1 web"],
    )
    rename.thing("name", VDI).word("new", "its new name")
    delete = area.verb(
        "delete",
        "delete VDIs",
        "A deleted VDI lies in the trash for an hour (sheepctl trash restore). Its snapshots\n"
        "stay, and keep its name until the last of them is deleted, too. One in use is refused.",
        ["vdi delete vm1 vm2", "vdi delete vm1 --now"],
    )
    delete.thing("name", VDI, nargs="+").flag("--now", "for good: not into the trash")
    unlock = area.verb(
        "unlock",
        "take a VDI from a holder that is dead",
        "Storage daemons refuse the old holder from then on; any mount can open the VDI.",
        ["vdi unlock vm1 --force"],
    )
    unlock.thing("name", VDI).flag("--force", "also from one that may be alive")
    check = area.verb(
        "check",
        "compare all replicas of a VDI",
        "Exits with 1 when they differ, or cannot all be asked.",
        ["vdi check vm1", "vdi check vm1 --deep"],
    )
    check.thing("name", VDI).flag("--deep", "read every byte of every replica")
    _add_copies(area)
    put = area.verb(
        "set",
        "keep texts of your own with a VDI or a snapshot",
        "The mount shows them as extended attributes user.KEY. All are set, or none.",
        [
            "vdi set vm1 owner=anna ticket=4711",
            "vdi set vm1@daily note='before the upgrade'",
            "vdi set vm1 ticket=                 removes it",
        ],
    )
    put.thing("name", ANY).word("pair", "KEY= removes KEY", nargs="+", metavar="KEY=VALUE")
    get = area.verb(
        "get",
        "show what is kept with a VDI or a snapshot",
        "Exits with 1 when KEY is not there.",
        ["vdi get vm1", "vdi get vm1 owner"],
    )
    get.thing("name", ANY).word("key", "only this one", nargs="?", metavar="KEY")


def _add_copies(area: Area) -> None:
    module = "sheepctl_copies"
    snapshot = area.verb(
        "snapshot",
        "keep a VDI as it is now",
        "Takes milliseconds and no space, also while a VM writes to it on whatever host. The\n"
        "mount shows it as a file that never changes. Without --freeze it is as a disk after a\n"
        "power failure; with it, the guest agent of a QEMU on this host flushes and freezes its\n"
        "file systems meanwhile.",
        [
            "vdi snapshot vm1 --tag daily              vm1@daily.raw in the mount",
            "vdi snapshot vm1                          the tag is the time",
            "vdi snapshot vm1 --tag daily --freeze /run/vm1-agent.sock",
        ],
        module,
    )
    snapshot.thing("name", VDI).option("--tag", "TAG", "its name (default: date and time)")
    snapshot.option("--freeze", "QMP_SOCKET", "of the VM, to freeze its file systems meanwhile")
    clone = area.verb(
        "clone",
        "make a VDI that begins as another, or as a snapshot, and shares its data",
        "Takes milliseconds, whatever the size. What is written to one is not seen in the other.",
        ["vdi clone golden vm2", "vdi clone vm1@daily rescue"],
        module,
    )
    clone.thing("source", ANY, "a VDI or a snapshot").word("new", "vm2 makes vm2.raw")
    rollback = area.verb(
        "rollback",
        "make a VDI as one of its snapshots is",
        "What was written since the snapshot is lost: take another one before. Snapshots stay.",
        ["vdi rollback vm1 daily"],
        module,
    )
    rollback.thing("name", VDI).word("tag", "of its snapshot", metavar="TAG")
    area.verb(
        "flatten",
        "give a clone data of its own for all that it shares",
        "Its origin and it then have nothing to do with each other, and it uses its full space.",
        ["vdi flatten vm2"],
        module,
    ).thing("name", VDI)
    copies = area.verb(
        "copies",
        "keep another number of replicas of a VDI",
        "All its data is copied once. Its snapshots keep the number that they have.",
        ["vdi copies vm1 3"],
        module,
    )
    copies.thing("name", VDI).number("copies", "N", "1 to 5")


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
