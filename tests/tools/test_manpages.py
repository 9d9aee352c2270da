"""Man pages say what --help says, and troff takes them without a warning."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepfs_tools.sheepctl.__main__ import main
from sheepfs_tools.sheepctl.commandline.manpages import PROGRAMS, Program, escape, page, parser_of


def every_action(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from every_action(child)


def rendered(text: str) -> str:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rLL=200n", "-P-cbou"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_page_has_every_option_and_every_word_of_the_help(program: Program) -> None:
    parser = parser_of(program)
    text = page(program, parser)
    for action in every_action(parser):
        for option in action.option_strings:
            assert escape(option) in text
    for line in (parser.epilog or "").splitlines():
        inside = re.sub(r"^\w[\w ]*:", "", line).strip()
        assert escape(inside) in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_page_renders_without_a_warning(program: Program) -> None:
    text = rendered(page(program, parser_of(program)))
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
        assert re.search(rf"^{heading}$", text, re.MULTILINE)
    assert f"{program.name} - {program.summary}" in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_no_text_is_taken_for_a_request_or_an_escape() -> None:
    parser = argparse.ArgumentParser(
        prog="odd",
        description='.so /etc/passwd\n\'br\n\\fBbold\\fP "quoted" a-b',
        epilog="examples:\n  .sp 3\n  echo \\n | tr '`' ~^",
    )
    parser.add_argument("--odd", help=".ds \\*x 100%%")
    text = rendered(page(Program("odd", "", "", "x.y \\z"), parser))
    for words in (".so /etc/passwd", "'br", '\\fBbold\\fP "quoted" a-b', "x.y \\z", ".sp 3"):
        assert words in text
    assert "echo \\n | tr '`' ~^" in text
    assert ".ds \\*x 100%" in text


def test_sheepctl_writes_all_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man", str(tmp_path / "man1")]) == 0
    names = sorted(path.name for path in (tmp_path / "man1").iterdir())
    assert names == ["sheep-cp.1", "sheepctl.1", "sheepfs-storaged.1", "sheepfs.1"]
    assert "sheepctl.1" in capsys.readouterr().out
