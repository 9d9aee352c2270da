"""The command line of what makes VDIs of VDIs: `sheepctl vdi snapshot`, `clone` and the like."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import ANY, VDI, Area

MODULE = "copies"


def add_copies(area: Area) -> None:
    """Add the commands to `sheepctl vdi`."""
    _add_snapshot(area)
    _add_clone(area)
    _add_rollback(area)
    _add_flatten(area)
    _add_number(area)


def _add_snapshot(area: Area) -> None:
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
        MODULE,
    )
    snapshot.thing("name", VDI).option("--tag", "TAG", "its name (default: date and time)")
    snapshot.option("--freeze", "QMP_SOCKET", "of the guest agent: freezes file systems meanwhile")


def _add_clone(area: Area) -> None:
    clone = area.verb(
        "clone",
        "make a VDI that begins as another, or as a snapshot, and shares its data",
        "Takes milliseconds, whatever the size. What is written to one is not seen in the other.",
        ["vdi clone golden vm2", "vdi clone vm1@daily rescue"],
        MODULE,
    )
    clone.thing("source", ANY, "a VDI or a snapshot").word("new", "vm2 makes vm2.raw")


def _add_rollback(area: Area) -> None:
    rollback = area.verb(
        "rollback",
        "make a VDI as one of its snapshots is",
        "What was written since the snapshot is lost: take another one before. Snapshots stay.",
        ["vdi rollback vm1 daily"],
        MODULE,
    )
    rollback.thing("name", VDI).word("tag", "of its snapshot", metavar="TAG")


def _add_flatten(area: Area) -> None:
    area.verb(
        "flatten",
        "give a clone data of its own for all that it shares",
        "Its origin and it then have nothing to do with each other. Nodes copy what they shared\n"
        "only when one of the two is deleted or changed.",
        ["vdi flatten vm2"],
        MODULE,
    ).thing("name", VDI)


def _add_number(area: Area) -> None:
    copies = area.verb(
        "copies",
        "keep another number of replicas of a VDI",
        "All its data is copied once. Its snapshots keep the number that they have.",
        ["vdi copies vm1 3"],
        MODULE,
    )
    copies.thing("name", VDI).number("copies", "N", "1 to 5")
