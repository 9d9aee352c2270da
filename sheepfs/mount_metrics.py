"""The metrics of a mount (docs/monitoring.md lists them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sheepfs import __version__
from sheepfs.accounts import Account
from sheepfs.core.exposition import family, labels, traffic_metrics


def vdi_metrics(accounts: Iterable[Account]) -> Iterator[str]:
    """Give the metrics of a mount's VDIs."""
    rows = [(labels(vdi=a.name, id=a.item), a) for a in accounts]
    yield from traffic_metrics("sheepfs_vdi", "a VDI", [(label, a.traffic) for label, a in rows])
    yield from family(
        "sheepfs_vdi_stalled", "gauge", "1 while a VDI's I/O does not move.",
        [(label, int(a.stalled)) for label, a in rows],
    )  # fmt: skip


def mount_metrics(
    accounts: Iterable[Account], epoch: int, nodes_linked: int, vdis_held: int
) -> Iterator[str]:
    """Give all metrics of a mount, in pieces."""
    yield from family(
        "sheepfs_mount_info", "gauge", "1; its labels tell the version.",
        [(labels(version=__version__), 1)],
    )  # fmt: skip
    for name, about, value in (
        ("epoch", "Epoch of the newest cluster map.", epoch),
        ("nodes_linked", "Storage daemons that the mount has a connection to.", nodes_linked),
        ("vdis_held", "VDIs whose one writer this mount is.", vdis_held),
    ):
        yield from family(f"sheepfs_mount_{name}", "gauge", about, [("", value)])
    yield from vdi_metrics(accounts)
