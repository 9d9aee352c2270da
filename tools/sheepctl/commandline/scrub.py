"""The command line of `sheepctl scrub`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import Area


def add_scrub(area: Area) -> None:
    """Add the commands of the area."""
    _add_status(area)
    _add_start(area)
    _add_pause_and_resume(area)
    _add_settings(area)


def _add_status(area: Area) -> None:
    area.verb(
        "status",
        "what the nodes' background check of all replicas has found",
        "A deep pass reads every byte of a node's replicas; a light one compares replicas with\n"
        "each other. What was bad is repaired from a good replica. What could not be repaired is\n"
        "listed with the VDIs that use it. Exits with 1 when there is any.",
        ["scrub status", "scrub status --json"],
    )


def _add_start(area: Area) -> None:
    start = area.verb(
        "start",
        "check now",
        "Begins both passes at once, or one of them. They keep to the rate, and give way to\n"
        "clients; sheepctl scrub status tells how far they are.",
        ["scrub start", "scrub start --deep", "scrub start --node 3 --light"],
    )
    start.number("--node", "N", "on this node only (default: on all)")
    start.flag("--deep", "only read every byte").flag("--light", "only compare replicas")


def _add_pause_and_resume(area: Area) -> None:
    area.verb(
        "pause",
        "stop checking, on all nodes, until sheepctl scrub resume",
        "A pass that is under way stays where it is.",
        ["scrub pause"],
    )
    area.verb("resume", "go on checking", examples=["scrub resume"])


def _add_settings(area: Area) -> None:
    settings = area.verb(
        "set",
        "how fast and how often all nodes check",
        "Without an option it shows what is set.",
        ["scrub set", "scrub set --rate 50M", "scrub set --deep-days 7 --light-days 0.5"],
    )
    settings.option("--rate", "SIZE", "what each node reads in a second at most (default 20M)")
    settings.option("--deep-days", "DAYS", "days between deep passes (default 14)")
    settings.option("--light-days", "DAYS", "days between light passes (default 1)")
