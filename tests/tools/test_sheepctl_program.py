"""sheepctl as a program: exit codes, one-line errors, completion."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepfs_tools.sheepctl import commands as commands_package
from sheepfs_tools.sheepctl.commandline.completion import completion, levels
from sheepfs_tools.sheepctl.commandline.parser import build_parser

AREAS = ("cluster", "node", "scrub", "vdi", "object", "snapshot", "trash", "metadata")
NOWHERE = ("--etcd", "127.0.0.1:1")


def sheepctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sheepfs_tools.sheepctl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_etcd_that_is_not_there_is_one_clear_line_and_exit_1() -> None:
    done = sheepctl("cluster", "status", *NOWHERE)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "127.0.0.1:1" in done.stderr
    assert "etcd" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("vdi", "create", "vm1", "5Q"),
        ("vdi", "create", "vm1", "2P"),
        ("vdi", "create", "a/b", "5G"),
        ("vdi", "create", "a@b", "5G"),
        ("vdi", "create", "vm1", "5G", "--copies", "6"),
        ("vdi", "create", "vm1"),
        ("vdi", "frobnicate"),
        ("--etcd", "nonsense", "vdi", "list"),
        ("--cluster", "a/b", "vdi", "list"),
        ("snapshot", "delete", "vm1"),
        ("snapshot", "rename", "vm1@a", "b@c"),
        ("snapshot", "protect", "vm1@"),
        ("trash", "purge"),
        ("vdi", "set", "vm1", "nonsense"),
    ],
)
def test_wrong_usage_is_exit_2_before_anything_is_asked(arguments: tuple[str, ...]) -> None:
    done = sheepctl(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_options_may_stand_before_and_after_the_command() -> None:
    parser = build_parser()
    for line in (["--etcd", "h:1", "vdi", "list"], ["vdi", "list", "--etcd", "h:1"]):
        assert parser.parse_args(line).etcd == "h:1"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str) -> None:
    script = completion(build_parser(), shell)
    for word in (
        *("cluster", "status", "create", "unlock", "copies", "protect", "purge", "man"),
        *("vdi list --names", "snapshot list --names", "trash list --ids"),
    ):
        assert word in script


def test_every_command_has_its_function() -> None:
    functions_of = Path(commands_package.__file__).parent
    for path, child in commands(build_parser()):
        module = ast.parse((functions_of / f"{child.get_default('module')}.py").read_text())
        functions = {f.name for f in module.body if isinstance(f, ast.AsyncFunctionDef)}
        assert "_".join(path) in functions


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from commands(child, (*path, name))
    if len(path) == 2 or path == ("top",):
        yield path, parser


def test_every_command_explains_itself() -> None:
    for level in levels(build_parser()):
        done = io.StringIO()
        with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(done):
            build_parser().parse_args([*level.path, "--help"])
        if level.path and level.path not in {(a,) for a in AREAS}:
            examples = done.getvalue().partition("\nexamples:\n")[2]
            assert f"sheepctl {' '.join(level.path)}" in examples


def complete(line: str, *names: str, breaks: str = " @:=") -> list[str]:
    """Complete `line` in a bash in which `sheepctl ... list` gives `names`."""
    words = re.findall(r"[^\s@]+|@", line) + ([""] if line.endswith((" ", "@")) else [])
    program = (
        f"{completion(build_parser(), 'bash')}\n"
        f"sheepctl() {{ if [[ $2 == list ]]; then printf '%s\\n' {shlex.join(names)}; fi; }}\n"
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}\n"
        f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n"
        f"COMP_WORDBREAKS={shlex.quote(breaks)}\n"
        '_sheepctl; for reply in "${COMPREPLY[@]}"; do echo "$reply"; done'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_bash_completes_commands_and_options() -> None:
    assert complete("sheepctl vdi cr") == ["create"]
    assert complete("sheepctl sn") == ["snapshot"]
    assert complete("sheepctl --etcd h:1 vdi create x 1G --co") == []
    assert complete("sheepctl vdi create --co") == ["--copies"]
    assert complete("sheepctl completion f") == ["fish"]


def test_bash_completes_names_where_they_are_wanted() -> None:
    assert complete("sheepctl vdi info v", "vm1.raw", "vm2.raw", "web.raw") == [
        "vm1.raw",
        "vm2.raw",
    ]
    assert complete("sheepctl vdi delete vm1.raw vm2", "vm1.raw", "vm2.raw") == ["vm2.raw"]
    assert complete("sheepctl vdi create v", "vm1.raw") == []
    assert complete("sheepctl trash restore 1", "17", "28") == ["17"]


def test_bash_completes_snapshots_though_it_splits_at_the_at_sign() -> None:
    names = ("vm1@daily.raw", "vm1@weekly.raw", "vm2@daily.raw")
    assert complete("sheepctl snapshot delete vm1@", *names) == ["daily.raw", "weekly.raw"]
    assert complete("sheepctl snapshot delete vm1@d", *names) == ["daily.raw"]
    assert complete("sheepctl snapshot delete vm1", *names) == ["vm1@daily.raw", "vm1@weekly.raw"]
    whole = complete("sheepctl snapshot delete vm1@d", *names, breaks=" ")
    assert whole == ["vm1@daily.raw"]


def test_bash_runs_nothing_that_a_name_says() -> None:
    name = "vm$(touch pwned);`touch pwned` x"
    (reply,) = complete("sheepctl vdi info vm", name)
    assert shlex.split(reply) == [name]
    assert not Path("pwned").exists()
