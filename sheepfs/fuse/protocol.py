"""The kernel's FUSE protocol, as far as the mount answers it: bytes to values and back, no I/O.

Always holds:
- A reply to the kernel has exactly the length that its operation asks for; the kernel refuses
  any other with EINVAL and the request would hang.
- Nothing here trusts a length: a request too short for its operation raises ProtocolError.
Source: include/uapi/linux/fuse.h, protocol 7.31 to 7.45; fields are host-endian (little here).
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from sheepfs.core.errors import ProtocolError
from sheepfs.core.wire import Buffer

MAX_WRITE = 1 << 20
"""Bytes of one READ or WRITE request."""
MAX_PAGES = MAX_WRITE // 4096
MAX_BACKGROUND = 128
"""Asynchronous requests in flight at most; the kernel's default of 12 starves queue depth 32."""
CONGESTION_THRESHOLD = 96
RECEIVE_BUFFER = MAX_WRITE + (64 << 10)
"""Bytes that the largest request fits in; reading the device with less loses the request."""


class Op(IntEnum):
    """Operations that the mount must know by name."""

    FORGET = 2
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    READDIR = 28
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    LSEEK = 46
    COPY_FILE_RANGE = 47
    COPY_FILE_RANGE_64 = 53


class InitFlag(IntFlag):
    """Capabilities of INIT; bits from 32 on travel in `flags2`."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ASYNC_DIO = 1 << 15
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36


class OpenFlag(IntFlag):
    """Flags of an OPEN or CREATE reply."""

    DIRECT_IO = 1 << 0
    PARALLEL_DIRECT_WRITES = 1 << 6


class LockType(IntEnum):
    """Type of a byte-range lock."""

    READ = 0
    WRITE = 1
    UNLOCK = 2


class FallocateMode(IntFlag):
    """Modes of fallocate(2) that the kernel passes on."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


class Seek(IntEnum):
    """`whence` of LSEEK; the kernel handles all others."""

    DATA = 3
    HOLE = 4


IN_HEADER = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
IN_HEADER_SIZE = IN_HEADER.size
OUT_HEADER = struct.Struct("<IiQ")
"""len, -errno, unique."""
OUT_HEADER_SIZE = OUT_HEADER.size

TRANSFER = struct.Struct("<QQIIQII")
"""READ and WRITE: fh, offset, size, read/write flags, lock owner, open flags, padding."""
WRITE_DATA = IN_HEADER_SIZE + TRANSFER.size
"""Where a WRITE request's data starts."""
_FALLOCATE = struct.Struct("<QQQII")
_LSEEK = struct.Struct("<QQII")
_COPY_RANGE = struct.Struct("<QQQQQQQ")
_LK = struct.Struct("<QQQQIIII")
_FLUSH = struct.Struct("<QIIQ")
_FH = struct.Struct("<Q")
_IOCTL = struct.Struct("<QIIQII")
_IOCTL_OUT = struct.Struct("<iIII")
"""The call's result, flags, numbers of iovecs; what the call gives back follows."""
DIRECT_IO_LIMITS = 0x800C581E
"""ioctl XFS_IOC_DIOINFO: _IOR('X', 30, three u32): alignment in memory, least and greatest size of
direct I/O, in bytes. QEMU asks it of any file. Source: QEMU, block/file-posix.c."""
_DIRECT_IO_LIMITS = struct.Struct("<III")
_UNIQUE = struct.Struct("<Q")
_READDIR_SIZE = struct.Struct("<I")
_READDIR_SIZE_AT = IN_HEADER_SIZE + 16

_U32X2 = struct.Struct("<II")
_U64 = struct.Struct("<Q")
_FILE_LOCK = struct.Struct("<QQII")
_WRITE_OUT = struct.Struct("<II")
_INVAL_INODE_OUT = struct.Struct("<Qqq")
_NOTIFY_INVAL_INODE = 2
_OPEN_OUT = struct.Struct("<QIi")
_ENTRY_OUT_SIZE = 128
_INIT_IN_FLAGS = struct.Struct("<IIII")
"""major, minor, max_readahead, flags."""
_INIT_OUT = struct.Struct("<IIIIHHIIHHI")
"""major, minor, max_readahead, flags, max_background, congestion, max_write, time_gran,
max_pages, map_alignment, flags2; 28 unused bytes follow."""


