"""What sheepfs asks of etcd, as data: keys with revisions, and transactions.

`sheepfs.net.etcd.Etcd` and the fake of the tests speak exactly this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as etcd gave it; revisions grow with every change of the whole store."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Condition: the key's mod_revision is still this one; 0 means the key does not exist."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Set a key; with a lease, it goes when the lease ends."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key, if it is there."""

    key: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """All conditions hold and all changes happen, or nothing does."""

    conditions: Sequence[Unchanged]
    changes: Sequence[Put | Delete]
