"""Random operations on a file in the mount, each compared with the same on bytes in memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

MAX_SIZE = 24 << 20
MAX_SPAN = 256 << 10
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
INTERESTING = (0, 1, 511, 512, 513, 4095, 4096, 4097, 65536)
"""Added to and taken from object borders, where off-by-one errors live."""

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), which Python does not offer with a mode (OSError)."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass
class Oracle:
    """A file under test and what it must hold.

    Args:
        seed: the same seed gives the same operations.
        direct: open with O_DIRECT; requests are then aligned to 4 KiB.
    """

    path: Path
    seed: int
    direct: bool = False

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.expected = bytearray()
        self.history: list[str] = []
        self.unit = 4096 if self.direct else 1
        self.fd = self._open()
        os.ftruncate(self.fd, 0)
        self.buffer = mmap.mmap(-1, MAX_SPAN + 2 * mmap.PAGESIZE)
        self.operations: tuple[tuple[int, Callable[[], None]], ...] = (
            (30, self.write),
            (30, self.read),
            (4, self.truncate),
            (8, self.punch),
            (6, self.zero),
            (6, self.seek),
            (3, self.fsync),
            (2, self.reopen),
        )

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0))

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
        self.buffer.close()

    def run(self, count: int) -> None:
        """Do `count` operations; a difference is an AssertionError that tells the last ones."""
        weights = [weight for weight, _ in self.operations]
        for number in range(count):
            (_, operation), *_ = self.random.choices(self.operations, weights)
            try:
                operation()
            except (AssertionError, OSError) as error:
                recent = "\n".join(self.history[-12:])
                raise AssertionError(
                    f"seed {self.seed}, step {number}: {error}\n{recent}"
                ) from error
        self.read_all()

    # -- choosing -----------------------------------------------------------------------------

    def _offset(self, limit: int) -> int:
        if self.random.random() < 0.5:
            border = self.random.randrange(0, limit // (4 << 20) + 1) * (4 << 20)
            near = border + self.random.choice((-1, 1)) * self.random.choice(INTERESTING)
            return self._align(max(0, min(near, limit)))
        return self._align(self.random.randint(0, limit))

    def _span(self) -> int:
        longest = self.random.choice((512, 4096, 65536, MAX_SPAN))
        return max(self.unit, self._align(self.random.randint(1, longest)))

    def _align(self, value: int) -> int:
        return value // self.unit * self.unit

    def _note(self, what: str, *numbers: int) -> None:
        self.history.append(f"{what} {' '.join(map(str, numbers))} (size {len(self.expected)})")

    # -- operations ---------------------------------------------------------------------------

    def write(self) -> None:
        """Write anywhere, also beyond the end."""
        offset = self._offset(min(len(self.expected) + MAX_SPAN, MAX_SIZE - MAX_SPAN))
        span = self._span()
        self._note("write", offset, span)
        data = self.random.randbytes(span) if self.random.random() < 0.8 else bytes(span)
        self.buffer[:span] = data
        with memoryview(self.buffer) as view, view[:span] as piece:
            written = os.pwrite(self.fd, piece, offset)
        assert written == span, f"short write: {written} of {span}"
        if offset + span > len(self.expected):
            self.expected.extend(bytes(offset + span - len(self.expected)))
        self.expected[offset : offset + span] = data

    def read(self) -> None:
        """Read anywhere, also across and beyond the end."""
        offset = self._offset(len(self.expected))
        span = self._span()
        self._note("read", offset, span)
        self._compare(offset, span)

    def _compare(self, offset: int, span: int) -> None:
        with memoryview(self.buffer) as view, view[:span] as piece:
            got = os.preadv(self.fd, [piece], offset)
        wanted = self.expected[offset : offset + span]
        assert got == len(wanted), f"read {got} bytes, not {len(wanted)}"
        if self.buffer[:got] != wanted:
            found = self.buffer[:got]
            bad = next(i for i in range(got) if found[i] != wanted[i])
            raise AssertionError(f"byte {offset + bad} is {found[bad]}, not {wanted[bad]}")

    def read_all(self) -> None:
        """Compare the whole file."""
        self._note("read all")
        assert os.fstat(self.fd).st_size == len(self.expected)
        for offset in range(0, len(self.expected), MAX_SPAN):
            self._compare(offset, MAX_SPAN)

    def truncate(self) -> None:
        """Cut or grow."""
        size = self._offset(MAX_SIZE)
        self._note("truncate", size)
        os.ftruncate(self.fd, size)
        if size < len(self.expected):
            del self.expected[size:]
        else:
            self.expected.extend(bytes(size - len(self.expected)))
        assert os.fstat(self.fd).st_size == size

    def punch(self) -> None:
        """Give back a range; the size stays."""
        self._clear("punch", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

    def zero(self) -> None:
        """Zero a range; the size stays."""
        self._clear("zero", FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)

    def _clear(self, what: str, mode: int) -> None:
        offset = self._offset(len(self.expected))
        span = self._span() * self.random.choice((1, 1, 40))
        self._note(what, offset, span)
        fallocate(self.fd, mode, offset, span)
        end = min(offset + span, len(self.expected))
        if end > offset:
            self.expected[offset:end] = bytes(end - offset)

    def seek(self) -> None:
        """Holes may be smaller than they could be, but everything in a hole must be zero."""
        size = len(self.expected)
        offset = self.random.randint(0, size)
        self._note("seek", offset)
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = size
        assert offset <= data <= size
        assert not any(self.expected[offset:data]), f"data in the hole {offset}..{data}"
        if offset < size:
            hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
            assert offset <= hole <= size, f"hole at {hole}, size {size}"

    def fsync(self) -> None:
        """Make durable."""
        self._note("fsync")
        os.fsync(self.fd)

    def reopen(self) -> None:
        """Close (which flushes and detaches) and open again."""
        self._note("reopen")
        os.close(self.fd)
        self.fd = self._open()
        assert os.fstat(self.fd).st_size == len(self.expected)
