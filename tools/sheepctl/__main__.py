"""Administer a sheepfs cluster: the program `sheepctl`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from sheepfs.service import run_program
from sheepfs_tools.sheepctl.commandline.areas import function_of, module_of
from sheepfs_tools.sheepctl.commandline.parser import build_parser


def _run(arguments: argparse.Namespace) -> int:
    # Imported late: --help and completion stay fast.
    import importlib
    import logging

    import trio

    from sheepfs.core.errors import (
        SheepError,
        SnapshotProtectedError,
        UsageError,
        VdiExistsError,
        VdiNotFoundError,
    )
    from sheepfs_tools.sheepctl.session import first_error

    logging.basicConfig(level=logging.CRITICAL)
    module = importlib.import_module(f"sheepfs_tools.sheepctl.commands.{module_of(arguments)}")
    command = getattr(module, function_of(arguments))
    try:
        return int(trio.run(command, arguments))
    except BaseException as raised:
        error = first_error(raised)
        if isinstance(error, SheepError):
            print(f"sheepctl: {error}", file=sys.stderr)
            failed = isinstance(error, VdiNotFoundError | VdiExistsError | SnapshotProtectedError)
            return 2 if isinstance(error, UsageError) and not failed else 1
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, BrokenPipeError):
            # `sheepctl ... | head`: nobody reads on. Keep the interpreter's last flush quiet.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise


def main(line: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        parser = build_parser()
        arguments = parser.parse_args(line)
        if arguments.area == "completion":
            from sheepfs_tools.sheepctl.commandline.completion import completion

            print(completion(parser, arguments.shell), end="")
            return 0
        if arguments.area == "man":
            from sheepfs_tools.sheepctl.commandline.manpages import write_pages

            return write_pages(arguments.directory)
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """Be the program."""
    run_program(main)


if __name__ == "__main__":
    run()
