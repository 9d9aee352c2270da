"""The command line of `sheepctl vdi`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import ANY, VDI, Area
from sheepfs_tools.sheepctl.commandline.copies import add_copies
from sheepfs_tools.sheepctl.commandline.data import add_data_commands


def add_vdi(area: Area) -> None:
    """Add all commands about VDIs."""
    _add_create(area)
    _add_list_and_info(area)
    _add_resize(area)
    _add_rename(area)
    _add_delete(area)
    _add_unlock(area)
    _add_check(area)
    add_copies(area)
    add_data_commands(area)
    _add_set(area)
    _add_get(area)


def _add_create(area: Area) -> None:
    create = area.verb(
        "create",
        "make an empty VDI; it uses no space until it is written to",
        examples=["vdi create vm1 20G", "vdi create scratch 1.5TiB --copies 1"],
    )
    create.word("name", "vm1 makes vm1.raw").word("size", "like 20G or 10TiB")
    create.number("--copies", "N", "1 to 5 (default 3)", 3)


def _add_list_and_info(area: Area) -> None:
    area.verb("list", "all VDIs", examples=["vdi list", "vdi list --json"]).flag(
        "--names", "names only, one a line"
    )
    area.verb("info", "all about one VDI", examples=["vdi info vm1"]).thing("name", VDI)


def _add_resize(area: Area) -> None:
    resize = area.verb(
        "resize",
        "grow a VDI (or cut it)",
        "Also while it is in use, on whatever host; QEMU learns of it by its block_resize.",
        ["vdi resize vm1 40G", "vdi resize vm1 10G --shrink"],
    )
    resize.thing("name", VDI).word("size", "the new size, like 40G")
    resize.flag("--shrink", "allow to cut off what is beyond")


def _add_rename(area: Area) -> None:
    rename = area.verb(
        "rename",
        "give a VDI another name",
        "Also while it is in use. Its snapshots go with it.",
        ["vdi rename vm1 web"],
    )
    rename.thing("name", VDI).word("new", "its new name")


def _add_delete(area: Area) -> None:
    delete = area.verb(
        "delete",
        "delete VDIs",
        "A deleted VDI lies in the trash for an hour (sheepctl trash restore). Its snapshots\n"
        "stay, and keep its name until the last of them is deleted, too. One in use is refused.",
        ["vdi delete vm1 vm2", "vdi delete vm1 --now"],
    )
    delete.thing("name", VDI, nargs="+").flag("--now", "for good: not into the trash")


def _add_unlock(area: Area) -> None:
    unlock = area.verb(
        "unlock",
        "take a VDI from a holder that is dead",
        "Storage daemons refuse the old holder from then on; any mount can open the VDI.",
        ["vdi unlock vm1 --force"],
    )
    unlock.thing("name", VDI).flag("--force", "also from one that may be alive")


def _add_check(area: Area) -> None:
    check = area.verb(
        "check",
        "compare all replicas of a VDI",
        "Exits with 1 when they differ, or cannot all be asked.",
        ["vdi check vm1", "vdi check vm1 --deep"],
    )
    check.thing("name", VDI).flag("--deep", "read every byte of every replica")


def _add_set(area: Area) -> None:
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


def _add_get(area: Area) -> None:
    get = area.verb(
        "get",
        "show what is kept with a VDI or a snapshot",
        "Exits with 1 when KEY is not there.",
        ["vdi get vm1", "vdi get vm1 owner"],
    )
    get.thing("name", ANY).word("key", "only this one", nargs="?", metavar="KEY")
