"""The format of a backup: one stream with a snapshot's data, or what changed since another one.

Always holds:
- Each part's checksum is seeded with that of the part before, so what was altered, left out, put
  in from elsewhere or put in another order is refused at the place where it is.
- A length is checked, by a checksum and against its limit, before anything is allocated for it.
- The stream ends with a trailer; one without it was cut off, and one that goes on is refused.
- The checksums (xxh3) are against accidents, not against somebody who forges a backup.
- Golden bytes in tests/tools/test_backup_stream.py pin the layout; changing it needs a new
  `FORMAT`. What `_PREFIX` holds stays in every format.

Layout, all numbers little-endian:
- prefix: magic "SHEEPBAK", format (u32), length of the JSON (u32), checksum (u64) of these 16;
- JSON, and its checksum (u64), seeded with the prefix's;
- records: kind (u8), flags (u8), 0 (u16), stored length (u32), offset (u64), length (u64), checksum
  (u64) of these 24, seeded with the checksum before; then, unless the stored length is 0, that many
  bytes and their checksum (u64), seeded with the record's. Offsets grow, ranges do not overlap.
  DATA: bytes, compressed with zlib if flag 1 is set. ZERO: the range reads as zeros. END: offset is
  the number of records, length the bytes of data; stored are the bytes of zeros (u64), the bytes
  of the stream before the END record (u64) and their xxh3-128.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, TypeAlias

from xxhash import xxh3_64_intdigest, xxh3_128

from sheepfs.core.errors import SheepError
from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE
from sheepfs.core.wire import Buffer

FORMAT = 1
MAGIC = b"SHEEPBAK"
MAX_HEADER = 64 << 10
MAX_DATA = OBJECT_SIZE
"""Most bytes of one data record, before and after compression."""

_PREFIX = struct.Struct("<8sII")
_RECORD = struct.Struct("<BBHIQQ")
_SUM = struct.Struct("<Q")
_END = struct.Struct("<QQ16s")
_ZLIB = 1
_SAMPLE = 64 << 10


class _Kind(IntEnum):
    DATA = 1
    ZERO = 2
    END = 3


class BackupError(SheepError):
    """A backup cannot be used; the text says why and where."""


class TruncatedError(BackupError):
    """The stream ends before its trailer."""


class AlteredError(BackupError):
    """The stream is not what was written."""


class NewerFormatError(BackupError):
    """A newer version wrote the stream."""


@dataclass(frozen=True, slots=True)
class BackupHeader:
    """What a backup is of. A base (a snapshot's tag and id) makes it an increment."""

    cluster: str
    """Id of the cluster that it was made of."""
    name: str
    """The VDI's name, `vm1.raw`."""
    vdi: int
    tag: str
    snapshot: int
    """The snapshot's id."""
    size: int
    copies: int
    created: float
    """When the snapshot was made, in seconds since 1970."""
    base_tag: str = ""
    base_snapshot: int = 0

    @property
    def identity(self) -> str:
        """Names the snapshot's contents among all clusters."""
        return f"{self.cluster}/{self.vdi}/{self.snapshot}"

    @property
    def base_identity(self) -> str:
        """Names the contents that the increment builds on; empty for a full backup."""
        return f"{self.cluster}/{self.vdi}/{self.base_snapshot}" if self.base_snapshot else ""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes at an offset."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Zeros:
    """A range that reads as zeros."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Totals:
    """What the trailer says: number of records, bytes of data (not compressed) and of zeros."""

    records: int
    data: int
    zeros: int


Part: TypeAlias = BackupHeader | Data | Zeros | Totals


def pack(data: Buffer) -> bytes:
    """Compress data; empty when that does not save. Takes long: callers do it in threads."""
    if len(data) > _SAMPLE and len(zlib.compress(data[:_SAMPLE], 1)) > _SAMPLE * 0.95:
        # Encrypted or compressed already: looking at the start saves 100 ms for each 4 MiB.
        return b""
    packed = zlib.compress(data, 1)
    return packed if len(packed) < len(data) else b""


class Writer:
    """Gives the bytes of a stream: `header`, then `data` and `zeros` in order, then `end`."""

    def __init__(self, header: BackupHeader) -> None:
        self._header = header
        self._chain = 0
        self._digest = xxh3_128()
        self._length = 0
        self._next_offset = 0
        self._records = self._data = self._zeros = 0

    def header(self) -> bytes:
        """Give the start of the stream."""
        content = json.dumps(asdict(self._header)).encode()
        if len(content) > MAX_HEADER:
            raise ValueError(f"a header of {len(content)} bytes")
        prefix = _PREFIX.pack(MAGIC, FORMAT, len(content))
        first = xxh3_64_intdigest(prefix)
        self._chain = xxh3_64_intdigest(content, first)
        return self._count(prefix + _SUM.pack(first) + content + _SUM.pack(self._chain))

    def data(self, offset: int, data: Buffer, packed: bytes = b"") -> bytes:
        """Give the record for 1 byte to 4 MiB of data.

        Args:
            packed: what `pack` gave for the data; empty: it is stored as it is.
        """
        if len(data) > MAX_DATA:
            raise ValueError(f"a record of {len(data)} bytes")
        self._claim(offset, len(data))
        self._data += len(data)
        flags, stored = (_ZLIB, packed) if packed else (0, data)
        return self._count(self._record(_Kind.DATA, flags, offset, len(data), stored))

    def zeros(self, offset: int, length: int) -> bytes:
        """Give the record for a range that reads as zeros, of any length."""
        self._claim(offset, length)
        self._zeros += length
        return self._count(self._record(_Kind.ZERO, 0, offset, length, b""))

    def end(self) -> bytes:
        """Give the trailer."""
        stored = _END.pack(self._zeros, self._length, self._digest.digest())
        return self._record(_Kind.END, 0, self._records, self._data, stored)

    def totals(self) -> Totals:
        """Give what the trailer says."""
        return Totals(self._records, self._data, self._zeros)

    def _claim(self, offset: int, length: int) -> None:
        if length <= 0 or offset < self._next_offset or offset + length > self._header.size:
            raise ValueError(f"{length} bytes at {offset}: not in order or beyond the end")
        self._next_offset = offset + length
        self._records += 1

    def _record(self, kind: _Kind, flags: int, offset: int, length: int, stored: Buffer) -> bytes:
        head = _RECORD.pack(kind, flags, 0, len(stored), offset, length)
        self._chain = xxh3_64_intdigest(head, self._chain)
        parts: list[Buffer] = [head, _SUM.pack(self._chain)]
        if stored:
            self._chain = xxh3_64_intdigest(stored, self._chain)
            parts += [stored, _SUM.pack(self._chain)]
        return b"".join(parts)

    def _count(self, part: bytes) -> bytes:
        self._digest.update(part)
        self._length += len(part)
        return part


class Reader:
    """Parses and checks a stream that comes in pieces of any size.

    `feed` gives what is complete and good; `finish` tells whether the stream was all there. What
    was fed may only be believed as a whole when `finish` has returned.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0
        """Bytes of the stream before `_buffer`."""
        self._chain = 0
        self._digest = xxh3_128()
        self._header: BackupHeader | None = None
        self._totals: Totals | None = None
        self._next_offset = 0
        self._records = self._data = self._zeros = 0

    def feed(self, data: Buffer) -> Iterator[Part]:
        """Take bytes; give the parts that are complete. The iterator must be used up.

        Raises:
            BackupError: the stream is no backup, newer, or not as it was written.
        """
        self._buffer += data
        while True:
            if self._totals is not None:
                if self._buffer:
                    raise AlteredError(f"altered at byte {self._position}: more after its end")
                return
            part = self._next_record() if self._header else self._next_header()
            if part is None:
                return
            yield part

    def finish(self) -> Totals:
        """Tell that nothing comes any more. Raises TruncatedError without a trailer."""
        if self._totals is None:
            if not self._position and not MAGIC.startswith(self._buffer[: len(MAGIC)]):
                raise BackupError("this is no backup made by sheepctl vdi backup")
            raise TruncatedError(
                f"truncated after {self._position + len(self._buffer)} bytes: its end is missing"
            )
        return self._totals

    def _altered(self, what: str) -> AlteredError:
        return AlteredError(f"altered at byte {self._position}: {what}")

    def _sum(self, start: int, end: int, seed: int, what: str) -> int:
        """Check that the bytes [start, end) of the buffer are followed by their checksum."""
        with memoryview(self._buffer) as view:
            found = xxh3_64_intdigest(view[start:end], seed)
        if _SUM.unpack_from(self._buffer, end)[0] != found:
            raise self._altered(f"the checksum of {what} does not match")
        return found

    def _take(self, length: int, *, counted: bool = True) -> None:
        if counted:
            with memoryview(self._buffer) as view:
                self._digest.update(view[:length])
        del self._buffer[:length]
        self._position += length

    def _next_header(self) -> BackupHeader | None:
        buffer = self._buffer
        if not MAGIC.startswith(bytes(buffer[: len(MAGIC)])):
            raise BackupError("this is no backup made by sheepctl vdi backup")
        start = _PREFIX.size + _SUM.size
        if len(buffer) < start:
            return None
        first = self._sum(0, _PREFIX.size, 0, "its first bytes")
        _, found_format, length = _PREFIX.unpack_from(buffer)
        if found_format != FORMAT:
            raise NewerFormatError(
                f"made by a newer version (format {found_format}); this one knows {FORMAT}"
            )
        if length > MAX_HEADER:
            raise self._altered(f"a header of {length} bytes")
        if len(buffer) < start + length + _SUM.size:
            return None
        self._chain = self._sum(start, start + length, first, "its header")
        self._header = _parse_header(bytes(buffer[start : start + length]))
        self._take(start + length + _SUM.size)
        return self._header

    def _next_record(self) -> Part | None:
        buffer = self._buffer
        start = _RECORD.size + _SUM.size
        if len(buffer) < start:
            return None
        # Checked again for each piece of the record that comes: 24 bytes.
        chain = self._sum(0, _RECORD.size, self._chain, "a record")
        kind, flags, reserved, stored, offset, length = _RECORD.unpack_from(buffer)
        self._check_record(kind, flags, reserved, stored, offset, length)
        total = start + (stored + _SUM.size if stored else 0)
        if len(buffer) < total:
            return None
        if stored:
            chain = self._sum(start, start + stored, chain, "a record's data")
        self._chain = chain
        content = bytes(memoryview(buffer)[start : start + stored])
        part: Part
        if kind == _Kind.END:
            self._totals = part = self._check_end(offset, length, content)
        elif kind == _Kind.ZERO:
            part = Zeros(offset, length)
            self._zeros += length
        else:
            part = Data(offset, self._unpack(content, length) if flags & _ZLIB else content)
            self._data += length
        self._take(total, counted=kind != _Kind.END)
        if kind != _Kind.END:
            self._records += 1
            self._next_offset = offset + length
        return part

    def _check_record(
        self, kind: int, flags: int, reserved: int, stored: int, offset: int, length: int
    ) -> None:
        """Refuse a record that `Writer` never makes, though its checksum is right."""
        if kind == _Kind.END:
            good = flags == 0 and stored == _END.size
        else:
            size = self._header.size if self._header else 0
            good = self._next_offset <= offset < offset + length <= size
            if kind == _Kind.DATA:
                short = 0 < stored < length if flags == _ZLIB else stored == length and not flags
                good = good and length <= MAX_DATA and short
            else:
                good = good and kind == _Kind.ZERO and not flags and not stored
        if not good or reserved:
            raise self._altered("a record that cannot be")

    def _check_end(self, records: int, data: int, content: bytes) -> Totals:
        zeros, length, digest = _END.unpack(content)
        totals = Totals(self._records, self._data, self._zeros)
        if (Totals(records, data, zeros), length, digest) != (
            totals,
            self._position,
            self._digest.digest(),
        ):
            raise self._altered("its end does not fit what comes before")
        return totals

    def _unpack(self, stored: bytes, length: int) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(stored, length)
            # The stream's own end may need one more call, which gives nothing.
            data += unpacker.decompress(unpacker.unconsumed_tail, 1)
        except zlib.error as error:
            raise self._altered(f"cannot be decompressed: {error}") from error
        if len(data) != length or not unpacker.eof or unpacker.unused_data:
            raise self._altered(f"does not decompress to {length} bytes")
        return data


def _parse_header(content: bytes) -> BackupHeader:
    """Parse what the checksums vouch for; fields that are not known are refused."""
    kinds: dict[str, type | tuple[type, ...]] = {"int": int, "str": str, "float": (int, float)}
    try:
        raw: dict[str, Any] = json.loads(content)
        for field in fields(BackupHeader):
            value = raw.get(field.name, "" if field.name == "base_tag" else 0)
            if not isinstance(value, kinds[str(field.type)]) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}")
        header = BackupHeader(**raw)
        if not 0 <= header.size <= MAX_VDI_SIZE:
            raise ValueError(f"size {header.size}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BackupError(f"its header is not understood: {error}") from error
    return header
