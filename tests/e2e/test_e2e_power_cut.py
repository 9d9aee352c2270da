"""Real file systems lose power under load: of one node, and of all at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e import stamping
from e2e.load import longest_wait_s, verifying
from e2e.power import Powered, missing
from e2e.stamping import BLOCK, STAMP
from sheepfs_tools.local.processes import wait_for


@pytest.fixture(params=["ext4", "xfs"])
def powered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Powered]:
    if reason := missing(request.param):
        pytest.skip(reason)
    cluster = Powered(tmp_path, request.param)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.destroy()


def test_fio_notices_nothing_when_one_node_after_the_other_loses_power(
    powered: Powered, soak: bool
) -> None:
    rounds = 20 if soak else 2
    mounted = powered.mounted
    path = mounted.create("load", "256M")
    with verifying(path, "4k", 4.0 * rounds + 5) as fio:
        for turn in range(rounds):
            powered.cut(turn % 3 + 1)
        longest_wait_s(fio, 600)
    mounted.assert_replicas_agree("load")


class Writer:
    """A process that writes stamped blocks and fsyncs (stamping.py)."""

    def __init__(self, path: Path, log: Path, seed: int, first: int) -> None:
        self._log = log
        argv = [sys.executable, stamping.__file__, path, log, str(seed), str(first)]
        self._process = subprocess.Popen([str(word) for word in argv])

    def fsyncs(self) -> int:
        """Tell how many succeeded so far."""
        return self._log.read_text().count("f") if self._log.exists() else 0

    def errors(self) -> list[int]:
        """Give the errno that ended it, if one did."""
        lines = self._log.read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("e")]

    def end(self) -> tuple[dict[int, set[int]], int]:
        """End it.

        Returns:
            block -> the numbers that it may hold, for each block written (0: whatever it held
            before); and the last number.
        """
        self._process.kill()
        self._process.wait(60)
        legal: dict[int, set[int]] = {}
        number = 0
        for line in self._log.read_text().splitlines():
            what, *numbers = line.split()
            if what == "w":
                block, number = map(int, numbers[:2])
                legal.setdefault(block, {0}).add(number)
            elif what == "f":
                # What came before it is durable: only the last one of each block counts.
                legal = {block: {max(values)} for block, values in legal.items()}
        return legal, number


def test_what_fsync_told_is_there_after_all_nodes_lost_power_at_once(
    powered: Powered, tmp_path: Path, soak: bool
) -> None:
    mounted = powered.mounted
    path = mounted.create("stamped", "32M")
    durable: dict[int, set[int]] = {}
    number = 0
    for turn in range(20 if soak else 2):
        writer = Writer(path, tmp_path / f"writer{turn}", turn, number)
        wait_for(lambda writer=writer: writer.fsyncs() > 20, 30, "some fsyncs")  # type: ignore[misc]
        powered.cut(1, 2, 3)
        written, number = writer.end()
        for block, numbers in written.items():
            former = durable.get(block, {0}) if 0 in numbers else set()
            durable[block] = numbers - {0} | former
        check(path, durable)
        mounted.assert_replicas_agree("stamped")


def check(path: Path, durable: dict[int, set[int]]) -> None:
    """Each block is what it may be; from then on it is what it was seen to be."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for block, legal in durable.items():
            data = os.pread(fd, BLOCK, block * BLOCK)
            found = {
                0 if not any(stamp) else stamp[1]
                for stamp in STAMP.iter_unpack(data)
                if stamp[0] == block or not any(stamp)
            }
            assert found <= legal, f"block {block} has {found}, and may have {legal}"
            assert found, f"block {block} has another one's bytes"
            if len(found) == 1:
                durable[block] = found
    finally:
        os.close(fd)
