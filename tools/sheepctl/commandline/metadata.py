"""The command line of `sheepctl metadata`."""

from __future__ import annotations

from sheepfs_tools.sheepctl.commandline.areas import Area


def add_metadata(area: Area) -> None:
    """Add the commands of the area."""
    _add_export(area)
    _add_import(area)
    _add_accept(area)


def _add_export(area: Area) -> None:
    outgoing = area.verb(
        "export",
        "write all that etcd knows of the cluster to a file",
        "Names, snapshots, nodes, the cluster map, ids: not the data. May run at any time, best\n"
        "often: what changes afterwards is not in it.",
        ["metadata export /backup/etcd.json --force", "metadata export - | gzip > etcd.json.gz"],
    )
    outgoing.word("file", "what is made; - is standard output", metavar="FILE")
    outgoing.flag("--force", "replace FILE if it is there")


def _add_import(area: Area) -> None:
    incoming = area.verb(
        "import",
        "bring an exported cluster back into an etcd that lost it",
        "All daemons must be stopped; they keep their data directories and are started after it.\n"
        "A cluster of that name that is there already is left alone. An import that was\n"
        "interrupted is completed by the same command; until then no daemon starts.\n"
        "With data directories at hand, --data refuses an export that is older than the data.",
        [
            "metadata import /backup/etcd.json",
            "metadata import /backup/etcd.json --data /srv/sheep/disk1 /srv/sheep/disk2",
            "--cluster prod metadata import - < etcd.json",
        ],
    )
    incoming.word("file", "an export; - is standard input", metavar="FILE")
    incoming.several("--data", "DIR", "refuse an export that knows less than these directories")


def _add_accept(area: Area) -> None:
    accepted = area.verb(
        "accept",
        "go on with an etcd that was restored from older data",
        "Daemons refuse an etcd that knows less than they have seen, and running ones change\n"
        "nothing in it. If the newer data cannot be brought back, this lets the cluster go on\n"
        "with what etcd holds: what was made since has no name any more, and cluster check\n"
        "--repair frees its space. With data directories at hand, --data shows what there is:\n"
        "rescue it first.\n"
        "All daemons must be stopped; then start them, and start all mounts anew.",
        [
            "metadata accept --data /srv/sheep/disk1 /srv/sheep/disk2",
            "metadata accept              shows what it means, and asks",
            "metadata accept --yes --json",
        ],
        "accept",
    )
    accepted.several("--data", "DIR", "show what these directories know of and etcd does not")
    accepted.flag("--yes", "do not ask")
