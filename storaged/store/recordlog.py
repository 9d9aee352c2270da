"""A small append-only log of fixed-size records, each with its checksum.

Always holds:
- What `append` returned from is on disk; records of an append that a crash cut short may be
  there or not, and are never taken for damage.
- A record that was once durable and no longer checks *is* taken for damage: each record names
  the one at which its append began, so a good record vouches for all before that.
- `rewrite` replaces the file as a whole: after a crash it is the old or the new one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from storaged.store.disk import Disk, must_succeed, read_file, replace_file, write_all

_HEADER = struct.Struct("<8sQQ")
"""magic, nonce, number of records written with the file; then the xxh3 of these."""
_SUM = struct.Struct("<Q")
_HEADER_SIZE = _HEADER.size + _SUM.size
_TAIL = struct.Struct("<II")
"""Behind each record's fields: number of the record at which its append began, checksum."""


class RecordLog:
    """One log file. Not thread-safe: its owner holds a lock around each call."""

    def __init__(self, disk: Disk, path: str, magic: bytes, fields: str) -> None:
        """Name the file; `fields` is the struct format of a record. Nothing is read yet."""
        self._disk = disk
        self._path = path
        self._magic = magic
        self._fields = struct.Struct(fields)
        self._size = self._fields.size + _TAIL.size
        self._fd = -1
        self._nonce = 0
        self.count = 0
        """Records in the file."""

    def load(self) -> tuple[list[tuple[int, ...]], bool]:
        """Read the file; `rewrite` must follow before anything is appended.

        Returns:
            The good records in order, and whether any that was durable is damaged or missing.

        Raises:
            OSError: the file cannot be read (a missing one counts as damaged).
        """
        try:
            data = read_file(self._disk, self._path)
        except FileNotFoundError:
            return [], True
        if len(data) < _HEADER_SIZE:
            return [], True
        magic, nonce, durable = _HEADER.unpack_from(data)
        (own,) = _SUM.unpack_from(data, _HEADER.size)
        if magic != self._magic or xxh3_64_intdigest(data[: _HEADER.size]) != own:
            return [], True
        good: list[tuple[int, ...]] = []
        first_bad: int | None = None
        total = (len(data) - _HEADER_SIZE) // self._size
        for number in range(total):
            start = _HEADER_SIZE + number * self._size
            began, check = _TAIL.unpack_from(data, start + self._fields.size)
            if self._check(nonce, data[start : start + self._size - 4]) != check:
                first_bad = number if first_bad is None else first_bad
                continue
            durable = max(durable, began)
            good.append(self._fields.unpack_from(data, start))
        if first_bad is None:
            first_bad = total
        return good, first_bad < durable

    def append(self, records: Sequence[tuple[int, ...]]) -> None:
        """Add records durably (OSError; after ENOSPC nothing was added)."""
        data = self._encode(self._nonce, records, self.count)
        write_all(self._disk, self._fd, data, _HEADER_SIZE + self.count * self._size)
        must_succeed(self._disk.fdatasync, self._fd)
        self.count += len(records)

    def rewrite(self, records: Iterable[tuple[int, ...]]) -> None:
        """Replace the file durably by one with just these records.

        Raises:
            OSError: ENOSPC leaves the old file in use; any other leaves it open which one is.
        """
        nonce = int.from_bytes(os.urandom(8), "little")
        kept = list(records)
        header = _HEADER.pack(self._magic, nonce, len(kept))
        header += _SUM.pack(xxh3_64_intdigest(header))
        replace_file(self._disk, self._path, header + self._encode(nonce, kept, 0))
        self.close()
        self._fd = self._disk.open(self._path)
        self._nonce = nonce
        self.count = len(kept)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return _HEADER_SIZE + self.count * self._size

    def _encode(self, nonce: int, records: Sequence[tuple[int, ...]], began: int) -> bytes:
        pieces = []
        for record in records:
            body = self._fields.pack(*record) + began.to_bytes(4, "little")
            pieces.append(body + self._check(nonce, body).to_bytes(4, "little"))
        return b"".join(pieces)

    @staticmethod
    def _check(nonce: int, body: bytes) -> int:
        return xxh3_64_intdigest(body, nonce) & 0xFFFFFFFF
