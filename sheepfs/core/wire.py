"""The frame: one layout for every request and reply between clients and storage daemons.

Always holds:
- A frame is a 72-byte header and a payload; `length` counts both and is checked against
  `MAX_FRAME` before anything is allocated for it.
- The checksum covers every byte of the frame but itself, and is seeded with the connection's
  session number, so a frame recorded on one connection is garbage on any other. The payload's
  own checksum is part of that seed: it is computed once for all replicas that a write goes to.
- Golden bytes in tests/core/test_wire.py pin the layout; changing it needs a new `VERSION`.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import OBJECT_SIZE

VERSION = 1
Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER = struct.Struct("<IBBHQ IIIBxH QQIIQQ")
"""length, op, flags, status, checksum, request, epoch, vdi, pool, pg, token, oid, offset, span,
prev, version: little-endian, no padding but the one named."""
HEADER_SIZE = HEADER.size
_REST = struct.Struct("<IIIBxHQQIIQQ")
_START = struct.Struct("<IBBH")
_SEAL = struct.Struct("<QQ")
_LENGTH = struct.Struct("<I")
_CHECKSUM_END = 16

MAX_PAYLOAD = OBJECT_SIZE + (64 << 10)
MAX_FRAME = HEADER_SIZE + MAX_PAYLOAD
MAX_HELLO = HEADER_SIZE + 4096
"""Largest frame before the two sides have greeted each other."""

REPLY = 0x80
"""Set in `op` of a reply."""
FLAG_CREATE = 1
"""WRITE: whatever the object held before is void; what is not written reads as zeros."""
FLAG_COPY = 2
"""WRITE, PUNCH: whatever the object held before is void; it becomes a copy of the object of the
layer that the payload's first 8 bytes name, at version `prev`, and then the range is changed."""
BASE = struct.Struct("<Q")
"""What stands before the data of a change with `FLAG_COPY`: the layer that is copied."""
FLAG_YIELD = 1
"""PULL: nobody waits for it; BUSY while the source has clients' requests to see to."""
FLAG_SALVAGE = 2
"""PULL: blocks that are damaged here are named in the reply, instead of CORRUPT."""
FLAG_KEEP_MAPS = 1
"""RECLAIM: the layer's map objects are in use."""
FLAG_FORWARD = 1
"""REPAIR: a copy that is newer than the source's stays as it is."""
RANGE = struct.Struct("<II")
"""RECLAIM's payload: index ranges [start, end) of the layer's data objects that are in use."""

USAGE = struct.Struct("<QQII")
"""USAGE's reply: object id, version, blocks in the object's own file, blocks that are no holes."""


class Op(IntEnum):
    """Operations. Numbers are part of the protocol; docs/wire.md explains each."""

    HELLO = 1
    PING = 2
    MAP = 3
    READ = 4
    WRITE = 5
    PUNCH = 6
    FLUSH = 7
    DELETE = 8
    STAT = 9
    EXTENTS = 10
    PULL = 11
    REPAIR = 12
    LIST = 13
    FENCE = 14
    REPORT = 15
    JOINED = 16
    STATUS = 17
    RECLAIM = 18
    ACKS = 19
    SUMS = 20
    LAYOUT = 21
    USAGE = 22
    SCRUB = 23
    TRAFFIC = 25


class Header(NamedTuple):
    """A decoded header. `pool` is the number of copies, `prev` and `version` object versions."""

    length: int
    op: int
    flags: int
    status: int
    checksum: int
    request: int
    epoch: int
    vdi: int
    pool: int
    pg: int
    token: int
    oid: int
    offset: int
    span: int
    prev: int
    version: int


