"""A data directory without its daemon: what is there, and whether it is good. Only reads.

Always holds:
- Nothing is written, and no daemon has the directory open meanwhile: a shared lock keeps one away.
- What is damaged is named, never dropped: files without a good header, lost logs, directories that
  cannot be listed, blocks that the disk does not give.
- An inherited block is read from where the sources say, by the same rules as in reader.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sheepfs.core.errors import CorruptError, UsageError, WrongClusterError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT, format_oid
from storaged.store import startup, superblock
from storaged.store.dirtylog import DirtyLog
from storaged.store.disk import Health, disk_error
from storaged.store.entry import StoredObject, sibling
from storaged.store.format import (
    META_OFFSET,
    META_SIZE,
    SUMS,
    Sources,
    block_sum,
    cluster_hash,
    decode_header,
    decode_meta,
)
from storaged.store.reader import stretches
from storaged.store.readonly import ReadOnlyDisk
from storaged.store.superblock import Superblock
from storaged.store.tokens import read_tokens

_STEP = 256
"""Blocks read at once."""


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """One object file, as its header and table tell.

    Attributes:
        blocks: blocks in the file itself that are no holes.
        table: the checksum of each block, 0 for zeros; None if header or table is damaged.
        sources: where inherited blocks lie; None if there are none, or that is unreadable.
        suspect: marked dirty: data and table may not belong together.
        problem: what is damaged; empty: header and table are good.
        changed: when the file was changed last, in seconds since 1970.
    """

    oid: int
    path: str
    version: int = 0
    lineage: int = 0
    blocks: int = 0
    table: tuple[int, ...] | None = None
    sources: Sources | None = None
    suspect: bool = False
    problem: str = ""
    changed: float = 0.0


class OfflineDirectory:
    """A data directory, to be read.

    Attributes:
        clean: the daemon's last stop was clean.
        marked: objects marked dirty. `marks_lost`: the log is damaged, any object may be.
        tokens: VDI -> highest fencing token. `tokens_lost`: that log is damaged.
        quarantined: names of files in quarantine, in order.
    """

    def __init__(self, path: Path, disk: ReadOnlyDisk, block: Superblock) -> None:
        """Read the logs and the names of all objects (OSError); use `open`."""
        self.path = path
        self.superblock = block
        self._disk = disk
        self._cluster = cluster_hash(block.cluster)
        self.clean = startup.stopped_cleanly(disk)
        self.marked, self.marks_lost = DirtyLog(disk, Health()).load()
        self.tokens, self.tokens_lost = read_tokens(disk)
        self.quarantined = sorted(disk.listdir("quarantine"))
        self._places: dict[int, StoredObject] = {}
        self._more: dict[int, list[StoredObject]] = {}
        """Further files with the same id, which a crash may leave."""
        for entry in startup.object_files(disk):
            if entry.oid in self._places:
                self._more.setdefault(entry.oid, []).append(entry)
            else:
                self._places[entry.oid] = entry

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open a directory for as long as the block runs.

        Raises:
            WrongClusterError: it is no data directory, or one of another format.
            UsageError: it is not there, or a daemon has it open.
            CorruptError: its superblock is damaged.
            DiskError: it cannot be read.
        """
        try:
            disk = ReadOnlyDisk(path)
        except FileNotFoundError as error:
            raise UsageError(f"there is no directory {path}") from error
        except NotADirectoryError as error:
            raise UsageError(f"{path} is not a directory") from error
        except OSError as error:
            raise disk_error(error, str(path)) from error
        lock = -1
        try:
            lock = _lock(disk, path)
            try:
                block = superblock.read(disk)
            except (WrongClusterError, CorruptError) as error:
                raise type(error)(f"{path}: {error}") from error
            if block is None:
                raise WrongClusterError(f"{path} is no data directory of sheepfs")
            directory = cls(path, disk, block)
        except OSError as error:
            disk.close_if_open(lock)
            raise disk_error(error, str(path)) from error
        except BaseException:
            disk.close_if_open(lock)
            raise
        try:
            yield directory
        finally:
            disk.close_if_open(lock)

    @property
    def unlisted(self) -> dict[str, str]:
        """Directories whose objects are not known, and why."""
        return self._disk.unlisted

    def oids(self) -> list[int]:
        """Give the ids of all objects in order, by their files' names."""
        return sorted(self._places)

    def __contains__(self, oid: int) -> bool:
        return oid in self._places

    def copies(self, oid: int) -> list[StoredCopy]:
        """Read the header and table of every file with this id; more than one is rare."""
        first = self._places.get(oid)
        entries = [] if first is None else [first, *self._more.get(oid, ())]
        return [self._read(entry) for entry in entries]

    def blocks(self, copy: StoredCopy, numbers: Iterable[int]) -> dict[int, memoryview]:
        """Read blocks from wherever they lie, unchecked.

        Args:
            numbers: in order.

        Returns:
            Those that could be read: not those of a base that is gone, or that the disk refuses.
        """
        wanted = list(numbers)
        found: dict[int, memoryview] = {}
        sources = bytes(BLOCKS_PER_OBJECT) if copy.sources is None else copy.sources.sources
        # Neighbours from the same file have the same key.
        keys = [sources[n] * 2 * BLOCKS_PER_OBJECT + n - i for i, n in enumerate(wanted)]
        files: dict[int, int] = {}
        try:
            for start, end, _ in stretches(keys):
                source = sources[wanted[start]]
                if source not in files:
                    files[source] = self._open_source(copy, source)
                fd = files[source]
                if fd < 0:
                    continue
                for first in range(start, end, _STEP):
                    count = min(_STEP, end - first)
                    found.update(self._fetch(fd, wanted[first], count))
        finally:
            for fd in files.values():
                self._disk.close_if_open(fd)
        return found

    def verify(self, copy: StoredCopy) -> list[int]:
        """Read all data of a copy whose table is good; give the blocks that do not match it."""
        table = copy.table or ()
        wanted = [i for i, entry in enumerate(table) if entry]
        bad: list[int] = []
        for start in range(0, len(wanted), _STEP):
            part = wanted[start : start + _STEP]
            found = self.blocks(copy, part)
            bad += [i for i in part if i not in found or block_sum(found[i]) != table[i]]
        return bad

    def _read(self, entry: StoredObject) -> StoredCopy:
        oid, path = entry.oid, entry.path
        version = lineage = blocks = 0
        sources: Sources | None = None
        changed = 0.0
        suspect = self.marks_lost or oid in self.marked
        try:
            fd = self._disk.open(path)
            try:
                changed = self._disk.changed(fd)
                meta = self._disk.pread(fd, META_SIZE, META_OFFSET)
            finally:
                self._disk.close(fd)
            header, sources, _ = decode_header(oid, self._cluster, meta)
            version, lineage, blocks = header.version, header.lineage, header.blocks
            table = SUMS[BLOCKS_PER_OBJECT].unpack(decode_meta(oid, self._cluster, meta)[1])
        except CorruptError as error:
            problem = str(error).partition(": ")[2] or str(error)
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        else:
            return StoredCopy(
                oid, path, version, lineage, blocks, table, sources, suspect, "", changed
            )
        return StoredCopy(
            oid, path, version, lineage, blocks, None, sources, suspect, problem, changed
        )

    def _open_source(self, copy: StoredCopy, source: int) -> int:
        """Open the file of a source number; -1 if it is not there or cannot be opened."""
        path = copy.path
        if source and copy.sources is not None:
            base = sibling(copy.oid, copy.sources.layers[source - 1])
            path = path[: -len(format_oid(base))] + format_oid(base)
        try:
            return self._disk.open(path)
        except OSError:
            return -1

    def _fetch(self, fd: int, first: int, count: int) -> dict[int, memoryview]:
        """Read neighbouring blocks; one by one if the disk refuses some of them."""
        try:
            data = self._disk.pread(fd, count * BLOCK_SIZE, first * BLOCK_SIZE)
        except OSError:
            if count == 1:
                return {}
            found: dict[int, memoryview] = {}
            for number in range(first, first + count):
                found.update(self._fetch(fd, number, 1))
            return found
        # A file that was cut short reads as zeros there, which match no checksum.
        view = memoryview(data.ljust(count * BLOCK_SIZE, b"\0"))
        return {first + i: view[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i in range(count)}


def _lock(disk: ReadOnlyDisk, path: Path) -> int:
    """Keep daemons away; a directory without a lock file was never opened by one, or is a copy."""
    try:
        return disk.lock(superblock.LOCK)
    except FileNotFoundError:
        return -1
    except BlockingIOError as error:
        raise UsageError(
            f"{path} is in use: a storage daemon runs there. Stop it first; a running cluster is"
            " checked with sheepctl vdi check and sheepctl cluster check"
        ) from error
