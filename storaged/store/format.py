"""The on-disk format of an object file, and the checksums of its blocks.

An object file is sparse and describes itself:

    0          data, 4 MiB; a block that holds only zeros or is inherited may be a hole
    4 MiB      header, 4 KiB: the struct below, zero-padded; of an overlay also its sources
    + 4 KiB    table, 8 KiB: one little-endian xxh3_64 for each 4 KiB block of data

Always holds:
- A table entry of 0 says: the block reads as zeros and is not looked at. A block whose xxh3_64
  happens to be 0 has the entry 1.
- Header and table are written with one pwrite and carry their own checksums.
- Each sector of 512 bytes of the header stands for itself: of an overlay that is written when the
  power goes, any mix of old and new sectors is good (see `Overlay` for why that is right).
- Golden bytes in tests/store/test_store_format.py pin the layout; a change needs a new `FORMAT`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, OBJECT_SIZE, format_oid
from sheepfs.core.wire import Buffer

FORMAT = 2
MAGIC = b"SHEEPOBJ"
_HEADER = struct.Struct("<8sIIQQIHBxIHHQQ")
"""magic, format, flags (0), oid, version, lineage, pg, pool, own blocks, number of bases, 0,
cluster hash, xxh3 of the table; then the xxh3 of all these."""
MAX_BASES = 255
_SECTOR = 512
_PAYLOAD = _SECTOR - 8
"""Each sector behind the header's first one: a piece of the sources, then its xxh3, seeded with
the oid plus the sector's number."""
_SECTORS = range(1, BLOCK_SIZE // _SECTOR)
_EMPTY_SECTOR = bytes(_SECTOR)
_SUM = struct.Struct("<Q")
HEADER_SIZE = BLOCK_SIZE
TABLE_SIZE = 8 * BLOCKS_PER_OBJECT
META_OFFSET = OBJECT_SIZE
META_SIZE = HEADER_SIZE + TABLE_SIZE
BITMAP_SIZE = BLOCKS_PER_OBJECT // 8

_U64 = (1 << 64) - 1

ZERO_BLOCK = bytes(BLOCK_SIZE)
_ZERO_DIGEST = xxh3_64_intdigest(ZERO_BLOCK)
EMPTY_TABLE = bytes(TABLE_SIZE)
SUMS = [struct.Struct(f"<{count}Q") for count in range(BLOCKS_PER_OBJECT + 1)]
"""`SUMS[n]` packs and unpacks n table entries at once."""


class Header(NamedTuple):
    """A checked header. `blocks` counts the blocks of the object's own file that are no holes."""

    oid: int
    version: int
    lineage: int
    pool: int
    pg: int
    blocks: int
    cluster: int


def cluster_hash(cluster: str) -> int:
    """Give the number by which object files name their cluster."""
    return xxh3_64_intdigest(cluster.encode())


class SourcesLostError(CorruptError):
    """A header says that blocks are inherited, and not from where."""


class Sources(NamedTuple):
    """Where an overlay's blocks lie, as on disk.

    Attributes:
        sources: a byte for each block: 0 is the own file (or a hole), k is `layers[k - 1]`.
        layers: of the objects of the same kind and index that blocks are inherited from.
    """

    sources: bytes
    layers: tuple[int, ...]


def encode_meta(header: Header, table: Buffer, sources: Sources | None = None) -> bytes:
    """Give header and table as they stand at `META_OFFSET`."""
    start = _HEADER.pack(
        MAGIC,
        FORMAT,
        0,
        header.oid,
        header.version,
        header.lineage,
        header.pg,
        header.pool,
        header.blocks,
        0 if sources is None else len(sources.layers),
        0,
        header.cluster,
        xxh3_64_intdigest(table),
    )
    start += _SUM.pack(xxh3_64_intdigest(start))
    if sources is None:
        return b"".join((start, bytes(HEADER_SIZE - len(start)), table))
    parts = [start, bytes(_SECTOR - len(start))]
    body = sources.sources + struct.pack(f"<{len(sources.layers)}Q", *sources.layers)
    for number in _SECTORS:
        piece = body[(number - 1) * _PAYLOAD : number * _PAYLOAD].ljust(_PAYLOAD, b"\0")
        parts += (piece, _SUM.pack(xxh3_64_intdigest(piece, header.oid + number & _U64)))
    return b"".join((*parts, table))


def decode_header(oid: int, cluster: int, meta: Buffer) -> tuple[Header, Sources | None, int]:
    """Check and decode a header alone; give also the table's checksum.

    Raises:
        CorruptError: it is not the header of this object of this cluster.
        SourcesLostError: it is, but where the object's blocks lie is unreadable.
    """
    what = f"object {format_oid(oid)}"
    if len(meta) < META_SIZE:
        raise CorruptError(f"{what}: the file ends before its header and table")
    view = memoryview(meta)
    fields = _HEADER.unpack_from(view)
    (own,) = _SUM.unpack_from(view, _HEADER.size)
    if fields[0] != MAGIC or xxh3_64_intdigest(view[: _HEADER.size]) != own:
        raise CorruptError(f"{what}: the header's checksum does not match")
    (
        _,
        version_of_format,
        flags,
        found,
        version,
        lineage,
        pg,
        pool,
        blocks,
        count,
        _,
        owner,
        check,
    ) = fields
    if version_of_format != FORMAT or flags:
        raise CorruptError(
            f"{what}: file format {version_of_format}, flags {flags:#x}: not known here"
        )
    if found != oid or owner != cluster:
        raise CorruptError(f"{what}: the header is that of another object or cluster")
    header = Header(found, version, lineage, pool, pg, blocks, owner)
    if not count:
        return header, None, check
    pieces = []
    for number in _SECTORS:
        sector = view[number * _SECTOR : (number + 1) * _SECTOR]
        (own,) = _SUM.unpack_from(sector, _PAYLOAD)
        piece = bytes(sector[:_PAYLOAD])
        # All zeros: the object had just become a plain one when the power went.
        if xxh3_64_intdigest(piece, oid + number & _U64) != own and sector != _EMPTY_SECTOR:
            raise SourcesLostError(f"{what}: the checksum of its sources does not match")
        pieces.append(piece)
    body = b"".join(pieces)
    layers = struct.unpack_from(f"<{min(count, MAX_BASES)}Q", body, BLOCKS_PER_OBJECT)
    sources = body[:BLOCKS_PER_OBJECT]
    if count > MAX_BASES or max(sources) > count:
        raise SourcesLostError(f"{what}: blocks of its sources are none of its bases")
    return header, Sources(sources, layers), check


def decode_meta(oid: int, cluster: int, meta: Buffer) -> tuple[Header, bytearray, Sources | None]:
    """Check and decode `META_SIZE` bytes read at `META_OFFSET`.

    Raises:
        CorruptError: they are not the header and table of this object of this cluster.
    """
    header, sources, check = decode_header(oid, cluster, meta)
    table = bytearray(memoryview(meta)[HEADER_SIZE:META_SIZE])
    if xxh3_64_intdigest(table) != check:
        raise CorruptError(f"object {format_oid(oid)}: the table's checksum does not match")
    return header, table, sources


def block_sum(block: Buffer) -> int:
    """Give the table entry of one block of 4 KiB."""
    digest = xxh3_64_intdigest(block)
    if digest == _ZERO_DIGEST and bytes(block) == ZERO_BLOCK:
        return 0
    return digest or 1


def block_sums(view: memoryview) -> list[int]:
    """Give the table entries of the whole blocks in `view`."""
    digest = xxh3_64_intdigest
    sums = [digest(view[i : i + BLOCK_SIZE]) for i in range(0, len(view), BLOCK_SIZE)]
    if _ZERO_DIGEST not in sums and 0 not in sums:
        return sums
    return [
        block_sum(view[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
        if found in (_ZERO_DIGEST, 0)
        else found
        for i, found in enumerate(sums)
    ]


def mismatches(view: memoryview, sums: tuple[int, ...]) -> list[int]:
    """Give the indexes in `sums` (none is 0) of the blocks of `view` that do not match.

    Blocks that `view` is too short for do not match.
    """
    digest = xxh3_64_intdigest
    found = [digest(view[i : i + BLOCK_SIZE]) for i in range(0, len(view), BLOCK_SIZE)]
    if tuple(found) == sums and len(view) == BLOCK_SIZE * len(sums):
        return []
    found += [0] * (len(sums) - len(found))
    # A digest of 0 is kept as 1. A block cut short has another digest than the whole block.
    return [i for i, good in enumerate(sums) if found[i] != good and (found[i] or 1) != good]


def runs(sums: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Split table entries into runs of data and of holes: (start, end, is data), in order."""
    result = []
    start = 0
    for i in range(1, len(sums) + 1):
        if i == len(sums) or (sums[i] == 0) != (sums[start] == 0):
            result.append((start, i, sums[start] != 0))
            start = i
    return result


def bitmap_of(sums: Sequence[int]) -> bytes:
    """Give 128 bytes in which bit `i % 8` of byte `i // 8` says that block i is no hole."""
    bits = bytearray(BITMAP_SIZE)
    for i, entry in enumerate(sums):
        if entry:
            bits[i >> 3] |= 1 << (i & 7)
    return bytes(bits)


def blocks_in(bitmap: Buffer) -> list[int]:
    """Give the block numbers whose bit is set in a bitmap of `bitmap_of`."""
    # Digits, lowest first: to shift a number of 1,024 bits for each takes ten times as long.
    digits = bin(int.from_bytes(bitmap, "little"))[:1:-1]
    return [i for i, digit in enumerate(digits) if digit == "1"]
