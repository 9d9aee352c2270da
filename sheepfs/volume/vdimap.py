"""The map of a VDI: for each object index the layer that owns its data, 0 for a hole.

Always holds:
- Pages (a 4 KiB block of a map object: 512 entries, 2 GiB of VDI) are loaded when asked for.
- What `take_dirty` gives names only objects whose creation is complete, so that once the data is
  durable the map may be made durable too, and never the other way round (DESIGN section 6).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Awaitable, Callable, Iterable

from sheepfs.core.errors import ProtocolError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    MAP_ENTRIES_PER_BLOCK,
    MAP_ENTRIES_PER_OBJECT,
    MAX_LAYER,
    index_of,
    is_map_object,
    layer_of,
)

PAGES_PER_OBJECT = MAP_ENTRIES_PER_OBJECT // MAP_ENTRIES_PER_BLOCK
PAGES_PER_LOAD = 16
"""Pages read at once: 64 KiB, the map of 32 GiB."""

LoadRange = Callable[[int, int, int], Awaitable[bytes]]
"""(map object index, offset in bytes, length) -> bytes of an existing map object."""

_EMPTY = bytes(BLOCK_SIZE)


class VdiMap:
    """Map pages in memory.

    Attributes:
        existing: bit i is set when map object i exists in the cluster.
        creating: objects whose creation is not complete: nothing in them is, they read as zeros
            (members may not have them yet, and may never get them).
    """

    def __init__(self, existing: int, load_range: LoadRange) -> None:
        self.existing = existing
        self.pages: dict[int, array[int]] = {}
        self.load_range = load_range
        self._dirty: set[int] = set()
        self._born: dict[int, dict[int, int]] = {}
        """Page number -> object index -> a version before that of the object's creation, as long
        as the map that names the object is not stored."""
        self.creating: set[int] = set()

    def get(self, index: int) -> int | None:
        """Give the owner layer of an object, 0 for a hole, None if the page is not loaded."""
        page = self.pages.get(index // MAP_ENTRIES_PER_BLOCK)
        return None if page is None else page[index % MAP_ENTRIES_PER_BLOCK]

    def names(self, oid: int) -> bool:
        """Whether a data object is what its index is now; its page is loaded."""
        return not is_map_object(oid) and self.get(index_of(oid)) == layer_of(oid)

    def skip_holes(self, index: int, end: int) -> int:
        """Give the first index in [`index`, `end`) that is owned or whose page must be loaded.

        `end` if there is none. Takes whole pages, and 2 TiB where nothing was ever stored, in
        one step.
        """
        touched = {number // PAGES_PER_OBJECT for number in self.pages}
        while index < end:
            number, entry = divmod(index, MAP_ENTRIES_PER_BLOCK)
            map_index = number // PAGES_PER_OBJECT
            page = self.pages.get(number)
            if page is None:
                if self.existing >> map_index & 1:
                    return index
                if map_index not in touched:
                    index = (map_index + 1) * MAP_ENTRIES_PER_OBJECT
                    continue
            elif any(page[entry:]):
                found = next(i for i in range(entry, MAP_ENTRIES_PER_BLOCK) if page[i])
                return min(number * MAP_ENTRIES_PER_BLOCK + found, end)
            index = (number + 1) * MAP_ENTRIES_PER_BLOCK
        return end

    async def load(self, index: int) -> None:
        """Load the page of an object index, and its neighbours.

        Raises:
            SheepError: no replica can give the map object.
        """
        number = index // MAP_ENTRIES_PER_BLOCK
        map_index, page = divmod(number, PAGES_PER_OBJECT)
        first = page - page % PAGES_PER_LOAD
        if self.existing >> map_index & 1:
            data = await self.load_range(map_index, first * BLOCK_SIZE, PAGES_PER_LOAD * BLOCK_SIZE)
        else:
            data = _EMPTY * PAGES_PER_LOAD
        base = map_index * PAGES_PER_OBJECT + first
        for i in range(PAGES_PER_LOAD):
            # A page that came meanwhile may have changes already.
            if base + i not in self.pages:
                self.pages[base + i] = _parse(data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])

    def take_empty(self, map_index: int, filled: int) -> None:
        """Take as loaded what need not be: pages of a stored map object that hold nothing.

        Args:
            filled: bit i says that page i of the object may name something.
        """
        base = map_index * PAGES_PER_OBJECT
        for page in range(PAGES_PER_OBJECT):
            if not filled >> page & 1 and base + page not in self.pages:
                self.pages[base + page] = _parse(_EMPTY)

    def begin_create(self, index: int, layer: int, after: int = 0) -> None:
        """The object is being created: writes go to it, but the map on disk does not name it.

        Args:
            after: an earlier version than that of the creation; `born_after` tells it.
        """
        self._set(index, layer)
        self._born.setdefault(index // MAP_ENTRIES_PER_BLOCK, {})[index] = after
        self.creating.add(index)

    def end_create(self, index: int, created: bool) -> None:
        """The creation is complete on all members, or it failed and the hole is back."""
        self.creating.discard(index)
        if created:
            self._dirty.add(index // MAP_ENTRIES_PER_BLOCK)
        else:
            self._set(index, 0)

    def replace(self, index: int, layer: int) -> None:
        """The object of `index` is that of another layer now; it exists on all members."""
        self._set(index, layer)
        self._dirty.add(index // MAP_ENTRIES_PER_BLOCK)

    def born_after(self, index: int) -> int:
        """Give a version that is earlier than all of an object that no stored map names yet.

        A copy that is not later was deleted, and a crash has brought it back.
        """
        return self._born.get(index // MAP_ENTRIES_PER_BLOCK, {}).get(index, 0)

    def stored(self, numbers: Iterable[int]) -> None:
        """These pages are durable as they were taken."""
        for number in numbers:
            if number not in self._dirty:
                self._born.pop(number, None)

    def discard(self, index: int) -> None:
        """Make an object a hole."""
        self.creating.discard(index)
        self.replace(index, 0)

    def _set(self, index: int, layer: int) -> None:
        number, entry = divmod(index, MAP_ENTRIES_PER_BLOCK)
        self.pages[number][entry] = layer

    @property
    def is_dirty(self) -> bool:
        """Tell whether the map in memory is newer than the stored one."""
        return bool(self._dirty)

    def take_dirty(self) -> dict[int, bytes]:
        """Give page number -> the bytes to store, for all pages that changed.

        Taken before the data is flushed: an object whose creation completes later is not in it.
        """
        taken, self._dirty = self._dirty, set()
        pages = {}
        for number in taken:
            page = self.pages[number][:]
            base = number * MAP_ENTRIES_PER_BLOCK
            for entry in range(MAP_ENTRIES_PER_BLOCK):
                if page[entry] and base + entry in self.creating:
                    page[entry] = 0
            pages[number] = format_page(page)
        return pages

    async def lost(self, existing: int) -> dict[int, tuple[int, int]]:
        """Take back what is not stored of which map objects exist.

        Args:
            existing: bit i is set when map object i was made durable.

        Returns:
            index -> (owner here, owner as stored), wherever they differ; nothing is being created.

        Raises:
            SheepError: the stored map cannot be read.
        """
        stored = VdiMap(existing, self.load_range)
        changed = {}
        for number in sorted(self._dirty):
            base = number * MAP_ENTRIES_PER_BLOCK
            await stored.load(base)
            for entry, pair in enumerate(
                zip(self.pages[number], stored.pages[number], strict=True)
            ):
                if pair[0] != pair[1]:
                    changed[base + entry] = pair
        self.existing = existing
        return changed

    def give_back(self, numbers: set[int]) -> None:
        """Storing these pages failed: they are still dirty."""
        self._dirty |= numbers

    def forget_clean(self) -> None:
        """Drop what is loaded, for a reader that must see what the holder stored since."""
        self.pages = {n: p for n, p in self.pages.items() if n in self._dirty}


def _parse(data: bytes) -> array[int]:
    page = array("Q", data)
    if sys.byteorder == "big":
        page.byteswap()
    if len(page) != MAP_ENTRIES_PER_BLOCK or max(page) > MAX_LAYER:
        raise ProtocolError("a map page holds a layer that cannot be")
    return page


def format_page(page: array[int]) -> bytes:
    """Give a page as it is stored."""
    if sys.byteorder == "big":
        page = page[:]
        page.byteswap()
    return page.tobytes()
