"""Processes that outlive the program that started them, found again by pid files.

Always holds:
- A pid file names a process by pid, start time and boot: a pid that the kernel has given to
  another process since is never signalled.
- Everything started here has its own session: Ctrl-C in a terminal does not reach it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.02


_children: list[subprocess.Popen[bytes]] = []
"""What this program has started and not yet seen the end of."""


def _reap() -> None:
    """Collect children that have ended, so that they are gone and not zombies."""
    _children[:] = [child for child in _children if child.poll() is None]


class StartError(Exception):
    """Something did not start, or did not stop; the text says what and where its log is."""


def wait_for(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Return as soon as `condition` is true.

    Raises:
        StartError: it was not within `deadline_s` seconds; says `what` was waited for.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise StartError(f"{what}: not within {deadline_s:g} s")
        time.sleep(POLL_S)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_start(pid: int) -> int | None:
    """Give a live process's start time in clock ticks since boot; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2, the name in brackets, may hold anything; count from the last bracket.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass
class ManagedProcess:
    """One program: its command line, its log, and the pid file by which it is found again."""

    name: str
    directory: Path
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def exit_code(self) -> int | None:
        """How the program ended; None: it has not, or another program started it."""
        return None if self._child is None else self._child.poll()

    @property
    def pid_file(self) -> Path:
        """Where pid, start time and boot id are kept."""
        return self.directory / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        """Standard output and error of all runs, appended."""
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Pid of the running process, or None."""
        _reap()
        try:
            found = json.loads(self.pid_file.read_text())
            pid, start, boot = int(found["pid"]), int(found["start"]), str(found["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if boot == _boot_id() and process_start(pid) == start else None

    def start(self) -> None:
        """Start the program; it is not said to be ready yet."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                self.argv,
                cwd=self.directory,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _children.append(child)
        self._child = child
        start = process_start(child.pid)
        if start is None:
            raise StartError(f"{self.name} ended at once{self.last_words()}")
        self.pid_file.write_text(json.dumps({"pid": child.pid, "start": start, "boot": _boot_id()}))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process is there."""
        if (pid := self.pid) is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return

    def stop(self, deadline_s: float = 15.0) -> bool:
        """End the process: SIGTERM, and SIGKILL when it has not ended in time.

        Returns:
            True if it ended by itself (or was not there).
        """
        gently = True
        self.signal(signal.SIGTERM)
        try:
            wait_for(lambda: self.pid is None, deadline_s, f"{self.name} to end")
        except StartError:
            gently = False
            self.kill()
        self.pid_file.unlink(missing_ok=True)
        _reap()
        return gently

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        # A paused process (SIGSTOP) dies of SIGKILL too; one in a dead mount may take a moment.
        wait_for(lambda: self.pid is None, 15, f"{self.name} to die")
        self.pid_file.unlink(missing_ok=True)
        _reap()

    def wait_ready(self, ready: Callable[[], object], deadline_s: float) -> None:
        """Wait until `ready()` is true; a StartError quotes the log if the program ends first."""

        def condition() -> bool:
            if ready():
                return True
            if self.pid is None:
                raise StartError(f"{self.name} ended while starting{self.last_words()}")
            return False

        try:
            wait_for(condition, deadline_s, f"{self.name} to be ready")
        except StartError as error:
            if self.pid is None:
                raise
            raise StartError(f"{error}{self.last_words()}") from error

    def last_words(self, lines: int = 8) -> str:
        """Give the end of the log, for an error's text."""
        try:
            tail = self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            tail = []
        return "".join(f"\n    {line}" for line in tail) + f"\n  (log: {self.log})"
