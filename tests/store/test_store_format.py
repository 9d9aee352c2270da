"""Golden bytes and checks of the object file's format."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, MAX_LAYER
from storaged.store.format import (
    META_OFFSET,
    META_SIZE,
    SUMS,
    TABLE_SIZE,
    ZERO_BLOCK,
    Header,
    Sources,
    SourcesLostError,
    bitmap_of,
    block_sum,
    block_sums,
    blocks_in,
    cluster_hash,
    decode_header,
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
    "02000000"  # format
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
    assert encode_meta(_HEADER, _table())[56:72].hex() == "2920ff145afa5aaf493bdd2aa2d95988"


def test_a_header_survives_encoding() -> None:
    meta = encode_meta(_HEADER, _table())
    header, table, sources = decode_meta(_HEADER.oid, _HEADER.cluster, meta)
    assert header == _HEADER
    assert table == _table()
    assert sources is None


_SOURCES = Sources(bytes([2, 1, 0, 3]) + bytes(1019) + b"\1", (0x207, 0x40F, MAX_LAYER))


def test_golden_bytes_of_an_overlay() -> None:
    meta = encode_meta(_HEADER, _table(), _SOURCES)
    assert meta[:44].hex() == _GOLDEN[:88]
    assert meta[44:48].hex() == "03000000", "number of bases"
    assert meta[72:512] == bytes(440)
    assert meta[512:1016].hex() == "02010003" + "00" * 500
    assert meta[1536:1560].hex() == ("00" * 15 + "01" + "0702000000000000"), (
        "the last source bytes, then the layers"
    )
    assert meta[1560:1576].hex() == "0f04000000000000" + "ffffffff07000000"
    assert meta[1576:2040] == bytes(464)
    for number in range(1, 8):
        sector = meta[512 * number : 512 * (number + 1)]
        own = xxh3_64_intdigest(sector[:504], _HEADER.oid + number)
        assert sector[504:] == own.to_bytes(8, "little")
    assert meta[4096:] == _table()
    found = decode_meta(_HEADER.oid, _HEADER.cluster, meta)
    assert found == (_HEADER, bytearray(_table()), _SOURCES)


def test_the_most_bases_fit() -> None:
    sources = Sources(bytes(i % 256 for i in range(1024)), tuple(range(1, 256)))
    meta = encode_meta(_HEADER, _table(), sources)
    assert len(meta) == META_SIZE
    assert decode_meta(_HEADER.oid, _HEADER.cluster, meta)[2] == sources


@given(st.integers(0, META_SIZE - 1), st.integers(1, 255))
def test_a_changed_byte_of_an_overlay_is_found_out(position: int, flip: int) -> None:
    meta = bytearray(encode_meta(_HEADER, _table(), _SOURCES))
    meta[position] ^= flip
    if 72 <= position < 512:
        return
    with pytest.raises(CorruptError):
        decode_meta(_HEADER.oid, _HEADER.cluster, meta)


@given(st.sets(st.integers(0, 7)))
def test_any_mix_of_old_and_new_sectors_tells_where_the_blocks_lie(new: set[int]) -> None:
    before = encode_meta(_HEADER, _table(), _SOURCES)
    later = Sources(bytes(504) + _SOURCES.sources[504:], _SOURCES.layers)
    after = encode_meta(_HEADER._replace(version=9, blocks=4), _table(), later)
    plain = encode_meta(_HEADER._replace(version=10), _table())
    for old, current in ((before, after), (after, plain)):
        mixed = b"".join((current if i in new else old)[512 * i : 512 * (i + 1)] for i in range(8))
        header, sources, _ = decode_header(_HEADER.oid, _HEADER.cluster, mixed + _table())
        assert header.version in (_HEADER.version, 9, 10)
        if sources is not None:
            sides = (decode_meta(_HEADER.oid, _HEADER.cluster, m)[2] for m in (old, current))
            allowed = [s.sources if s else bytes(1024) for s in sides]
            assert all(byte in (a[i] for a in allowed) for i, byte in enumerate(sources.sources))


def test_a_source_that_is_no_base_is_refused() -> None:
    sources = Sources(b"\4" + bytes(1023), (5, 6, 7))
    meta = encode_meta(_HEADER, _table(), sources)
    with pytest.raises(SourcesLostError):
        decode_meta(_HEADER.oid, _HEADER.cluster, meta)


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
    meta[8] = 3
    meta[64:72] = xxh3_64_intdigest(meta[:64]).to_bytes(8, "little")
    with pytest.raises(CorruptError, match="not known"):
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