def encode(
    session: int,
    op: int,
    request: int,
    payload: Buffer = b"",
    *,
    flags: int = 0,
    status: int = 0,
    epoch: int = 0,
    vdi: int = 0,
    pool: int = 0,
    pg: int = 0,
    token: int = 0,
    oid: int = 0,
    offset: int = 0,
    span: int = 0,
    prev: int = 0,
    version: int = 0,
) -> bytes:
    """Give the header of a frame whose payload the caller sends right behind it, uncopied."""
    start = _START.pack(HEADER_SIZE + len(payload), op, flags, status)
    rest = _REST.pack(request, epoch, vdi, pool, pg, token, oid, offset, span, prev, version)
    seed = int.from_bytes(start, "little") ^ session
    if payload:
        seed ^= xxh3_64_intdigest(payload)
    checksum = xxh3_64_intdigest(rest, seed)
    return start + checksum.to_bytes(8, "little") + rest


_new_header = tuple.__new__
"""`Header._make` without its call of a Python function: one for each frame."""
_EMPTY_REST = bytes(_REST.size - 4)


def encode_reply(session: int, op: int, request: int, payload: Buffer) -> bytes:
    """Do what `encode` does for the most frequent reply: status OK, no other field."""
    start = _START.pack(HEADER_SIZE + len(payload), op | REPLY, 0, 0)
    rest = request.to_bytes(4, "little") + _EMPTY_REST
    seed = int.from_bytes(start, "little") ^ session
    if payload:
        seed ^= xxh3_64_intdigest(payload)
    return start + xxh3_64_intdigest(rest, seed).to_bytes(8, "little") + rest


def acknowledged(request: int) -> Header:
    """Give the header that a plain reply "OK" to request number `request` would have had."""
    return Header(HEADER_SIZE, Op.ACKS | REPLY, 0, 0, 0, request, *(0,) * 10)


class Unsealed(NamedTuple):
    """A header without its checksum: sealed once for each replica's connection."""

    start: bytes
    rest: bytes
    seed: int

    def seal(self, session: int) -> bytes:
        """Give the header for one connection; equal to what `encode` gives."""
        checksum = xxh3_64_intdigest(self.rest, self.seed ^ session)
        return self.start + checksum.to_bytes(8, "little") + self.rest


def prepare(
    op: int,
    flags: int,
    request: int,
    epoch: int,
    vdi: int,
    pool: int,
    pg: int,
    token: int,
    oid: int,
    offset: int,
    span: int,
    prev: int,
    version: int,
    payload_length: int,
    payload_checksum: int,
) -> Unsealed:
    """Do what is the same for all replicas of one change; the hot path's `encode`.

    Args:
        payload_checksum: xxh3_64 of the payload, 0 when there is none.
    """
    start = _START.pack(HEADER_SIZE + payload_length, op, flags, 0)
    rest = _REST.pack(request, epoch, vdi, pool, pg, token, oid, offset, span, prev, version)
    return Unsealed(start, rest, int.from_bytes(start, "little") ^ payload_checksum)


def frame_length(buffer: Buffer, position: int, limit: int = MAX_FRAME) -> int:
    """Give the length in bytes of the frame at `position`, of which 4 bytes are there.

    Raises:
        ProtocolError: the length cannot be; the connection must end before it is believed.
    """
    (length,) = _LENGTH.unpack_from(buffer, position)
    if not HEADER_SIZE <= length <= limit:
        raise ProtocolError(f"frame of {length} bytes, not within {HEADER_SIZE} to {limit}")
    return int(length)


def decode(session: int, frame: memoryview) -> tuple[Header, memoryview]:
    """Check a whole frame; give its header and a view of its payload.

    Raises:
        ProtocolError: the checksum does not match; nothing of the frame can be trusted.
    """
    start, checksum = _SEAL.unpack_from(frame)
    seed = start ^ session
    payload = frame[HEADER_SIZE:]
    if payload:
        seed ^= xxh3_64_intdigest(payload)
    if xxh3_64_intdigest(frame[_CHECKSUM_END:HEADER_SIZE], seed) != checksum:
        raise ProtocolError("frame checksum does not match")
    return _new_header(Header, HEADER.unpack_from(frame)), payload
