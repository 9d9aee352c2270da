"""Writes stamped blocks to a file and fsyncs, until an error; a log tells what was issued and done.

A process of its own: whoever has such a file open waits for it whenever it starts a program.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

BLOCK = 4096
BLOCKS = 8192
"""32 MiB: eight objects."""
STAMP = struct.Struct("<QQ")
"""Block, number: all over the block."""


def main(path: Path, log: Path, seed: int, number: int) -> None:
    """Run until an error.

    In the log: `w BLOCK NUMBER` before each write, `d` after it, `f` after each fsync, `e ERRNO` at
    the end; each with the time (monotonic, in seconds) behind it.
    """
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    with log.open("w", buffering=1) as lines:
        try:
            while True:
                for _ in range(rng.randint(1, 16)):
                    block = rng.randrange(BLOCKS)
                    number += 1
                    lines.write(f"w {block} {number} {time.monotonic()}\n")
                    buffer[:] = STAMP.pack(block, number) * (BLOCK // STAMP.size)
                    os.pwrite(fd, buffer, block * BLOCK)
                    lines.write(f"d {time.monotonic()}\n")
                os.fsync(fd)
                lines.write(f"f {time.monotonic()}\n")
        except OSError as error:
            lines.write(f"e {error.errno} {time.monotonic()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