class Fallocate(NamedTuple):
    """FALLOCATE; offset and length in bytes."""

    fh: int
    offset: int
    length: int
    mode: int


class Lseek(NamedTuple):
    """LSEEK; offset in bytes."""

    fh: int
    offset: int
    whence: int


class CopyRange(NamedTuple):
    """COPY_FILE_RANGE and COPY_FILE_RANGE_64; offsets and length in bytes."""

    source_fh: int
    source_offset: int
    target_node: int
    target_fh: int
    target_offset: int
    length: int
    flags: int


class LockRequest(NamedTuple):
    """GETLK, SETLK, SETLKW. `end` is the last byte locked, not the one after it."""

    fh: int
    owner: int
    start: int
    end: int
    type: int
    pid: int


class Flush(NamedTuple):
    """FLUSH: one close(2) of a process; `owner` identifies the process's POSIX locks."""

    fh: int
    owner: int


class Opened(NamedTuple):
    """What a reply to OPEN or CREATE opened."""

    fh: int
    flags: int


def _unpack(layout: struct.Struct, request: Buffer) -> tuple[int, ...]:
    if len(request) < IN_HEADER_SIZE + layout.size:
        raise ProtocolError(f"FUSE request of {len(request)} bytes is too short")
    return layout.unpack_from(request, IN_HEADER_SIZE)


def decode_fallocate(request: Buffer) -> Fallocate:
    """Decode a FALLOCATE request. Raises ProtocolError if it is too short."""
    return Fallocate._make(_unpack(_FALLOCATE, request)[:4])


def decode_lseek(request: Buffer) -> Lseek:
    """Decode an LSEEK request. Raises ProtocolError if it is too short."""
    return Lseek._make(_unpack(_LSEEK, request)[:3])


def decode_copy_range(request: Buffer) -> CopyRange:
    """Decode either COPY_FILE_RANGE request. Raises ProtocolError if it is too short."""
    return CopyRange._make(_unpack(_COPY_RANGE, request))


def decode_lock(request: Buffer) -> LockRequest:
    """Decode GETLK, SETLK or SETLKW. Raises ProtocolError if it is too short."""
    return LockRequest._make(_unpack(_LK, request)[:6])


def decode_flush(request: Buffer) -> Flush:
    """Decode a FLUSH request. Raises ProtocolError if it is too short."""
    fh, _, _, owner = _unpack(_FLUSH, request)
    return Flush(fh, owner)


def decode_ioctl(request: Buffer) -> int:
    """Give the command of an IOCTL request. Raises ProtocolError if it is too short."""
    return _unpack(_IOCTL, request)[2]


def encode_direct_io_limits(unique: int, least: int, greatest: int) -> bytes:
    """Give the reply to an IOCTL of `DIRECT_IO_LIMITS`, in bytes."""
    limits = _DIRECT_IO_LIMITS.pack(least, least, greatest)
    return encode_reply(unique, _IOCTL_OUT.pack(0, 0, 0, 0) + limits)


def decode_fh(request: Buffer) -> int:
    """Give the file handle of a request that starts with one (FSYNC, RELEASE)."""
    return _unpack(_FH, request)[0]


def decode_interrupt(request: Buffer) -> int:
    """Give the number of the request that an INTERRUPT is about."""
    return _unpack(_UNIQUE, request)[0]


def decode_init_flags(request: Buffer) -> InitFlag:
    """Give the capabilities that the kernel offers in its INIT request."""
    _, _, _, flags = _unpack(_INIT_IN_FLAGS, request)
    if flags & InitFlag.INIT_EXT and len(request) >= IN_HEADER_SIZE + 20:
        flags |= int.from_bytes(request[IN_HEADER_SIZE + 16 : IN_HEADER_SIZE + 20], "little") << 32
    return InitFlag(flags)


def limit_readdir(request: bytearray, limit_bytes: int) -> None:
    """Lower the reply size that a READDIR or READDIRPLUS request allows, in place."""
    if len(request) < _READDIR_SIZE_AT + _READDIR_SIZE.size:
        raise ProtocolError(f"FUSE request of {len(request)} bytes is too short")
    (size,) = _READDIR_SIZE.unpack_from(request, _READDIR_SIZE_AT)
    _READDIR_SIZE.pack_into(request, _READDIR_SIZE_AT, min(size, limit_bytes))


