"""The commands that look at a running cluster: top, object."""

from __future__ import annotations

import argparse

from sheepfs_tools.sheepctl.commandline.areas import ANY, Area, command, common_options


def add_top(areas: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `sheepctl top`."""
    top = command(
        areas,
        "top",
        "requests, MB/s and latency of each node and VDI, as they are now",
        "Of a node: what its daemon did; a write to three copies counts on three nodes. Of a VDI:\n"
        "what programs did through all mounts, with latency as the mounts saw it. What sheepctl\n"
        "itself reads and writes (export, backup) shows only in the nodes' figures.\n"
        "Shows it again and again until Ctrl-C; not on a terminal, one after another.",
        ["top", "top --interval 10", "top --once --json"],
        "top",
        parents=[common_options(False)],
    )
    top.seconds("--interval", "time between two looks (default 2)", default=2.0, minimum=2.0)
    top.flag("--once", "one look, then end")


def add_object(area: Area) -> None:
    """Add `sheepctl object …`."""
    area.verb(
        "locate",
        "where a byte of a VDI or snapshot is",
        "Gives the object of 4 MiB that holds OFFSET: its id, placement group and members, what\n"
        "each of them has, and the file in its data directory. A hole has no object. Of a VDI in\n"
        "use it shows what was last flushed.",
        ["object locate vm1 0", "object locate vm1@daily 1.5G", "object locate vm1 4M --json"],
    ).thing("name", ANY, "VDI or VDI@TAG", metavar="VDI[@TAG]").word(
        "offset", "in bytes, or like 4M", metavar="OFFSET"
    )
