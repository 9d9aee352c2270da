"""FaultyDisk: a disk in memory that loses power, tears, rots, fills up and fails on demand.

It promises exactly what storaged.store.disk.Disk says, and no more: what was not synced is lost
block by block and name by name, in any combination, when the power goes.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from sheepfs.core.wire import Buffer
from storaged.store.disk import DiskSpace

BLOCK = 4096
UNFILLED = 1 << 40
SECTOR = 512
_HOLE = bytes(BLOCK)


@dataclass(eq=False)
class _File:
    blocks: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    durable_blocks: dict[int, bytes] = field(default_factory=dict)
    durable_size: int = 0
    unwritten: dict[int, tuple[bytes | None, bytes | None]] = field(default_factory=dict)
    """Block -> what memory and the platter have, where the kernel takes them for the same."""


@dataclass(eq=False)
class _Directory:
    names: dict[str, _Node] = field(default_factory=dict)
    durable: dict[str, _Node] = field(default_factory=dict)


_Node: TypeAlias = "_File | _Directory"
_Change: TypeAlias = tuple[_Directory, str, "_Node | None"]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _put(blocks: dict[int, bytes], number: int, block: bytes | None) -> None:
    if block is None:
        blocks.pop(number, None)
    else:
        blocks[number] = block


def _locked(method: _Method) -> _Method:
    def call(self: FaultyDisk, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            error = self.faults.get(method.__name__)
            if error is not None:
                raise OSError(error, os.strerror(error))
            self.calls.append(method.__name__)
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class FaultyDisk:
    """See the module.

    Attributes:
        faults: name of a method -> errno that each call of it fails with.
        capacity: bytes of file blocks that fit.
        is_cold: `pread_nowait` finds nothing in memory.
        calls: names of the methods called.
    """

    def __init__(self) -> None:
        self.faults: dict[str, int] = {}
        self.capacity = UNFILLED
        self.is_cold = False
        self.calls: list[str] = []
        self._root = _Directory()
        self._pending: list[list[_Change]] = []
        self._fds: dict[int, _File] = {}
        self._next_fd = itertools.count(1000)
        self._locks: dict[int, str] = {}
        self._lock = threading.RLock()

    # --- the seam ---

    @_locked
    def open(self, path: str, *, create: bool = False, truncate: bool = False) -> int:
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if isinstance(node, _Directory):
            raise IsADirectoryError(errno.EISDIR, path)
        if node is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, path)
            node = _File()
            self._change([(parent, name, node)])
        if truncate:
            node.blocks.clear()
            node.size = 0
        fd = next(self._next_fd)
        self._fds[fd] = node
        return fd

    def close(self, fd: int, /) -> None:
        with self._lock:
            self._locks.pop(fd, None)
            self._fds.pop(fd, None)

    @_locked
    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        return self._read(self._file(fd), length, offset)

    @_locked
    def pread_nowait(self, fd: int, buffer: bytearray, offset: int, /) -> int:
        if self.is_cold:
            raise BlockingIOError(errno.EAGAIN, "cold")
        data = self._read(self._file(fd), len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    @_locked
    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int:
        file = self._file(fd)
        view = memoryview(data)
        done = 0
        while done < len(view):
            number, skip = divmod(offset + done, BLOCK)
            if number not in file.blocks and self._is_full():
                if not done:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                break
            piece = view[done : done + BLOCK - skip]
            old = file.blocks.get(number, bytes(BLOCK))
            file.blocks[number] = old[:skip] + bytes(piece) + old[skip + len(piece) :]
            done += len(piece)
        file.size = max(file.size, offset + done)
        return done

    @_locked
    def punch(self, fd: int, offset: int, length: int, /) -> None:
        file = self._file(fd)
        for number in [n for n in file.blocks if offset - BLOCK < n * BLOCK < offset + length]:
            start = max(offset - number * BLOCK, 0)
            end = min(offset + length - number * BLOCK, BLOCK)
            old = file.blocks[number]
            file.blocks[number] = old[:start] + bytes(end - start) + old[end:]
            if end - start == BLOCK:
                del file.blocks[number]

    @_locked
    def truncate(self, fd: int, size: int, /) -> None:
        file = self._file(fd)
        number, keep = divmod(size, BLOCK)
        for other in [n for n in file.blocks if n > number or (n == number and not keep)]:
            del file.blocks[other]
        if number in file.blocks:
            file.blocks[number] = file.blocks[number][:keep] + bytes(BLOCK - keep)
        file.size = size

    @_locked
    def fdatasync(self, fd: int, /) -> None:
        self._settle(self._file(fd))

    def drop_cache(self, fd: int, /) -> None:
        """See Disk: reads are of what the disk will have, but for a failed write-back's pages."""
        with self._lock:
            self._forget(self._file(fd))

    @_locked
    def fsync_dir(self, path: str) -> None:
        directory = self._directory(path)
        for group in list(self._pending):
            if any(change[0] is directory for change in group):
                self._commit(group)
                self._pending.remove(group)

    @_locked
    def syncfs(self) -> None:
        for group in self._pending:
            self._commit(group)
        self._pending.clear()
        for file in {*self._files(self._root), *self._fds.values()}:
            self._settle(file)

    @_locked
    def rename(self, old: str, new: str) -> None:
        source, source_name = self._parent(old)
        target, target_name = self._parent(new)
        node = source.names.get(source_name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, old)
        self._change([(source, source_name, None), (target, target_name, node)])

    @_locked
    def unlink(self, path: str) -> None:
        parent, name = self._parent(path)
        if name not in parent.names:
            raise FileNotFoundError(errno.ENOENT, path)
        self._change([(parent, name, None)])

    @_locked
    def mkdir(self, path: str) -> None:
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, path)
        self._change([(parent, name, _Directory())])

    @_locked
    def listdir(self, path: str) -> list[str]:
        return list(self._directory(path).names)

    @_locked
    def space(self) -> DiskSpace:
        return DiskSpace(self.capacity, max(0, self.capacity - self._used()))

    @_locked
    def lock(self, path: str) -> int:
        if path in self._locks.values():
            raise BlockingIOError(errno.EAGAIN, path)
        fd = self.open(path, create=True)
        self._locks[fd] = path
        return fd

    # --- the faults ---

    def kill(self) -> None:
        """End the process that uses the disk: descriptors and locks are gone, nothing else."""
        self._fds.clear()
        self._locks.clear()

    def power_cut(self, rng: random.Random) -> None:
        """Lose any part of what was not synced; blocks may be torn between sectors."""
        self.kill()
        for group in self._pending:
            if rng.random() < 0.5:
                self._commit(group)
        self._pending.clear()
        self._restore(self._root, rng)

    def fail_write_back(self) -> None:
        """What was not synced is called clean and never written; memory has it until it forgets."""
        for file in {*self._files(self._root), *self._fds.values()}:
            for number in file.blocks.keys() | file.durable_blocks.keys():
                cached, stored = file.blocks.get(number), file.durable_blocks.get(number)
                if cached is not stored:
                    file.unwritten[number] = cached, stored

    def lose_dirty_pages(self) -> None:
        """After a write-back error what was not synced is gone, as if it was never written."""
        for file in {*self._files(self._root), *self._fds.values()}:
            for number, block in file.durable_blocks.items():
                file.blocks[number] = block

    def rot(self, path: str, offset: int) -> None:
        """Flip a bit, on the platter and in memory."""
        parent, name = self._parent(path)
        file = parent.names[name]
        assert isinstance(file, _File)
        number, skip = divmod(offset, BLOCK)
        block = bytearray(file.blocks.get(number, bytes(BLOCK)))
        block[skip] ^= 1
        file.blocks[number] = file.durable_blocks[number] = bytes(block)

    def paths(self, directory: str = "") -> list[str]:
        """Give the paths of all files below a directory, in the order in which they were made."""
        found = []
        for name, node in self._directory(directory).names.items():
            path = f"{directory}/{name}" if directory else name
            found += self.paths(path) if isinstance(node, _Directory) else [path]
        return found

    def stored_blocks(self, path: str) -> list[int]:
        """Give the numbers of a file's blocks that are as they were when they were synced."""
        parent, name = self._parent(path)
        file = parent.names[name]
        assert isinstance(file, _File)
        return [n for n, block in file.blocks.items() if file.durable_blocks.get(n) is block]

    def fill(self, left_bytes: int) -> None:
        """Leave room for so much more."""
        self.capacity = self._used() + left_bytes

    @property
    def is_short(self) -> bool:
        """Whether it was filled."""
        return self.capacity < UNFILLED

    # --- how ---

    def _restore(self, directory: _Directory, rng: random.Random) -> None:
        directory.names = dict(directory.durable)
        for node in directory.names.values():
            if isinstance(node, _Directory):
                self._restore(node, rng)
            else:
                self._lose(node, rng)

    def _forget(self, file: _File) -> None:
        for number, (cached, stored) in file.unwritten.items():
            if file.blocks.get(number) is cached:
                _put(file.blocks, number, stored)
        file.unwritten.clear()

    def _lose(self, file: _File, rng: random.Random) -> None:
        self._forget(file)
        if file.size != file.durable_size and rng.random() < 0.5:
            file.size = file.durable_size
        for number in file.blocks.keys() | file.durable_blocks.keys():
            new = file.blocks.get(number)
            old = file.durable_blocks.get(number)
            if new is old:
                continue
            fate = rng.random()
            if fate < 0.4:
                chosen = old
            elif fate < 0.8:
                chosen = new
            else:
                cut = rng.randrange(1, BLOCK // SECTOR) * SECTOR
                chosen = (new or bytes(BLOCK))[:cut] + (old or bytes(BLOCK))[cut:]
            if chosen is None or number * BLOCK >= file.size:
                file.blocks.pop(number, None)
            else:
                file.blocks[number] = chosen
        tail, keep = divmod(file.size, BLOCK)
        if keep and tail in file.blocks:
            file.blocks[tail] = file.blocks[tail][:keep] + bytes(BLOCK - keep)
        self._settle(file)

    def _settle(self, file: _File) -> None:
        file.durable_blocks = dict(file.blocks)
        file.durable_size = file.size
        for number, (cached, stored) in file.unwritten.items():
            if file.blocks.get(number) is cached:
                _put(file.durable_blocks, number, stored)

    def _change(self, group: list[_Change]) -> None:
        for directory, name, node in group:
            if node is None:
                del directory.names[name]
            else:
                directory.names[name] = node
        self._pending.append(group)

    def _commit(self, group: list[_Change]) -> None:
        for directory, name, node in group:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node

    def _file(self, fd: int) -> _File:
        try:
            return self._fds[fd]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def _read(self, file: _File, length: int, offset: int) -> bytes:
        end = min(offset + length, file.size)
        if end <= offset:
            return b""
        first = offset // BLOCK
        blocks = [file.blocks.get(n, _HOLE) for n in range(first, -(-end // BLOCK))]
        return b"".join(blocks)[offset - first * BLOCK : end - first * BLOCK]

    def _parent(self, path: str) -> tuple[_Directory, str]:
        head, _, name = path.rpartition("/")
        return self._directory(head), name

    def _directory(self, path: str) -> _Directory:
        node: _Node = self._root
        for part in filter(None, path.split("/")):
            found = node.names.get(part) if isinstance(node, _Directory) else None
            if found is None:
                raise FileNotFoundError(errno.ENOENT, path)
            node = found
        if not isinstance(node, _Directory):
            raise NotADirectoryError(errno.ENOTDIR, path)
        return node

    def _files(self, directory: _Directory) -> list[_File]:
        result = []
        for node in directory.names.values():
            if isinstance(node, _Directory):
                result += self._files(node)
            else:
                result.append(node)
        return result

    def _is_full(self) -> bool:
        return self.is_short and self._used() + BLOCK > self.capacity

    def _used(self) -> int:
        return BLOCK * sum(len(file.blocks) for file in self._files(self._root))
