"""The backup format: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from sheepfs_tools.transfer import backup_stream
from sheepfs_tools.transfer.backup_stream import (
    MAX_DATA,
    AlteredError,
    BackupError,
    BackupHeader,
    Data,
    NewerFormatError,
    Part,
    Reader,
    Totals,
    TruncatedError,
    Writer,
    Zeros,
    pack,
)

HEADER = BackupHeader("c0ffee", "vm1.raw", 2, "daily", 7, 1 << 40, 3, 1e9, "old", 5)


def write(
    parts: list[Data | Zeros], *, compress: bool = False, header: BackupHeader = HEADER
) -> list[bytes]:
    writer = Writer(header)
    chunks = [writer.header()]
    for part in parts:
        if isinstance(part, Data):
            packed = pack(part.data) if compress else b""
            chunks.append(writer.data(part.offset, part.data, packed))
        else:
            chunks.append(writer.zeros(part.offset, part.length))
    chunks.append(writer.end())
    return chunks


def read(stream: bytes, piece: int = 1 << 20) -> list[Part]:
    reader = Reader()
    parts: list[Part] = []
    for start in range(0, len(stream), piece):
        parts += reader.feed(stream[start : start + piece])
    reader.finish()
    return parts


@st.composite
def contents(draw: st.DrawFn) -> list[Data | Zeros]:
    parts: list[Data | Zeros] = []
    offset = 0
    for _ in range(draw(st.integers(0, 5))):
        offset += draw(st.integers(0, 1 << 30))
        if draw(st.booleans()):
            data = draw(st.binary(min_size=1, max_size=60)) * draw(st.integers(1, 3))
            parts.append(Data(offset, data))
            offset += len(data)
        else:
            length = draw(st.integers(1, 1 << 33))
            parts.append(Zeros(offset, length))
            offset += length
    return parts


SAMPLE: list[Data | Zeros] = [Data(4096, b"abc" * 20), Zeros(8192, 1 << 30), Data(1 << 35, b"z")]


@given(contents(), st.booleans(), st.integers(1, 300))
def test_what_was_written_comes_back_whatever_the_pieces(
    parts: list[Data | Zeros], compress: bool, piece: int
) -> None:
    stream = b"".join(write(parts, compress=compress))
    header, *found, totals = read(stream, piece)
    assert header == HEADER
    assert found == parts
    assert totals == Totals(
        len(parts),
        sum(len(p.data) for p in parts if isinstance(p, Data)),
        sum(p.length for p in parts if isinstance(p, Zeros)),
    )


@given(contents(), st.booleans(), st.data())
def test_every_truncation_is_refused(
    parts: list[Data | Zeros], compress: bool, data: st.DataObject
) -> None:
    stream = b"".join(write(parts, compress=compress))
    length = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(TruncatedError, match=f"truncated after {length} bytes"):
        read(stream[:length])


@pytest.mark.parametrize("compress", [False, True])
def test_every_flipped_byte_is_refused(compress: bool) -> None:
    stream = b"".join(write(SAMPLE, compress=compress))
    for place in range(len(stream)):
        for bits in (1, 0x80, 0xFF):
            bad = bytearray(stream)
            bad[place] ^= bits
            with pytest.raises(BackupError):
                read(bytes(bad))


def test_the_place_of_a_flipped_byte_is_told() -> None:
    header, first, *rest = write(SAMPLE)
    bad = bytearray(first)
    bad[50] ^= 1
    with pytest.raises(AlteredError, match=f"altered at byte {len(header)}"):
        read(b"".join((header, bad, *rest)))


def test_records_left_out_swapped_repeated_or_of_another_backup_are_refused() -> None:
    header, one, two, three, end = write(SAMPLE)
    other = write(SAMPLE, header=dataclasses.replace(HEADER, snapshot=8))
    for order in (
        (header, one, three, end),
        (header, two, one, three, end),
        (header, one, one, two, three, end),
        (header, one, two, end),
        (header, end),
        (header, one, other[2], three, end),
        (other[0], one, two, three, end),
        (header, one, two, three, other[4]),
        (header, one, two, three, end, end),
        (header, one, two, three, end, b"\0"),
    ):
        with pytest.raises(AlteredError):
            read(b"".join(order))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_anything_else_is_refused(junk: bytes) -> None:
    with pytest.raises(BackupError):
        read(junk)
    with pytest.raises(BackupError):
        read(write([])[0] + junk)


def test_a_newer_format_says_so() -> None:
    prefix = struct.pack("<8sII", b"SHEEPBAK", 2, 10)
    stream = prefix + struct.pack("<Q", xxh3_64_intdigest(prefix)) + bytes(50)
    with pytest.raises(NewerFormatError, match=r"made by a newer version \(format 2\)"):
        read(stream)


def test_a_length_that_cannot_be_is_refused_before_its_bytes_are_awaited() -> None:
    prefix = struct.pack("<8sII", b"SHEEPBAK", 1, 1 << 31)
    with pytest.raises(AlteredError):
        list(Reader().feed(prefix + struct.pack("<Q", xxh3_64_intdigest(prefix))))
    reader = Reader()
    start = write([])[0]
    list(reader.feed(start))
    record = struct.pack("<BBHIQQ", 1, 0, 0, MAX_DATA + 1, 0, MAX_DATA + 1)
    chain = struct.unpack("<Q", start[-8:])[0]
    with pytest.raises(AlteredError, match="cannot be"):
        list(reader.feed(record + struct.pack("<Q", xxh3_64_intdigest(record, chain))))


def test_a_record_that_unpacks_to_more_than_it_says_is_refused() -> None:
    import zlib

    start = write([])[0]
    chain = struct.unpack("<Q", start[-8:])[0]
    packed = zlib.compress(bytes(1 << 20))
    head = struct.pack("<BBHIQQ", 1, 1, 0, len(packed), 0, len(packed) + 1)
    first = xxh3_64_intdigest(head, chain)
    last = xxh3_64_intdigest(packed, first)
    record = head + struct.pack("<Q", first) + packed + struct.pack("<Q", last)
    with pytest.raises(AlteredError, match="decompress"):
        list(Reader().feed(start + record))


def test_compression_is_used_only_where_it_saves() -> None:
    noise = bytes(range(64))
    plain, packed = (write([Data(0, noise)], compress=c) for c in (False, True))
    assert plain == packed
    assert len(write([Data(0, bytes(MAX_DATA))], compress=True)[1]) < MAX_DATA // 100


def test_what_does_not_compress_at_its_start_is_not_tried() -> None:
    noise = random.Random(1).randbytes(1 << 20)
    assert pack(noise) == b""
    assert pack(noise + bytes(MAX_DATA - len(noise))) == b""
    assert 0 < len(pack(bytes(100) + noise[:100])) < 200


def test_records_out_of_order_or_beyond_the_end_are_not_written() -> None:
    writer = Writer(HEADER)
    writer.header()
    writer.data(4096, b"x" * 4096)
    for offset, length in ((0, 1), (8191, 1), (1 << 40, 1), ((1 << 40) - 1, 2), (9000, 0)):
        with pytest.raises(ValueError, match="not in order"):
            writer.zeros(offset, length)


def test_golden_bytes() -> None:
    header = BackupHeader("c0", "v.raw", 2, "t", 3, 1 << 20, 3, 1.5)
    stream = b"".join(write([Data(0, b"data"), Zeros(4096, 4096)], header=header))
    assert backup_stream.FORMAT == 1
    assert stream.hex() == GOLDEN


GOLDEN = (
    "534845455042414b0100000099000000dbdd37933bc58b8d7b22636c7573746572223a20226330222c20226e"
    "616d65223a2022762e726177222c2022766469223a20322c2022746167223a202274222c2022736e61707368"
    "6f74223a20332c202273697a65223a20313034383537362c2022636f70696573223a20332c20226372656174"
    "6564223a20312e352c2022626173655f746167223a2022222c2022626173655f736e617073686f74223a2030"
    "7d6f950663161d40e9010000000400000000000000000000000400000000000000a5b873a91143a048646174"
    "6160eb833e72266aa4020000000000000000100000000000000010000000000000b822ffe0e10bdef2030000"
    "0020000000020000000000000004000000000000000e9b90f68c668723001000000000000005010000000000"
    "001d175cbfd2937ea96c03eed7bf2fdaa1ee8fbf35dcf58f38"
)
