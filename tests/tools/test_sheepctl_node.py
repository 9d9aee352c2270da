"""`sheepctl node` and `cluster recover`: what they put into etcd, print, and refuse."""

from __future__ import annotations

import pytest
import trio

from fakes.etcd import FakeEtcd
from fakes.sheepctl_bench import CLUSTER, Bench
from fakes.snapshot_taker import KEYS
from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.metadata import NodeWish
from sheepfs_tools.sheepctl.commands import node as sheepctl_node


@pytest.fixture(autouse=True)
def five_nodes(monkeypatch: pytest.MonkeyPatch, sheepctl: Bench) -> None:
    """Nobody listens at them; node 1 is down, and node 5 is empty."""
    monkeypatch.setattr(sheepctl_node, "LEADER_ACTS_S", 0.05)
    nodes = {
        n: Node(
            n, NodeState.DOWN if n == 1 else NodeState.ACTIVE, "127.0.0.1:1", n, f"z{n}", 9.0, 1e9
        )
        for n in range(1, 6)
    }
    groups = (PlacementGroup(3, (2, 3, 4)), PlacementGroup(3, (2, 3), (), (1,)))
    sheepctl.put(KEYS.map, ClusterMap(3, CLUSTER, nodes, {3: groups}).encoded)


def wish(sheepctl: Bench, node: int) -> NodeWish | None:
    found = trio.run(FakeEtcd(sheepctl.server).get, KEYS.wish(node))
    return None if found is None else NodeWish.decode(found.value)


def test_drain_is_kept_in_etcd_until_it_is_undone(sheepctl: Bench) -> None:
    out = sheepctl.good("node drain 2").out
    assert "node 2 is being drained: 2 groups are to move" in out
    out = sheepctl.good("node drain 5").out
    assert "node 5 is empty: sheepctl node remove 5" in out
    assert wish(sheepctl, 2) == NodeWish(2, draining=True)
    assert sheepctl.good("node drain 2 --undo --json").json == {
        "nodes": [{"node": 2, "draining": False, "groups_left": 2}],
        "problem": None,
    }
    assert wish(sheepctl, 2) is None


def test_drain_says_when_there_is_nowhere_to_go(sheepctl: Bench) -> None:
    done = sheepctl("node drain 3 4 5")
    assert done.code == 1
    assert "2 groups of 3 copies have nowhere to go" in done.out
    assert wish(sheepctl, 3) == NodeWish(3, draining=True)


def test_weight_is_set_and_ends(sheepctl: Bench) -> None:
    sheepctl.good("node weight 2 120.5")
    sheepctl.good("node drain 2")
    assert wish(sheepctl, 2) == NodeWish(2, draining=True, weight=120.5)
    sheepctl.good("node drain 2 --undo")
    assert "by the size of its disk" in sheepctl.good("node weight 2 auto").out
    assert wish(sheepctl, 2) is None
    for bad in ("-1", "nan", "inf", "much"):
        assert "weight" in sheepctl.bad(2, "node weight 2", "--", bad)


def test_a_node_that_is_needed_is_not_removed(sheepctl: Bench) -> None:
    assert "is up, and 2 groups are on it" in sheepctl.bad(1, "node remove 2")
    assert wish(sheepctl, 2) is None


def test_a_removal_is_wished_for_and_the_leader_waited_for(sheepctl: Bench) -> None:
    for node in (1, 5):
        assert "no leader acts" in sheepctl.bad(1, f"node remove {node}")
        assert wish(sheepctl, node) == NodeWish(node, removed=True)
    without = ClusterMap(4, "ab" * 16, {2: Node(2, NodeState.ACTIVE, "h:1", 2, "z", 1.0)})
    sheepctl.put(KEYS.map, without.encoded)
    assert "was removed already" in sheepctl.bad(2, "node remove 1")


def test_what_is_no_node_is_refused(sheepctl: Bench) -> None:
    assert "there is no node 9; there are 1, 2, 3, 4, 5" in sheepctl.bad(2, "node drain 2 9")
    assert wish(sheepctl, 2) is None
    assert "sheepctl node list" in sheepctl.bad(2, "node info vm1")


def test_info_says_what_a_node_holds_and_why_it_cannot_go(sheepctl: Bench) -> None:
    sheepctl.good("node drain 2")
    told = sheepctl.good("node info 2 --json").json
    assert told["groups"] == {"sync": 2, "joining": 0, "away": 0, "waiting": 0}
    assert told["removable"] is False
    assert "empty it first" in told["why_not"]
    text = sheepctl.good("node info 1").out
    assert "1 expected back" in text
    assert "sheepctl node remove 1" in text
    assert "drained" in sheepctl.good("node info 2").out


def test_patience_is_shown_and_set(sheepctl: Bench) -> None:
    assert sheepctl.good("node patience --json").json == {"returns": 3, "longest_s": 300.0}
    assert "more than 5 times" in sheepctl.good("node patience --returns 5").out
    sheepctl.good("node patience --longest 60")
    assert sheepctl.good("node patience --json").json == {"returns": 5, "longest_s": 60.0}
    assert "--longest" in sheepctl.bad(2, "node patience --longest -1")


def test_ids_are_listed_for_completion(sheepctl: Bench) -> None:
    assert sheepctl.good("node list --ids").out.split() == ["1", "2", "3", "4", "5"]


def test_recover_has_nothing_to_do_while_every_group_has_a_member_that_is_up(
    sheepctl: Bench,
) -> None:
    assert "nothing is to be given up" in sheepctl.good("cluster recover").out
    assert sheepctl.good("cluster recover --accept-loss --yes --json").json["done"] is False
