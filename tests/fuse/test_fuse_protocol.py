"""The kernel protocol: golden bytes as Linux 6.18 sends them, and what hostile bytes do."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError
from sheepfs.fuse import protocol
from sheepfs.fuse.protocol import InitFlag, LockType, Op, OpenFlag

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


def request(op: int, body: bytes, unique: int = 6) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), op, unique, 2, 0, 0, 1, 0, 0) + body


def test_header_is_forty_bytes() -> None:
    raw = bytes.fromhex(
        "50000000" "10000000" "0600000000000000" "0200000000000000"
        "e8030000" "e9030000" "d2040000" "0000" "0000"
    )  # fmt: skip
    assert protocol.IN_HEADER_SIZE == len(raw) == 40
    assert protocol.IN_HEADER.unpack(raw) == (80, Op.WRITE, 6, 2, 1000, 1001, 1234, 0, 0)


def test_write_request_has_its_data_at_byte_80() -> None:
    body = bytes.fromhex(
        "0100000000000000" "0010000000000000" "04000000" "00000000"
        "efbeadde00000000" "01900000" "00000000"
    )  # fmt: skip
    raw = request(Op.WRITE, body + b"data")
    fields = protocol.TRANSFER.unpack_from(raw, protocol.IN_HEADER_SIZE)
    assert fields == (1, 4096, 4, 0, 0xDEADBEEF, 0x9001, 0)
    assert raw[protocol.WRITE_DATA :] == b"data"


def test_lock_request() -> None:
    body = bytes.fromhex(
        "0300000000000000" "efbeadde00000000" "6500000000000000" "6500000000000000"
        "00000000" "d2040000" "00000000" "00000000"
    )  # fmt: skip
    assert protocol.decode_lock(request(Op.SETLK, body)) == (3, 0xDEADBEEF, 101, 101, 0, 1234)


def test_small_requests() -> None:
    fallocate = struct.pack("<QQQII", 1, 2, 3, 4, 0)
    assert protocol.decode_fallocate(request(Op.FALLOCATE, fallocate)) == (1, 2, 3, 4)
    lseek = struct.pack("<QQII", 1, 2, 3, 0)
    assert protocol.decode_lseek(request(Op.LSEEK, lseek)) == (1, 2, 3)
    copy = bytes.fromhex(
        "0300000000000000" "0000400000000000" "0700000000000000" "0400000000000000"
        "0000800000000000" "00f0ffff00000000" "0000000000000000"
    )  # fmt: skip
    expected = (3, 4 << 20, 7, 4, 8 << 20, 0xFFFFF000, 0)
    assert protocol.decode_copy_range(request(Op.COPY_FILE_RANGE, copy)) == expected
    assert protocol.decode_copy_range(request(Op.COPY_FILE_RANGE_64, copy)) == expected
    flush = struct.pack("<QIIQ", 1, 0, 0, 9)
    assert protocol.decode_flush(request(Op.FLUSH, flush)) == (1, 9)
    assert protocol.decode_fh(request(Op.RELEASE, struct.pack("<QIIQ", 5, 0, 0, 0))) == 5
    assert protocol.decode_interrupt(request(Op.INTERRUPT, struct.pack("<Q", 44))) == 44


def test_replies() -> None:
    assert protocol.encode_error(6, 5).hex() == "10000000fbffffff0600000000000000"
    assert protocol.encode_error(6, 0).hex() == "10000000000000000600000000000000"
    assert (
        protocol.encode_written(6, 4096).hex() == "180000000000000006000000000000000010000000000000"
    )
    assert protocol.encode_reply(6, b"abcde").hex() == (
        "150000000000000006000000000000006162636465"
    )
    assert protocol.encode_reply(6, protocol.pack_offset(4096)).hex() == (
        "180000000000000006000000000000000010000000000000"
    )
    assert protocol.pack_copied(0xFFC00000).hex() == "0000c0ff00000000"
    assert protocol.pack_copied_64(0x1FFC00000).hex() == "0000c0ff01000000"
    assert protocol.encode_changed(7).hex() == (
        "28000000" "02000000" "0000000000000000"
        "0700000000000000" "ffffffffffffffff" "0000000000000000"
    )  # fmt: skip
    assert protocol.pack_lock(101, 102, LockType.WRITE, 77).hex() == (
        "65000000000000006600000000000000010000004d000000"
    )


def init_reply(flags: int = 0) -> bytearray:
    body = struct.pack("<IIIIHHIIHHI28x", 7, 31, 131072, flags, 0, 0, 4096, 1, 32, 0, 0)
    return bytearray(struct.pack("<IiQ", 16 + len(body), 0, 2) + body)


def test_init_reply_asks_for_what_the_data_path_wants() -> None:
    reply = init_reply(flags=1 << 5)
    protocol.amend_init(reply, InitFlag(0x1FFFFFFFFF))
    fields = struct.unpack_from("<IIIIHHIIHHI", reply, 16)
    _, minor, readahead, flags, background, congestion, max_write, _, pages, _, flags2 = fields
    assert (minor, readahead) == (31, 131072)
    assert flags == 1 << 5 | 1 << 0 | 1 << 1 | 1 << 15 | 1 << 22 | 1 << 30
    assert flags2 == 1 << 4
    assert (background, congestion, max_write, pages) == (128, 96, 1 << 20, 256)
    assert len(reply) == 80


def test_init_reply_does_not_ask_for_what_an_old_kernel_does_not_offer() -> None:
    reply = init_reply()
    protocol.amend_init(reply, InitFlag.POSIX_LOCKS | InitFlag.ASYNC_READ)
    assert struct.unpack_from("<I", reply, 28) == (3,)
    assert struct.unpack_from("<I", reply, 16 + 36) == (0,)


def test_offered_flags_beyond_32_bits_need_init_ext() -> None:
    body = struct.pack("<IIIII44x", 7, 45, 0, 1 | 1 << 30, 1 << 4)
    assert protocol.decode_init_flags(request(Op.INIT, body)) & InitFlag.DIRECT_IO_ALLOW_MMAP
    body = struct.pack("<IIIII44x", 7, 45, 0, 1, 1 << 4)
    assert not protocol.decode_init_flags(request(Op.INIT, body)) & InitFlag.DIRECT_IO_ALLOW_MMAP


@pytest.mark.parametrize(("op", "entry"), [(Op.OPEN, b""), (Op.CREATE, bytes(128))])
def test_open_reply_with_direct_io_allows_parallel_writes(op: Op, entry: bytes) -> None:
    body = entry + struct.pack("<QIi", 9, OpenFlag.DIRECT_IO, 0)
    reply = bytearray(struct.pack("<IiQ", 16 + len(body), 0, 6) + body)
    opened = protocol.amend_open(reply, op)
    assert opened == (9, OpenFlag.DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES)
    assert reply[-16:].hex() == "09000000000000004100000000000000"


def test_open_reply_without_direct_io_or_with_an_error_stays() -> None:
    body = struct.pack("<QIi", 9, 2, 0)
    reply = bytearray(struct.pack("<IiQ", 32, 0, 6) + body)
    assert protocol.amend_open(reply, Op.OPEN) == (9, 2)
    assert reply[16:] == body
    assert protocol.amend_open(bytearray(protocol.encode_error(6, 2)), Op.OPEN) is None


def test_readdir_reply_size_is_limited() -> None:
    raw = bytearray(request(Op.READDIRPLUS, struct.pack("<QQIIQII", 1, 0, 1 << 20, 0, 0, 0, 0)))
    protocol.limit_readdir(raw, 32768)
    assert struct.unpack_from("<QQI", raw, 40) == (1, 0, 32768)
    protocol.limit_readdir(raw, 1 << 20)
    assert struct.unpack_from("<QQI", raw, 40) == (1, 0, 32768)


@given(U64, U64, U64, U64, U32, U32)
def test_any_lock_request_round_trips(
    fh: int, owner: int, start: int, end: int, kind: int, pid: int
) -> None:
    raw = request(Op.SETLK, struct.pack("<QQQQIIII", fh, owner, start, end, kind, pid, 0, 0))
    assert protocol.decode_lock(raw) == (fh, owner, start, end, kind, pid)


@given(st.binary(max_size=120))
def test_hostile_bytes_raise_nothing_but_protocol_errors(raw: bytes) -> None:
    for decode in (
        protocol.decode_fallocate,
        protocol.decode_lseek,
        protocol.decode_lock,
        protocol.decode_copy_range,
        protocol.decode_flush,
        protocol.decode_fh,
        protocol.decode_interrupt,
        protocol.decode_init_flags,
    ):
        with contextlib.suppress(ProtocolError):
            decode(raw)
    with contextlib.suppress(ProtocolError):
        protocol.limit_readdir(bytearray(raw), 1)
    with contextlib.suppress(ProtocolError):
        protocol.amend_init(bytearray(raw), InitFlag(0))
