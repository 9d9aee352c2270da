"""The command line of what moves data in and out: `sheepctl vdi import`, `backup` and the like."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import ANY, SNAPSHOT, VDI, Area

MODULE = "data"


def add_data_commands(area: Area) -> None:
    """Add the commands to `sheepctl vdi`."""
    _add_import(area)
    _add_export(area)
    _add_backup(area)
    _add_restore(area)
    _add_diff(area)


def _add_import(area: Area) -> None:
    incoming = area.verb(
        "import",
        "make a VDI of a disk image",
        "Zeros are not stored. Formats other than raw go through qemu-img. Nothing is left\n"
        "behind when it fails or is interrupted.",
        [
            "vdi import debian-12.qcow2 vm1",
            "zcat disk.img.gz | sheepctl vdi import - vm1",
        ],
        MODULE,
    )
    incoming.word("file", "a disk image; - is standard input (raw)", metavar="FILE")
    incoming.word("name", "vm1 makes vm1.raw", metavar="NAME")
    incoming.option("--format", "FORMAT", "raw, qcow2, vmdk, vdi or vhdx (default: by the suffix)")
    incoming.number("--copies", "N", "1 to 5 (default 3)", 3)


def _add_export(area: Area) -> None:
    outgoing = area.verb(
        "export",
        "write a VDI or a snapshot to a disk image",
        "Holes stay holes. A VDI that is in use is refused: export a snapshot of it.",
        ["vdi export vm1@daily vm1.qcow2", "vdi export vm1@daily - | gzip > vm1.img.gz"],
        MODULE,
    )
    outgoing.thing("name", ANY, "a VDI or a snapshot", metavar="NAME[@TAG]")
    outgoing.word("file", "what is made; - is standard output (raw)", metavar="FILE")
    outgoing.option("--format", "FORMAT", "raw, qcow2, vmdk, vdi or vhdx (default: by the suffix)")
    outgoing.flag("--force", "replace FILE if it is there")


def _add_backup(area: Area) -> None:
    backup = area.verb(
        "backup",
        "write a snapshot, or what changed since an older one, as a stream",
        "The stream carries checksums; sheepctl vdi restore checks all of it before it touches\n"
        "a VDI. Only blocks of 4 KiB that changed are read and written.",
        [
            "vdi backup vm1@monday /backup/vm1-full",
            "vdi backup vm1@tuesday /backup/vm1-tue --since vm1@monday",
            "vdi backup vm1@monday - | ssh other sheepctl vdi restore - vm1",
        ],
        MODULE,
    )
    backup.thing("name", SNAPSHOT, metavar="NAME@TAG")
    backup.word("file", "what is made; - is standard output", metavar="FILE")
    backup.option("--since", "NAME@TAG", "an older snapshot that the other side has")
    backup.flag("--compress", "compress the data a little")
    backup.flag("--force", "replace FILE if it is there")


def _add_restore(area: Area) -> None:
    restore = area.verb(
        "restore",
        "make a VDI of a backup, or bring one up to an increment",
        "A full backup makes a new VDI; an increment goes on a VDI that is as its base was. The\n"
        "result has a snapshot with the backup's tag, for the next increment. A stream that is\n"
        "cut short or altered is refused, and nothing is touched.",
        ["vdi restore /backup/vm1-full vm1", "vdi restore /backup/vm1-tue vm1"],
        MODULE,
    )
    restore.word("file", "a backup; - is standard input", metavar="FILE")
    restore.thing("name", VDI, metavar="NAME")
    restore.number("--copies", "N", "of a new VDI (default: as the original had)")


def _add_diff(area: Area) -> None:
    diff = area.verb(
        "diff",
        "show which ranges differ between two snapshots",
        "By their checksums, block by block: no data is read.",
        ["vdi diff vm1@monday vm1@tuesday", "vdi diff vm1@monday vm1 --json"],
        MODULE,
    )
    diff.thing("older", ANY, metavar="NAME@TAG").thing("newer", ANY, metavar="NAME[@TAG]")
