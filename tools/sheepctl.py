"""Administer a sheepfs cluster: the program `sheepctl`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

EPILOG = """
examples:
  sheepctl cluster status                  is all well?
  sheepctl vdi create vm1 20G              a virtual disk; the mount shows it as vm1.raw
  sheepctl vdi create scratch 1T --copies 1
  sheepctl vdi resize vm1 40G
  sheepctl vdi check vm1                   do all replicas agree?

Exit codes: 0 done, 1 it failed (or the answer is bad news), 2 wrong usage.
"""


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


def build_parser() -> argparse.ArgumentParser:
    """Give the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sheepctl",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(True)],
    )
    areas = parser.add_subparsers(dest="area", metavar="COMMAND", required=True)

    def area(name: str, summary: str) -> Callable[[str, str], argparse.ArgumentParser]:
        group = areas.add_parser(name, help=summary, description=summary)
        verbs = group.add_subparsers(dest="verb", metavar="COMMAND", required=True)

        def verb(name: str, summary: str) -> argparse.ArgumentParser:
            result: argparse.ArgumentParser = verbs.add_parser(
                name, help=summary, description=summary, parents=[_common(False)]
            )
            result.add_argument("--json", action="store_true", help="print JSON")
            return result

        return verb

    cluster = area("cluster", "the cluster as a whole")
    cluster("status", "health, nodes, placement groups, counters")
    area("node", "storage daemons")("list", "all nodes")
    _add_vdi_commands(area("vdi", "virtual disk images"))
    completion = areas.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _add_vdi_commands(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    create = verb("create", "make an empty VDI; it uses no space until it is written to")
    create.add_argument("name", help="vm1 makes vm1.raw")
    create.add_argument("size", help="like 20G or 10TiB")
    create.add_argument("--copies", type=int, default=3, metavar="N", help="1 to 5 (default 3)")
    listing = verb("list", "all VDIs")
    listing.add_argument("--names", action="store_true", help="names only, one a line")
    verb("info", "all about one VDI").add_argument("name")
    resize = verb("resize", "grow a VDI (or cut it)")
    resize.add_argument("name")
    resize.add_argument("size")
    resize.add_argument("--shrink", action="store_true", help="allow to cut off what is beyond")
    rename = verb("rename", "give a VDI another name")
    rename.add_argument("name")
    rename.add_argument("new")
    verb("delete", "delete VDIs").add_argument("name", nargs="+")
    unlock = verb("unlock", "take a VDI from a holder that is dead")
    unlock.add_argument("name")
    unlock.add_argument("--force", action="store_true", help="also from one that may be alive")
    check = verb("check", "compare all replicas of a VDI")
    check.add_argument("name")
    check.add_argument("--deep", action="store_true", help="read every byte of every replica")


def _run(arguments: argparse.Namespace) -> int:
    # Imported late: --help and completion stay fast.
    import logging

    import trio

    from sheepfs.core.errors import SheepError, UsageError, VdiExistsError, VdiNotFoundError
    from sheepfs_tools import sheepctl_commands
    from sheepfs_tools.sheepctl_session import first_error

    logging.basicConfig(level=logging.CRITICAL)
    command = getattr(sheepctl_commands, f"{arguments.area}_{arguments.verb}")
    try:
        return int(trio.run(command, arguments))
    except BaseException as raised:
        error = first_error(raised)
        if isinstance(error, SheepError):
            print(f"sheepctl: {error}", file=sys.stderr)
            failed = isinstance(error, VdiNotFoundError | VdiExistsError)
            return 2 if isinstance(error, UsageError) and not failed else 1
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, BrokenPipeError):
            # `sheepctl ... | head`: nobody reads on. Keep the interpreter's last flush quiet.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise


def main() -> int:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        parser = build_parser()
        arguments = parser.parse_args()
        if arguments.area == "completion":
            from sheepfs_tools.sheepctl_completion import completion

            print(completion(parser, arguments.shell), end="")
            return 0
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
