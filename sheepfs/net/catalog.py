"""All records of a cluster's VDIs, snapshots, trash and layers, and every change of them.

Attaching is in `sheepfs.net.attach`. Source: docs/etcd.md.
"""

from __future__ import annotations

from sheepfs.net.layer_catalog import LayerCatalog, RootMap, Roots
from sheepfs.net.records import Backoff, held_by
from sheepfs.net.snapshot_catalog import SnapshotCatalog, Tagged
from sheepfs.net.trash_catalog import TRASH_KEEP_S, TrashCatalog
from sheepfs.net.vdi_catalog import VdiCatalog, VdiChange

__all__ = [
    "TRASH_KEEP_S",
    "Backoff",
    "Catalog",
    "RootMap",
    "Roots",
    "Tagged",
    "VdiChange",
    "held_by",
]


class Catalog(VdiCatalog, SnapshotCatalog, TrashCatalog, LayerCatalog):
    """Everything that etcd has of one cluster's VDIs."""
