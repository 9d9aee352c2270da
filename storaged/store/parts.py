"""What everything that works on the objects of one open data directory works with."""

from __future__ import annotations

from dataclasses import dataclass

from storaged.store.catalog import Catalog
from storaged.store.dirtylog import DirtyLog
from storaged.store.disk import Disk, Health
from storaged.store.files import OpenFiles
from storaged.store.flush import FlushTracker
from storaged.store.reader import Reader
from storaged.store.space import SpaceGuard


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that know of one object at a time; how they are wired is in directory.py."""

    disk: Disk
    health: Health
    catalog: Catalog
    files: OpenFiles
    reader: Reader
    tracker: FlushTracker
    marks: DirtyLog
    space: SpaceGuard


class OnParts:
    """What works on objects by means of these parts."""

    def __init__(self, parts: Parts) -> None:
        self._disk = parts.disk
        self._health = parts.health
        self._catalog = parts.catalog
        self._files = parts.files
        self._reader = parts.reader
        self._tracker = parts.tracker
        self._marks = parts.marks
        self._space = parts.space
