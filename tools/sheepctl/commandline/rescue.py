"""The command line of what saves data: `sheepctl inspect` and `rescue`."""

from __future__ import annotations

import argparse

from sheepfs_tools.sheepctl.commandline.areas import command


def add_rescue(areas: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    inspect = command(
        areas,
        "inspect",
        "look into a data directory whose daemon does not run",
        "Nothing in it is changed, and etcd is not needed. Without options: whose it is, how the\n"
        "daemon stopped, and what is there, layer by layer. Exits with 1 when something is\n"
        "damaged. A directory that a daemon has open is refused.",
        [
            "inspect /srv/sheep/disk1",
            "inspect /srv/sheep/disk1 --verify        read and check every block",
            "inspect /srv/sheep/disk1 --list | less   every object",
            "inspect /srv/sheep/disk1 --object 0000020b0000000c",
            "inspect /srv/sheep/disk1 --dump 0000020b0000000c --out object.bin",
        ],
        "inspect",
    )
    inspect.word("directory", "of a storage daemon", metavar="DATA_DIR")
    inspect.flag("--verify", "check every block of every object against its checksum")
    inspect.flag("--list", "one line for each object, in order")
    inspect.option("--object", "OID", "all about one object (16 hex digits)")
    inspect.option("--dump", "OID", "write the 4 MiB of one object, what it inherits included")
    inspect.option("--out", "FILE", "where --dump writes; - is standard output", "-")
    inspect.flag("--force", "replace FILE if it is there")
    rescue = command(
        areas,
        "rescue",
        "rebuild a VDI from data directories alone",
        "Without etcd and daemons. Of each object the newest good copy counts; a damaged block is\n"
        "taken from any copy that has it undamaged. What no directory has is a hole in FILE and\n"
        "is listed; then the exit code is 1. The directories are not changed, and no daemon may\n"
        "have them open. Give those of all nodes: one alone may be behind.\n"
        "MAP is the number that --list shows. Names are only known from an export of the\n"
        "metadata (sheepctl metadata export); so is a VDI's exact size.",
        [
            "rescue --list --data /mnt/disk1 /mnt/disk2",
            "rescue 0x413 --out vm1.img --data /mnt/disk1 /mnt/disk2",
            "rescue vm1 --metadata etcd.json --out vm1.img --data /mnt/disk1 /mnt/disk2",
            "rescue vm1@daily --metadata etcd.json --out daily.img --data /mnt/disk1 --json",
        ],
        "rescue",
    )
    rescue.word("what", "a VDI, a snapshot, or the number of a map", "?", metavar="NAME|MAP")
    rescue.several("--data", "DIR", "data directories, as many as there are")
    rescue.flag("--list", "show what can be rescued")
    rescue.option("--metadata", "FILE", "an export of the metadata: names, sizes, which maps exist")
    rescue.option("--out", "FILE", "the image that is made (raw, sparse)")
    rescue.flag("--force", "replace FILE if it is there")
