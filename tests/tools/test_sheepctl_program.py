"""sheepctl as a program: exit codes, one-line errors, completion."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sheepfs_tools.sheepctl import build_parser
from sheepfs_tools.sheepctl_completion import completion

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
    for word in ("cluster", "status", "create", "unlock", "copies", "vdi list --names"):
        assert word in script


def test_bash_completes_a_command() -> None:
    script = completion(build_parser(), "bash")
    program = f"{script}\nCOMP_WORDS=(sheepctl vdi cr); COMP_CWORD=2; _sheepctl; echo $COMPREPLY"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "create\n"
