"""Ids and geometry: how a byte range of a VDI becomes objects, and objects become placement groups.

Always holds:
- An object id is one unsigned 64-bit number: kind (1 bit), layer (35 bits), index (28 bits).
  It is compared, hashed and packed as a plain int on the hot path.
- A layer id is serial (26 bits), family tag (6 bits), copies (3 bits): an object id alone tells
  its pool and, by tag and index, its placement group.
- Layers of one family (a VDI, its snapshots and clones) share their tag, so all objects of one
  index of a family lie on the same nodes: a copy-on-write never crosses the network.
- Serials are never reused, so an object id names the same slice of the same generation for ever.
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_SIZE = 4096
"""Bytes covered by one checksum."""
OBJECT_SIZE = 4 << 20
"""Bytes of VDI data in one object."""
BLOCKS_PER_OBJECT = OBJECT_SIZE // BLOCK_SIZE

_INDEX_BITS = 28
_LAYER_BITS = 35
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_LAYER_MASK = (1 << _LAYER_BITS) - 1
_MAP_BIT = 1 << 63
_U64 = (1 << 64) - 1

MAX_LAYER = _LAYER_MASK
_COPIES_BITS = 3
_TAG_BITS = 6
_COPIES_MASK = (1 << _COPIES_BITS) - 1
_TAG_MASK = (1 << _TAG_BITS) - 1
_SERIAL_SHIFT = _COPIES_BITS + _TAG_BITS
_PLACE_MASK = _MAP_BIT | _TAG_MASK << _COPIES_BITS + _INDEX_BITS | _INDEX_MASK
MAX_SERIAL = MAX_LAYER >> _SERIAL_SHIFT
MAX_VDI_SIZE = OBJECT_SIZE << _INDEX_BITS
"""Largest VDI in bytes: 1 PiB."""

MAP_ENTRY_SIZE = 8
MAP_ENTRIES_PER_BLOCK = BLOCK_SIZE // MAP_ENTRY_SIZE
MAP_ENTRIES_PER_OBJECT = OBJECT_SIZE // MAP_ENTRY_SIZE


def make_layer(serial: int, tag: int, copies: int) -> int:
    """Give the id of a layer.

    Args:
        serial: number that no other layer has, 1 to `MAX_SERIAL`.
        tag: of the layer's family; a new family takes its first serial (modulo 64).
        copies: replicas of each of its objects.
    """
    return serial << _SERIAL_SHIFT | (tag & _TAG_MASK) << _COPIES_BITS | copies


def copies_of(layer: int) -> int:
    """Give the number of copies of a layer's objects."""
    return layer & _COPIES_MASK


def tag_of(layer: int) -> int:
    """Give the tag that all layers of a family share."""
    return layer >> _COPIES_BITS & _TAG_MASK


def serial_of(layer: int) -> int:
    """Give a layer's serial number; a later one is greater."""
    return layer >> _SERIAL_SHIFT


def pool_of(oid: int) -> int:
    """Give the pool (number of copies) of an object."""
    return oid >> _INDEX_BITS & _COPIES_MASK


def data_object(layer: int, index: int) -> int:
    """Give the id of the data object `index` (in units of 4 MiB) of `layer`."""
    return layer << _INDEX_BITS | index


def map_object(layer: int, index: int) -> int:
    """Give the id of the map object `index` (each holds 524,288 map entries) of `layer`."""
    return _MAP_BIT | layer << _INDEX_BITS | index


def is_map_object(oid: int) -> bool:
    """Tell map objects from data objects."""
    return oid >= _MAP_BIT


def layer_of(oid: int) -> int:
    """Give the layer that an object belongs to."""
    return oid >> _INDEX_BITS & _LAYER_MASK


def index_of(oid: int) -> int:
    """Give an object's index within its layer and kind."""
    return oid & _INDEX_MASK


def format_oid(oid: int) -> str:
    """Give the 16 hex digits that name an object in files and logs."""
    return f"{oid:016x}"


def describe_oid(oid: int) -> str:
    """Give an object id as a person reads it: `data layer 0x20b index 12`."""
    kind = "map" if is_map_object(oid) else "data"
    return f"{kind} layer {layer_of(oid):#x} index {index_of(oid)}"


def pg_of(oid: int, pg_count: int) -> int:
    """Give the placement group of an object within its pool of `pg_count` groups.

    Kind, family tag and index decide, not the serial: the objects that copy-on-write makes of
    one another share a group.

    Source: Fibonacci hashing (Knuth, TAOCP 3, 6.4): neighbouring indexes of one layer, which is
    what a sequential stream touches, spread evenly.
    """
    place = oid & _PLACE_MASK
    return ((place * 0x9E3779B97F4A7C15 & _U64) >> 32) % pg_count


def object_count(size_bytes: int) -> int:
    """Give how many objects cover `size_bytes`."""
    return -(-size_bytes // OBJECT_SIZE)


def split(offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Split a byte range of a VDI at object borders.

    Yields:
        (object index, offset within the object, length), in order; nothing for an empty range.
    """
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        index, within = divmod(offset_bytes, OBJECT_SIZE)
        piece = min(OBJECT_SIZE - within, end - offset_bytes)
        yield index, within, piece
        offset_bytes += piece
