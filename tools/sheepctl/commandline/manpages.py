"""Man pages of all programs, in troff, made from the text of their --help.

Source: man-pages(7), groff_man(7).
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sheepfs import __version__


class Program(NamedTuple):
    """A program: where its command line is, and the line under NAME."""

    name: str
    module: str
    function: str
    summary: str


# By name: what runs here must not load the mount's or the daemon's modules for anything else.
PROGRAMS = (
    Program(
        "sheepctl",
        "sheepfs_tools.sheepctl.commandline.parser",
        "build_parser",
        "administer a sheepfs cluster",
    ),
    Program(
        "sheepfs", "sheepfs.mount", "_parser", "mount a cluster: its virtual disks as raw files"
    ),
    Program("sheepfs-storaged", "storaged.main", "build_parser", "keep replicas of virtual disks"),
    Program("sheep-cp", "sheepfs_tools.sheep_cp", "parser", "copy virtual disks, holes and all"),
)


def parser_of(program: Program) -> argparse.ArgumentParser:
    """Give a program's command line."""
    found = getattr(importlib.import_module(program.module), program.function)()
    assert isinstance(found, argparse.ArgumentParser)
    return found


def escape(text: str) -> str:
    """Give text as troff takes it: nothing in it is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    text = text.replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")
    text = text.replace('"', "\\(dq").replace("…", "...")
    return "\n".join("\\&" + line if line.startswith(".") else line for line in text.split("\n"))


def page(program: Program, parser: argparse.ArgumentParser) -> str:
    """Give the man page of a program."""
    others = [f"{other.name}(1)" for other in PROGRAMS if other.name != program.name]
    lines = [
        f'.TH {escape(program.name.upper())} 1 "" "sheepfs {escape(__version__)}" "sheepfs"',
        ".SH NAME",
        f"{escape(program.name)} \\- {escape(program.summary)}",
        ".SH SYNOPSIS",
        *_synopsis(parser),
        ".SH DESCRIPTION",
        *_prose(parser.description or ""),
        *_options(parser, ".SH OPTIONS"),
    ]
    commands = list(_commands(parser))
    if commands:
        lines.append(".SH COMMANDS")
        for command in commands:
            lines += [f".SS {escape(command.prog)}", *_synopsis(command)]
            lines += _prose(command.description or "")
            lines += _options(command, "", leave_out=parser)
            lines += _prose(command.epilog or "", heading=".PP\n.I ")
    lines += _prose(parser.epilog or "", heading=".SH ")
    lines += [".SH SEE ALSO", escape(", ".join(others))]
    return "\n".join(lines) + "\n"


def write_pages(directory: str) -> int:
    """Write the pages of all programs; gives the exit code."""
    where = Path(directory)
    where.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        path = where / f"{program.name}.1"
        path.write_text(page(program, parser_of(program)))
        print(path)
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Give the commands that can be run, each with its own arguments."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                inner = list(_commands(child))
                yield from inner or [child]


def _synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    if parser.usage:
        for number, line in enumerate((parser.usage % {"prog": parser.prog}).split("\n")):
            if number:
                yield ".br"
            yield f".B {escape(parser.prog)}"
            yield escape(line.strip().removeprefix(parser.prog).strip()) or "\\&"
        return
    # Wide enough that argparse never breaks a line: troff does.
    formatter = argparse.HelpFormatter(parser.prog, width=10_000)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, "")
    usage = " ".join(formatter.format_help().split()).removeprefix(parser.prog).strip()
    yield f".B {escape(parser.prog)}"
    if usage:
        yield escape(usage)


def _options(
    parser: argparse.ArgumentParser, heading: str, leave_out: argparse.ArgumentParser | None = None
) -> Iterator[str]:
    known = {text for a in (leave_out._actions if leave_out else ()) for text in a.option_strings}
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        hidden = action.help == argparse.SUPPRESS or set(action.option_strings) & known
        if hidden or isinstance(action, argparse._SubParsersAction):
            continue
        if heading:
            yield heading
            heading = ""
        yield ".TP"
        yield f".B {escape(_invocation(action))}"
        text = formatter._expand_help(action) if action.help else _choices(action)
        yield escape(" ".join(text.split())) or "\\&"


def _invocation(action: argparse.Action) -> str:
    shown = action.metavar if isinstance(action.metavar, str) else None
    if not action.option_strings:
        return shown or action.dest
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    value = shown or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest)
    return f"{names} [{value}]" if action.nargs == "?" else f"{names} {value}"


def _choices(action: argparse.Action) -> str:
    return "one of " + ", ".join(map(str, action.choices)) if action.choices else ""


def _prose(text: str, heading: str = "") -> Iterator[str]:
    """Give text as it stands: paragraphs, headings (`examples:`), indented lines verbatim."""
    verbatim = False
    paragraph = True
    for line in text.strip("\n").split("\n"):
        indented = line.startswith("  ")
        if verbatim and not indented:
            yield ".EE\n.RE"
            verbatim = False
        if not line.strip():
            paragraph = True
        elif heading and (match := re.fullmatch(r"(\w[\w ]*):( \S.*)?", line)):
            title = match[1].upper() if heading == ".SH " else match[1].capitalize()
            yield heading + escape(title)
            if match[2]:
                yield f".RS\n.EX\n{escape(match[2].strip())}"
                verbatim = True
            paragraph = False
        elif indented:
            if not verbatim:
                yield ".RS\n.EX"
                verbatim = True
            yield escape(line[2:])
        else:
            if paragraph:
                yield ".PP"
                paragraph = False
            yield escape(line)
    if verbatim:
        yield ".EE\n.RE"
