"""Whole clusters in simulation, by seed; see docs/simulation.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sim", *arguments],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_no_seed_finds_a_violation() -> None:
    done = simulate("0-15")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def test_a_seed_is_one_run(tmp_path: Path) -> None:
    histories = []
    for number in range(2):
        history = tmp_path / str(number)
        simulate("5", "--operations", "300", "--faults", "5", "--history", str(history))
        histories.append(history.read_text())
    assert histories[0] == histories[1]
    assert len(histories[0]) > 10_000


def test_a_bug_that_acknowledges_early_is_found() -> None:
    done = simulate("10-30", "--bug", "acknowledge_early", "--first")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "legal are" in done.stdout
