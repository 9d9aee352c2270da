"""A mount in a process of its own, so that no bug of it can hang the tests.

Everything that touches the mounted directory is another process with a timeout as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PROGRAM = str(TESTS / "fakes" / "memory_mount.py")
TIMEOUT_S = 20.0
PRELUDE = "import errno, fcntl, mmap, os, signal, struct, sys, time\n"


def can_mount() -> bool:
    """Tell whether this user may open /dev/fuse here."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


def mounted(mountpoint: Path) -> bool:
    """Tell whether there is a mount, dead or alive, without touching it."""
    mounts = Path("/proc/self/mountinfo").read_text()
    return any(line.split()[4] == str(mountpoint) for line in mounts.splitlines())


def environment(**more: str) -> dict[str, str]:
    """Environment of the programs under test."""
    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "LC_ALL": "C", **more}


class MountProcess:
    """`sheepfs -f` on a cluster in memory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "mnt"
        self.path.mkdir()
        self.journal_file = directory / "journal"
        self.journal_file.touch()
        self.log_file = directory / "log"
        self._notify = directory / "notify"
        self.process: subprocess.Popen[bytes] | None = None
        self._spawned: list[subprocess.Popen[str]] = []

    def start(self, *options: str, **variables: str) -> None:
        """Mount, and wait until systemd would be told that it is ready."""
        self._notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self._notify))
            notify.settimeout(TIMEOUT_S)
            with self.log_file.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, PROGRAM, "-f", "-v", *options, str(self.path)],
                    env=environment(
                        NOTIFY_SOCKET=str(self._notify),
                        MEMORY_JOURNAL=str(self.journal_file),
                        **variables,
                    ),
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                )
            try:
                assert b"READY=1" in notify.recv(4096)
            except TimeoutError:
                pytest.fail(f"the mount did not come up:\n{self.log}")

    @property
    def log(self) -> str:
        """What the mount has logged."""
        return self.log_file.read_text()

    @property
    def journal(self) -> list[str]:
        """What has reached the "cluster", in order."""
        return self.journal_file.read_text().splitlines()

    def run(
        self, *command: str | Path, timeout: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the mounted directory; it may fail."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, *command: str | Path, timeout: float = TIMEOUT_S) -> str:
        """Run a program in the mounted directory, which must succeed; give its output."""
        result = self.run(*command, timeout=timeout)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{self.log}"
        return result.stdout

    def fails(self, message: str, *command: str | Path) -> None:
        """Run a program, which must fail with `message` among what it says."""
        result = self.run(*command)
        assert result.returncode != 0
        assert message in result.stderr + result.stdout

    def python(self, code: str) -> str:
        """Run Python code in the mounted directory; give what it prints."""
        return self.ok(sys.executable, "-c", PRELUDE + code).strip()

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Start a program in the mounted directory, to talk to over its standard streams."""
        process = subprocess.Popen(
            command,
            cwd=self.path,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._spawned.append(process)
        return process

    def spawn(self, code: str) -> subprocess.Popen[str]:
        """Start Python code in the mounted directory."""
        return self.popen(sys.executable, "-u", "-c", PRELUDE + code)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the mount; give the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(TIMEOUT_S)
        self.process = None
        return code

    def clean_up(self) -> None:
        """Leave no process and no mount, whatever happened."""
        for process in self._spawned:
            process.kill()
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
            self.process = None
        while mounted(self.path):
            detach = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([*detach, str(self.path)], timeout=10, check=True)
        for process in self._spawned:
            # Without the mount nothing can keep them any more.
            process.communicate(timeout=10)
