"""Running seeds in processes of their own, for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
SOAK = os.environ.get("SHEEPFS_SOAK") == "1"
SEEDS = "0-1999" if SOAK else "0-99"
LIMIT_S = 36_000 if SOAK else 1500


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m sim` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "sim", *arguments],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


class Seeds:
    """All seeds, run beside whatever else goes on, with what that leaves of the processors."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-m", "sim", SEEDS],
            cwd=TESTS,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            process_group=0,  # Of this session still, or being nice would mean nothing.
        )

    def outcome(self) -> tuple[int, str]:
        """Wait for the end; give the exit code and what was printed."""
        code = self._process.wait(LIMIT_S)
        self._output.seek(0)
        return code, self._output.read()

    def end(self) -> None:
        """End it, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._output.close()
