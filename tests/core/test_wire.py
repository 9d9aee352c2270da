from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError, SheepError, Status, error_for
from sheepfs.core.wire import (
    HEADER_SIZE,
    MAX_FRAME,
    MAX_HELLO,
    Op,
    decode,
    encode,
    frame_length,
)

u8, u16 = st.integers(0, 2**8 - 1), st.integers(0, 2**16 - 1)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
FIELDS = {
    "flags": u8,
    "status": u16,
    "epoch": u32,
    "vdi": u32,
    "pool": u8,
    "pg": u16,
    "token": u64,
    "oid": u64,
    "offset": u32,
    "span": u32,
    "prev": u64,
    "version": u64,
}
GOLDEN = {
    "flags": 1,
    "status": 3,
    "epoch": 0x01020304,
    "vdi": 0x11121314,
    "pool": 3,
    "pg": 0x2122,
    "token": 0x3132333435363738,
    "oid": 0x4142434445464748,
    "offset": 0x51525354,
    "span": 0x61626364,
    "prev": 0x7172737475767778,
    "version": 0x8182838485868788,
}

GOLDEN_BYTES = (
    "4f000000 05010300 a52eb948 da942ce6 ccbbaa99 04030201 "
    "14131211 03002221 38373635 34333231 48474645 44434241 "
    "54535251 64636261 78777675 74737271 88878685 84838281"
)


@given(u64, u8, u32, st.binary(max_size=300), st.fixed_dictionaries(FIELDS))
def test_a_frame_survives_encoding(
    session: int, op: int, request: int, payload: bytes, fields: dict[str, int]
) -> None:
    frame = encode(session, op, request, payload, **fields) + payload
    assert frame_length(frame, 0) == len(frame) == HEADER_SIZE + len(payload)
    header, found = decode(session, memoryview(frame))
    assert (header.op, header.request, bytes(found)) == (op, request, payload)
    assert {name: getattr(header, name) for name in fields} == fields


def test_the_layout_is_pinned() -> None:
    """Daemons of two versions talk to each other: a change needs a new VERSION."""
    frame = encode(0x0102030405060708, Op.WRITE, 0x99AABBCC, b"payload", **GOLDEN)
    assert HEADER_SIZE == 72
    assert frame.hex(" ", -4) == GOLDEN_BYTES


@given(
    st.binary(max_size=100),
    st.integers(0, 8 * (HEADER_SIZE + 100) - 1),
)
def test_a_flipped_bit_anywhere_is_found(payload: bytes, bit: int) -> None:
    frame = bytearray(encode(7, Op.WRITE, 1, payload, **GOLDEN) + payload)
    bit %= 8 * len(frame)
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode(7, memoryview(frame))


@given(st.binary(max_size=100), u64, u64)
def test_a_frame_of_another_session_is_refused(payload: bytes, mine: int, other: int) -> None:
    if mine == other:
        return
    frame = encode(other, Op.READ, 1, payload) + payload
    with pytest.raises(ProtocolError):
        decode(mine, memoryview(frame))


@given(st.binary(min_size=1, max_size=64), st.binary(min_size=1, max_size=64))
def test_a_payload_of_another_frame_is_refused(one: bytes, other: bytes) -> None:
    if one == other:
        return
    frame = encode(7, Op.WRITE, 1, one) + other
    with pytest.raises(ProtocolError):
        decode(7, memoryview(frame))


@given(st.binary(min_size=HEADER_SIZE, max_size=400))
def test_random_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(7, memoryview(junk))


@pytest.mark.parametrize("length", [0, 1, HEADER_SIZE - 1, MAX_FRAME + 1, 2**32 - 1])
def test_a_length_that_cannot_be_is_refused_before_it_is_believed(length: int) -> None:
    with pytest.raises(ProtocolError):
        frame_length(length.to_bytes(4, "little"), 0)


def test_the_longest_frames_are_taken() -> None:
    assert frame_length(MAX_FRAME.to_bytes(4, "little"), 0) == MAX_FRAME
    assert frame_length(MAX_HELLO.to_bytes(4, "little"), 0, MAX_HELLO) == MAX_HELLO
    with pytest.raises(ProtocolError):
        frame_length((MAX_HELLO + 1).to_bytes(4, "little"), 0, MAX_HELLO)


def test_operations_keep_their_numbers() -> None:
    assert [op.value for op in Op][:22] == list(range(1, 23))
    assert Op["TRAFFIC"].value == 25
    assert [op.name for op in Op][:17] == [
        *("HELLO", "PING", "MAP", "READ", "WRITE", "PUNCH", "FLUSH", "DELETE", "STAT"),
        *("EXTENTS", "PULL", "REPAIR", "LIST", "FENCE", "REPORT", "JOINED", "STATUS"),
    ]


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_every_status_stands_for_an_error_of_that_status(status: Status) -> None:
    error = error_for(status, "why")
    assert isinstance(error, SheepError)
    assert error.status == status
    assert str(error) == "why"


def test_an_unknown_status_is_a_protocol_error() -> None:
    assert isinstance(error_for(9999, "why"), ProtocolError)
