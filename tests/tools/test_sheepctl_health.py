"""The verdict of `sheepctl cluster status`."""

from __future__ import annotations

from typing import Any

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs_tools.sheepctl.analysis.health import assess

GROUPS = 4


def cluster(
    *states: NodeState, sync: tuple[int, ...] = (1, 2, 3), joining: tuple[int, ...] = ()
) -> ClusterMap:
    nodes = {
        number: Node(number, state, f"10.0.0.{number}:7000", number, f"z{number}", 1.0)
        for number, state in enumerate(states, 1)
    }
    return ClusterMap(7, "ab" * 16, nodes, {3: (PlacementGroup(7, sync, joining),) * GROUPS})


def answer(**fields: Any) -> dict[str, Any]:
    return {"total": 100, "free": 60, "corrupt_blocks": 0, "repaired_blocks": 0, **fields}


ACTIVE = NodeState.ACTIVE
THREE = (ACTIVE, ACTIVE, ACTIVE)


def test_all_nodes_up_and_all_groups_whole_is_ok() -> None:
    health = assess(cluster(*THREE), {n: answer() for n in (1, 2, 3)})
    assert (health.verdict, health.reasons) == ("ok", ())
    assert (health.total_bytes, health.free_bytes) == (300, 180)


def test_a_node_that_is_down_is_named_and_writes_go_on() -> None:
    health = assess(
        cluster(ACTIVE, ACTIVE, NodeState.DOWN, sync=(1, 2)), {1: answer(), 2: answer(), 3: "no"}
    )
    assert health.verdict == "degraded"
    assert any("node 3" in reason and "down" in reason for reason in health.reasons)
    assert health.pools[0].degraded == GROUPS


def test_too_few_copies_for_writes_is_down_and_comes_first() -> None:
    health = assess(
        cluster(ACTIVE, NodeState.DOWN, NodeState.DOWN, sync=(1,)),
        {1: answer(), 2: "refused", 3: "refused"},
    )
    assert health.verdict == "down"
    assert "take no writes" in health.reasons[0]


def test_groups_whose_members_all_vanished_at_once_are_not_whole() -> None:
    dead = (NodeState.DOWN,) * 3
    health = assess(cluster(*dead, ACTIVE), {1: "no", 2: "no", 3: "no", 4: answer()})
    assert health.verdict == "down"
    assert "take no writes" in health.reasons[0]
    assert (health.pools[0].whole, health.pools[0].stopped) == (0, GROUPS)


def test_no_node_and_no_answering_node_are_down() -> None:
    assert assess(ClusterMap(0, "ab" * 16), {}).verdict == "down"
    assert assess(cluster(*THREE), {n: "refused" for n in (1, 2, 3)}).verdict == "down"


def test_fewer_nodes_than_copies_is_degraded() -> None:
    health = assess(cluster(ACTIVE, ACTIVE, sync=(1, 2)), {1: answer(), 2: answer()})
    assert health.verdict == "degraded"
    assert any("add nodes" in reason for reason in health.reasons)


def test_catching_up_full_disks_stalls_and_corruption_are_reasons() -> None:
    health = assess(
        cluster(*THREE, sync=(1, 2), joining=(3,)),
        {1: answer(free=5), 2: answer(stalled=["vm1.raw: waits for node 3"]), 3: answer()},
    )
    text = "; ".join(health.reasons)
    for part in ("groups of the pool of 3 copies are catching up", "nearly full", "vm1.raw"):
        assert part in text
    corrupt = assess(
        cluster(*THREE), {1: answer(corrupt_blocks=2, repaired_blocks=1), 2: answer(), 3: answer()}
    )
    assert "1 corrupt blocks" in corrupt.reasons[0]


def test_what_was_corrupt_and_is_repaired_is_no_reason() -> None:
    repaired = answer(corrupt_blocks=2, repaired_blocks=2)
    health = assess(cluster(*THREE), {1: repaired, 2: answer(), 3: answer()})
    assert (health.verdict, health.repaired_blocks) == ("ok", 2)


def test_what_scrubbing_could_not_repair_is_a_reason() -> None:
    scrubbed = answer(scrub={"unrepairable": 2})
    health = assess(cluster(*THREE), {1: scrubbed, 2: answer(), 3: scrubbed})
    assert health.verdict == "degraded"
    assert health.reasons[0].startswith("4 ")
    assert "sheepctl scrub status" in health.reasons[0]
