"""The command line of `sheepctl vdi`."""

from __future__ import annotations

from sheepfs_tools.sheepctl_commandline import ANY, VDI, Area
from sheepfs_tools.sheepctl_parser_data import add_data_commands


def add_vdi(area: Area) -> None:
    """Add all commands about VDIs."""
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
        "Also while it is in use, on whatever host; QEMU learns of it by its block_resize.",
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
    add_data_commands(area)
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
    snapshot.option("--freeze", "QMP_SOCKET", "of the guest agent: freezes file systems meanwhile")
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
        "Its origin and it then have nothing to do with each other. Nodes copy what they shared\n"
        "only when one of the two is deleted or changed.",
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
