"""A virtual machine that commits to databases, and what it was told is durable."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.guest import Guest, control
from sheepfs_tools.local.processes import wait_for

DATABASES = ("wal", "truncate", "delete")
"""Named after SQLite's journal modes. Of these, `delete` is durable only with `synchronous=EXTRA`:
with FULL, SQLite does not sync the directory that it removes its journal from."""
BOOT_S = 300.0
COMMITS_S = 300.0
SOCKET_S = 30.0
MIGRATION_S = 120.0
_COMMITTED = re.compile(r"^COMMITTED (\w+) (\d+)\r?$", re.MULTILINE)
_FOUND = re.compile(r"^FOUND (\w+) (.*?)\r?$", re.MULTILINE)
_ENDED = re.compile(r"^ENDED (\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Qemu:
    """One QEMU: its process, the guest's disk and console, and the socket of its monitor."""

    process: subprocess.Popen[bytes]
    disk: Path
    console: Path
    monitor: Path

    def text(self) -> str:
        """What the guest has said so far."""
        return self.console.read_text(errors="replace")

    def end(self) -> None:
        """End it like a power cut of its host."""
        self.process.kill()
        self.process.wait(60)


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
        self._started = 0
        self._qemu: Qemu | None = None

    @property
    def qemu(self) -> Qemu:
        """The one in which it runs."""
        assert self._qemu is not None
        return self._qemu

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """QEMU, which runs."""
        return self.qemu.process

    def _start(self, disk: Path, task: str, *options: str) -> Qemu:
        self._started += 1
        console = self._directory / f"console{self._started}"
        monitor = self._directory / f"monitor{self._started}"
        qmp = ("-qmp", f"unix:{monitor},server=on,wait=off")
        process = self._guest.boot(disk, task, console, *qmp, *options)
        return Qemu(process, disk, console, monitor)

    def _complain(self) -> None:
        """Raise AssertionError if the guest has given up, or QEMU has ended."""
        text = self.qemu.text()
        assert "GUEST-FAILED" not in text, text[-3000:]
        assert self.process.poll() is None, f"QEMU ended: {text[-3000:]}"

    def boot(self, *, mend: bool = False) -> None:
        """Boot, check the file system and what the databases hold; then it commits more.

        Args:
            mend: have e2fsck mend what the kernel leaves to it after errors.
        """
        self.boots += 1
        task = "commit new" if self.boots == 1 else "commit mend" if mend else "commit"
        self._qemu = self._start(self.disk, task)

        def checked() -> bool:
            self._complain()
            return len(_FOUND.findall(self.qemu.text())) == len(DATABASES)

        wait_for(checked, BOOT_S, "the guest to check its databases")
        for name, found in _FOUND.findall(self.qemu.text()):
            integrity, *numbers = found.split(" ")
            assert integrity == "ok", f"{name}: {found}"
            last, count, highest, wrong = map(int, numbers)
            assert last == count == highest, f"{name}: rows are missing: {found}"
            assert wrong == 0, f"{name}: rows hold something else: {found}"
            told = self.acknowledged[name]
            assert told <= last, f"{name}: row {told} was committed, the last one is {last}"

    def commits(self) -> dict[str, int]:
        """Tell each database's last row whose commit the guest has seen."""
        for name, number in _COMMITTED.findall(self.qemu.text()):
            self.acknowledged[name] = max(self.acknowledged[name], int(number))
        return dict(self.acknowledged)

    def ended(self) -> set[str]:
        """Tell which databases take no commits any more: SQLite has met an error."""
        return set(_ENDED.findall(self.qemu.text()))

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

    @contextmanager
    def moving(self, disk: Path, **parameters: int) -> Iterator[Qemu]:
        """Move it, while it runs, to another QEMU, which sees the same disk at another path.

        Gives the target. If the move is completed in the block, it runs there from then on; else
        it goes on where it is, and the target is ended.

        Args:
            parameters: of the migration, as QEMU names them.
        """
        source = self.qemu
        incoming = self._directory / f"incoming{self._started}"
        target = self._start(disk, "commit", "-incoming", f"unix:{incoming}")
        ended = target
        try:
            wait_for(incoming.exists, SOCKET_S, "the target of the migration")
            if parameters:
                control(source.monitor, "migrate-set-parameters", **parameters)
            control(source.monitor, "migrate", uri=f"unix:{incoming}")
            yield target
            if self.migration()["status"] == "completed":
                self.commits()
                self._qemu, ended = target, source
        finally:
            ended.end()

    def migration(self) -> dict[str, Any]:
        """Tell of the move that goes on, as QEMU does."""
        state: dict[str, Any] = control(self.qemu.monitor, "query-migrate")
        return state

    def wait_migration(self, status: str) -> dict[str, Any]:
        """Wait until the move is so far; AssertionError if it failed unexpectedly."""

        def there() -> bool:
            state = self.migration()
            assert state["status"] in (status, "setup", "active", "device"), state
            return bool(state["status"] == status)

        wait_for(there, MIGRATION_S, f"the move to be {status}")
        return self.migration()

    def kill(self) -> None:
        """End it like a power cut of its host, if it runs."""
        if self._qemu is not None:
            self._qemu.end()
            self.commits()
            self._qemu = None