def encode_reply(unique: int, payload: Buffer = b"") -> bytes:
    """Give a successful reply."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), 0, unique) + payload


def encode_error(unique: int, code: int) -> bytes:
    """Give a reply that fails with errno `code` (0: succeeds with no payload)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -code, unique)


_WRITTEN = struct.Struct("<IiQII")


def encode_written(unique: int, size: int) -> bytes:
    """Give the reply to a WRITE of `size` bytes."""
    return _WRITTEN.pack(_WRITTEN.size, 0, unique, size, 0)


def pack_offset(offset: int) -> bytes:
    """Give the payload of an LSEEK reply."""
    return _U64.pack(offset)


def pack_copied(copied: int) -> bytes:
    """Give the payload of a COPY_FILE_RANGE reply, which has 32 bits for the length."""
    return _WRITE_OUT.pack(copied, 0)


def pack_copied_64(copied: int) -> bytes:
    """Give the payload of a COPY_FILE_RANGE_64 reply (protocol 7.45)."""
    return _U64.pack(copied)


def encode_changed(node: int) -> bytes:
    """Give the notification that makes the kernel ask again for a file's attributes.

    Negative offset: the attributes alone, no cached data. Notifications have number 0, and their
    kind stands where a reply has its error.
    """
    size = OUT_HEADER_SIZE + _INVAL_INODE_OUT.size
    return OUT_HEADER.pack(size, _NOTIFY_INVAL_INODE, 0) + _INVAL_INODE_OUT.pack(node, -1, 0)


def pack_lock(start: int, end: int, kind: LockType, pid: int) -> bytes:
    """Give the payload of a GETLK reply: the lock in the way, or one of type UNLOCK."""
    return _FILE_LOCK.pack(start, end, kind, pid)


def amend_init(reply: bytearray, offered: InitFlag, *, parallel: int = MAX_BACKGROUND) -> None:
    """Make libfuse's INIT reply ask for what the data path wants and the kernel offers, in place.

    Args:
        reply: the whole reply with its header.
        offered: what the kernel's request offered.
        parallel: asynchronous requests in flight at most.

    Raises:
        ProtocolError: not an INIT reply of protocol 7.23 or later.
    """
    if len(reply) < OUT_HEADER_SIZE + _INIT_OUT.size:
        raise ProtocolError(f"INIT reply of {len(reply)} bytes is too short")
    major, minor, readahead, flags, _, _, _, gran, _, align, flags2 = _INIT_OUT.unpack_from(
        reply, OUT_HEADER_SIZE
    )
    wanted = (
        InitFlag.ASYNC_READ
        | InitFlag.POSIX_LOCKS
        | InitFlag.ASYNC_DIO
        | InitFlag.MAX_PAGES
        | InitFlag.DIRECT_IO_ALLOW_MMAP
    ) & offered
    if wanted >> 32:
        wanted |= InitFlag.INIT_EXT
    _INIT_OUT.pack_into(
        reply,
        OUT_HEADER_SIZE,
        major,
        minor,
        readahead,
        flags | (wanted & 0xFFFFFFFF),
        parallel,
        parallel * CONGESTION_THRESHOLD // MAX_BACKGROUND,
        MAX_WRITE,
        gran,
        MAX_PAGES,
        align,
        flags2 | (wanted >> 32),
    )


def amend_open(reply: bytearray, op: int) -> Opened | None:
    """Allow parallel direct writes in a reply to OPEN or CREATE that has DIRECT_IO, in place.

    Returns:
        What was opened; None if the reply is an error.
    """
    length, code, _ = OUT_HEADER.unpack_from(reply)
    if code:
        return None
    at = OUT_HEADER_SIZE + (_ENTRY_OUT_SIZE if op == Op.CREATE else 0)
    if len(reply) < at + _OPEN_OUT.size or length != len(reply):
        raise ProtocolError(f"reply of {len(reply)} bytes to {Op(op).name} is too short")
    fh, flags, backing = _OPEN_OUT.unpack_from(reply, at)
    if flags & OpenFlag.DIRECT_IO:
        # The kernel serializes synchronous writers to one file without this.
        flags |= OpenFlag.PARALLEL_DIRECT_WRITES
        _OPEN_OUT.pack_into(reply, at, fh, flags, backing)
    return Opened(fh, flags)
