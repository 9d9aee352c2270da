"""Whole clusters in simulation, by seed; see docs/simulation.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.planted import PLANTED
from sim.running import SOAK, Seeds, simulate

FINDERS = {
    "acknowledge_early": 0,
    "skip_epoch_check": 66,
    "serve_before_caught_up": 1,
    "forget_dirty_marks": 1,
    "retry_failed_sync": 16,
    "delete_strays_unconfirmed": 57,
    "level_from_the_stale_side": 3,
}
"""A seed from 0 to 199 that finds the bug, to begin with. Any change of the code moves them; the
test then takes longer, and a run of `python -m sim 0-199 --bug NAME --first` gives the new one."""


def test_no_seed_finds_a_violation(seeds: Seeds) -> None:
    code, printed = seeds.outcome()
    assert code == 0, printed[-20_000:]


def test_a_seed_is_one_run(tmp_path: Path) -> None:
    histories = []
    for number in range(2):
        history = tmp_path / str(number)
        simulate("5", "--operations", "300", "--faults", "5", "--history", str(history))
        histories.append(history.read_text())
    assert histories[0] == histories[1]
    assert len(histories[0]) > 10_000


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_within_200_seeds(bug: str) -> None:
    if bug not in FINDERS and not SOAK:
        pytest.skip("only with SHEEPFS_SOAK=1: the first seed that finds it is far behind")
    first = 0 if SOAK else FINDERS[bug]
    seeds = [f"{first}-199", *([f"0-{first - 1}"] if first else [])]
    done = simulate(*seeds, "--bug", bug, "--first")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FAILED" in done.stdout
