"""What the store has, found at start: from the index of a clean stop, or from the headers.

Always holds:
- The index `index` exists only while no store has the directory open: it is written by a clean
  stop and removed, durably, before anything may change.
- A file whose header cannot be trusted is listed all the same, never dropped.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from xxhash import xxh3_64_intdigest

from sheepfs.core.errors import CorruptError
from sheepfs.core.geometry import format_oid, layer_of
from storaged.store.disk import Disk, read_file, replace_file
from storaged.store.entry import CORRUPT, StoredObject, open_overlay, sibling
from storaged.store.format import META_OFFSET, META_SIZE, decode_header, decode_meta

log = logging.getLogger(__name__)
INDEX = "index"
_MAGIC = b"SHEEPIDX"
_LAYER = struct.Struct("<Q")
_HEADER = struct.Struct("<8sQQ")
"""magic, number of records, xxh3 of all that follows."""
_RECORD = struct.Struct("<QQIHHBBH")
"""oid, version, lineage, blocks, pg, pool, state, number of bases. The layers of all bases, 8 bytes
each, stand behind the last record, in the order of the records."""


def write_index(disk: Disk, entries: Sequence[StoredObject]) -> None:
    """Write the index durably (OSError)."""
    body = b"".join(
        _RECORD.pack(e.oid, e.version, e.lineage, e.blocks, e.pg, e.pool, e.state, len(e.bases))
        for e in entries
    )
    layers = [layer_of(base) for e in entries for base in e.bases]
    body += struct.pack(f"<{len(layers)}Q", *layers)
    header = _HEADER.pack(_MAGIC, len(entries), xxh3_64_intdigest(body))
    replace_file(disk, INDEX, header + body)


def take_index(disk: Disk) -> list[StoredObject] | None:
    """Read the index and remove it; None if there is none that can be trusted (OSError)."""
    try:
        data = read_file(disk, INDEX)
    except FileNotFoundError:
        return None
    disk.unlink(INDEX)
    disk.fsync_dir("")
    found = _checked(data)
    if found is None:
        log.warning("the index of the last stop is damaged; reading the headers instead")
        return None
    return _entries(*found)


def stopped_cleanly(disk: Disk) -> bool:
    """Tell whether there is an index that can be trusted; nothing is changed (OSError)."""
    try:
        return _checked(read_file(disk, INDEX)) is not None
    except FileNotFoundError:
        return False


def _checked(data: bytes) -> tuple[memoryview, int] | None:
    """Give the records and their number; None if the index is damaged."""
    if len(data) >= _HEADER.size:
        magic, count, check = _HEADER.unpack_from(data)
        body = memoryview(data)[_HEADER.size :]
        if magic == _MAGIC and xxh3_64_intdigest(body) == check:
            return body, count
    return None


def _entries(body: memoryview, count: int) -> list[StoredObject]:
    records = body[: count * _RECORD.size]
    layers = iter(_LAYER.iter_unpack(body[len(records) :]))
    result = []
    for oid, version, lineage, blocks, pg, pool, state, bases in _RECORD.iter_unpack(records):
        own = tuple(sibling(oid, layer) for (layer,) in islice(layers, bases))
        result.append(StoredObject(oid, pool, pg, version, lineage, blocks, state, own))
    return result


def scan(disk: Disk, cluster: int, marked: AbstractSet[int] | None) -> list[StoredObject]:
    """Find all object files and read their headers (OSError). Blocks.

    Args:
        marked: objects that may have been dirty; None: all. They are taken as the disk has them:
            after a failed sync (I5) the kernel calls pages clean that it never wrote, and as long
            as they are in memory they look like what was to be there.

    Of two files with one id, which a crash between making the one and removing the other
    leaves, the one with the higher version stays; the other goes to quarantine.
    """
    found: dict[int, StoredObject] = {}
    for entry in object_files(disk):
        _read_entry(disk, cluster, entry, marked is None or entry.oid in marked)
        rival = found.get(entry.oid)
        if rival is not None:
            entry, loser = sorted((entry, rival), key=_trust, reverse=True)
            log.error("object %s is there twice: quarantined %s", entry.oid, loser.path)
            disk.rename(loser.path, quarantine_path(disk, loser))
            disk.fsync_dir("quarantine")
            disk.fsync_dir(loser.directory)
        found[entry.oid] = entry
    return list(found.values())


def object_files(disk: Disk) -> Iterator[StoredObject]:
    """Give an entry for each object file, by its name alone (OSError)."""
    for pool in _numbers(disk, "objects", 10, 1, range(1, 256)):
        for pg in _numbers(disk, f"objects/{pool}", 16, 4, range(1 << 16)):
            for oid in _numbers(disk, f"objects/{pool}/{pg:04x}", 16, 16, range(1 << 64)):
                yield StoredObject(oid, pool, pg)


def quarantine_path(disk: Disk, entry: StoredObject) -> str:
    """Give a free name in quarantine for an object's file (OSError)."""
    names = set(disk.listdir("quarantine"))
    stem = f"{format_oid(entry.oid)}.{entry.version:016x}"
    number = 0
    while f"{stem}.{number}" in names:
        number += 1
    return f"quarantine/{stem}.{number}"


def remove_leftovers(disk: Disk) -> None:
    """Remove the temporary files of a crash (OSError)."""
    for name in disk.listdir("tmp"):
        disk.unlink(f"tmp/{name}")


def _trust(entry: StoredObject) -> tuple[bool, int]:
    return entry.state != CORRUPT, entry.version


def _read_entry(disk: Disk, cluster: int, entry: StoredObject, is_marked: bool) -> None:
    fd = disk.open(entry.path)
    try:
        if is_marked:
            disk.drop_cache(fd)
        meta = disk.pread(fd, META_SIZE, META_OFFSET)
        header, sources, _ = decode_header(entry.oid, cluster, meta)
        entry.version, entry.lineage, entry.blocks = header.version, header.lineage, header.blocks
        overlay = open_overlay(entry.oid, sources)
        entry.bases = () if overlay is None else overlay.used()
        decode_meta(entry.oid, cluster, meta)
    except CorruptError as error:
        log.error("%s", error)
        entry.state = CORRUPT
    except OSError as error:
        log.error("object %s: the header cannot be read: %s", format_oid(entry.oid), error)
        entry.state = CORRUPT
    finally:
        disk.close(fd)


def _numbers(disk: Disk, path: str, base: int, width: int, allowed: range) -> list[int]:
    """Give the numbers that name the entries of a directory; other names are logged."""
    result = []
    for name in disk.listdir(path):
        try:
            number = int(name, base)
        except ValueError:
            number = -1
        digits = f"{number:0{width}{'x' if base == 16 else 'd'}}"
        if number in allowed and digits == name:
            result.append(number)
        else:
            log.warning("%s/%s is not ours and is left alone", path, name)
    return result
