"""What Prometheus reads: checked with the parser of its own Python client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sheepfs.accounts import Account
from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.exposition import family, histogram, labels
from sheepfs.core.traffic import Meter, Traffic
from sheepfs.mount_metrics import mount_metrics
from storaged.metrics import cluster_metrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Give (name, labels) -> value; no series may be there twice."""
    found: Samples = {}
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_name_survives_as_a_label(name: str) -> None:
    text = "".join(family("sheepfs_x", "gauge", "X.", [(labels(vdi=name), 1)]))
    assert parse(text) == {("sheepfs_x", (("vdi", name),)): 1}


@given(st.lists(st.integers(0, 10**11), max_size=40))
def test_a_histogram_counts_what_took_at_most_so_long(times_ns: list[int]) -> None:
    meter = Meter()
    for took in times_ns:
        meter.add(took, 0)
    found = parse("".join(histogram("sheepfs_x_seconds", "X.", [(labels(vdi="a"), meter)])))
    bounds = {
        dict(label)["le"]: value
        for (name, label), value in found.items()
        if name == "sheepfs_x_seconds_bucket"
    }
    assert len(bounds) == 20
    for bound, count in bounds.items():
        limit_us = float(bound) * 1e6
        assert count == sum(took // 1000 < limit_us for took in times_ns)
    assert found["sheepfs_x_seconds_count", (("vdi", "a"),)] == len(times_ns)
    assert found["sheepfs_x_seconds_sum", (("vdi", "a"),)] == sum(times_ns) / 1e9


def test_a_mount_shows_each_vdi_with_what_it_did() -> None:
    traffic = Traffic()
    traffic.read.add(1_000_000, 4096)
    traffic.write.errors = 2
    accounts = [
        Account(7, 'a"b\\.raw', traffic, stalled=True),
        Account(8, 'a"b\\.raw', Traffic(), stalled=False),  # It was deleted and made again.
    ]
    found = parse("".join(mount_metrics(accounts, 12, 3, 1)))
    who = (("id", "7"), ("vdi", 'a"b\\.raw'))
    assert found["sheepfs_vdi_reads_total", who] == 1
    assert found["sheepfs_vdi_read_bytes_total", who] == 4096
    assert found["sheepfs_vdi_read_seconds_count", who] == 1
    assert found["sheepfs_vdi_write_errors_total", who] == 2
    assert found["sheepfs_vdi_stalled", who] == 1
    assert found["sheepfs_mount_nodes_linked", ()] == 3


def test_groups_are_told_by_how_many_good_copies_they_have() -> None:
    nodes = {
        n: Node(n, NodeState.DOWN if n == 3 else NodeState.ACTIVE, f"h:{n}", n, "z", 1.0)
        for n in (1, 2, 3)
    }
    groups = (
        PlacementGroup(4, (1, 2), (3,)),
        PlacementGroup(4, (1, 2, 3), ()),
        PlacementGroup(4, (3,), ()),
    )
    found = parse("".join(cluster_metrics(ClusterMap(4, "ab" * 16, nodes, {3: groups}))))

    def count(good: int) -> float:
        return found["sheepfs_cluster_groups", (("copies", "3"), ("good", str(good)))]

    assert [count(good) for good in range(4)] == [1, 0, 2, 0]
    assert found["sheepfs_cluster_groups_stopped", (("copies", "3"),)] == 1
    assert found["sheepfs_cluster_groups_joining", (("copies", "3"),)] == 1
    assert found["sheepfs_cluster_nodes", (("state", "down"),)] == 1
    assert found["sheepfs_cluster_nodes", (("state", "active"),)] == 2
