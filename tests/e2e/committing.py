"""A virtual machine that commits to databases, and what it was told is durable."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from e2e.guest import Guest
from sheepfs_tools.processes import wait_for

DATABASES = ("wal", "truncate", "delete")
"""Named after SQLite's journal modes. Of these, `delete` is durable only with `synchronous=EXTRA`:
with FULL, SQLite does not sync the directory that it removes its journal from."""
BOOT_S = 300.0
COMMITS_S = 300.0
_COMMITTED = re.compile(r"^COMMITTED (\w+) (\d+)\r?$", re.MULTILINE)
_FOUND = re.compile(r"^FOUND (\w+) (.*?)\r?$", re.MULTILINE)
_ENDED = re.compile(r"^ENDED (\w+)", re.MULTILINE)


class Machine:
    """A guest with a disk, which is booted again and again.

    Attributes:
        boots: how often it was.
        acknowledged: database -> the number of its last row whose commit the guest has seen.
    """

    def __init__(self, guest: Guest, disk: Path, directory: Path) -> None:
        self._guest = guest
        self.disk = disk
        self._directory = directory
        self.boots = 0
        self.acknowledged = dict.fromkeys(DATABASES, 0)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """QEMU, which runs."""
        assert self._process is not None
        return self._process

    @property
    def _console(self) -> Path:
        return self._directory / f"console{self.boots}"

    def _text(self) -> str:
        return self._console.read_text(errors="replace")

    def _complain(self) -> None:
        """Raise AssertionError if the guest has given up, or QEMU has ended."""
        text = self._text()
        assert "GUEST-FAILED" not in text, text[-3000:]
        assert self.process.poll() is None, f"QEMU ended: {text[-3000:]}"

    def boot(self, *, mend: bool = False) -> None:
        """Boot, check the file system and what the databases hold; then it commits more.

        Args:
            mend: have e2fsck mend what the kernel leaves to it after errors.
        """
        self.boots += 1
        task = "commit new" if self.boots == 1 else "commit mend" if mend else "commit"
        self._process = self._guest.boot(self.disk, task, self._console)

        def checked() -> bool:
            self._complain()
            return len(_FOUND.findall(self._text())) == len(DATABASES)

        wait_for(checked, BOOT_S, "the guest to check its databases")
        for name, found in _FOUND.findall(self._text()):
            integrity, *numbers = found.split(" ")
            assert integrity == "ok", f"{name}: {found}"
            last, count, highest, wrong = map(int, numbers)
            assert last == count == highest, f"{name}: rows are missing: {found}"
            assert wrong == 0, f"{name}: rows hold something else: {found}"
            told = self.acknowledged[name]
            assert told <= last, f"{name}: row {told} was committed, the last one is {last}"

    def commits(self) -> dict[str, int]:
        """Tell each database's last row whose commit the guest has seen."""
        for name, number in _COMMITTED.findall(self._text()):
            self.acknowledged[name] = max(self.acknowledged[name], int(number))
        return dict(self.acknowledged)

    def ended(self) -> set[str]:
        """Tell which databases take no commits any more: SQLite has met an error."""
        return set(_ENDED.findall(self._text()))

    def wait_commits(self, count: int) -> set[str]:
        """Wait for so many more commits to each database.

        Returns:
            Those that take none any more.
        """
        before = self.commits()

        def enough() -> bool:
            self._complain()
            now = self.commits()
            ended = self.ended()
            return all(name in ended or now[name] >= before[name] + count for name in DATABASES)

        wait_for(enough, COMMITS_S, f"{count} commits to each database")
        return self.ended()

    def kill(self) -> None:
        """End it like a power cut of its host, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self.commits()
            self._process = None
