"""What each sector of a volume may hold: the simulation's model of a disk.

Each sector of 512 bytes is a register. A write is in force from some moment between its issue and
its completion. A read gives the last write in force, or any that is concurrent. After a loss (the
power of all who had a write, or the holder) it is what was in force at some moment since the last
flush that succeeded was issued, or any later write; which one it is is known once it is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SECTOR = 512
_HOLE = bytes(SECTOR)
ZEROS = 0
"""The value of what was never written or was punched."""
_STAMP = struct.Struct("<8sIIQQ")
_MAGIC = b"SECTOR!!"
WIDE = 64


def stamp(volume: int, sector: int, value: int) -> bytes:
    """Give the 512 bytes that stand for a value of a sector."""
    if value == ZEROS:
        return bytes(SECTOR)
    return _STAMP.pack(_MAGIC, volume, sector & 0xFFFFFFFF, sector, value).ljust(SECTOR, b"\x5a")


def value_of(volume: int, sector: int, data: bytes) -> int:
    """Give the value that the bytes of a sector stand for.

    Raises:
        AssertionError: they are none that this sector ever had: torn, or another sector's.
    """
    if data == _HOLE:
        return ZEROS
    magic, found_volume, _, found_sector, value = _STAMP.unpack_from(data)
    if (magic, found_volume, found_sector) != (_MAGIC, volume, sector) or data != stamp(
        volume, sector, value
    ):
        raise AssertionError(
            f"volume {volume} sector {sector}: not a sector of its own:"
            f" {bytes(data[:40])!r} (volume {found_volume}, sector {found_sector}, value {value})"
        )
    return int(value)


@dataclass(slots=True, eq=False)
class Write:
    """A write as one sector sees it. Times are numbers of events; None: not complete.

    Attributes:
        beside: writes that it may still come after; it ends when all of them do.
    """

    value: int
    issued: int
    completed: int | None = None
    beside: list[Write] = field(default_factory=list)

    def end(self) -> int | None:
        """Tell when it is over."""
        if not self.beside:
            return self.completed
        ends = [write.end() for write in self.beside]
        known = [end for end in ends if end is not None]
        return max(known) if len(known) == len(ends) else None

    def is_over(self, before: int) -> bool:
        """Tell whether it was over before an event."""
        end = self.end()
        return end is not None and end < before


@dataclass(slots=True)
class Register:
    """One sector.

    Attributes:
        floor: values that a loss may bring back.
        base: values that may be in force from before `log`.
        log: writes since then, by issue.
        claims: complete writes that a loss may have undone. A flush that succeeds says that it
            has not, whoever was told of a loss by one that failed.
    """

    floor: set[int] = field(default_factory=lambda: {ZEROS})
    base: set[int] = field(default_factory=lambda: {ZEROS})
    log: list[Write] = field(default_factory=list)
    claims: list[Write] = field(default_factory=list)

    def in_force(self, since: int) -> set[int]:
        """Give what may have been in force at some moment from event `since` on."""
        found = {
            write.value for i, write in enumerate(self.log) if not self._is_past(write, i, since)
        }
        overwritten = any(write.is_over(since) for write in self.log)
        return found if overwritten else found | self.base

    def _is_past(self, write: Write, place: int, since: int) -> bool:
        end = write.end()
        return end is not None and any(
            later.issued > end and later.is_over(since) for later in self.log[place + 1 :]
        )

    def flushed(self, issued: int) -> None:
        """A flush that was issued at that event has succeeded."""
        if self.claims or any(write.beside for write in self.log):
            self.log = [*self.claims, *(write for write in self.log if not write.beside)]
            self.claims = []
        done = [write for write in self.log if write.is_over(issued)]
        if not done:
            self.floor = set(self.base)
            return
        last = [w for w in done if not self._is_past(w, self.log.index(w), issued)]
        self.floor = {write.value for write in last}
        # What is under way may be in force already, and a flush may have made it durable.
        others = [write for write in self.log if write not in done]
        if any(not write.is_over(other.issued) for write in last for other in others):
            # They may come after what stays in the log.
            self.base = set()
            self.log = [write for write in self.log if write in last or write in others]
        else:
            self.base = set(self.floor)
            self.log = others

    def lost(self, *, holder: bool) -> None:
        """What was not flushed may be gone; with its holder, what is under way ends, too."""
        under_way = [w for w in self.log if not (holder or w.beside or w.completed is not None)]
        ended = [write for write in self.log if write not in under_way]
        self.base = self.floor | self.base | {write.value for write in ended}
        if holder:
            self.claims = []
        else:
            self.claims += [write for write in ended if not write.beside]
        # What is sent again may have been in force before. What is not, as all answers to it are
        # on their way already, is complete soon, and may be gone all the same.
        again = [Write(v, 0, beside=under_way) for v in sorted(self.base)] if under_way else []
        self.log = [*again, *under_way]

    def seen(self, value: int) -> None:
        """A read gave this value."""
        if (
            value in self.base
            and not self.claims
            and len(self.base) > 1
            and all(w.value != value for w in self.log)
        ):
            self.base = {value}


class Volume:
    """All registers of one volume.

    Args:
        number: stands in its stamps; a snapshot or clone has that of its origin.
    """

    def __init__(self, number: int, sectors: int) -> None:
        self.number = number
        self.sectors = sectors
        self.registers: dict[int, Register] = {}
        self._dirty: dict[int, None] = {}
        self._holder: object = None
        self._readers = 0
        self._past: dict[int, list[tuple[int, Register]]] = {}
        """Sector -> what it was when flushes were issued, for reads that began before them."""
        self._wide: list[tuple[int, int, Write]] = []
        """Punches of so much that a register is made only for what is written, too."""

    def begin(self, first: int, count: int, value: int, event: int) -> Write:
        """Issue a write; its end is to be noted in what this gives."""
        write = Write(value, event)
        if count <= WIDE:
            for sector in range(first, first + count):
                self._register(sector).log.append(write)
                self._dirty[sector] = None
        else:
            self._wide = [item for item in self._wide if item[2].end() is None]
            self._wide.append((first, first + count, write))
            for sector, register in self.registers.items():
                if first <= sector < first + count:
                    register.log.append(write)
                    self._dirty[sector] = None
        return write

    def _register(self, sector: int) -> Register:
        register = self.registers.get(sector)
        if register is None:
            register = self.registers[sector] = Register()
            register.log += [
                write
                for first, end, write in self._wide
                if first <= sector < end and write.end() is None
            ]
        return register

    def flushed(self, issued: int) -> None:
        """See Register."""
        for sector in list(self._dirty):
            register = self.registers[sector]
            if self._readers:
                former = Register(base=register.base, log=list(register.log))
                self._past.setdefault(sector, []).append((issued, former))
            register.flushed(issued)
            if not register.log:
                del self._dirty[sector]

    def lost(self, *, holder: bool) -> None:
        """See Register."""
        for sector in self._dirty:
            self.registers[sector].lost(holder=holder)

    def held_by(self, holder: object, *, was_clean: bool) -> None:
        """Somebody attached; whoever held it until now has not let go, if that is not noted.

        Mounts level the VDI of a holder that died: it may be clean again, and began with what
        was durable.
        """
        if not was_clean or self._holder is not None:
            self.lost(holder=True)
        self._holder = holder

    def let_go(self, holder: object, *, in_order: bool) -> None:
        """The holder has ended; `in_order`: it has flushed all."""
        if self._holder is holder:
            self._holder = None
            if not in_order:
                self.lost(holder=True)

    def _in_force(self, sector: int, issued: int) -> set[int]:
        register = self.registers.get(sector)
        legal = {ZEROS} if register is None else register.in_force(issued)
        for flush, former in self._past.get(sector, ()):
            if issued < flush:
                legal |= former.in_force(issued)
        return legal

    def frozen(self, issued: int) -> Volume:
        """Give what a snapshot is that was asked for at that event and is made now.

        Its sectors never change, and are durable: a loss brings nothing else back.
        """
        made = Volume(self.number, self.sectors)
        for sector in self.registers:
            legal = self._in_force(sector, issued)
            made.registers[sector] = Register(set(legal), set(legal))
        return made

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside of the block a read is issued, and then what it gave is checked."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._past.clear()

    def check(self, first: int, data: bytes, issued: int) -> None:
        """Check what a read that was issued at that event gave. Raises AssertionError."""
        for i in range(len(data) // SECTOR):
            sector = first + i
            value = value_of(self.number, sector, data[i * SECTOR : (i + 1) * SECTOR])
            register = self.registers.get(sector)
            legal = self._in_force(sector, issued)
            if value not in legal:
                raise AssertionError(
                    f"volume {self.number} sector {sector} (block {sector // 8}, object"
                    f" {sector // 8192}) reads {value}; legal are {sorted(legal)}; {register}"
                )
            if register is not None:
                register.seen(value)
