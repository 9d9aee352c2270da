"""Takes a VDI as soon as it can be had, and tells what is in it: at once, and when asked again.

A process of its own, on another host's mount than the stamping one (stamping.py). In the log: `x
ERRNO` after each attempt that fails, `t` when the VDI is taken, `r BLOCK NUMBER` for each block
that holds a number, `n` after the last of them; each but `r` with the time behind it. Each line of
its input makes it read again; at the end of its input it lets the VDI go.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from e2e.stamping import BLOCK, BLOCKS, STAMP

RETRY_S = 0.05
CHUNK = 256


def main(path: Path, log: Path) -> None:
    """Run until the end of the input."""
    with log.open("w", buffering=1) as lines:
        fd = _take(path, lines)
        lines.write(f"t {time.monotonic()}\n")
        os.fsync(fd)
        while True:
            _tell(fd, lines)
            if not sys.stdin.readline():
                return


def _take(path: Path, lines: TextIO) -> int:
    buffer = mmap.mmap(-1, BLOCK)
    buffer[:] = b"t" * BLOCK
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT)
            try:
                # Behind all that is stamped. The first write takes the VDI.
                os.pwrite(fd, buffer, BLOCKS * BLOCK)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            lines.write(f"x {error.errno} {time.monotonic()}\n")
            time.sleep(RETRY_S)
        else:
            return fd


def _tell(fd: int, lines: TextIO) -> None:
    found = mmap.mmap(-1, BLOCK * CHUNK)
    rows = []
    for first in range(0, BLOCKS, CHUNK):
        os.preadv(fd, [found], first * BLOCK)
        for place in range(CHUNK):
            data = found[place * BLOCK : (place + 1) * BLOCK]
            if not any(data):
                continue
            block, number = STAMP.unpack_from(data)
            whole = data == STAMP.pack(block, number) * (BLOCK // STAMP.size)
            rows.append(f"r {first + place} {number if whole and block == first + place else -1}")
    lines.write("\n".join([*rows, f"n {time.monotonic()}\n"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
