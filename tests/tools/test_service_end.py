"""How the programs end (sheepfs.service.run_program)."""

from __future__ import annotations

import subprocess
import sys

import pytest


def end_of(main: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys, threading\nfrom sheepfs.service import run_program\n{main}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize(
    ("main", "code", "output", "errors"),
    [
        ("run_program(lambda: print('done'))", 0, "done\n", ""),
        ("run_program(lambda: 3)", 3, "", ""),
        ("run_program(lambda: sys.exit(2))", 2, "", ""),
        ("run_program(lambda: sys.exit())", 0, "", ""),
        ("run_program(lambda: sys.exit('no such thing'))", 1, "", "no such thing\n"),
    ],
)
def test_a_program_ends_with_its_code_and_all_that_it_said(
    main: str, code: int, output: str, errors: str
) -> None:
    done = end_of(main)
    assert (done.returncode, done.stdout, done.stderr) == (code, output, errors)


def test_an_unexpected_error_is_shown() -> None:
    done = end_of("run_program(lambda: 1 // 0)")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_thread_that_never_ends_keeps_no_program_from_ending() -> None:
    done = end_of(
        "threading.Thread(target=threading.Event().wait).start()\n"
        "run_program(lambda: print('done'))"
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
