"""Golden bytes and checks of the object file's format."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT
from storaged.store.format import (
    META_OFFSET,
    META_SIZE,
    SUMS,
    TABLE_SIZE,
    ZERO_BLOCK,
    Header,
    bitmap_of,
    block_sum,
    block_sums,
    blocks_in,
    cluster_hash,
    decode_meta,
    encode_meta,
    mismatches,
    runs,
)

_HEADER = Header(
    oid=0x8000_0007_0000_0003,
    version=0x1_0000_0002,
    lineage=5,
    pool=3,
    pg=0xAB,
    blocks=2,
    cluster=cluster_hash("c0ffee"),
)
_GOLDEN = (
    "53484545504f424a"  # magic
    "01000000"  # format
    "00000000"  # flags
    "0300000007000080"  # oid
    "0200000001000000"  # version
    "05000000"  # lineage
    "ab00"  # pg
    "03"  # pool
    "00"
    "02000000"  # blocks
    "00000000"
)


def _table() -> bytes:
    sums = [0] * BLOCKS_PER_OBJECT
    sums[0], sums[1023] = 1, 0x1122334455667788
    return SUMS[BLOCKS_PER_OBJECT].pack(*sums)


def test_golden_bytes_of_the_header() -> None:
    meta = encode_meta(_HEADER, _table())
    assert META_OFFSET == 4 << 20
    assert len(meta) == META_SIZE == 12_288
    assert meta[:48].hex() == _GOLDEN
    assert meta[48:56] == xxh3_64_intdigest(b"c0ffee").to_bytes(8, "little")
    assert meta[56:64] == xxh3_64_intdigest(meta[4096:]).to_bytes(8, "little")
    assert meta[64:72] == xxh3_64_intdigest(meta[:64]).to_bytes(8, "little")
    assert meta[72:4096] == bytes(4024)
    assert meta[4096:4104].hex() == "0100000000000000"
    assert meta[-8:].hex() == "8877665544332211"


def test_golden_header_has_the_golden_checksum() -> None:
    assert xxh3_64_intdigest(b"c0ffee") == 0x915D4EB7A9DCA8E6
    assert encode_meta(_HEADER, _table())[56:72].hex() == "2920ff145afa5aafcbf5678c6b99e071"


def test_a_header_survives_encoding() -> None:
    header, table = decode_meta(_HEADER.oid, _HEADER.cluster, encode_meta(_HEADER, _table()))
    assert header == _HEADER
    assert table == _table()


@given(st.integers(0, META_SIZE - 1), st.integers(1, 255))
def test_a_changed_byte_is_found_out(position: int, flip: int) -> None:
    meta = bytearray(encode_meta(_HEADER, _table()))
    meta[position] ^= flip
    if 72 <= position < 4096:
        decode_meta(_HEADER.oid, _HEADER.cluster, meta)  # Padding carries nothing.
        return
    with pytest.raises(CorruptError):
        decode_meta(_HEADER.oid, _HEADER.cluster, meta)


def test_another_objects_or_clusters_header_is_refused() -> None:
    meta = encode_meta(_HEADER, _table())
    with pytest.raises(CorruptError, match="another"):
        decode_meta(_HEADER.oid + 1, _HEADER.cluster, meta)
    with pytest.raises(CorruptError, match="another"):
        decode_meta(_HEADER.oid, cluster_hash("other"), meta)
    with pytest.raises(CorruptError, match="ends"):
        decode_meta(_HEADER.oid, _HEADER.cluster, meta[:-1])


def test_a_newer_format_is_refused() -> None:
    meta = bytearray(encode_meta(_HEADER, _table()))
    meta[8] = 2
    meta[64:72] = xxh3_64_intdigest(meta[:64]).to_bytes(8, "little")
    with pytest.raises(CorruptError, match="too new"):
        decode_meta(_HEADER.oid, _HEADER.cluster, meta)


def test_zero_blocks_have_the_entry_zero() -> None:
    assert block_sum(ZERO_BLOCK) == 0
    block = random.Random(1).randbytes(BLOCK_SIZE)
    sums = block_sums(memoryview(block + ZERO_BLOCK + block))
    assert sums == [xxh3_64_intdigest(block), 0, xxh3_64_intdigest(block)]


def test_mismatches_names_wrong_and_missing_blocks() -> None:
    data = random.Random(2).randbytes(4 * BLOCK_SIZE)
    sums = tuple(block_sums(memoryview(data)))
    assert mismatches(memoryview(data), sums) == []
    bad = bytearray(data)
    bad[BLOCK_SIZE] ^= 1
    assert mismatches(memoryview(bad), sums) == [1]
    assert mismatches(memoryview(data)[: 2 * BLOCK_SIZE + 5], sums) == [2, 3]
    assert mismatches(memoryview(b""), sums) == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_runs_cover_everything_once_and_alternate(sums: list[int]) -> None:
    found = runs(sums)
    assert [i for start, end, _ in found for i in range(start, end)] == list(range(len(sums)))
    for start, end, is_data in found:
        assert {entry != 0 for entry in sums[start:end]} == {is_data}
    assert all(a[2] != b[2] for a, b in itertools.pairwise(found))


@given(st.sets(st.integers(0, BLOCKS_PER_OBJECT - 1)))
def test_bitmaps_name_the_blocks(numbers: set[int]) -> None:
    sums = [int(i in numbers) for i in range(BLOCKS_PER_OBJECT)]
    bitmap = bitmap_of(sums)
    assert len(bitmap) == 128
    assert blocks_in(bitmap) == sorted(numbers)
    assert TABLE_SIZE == 8 * BLOCKS_PER_OBJECT
