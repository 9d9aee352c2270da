"""Processes found again by their pid files."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepfs_tools.local.processes import ManagedProcess, StartError, process_start, wait_for

FOREVER = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = """import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
while True:
    signal.pause()"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[ManagedProcess]:
    process = ManagedProcess("sleeper", tmp_path, [sys.executable, "-c", FOREVER])
    yield process
    process.kill()


def wait_up(process: ManagedProcess) -> None:
    process.wait_ready(lambda: "up" in process.log.read_text(), 20)


def test_another_program_finds_and_stops_a_process_by_its_pid_file(
    sleeper: ManagedProcess,
) -> None:
    sleeper.start()
    wait_up(sleeper)
    again = ManagedProcess("sleeper", sleeper.directory, [])
    assert again.pid == sleeper.pid
    assert again.stop()
    assert sleeper.pid is None
    assert not sleeper.pid_file.exists()


def test_a_pid_that_belongs_to_another_process_now_is_never_signalled(
    sleeper: ManagedProcess,
) -> None:
    sleeper.start()
    content = json.loads(sleeper.pid_file.read_text())
    sleeper.pid_file.write_text(json.dumps({**content, "pid": os.getpid()}))
    assert ManagedProcess("sleeper", sleeper.directory, []).pid is None
    sleeper.pid_file.write_text(json.dumps({**content, "boot": "another boot"}))
    assert ManagedProcess("sleeper", sleeper.directory, []).pid is None
    sleeper.pid_file.write_text(json.dumps(content))


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = ManagedProcess("stubborn", tmp_path, [sys.executable, "-c", STUBBORN])
    process.start()
    wait_up(process)
    assert not process.stop(deadline_s=0.2)
    assert process.pid is None


def test_a_paused_process_can_be_killed(sleeper: ManagedProcess) -> None:
    sleeper.start()
    wait_up(sleeper)
    sleeper.signal(signal.SIGSTOP)
    sleeper.kill()
    assert sleeper.pid is None


def test_a_program_that_fails_at_start_is_quoted_in_the_error(tmp_path: Path) -> None:
    process = ManagedProcess("broken", tmp_path, [sys.executable, "-c", "raise SystemExit('why')"])
    process.start()
    with pytest.raises(StartError, match="why"):
        process.wait_ready(lambda: False, 20)


def test_a_dead_process_has_no_start_time() -> None:
    assert process_start(os.getpid()) is not None
    assert process_start(2**22 + 1) is None


def test_waiting_in_vain_says_what_for() -> None:
    with pytest.raises(StartError, match="the moon: not within"):
        wait_for(lambda: False, 0.05, "the moon")
