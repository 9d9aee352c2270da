"""What the command line of sheepctl is built of: areas, and their commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

VDI, SNAPSHOT, ANY, TRASH, NODE = "vdi", "snapshot", "any", "trash", "node"
"""What an argument names: completion offers those."""


def interval_of(minimum_s: float) -> Callable[[str], float]:
    """Give what parses seconds as they are typed; argparse shows what is wrong with them."""

    def parse(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
        if not minimum_s <= seconds <= 86400:
            raise argparse.ArgumentTypeError(f"{text} s: use {minimum_s:g} to 86400 seconds")
        return seconds

    return parse


def completes(action: argparse.Action) -> str:
    """Give what an argument names (VDI, SNAPSHOT, ANY, TRASH, NODE); empty: nothing that exists."""
    return str(getattr(action, "sheepctl_completes", ""))


def module_of(arguments: argparse.Namespace) -> str:
    """Give the module in which the function of a parsed command is."""
    return str(arguments.module)


def common_options(defaults: bool) -> argparse.ArgumentParser:
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


def function_of(arguments: argparse.Namespace) -> str:
    """Give the name of that function: `vdi_create`, or `inspect` of a command without verbs."""
    verb = getattr(arguments, "verb", "")
    return f"{arguments.area}_{verb}" if verb else str(arguments.area)


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

    def seconds(self, name: str, help: str, default: float, minimum: float) -> Verb:
        """Add an option with a time."""
        self._parser.add_argument(
            name, metavar="SECONDS", type=interval_of(minimum), default=default, help=help
        )
        return self

    def watch(self) -> Verb:
        """Add the option that shows it again and again."""
        self._parser.add_argument(
            "--watch",
            metavar="SECONDS",
            type=interval_of(0.5),
            nargs="?",
            const=2.0,
            help="show it again and again until Ctrl-C (every 2 s); with --json one line each",
        )
        return self

    def flag(self, name: str, help: str) -> Verb:
        """Add an option that is there or not."""
        self._parser.add_argument(name, action="store_true", help=help)
        return self

    def option(self, name: str, metavar: str, help: str, default: str | None = None) -> Verb:
        """Add an option with a text."""
        self._parser.add_argument(name, metavar=metavar, default=default, help=help)
        return self

    def several(self, name: str, metavar: str, help: str) -> Verb:
        """Add an option that takes one or more texts, and may stand more than once."""
        self._parser.add_argument(
            name, metavar=metavar, nargs="+", action="extend", default=[], help=help
        )
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
        parser = areas.add_parser(name, help=summary, description=sentence(summary))
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
        return command(
            self._verbs, name, summary, more, examples, module or self._module,
            parents=[common_options(False)],
        )  # fmt: skip


def command(
    group: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    more: str,
    examples: Sequence[str],
    module: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> Verb:
    """Add a command to an area, or beside the areas; the arguments are those of `Area.verb`."""
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=summary,
        description=sentence(summary) + ("\n" + more.strip("\n") if more else ""),
        epilog="examples:\n" + "\n".join(f"  sheepctl {line}" for line in examples)
        if examples
        else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=list(parents),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(module=module)
    return Verb(parser)


def sentence(summary: str) -> str:
    """Make a summary a sentence."""
    return summary[0].upper() + summary[1:] + "."
