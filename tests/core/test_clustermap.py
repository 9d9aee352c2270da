from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.errors import ProtocolError

ids = st.integers(0, 2**31)
members = st.lists(ids, max_size=5).map(tuple)
nodes = st.builds(
    Node,
    id=ids,
    state=st.sampled_from(NodeState),
    address=st.text(max_size=20),
    incarnation=st.integers(0, 2**63),
    zone=st.text(max_size=20),
    weight=st.floats(0, 1e9),
    down_since=st.floats(0, 1e12),
    returns=st.integers(0, 1000),
    up_since=st.floats(0, 1e12),
    held_until=st.floats(0, 1e12),
)
groups = st.builds(
    PlacementGroup, st.integers(0, 2**60), members, members, members, st.integers(0, 2**60)
)
maps = st.builds(
    ClusterMap,
    epoch=st.integers(0, 2**60),
    cluster=st.text("0123456789abcdef", min_size=32, max_size=32),
    nodes=st.lists(nodes, max_size=5).map(lambda some: {n.id: n for n in some}),
    pools=st.dictionaries(st.integers(1, 5), st.lists(groups, max_size=8).map(tuple), max_size=3),
)


def map_of(nodes: int, *groups: PlacementGroup, copies: int = 3) -> ClusterMap:
    return ClusterMap(
        1,
        "c" * 32,
        {n: Node(n, NodeState.ACTIVE, f"h{n}:1", n, f"z{n}", 1.0) for n in range(1, nodes + 1)},
        {copies: groups},
    )


@given(maps)
def test_a_map_survives_encoding(cluster_map: ClusterMap) -> None:
    assert ClusterMap.decode(cluster_map.encoded) == cluster_map


def test_the_encoding_is_pinned() -> None:
    """Peers of other versions and etcd hold these bytes: a change needs a new format number."""
    cluster_map = ClusterMap(
        7,
        "ab" * 16,
        {2: Node(2, NodeState.DOWN, "host:7000", 99, "rack", 1.5, 3.0, 4, 1.0, 9.5)},
        {
            3: (
                PlacementGroup(6, (1, 2), (3,)),
                PlacementGroup(7, (1,), (), (2,)),
                PlacementGroup(7, (1,), lost=5),
            )
        },
    )
    assert cluster_map.encoded == (
        b'{"format":1,"epoch":7,"cluster":"' + b"ab" * 16 + b'",'
        b'"nodes":[[2,"down","host:7000",99,"rack",1.5,3.0,4,1.0,9.5]],'
        b'"pools":{"3":[[6,[1,2],[3]],[7,[1],[],[2]],[7,[1],[],[],5]]}}'
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"format":1}',
        b"[" * 100_000,
        map_of(1, PlacementGroup(1, (1,))).encoded[:-1],
    ],
)
def test_bytes_that_are_no_map_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ClusterMap.decode(data)


def test_a_map_of_a_version_without_returns_is_read() -> None:
    content = json.loads(map_of(1).encoded)
    content["nodes"] = [row[:7] for row in content["nodes"]]
    assert ClusterMap.decode(json.dumps(content).encode()).nodes == map_of(1).nodes


def test_a_newer_format_is_refused_not_guessed_at() -> None:
    content = json.loads(map_of(1).encoded) | {"format": 2}
    with pytest.raises(ProtocolError, match="format 2"):
        ClusterMap.decode(json.dumps(content).encode())


@given(maps, st.data())
def test_a_damaged_map_is_refused_or_read_but_never_crashes(
    cluster_map: ClusterMap, data: st.DataObject
) -> None:
    damaged = bytearray(cluster_map.encoded)
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        ClusterMap.decode(damaged)


@pytest.mark.parametrize(
    ("copies", "nodes", "needed"),
    [(1, 3, 1), (2, 3, 1), (3, 3, 2), (4, 5, 2), (5, 5, 3), (3, 2, 1), (3, 1, 1), (5, 3, 2)],
)
def test_half_of_the_copies_rounded_up_is_needed_to_write(
    copies: int, nodes: int, needed: int
) -> None:
    assert map_of(nodes).needed(copies) == needed


def test_joining_members_do_not_make_a_group_writable() -> None:
    cluster_map = map_of(3, PlacementGroup(1, (1,), (2, 3)), PlacementGroup(1, (1, 2)))
    assert not cluster_map.writable(3, 0)
    assert cluster_map.writable(3, 1)


def test_who_is_away_is_no_member() -> None:
    assert PlacementGroup(1, (1,), (2,), (3,)).members == (1, 2)


def test_changes_make_the_next_epoch_and_leave_the_old_map_alone() -> None:
    before = map_of(2, PlacementGroup(1, (1,)))
    after = before.with_changes(pools={})
    assert (before.epoch, after.epoch) == (1, 2)
    assert before.pools
    assert after.nodes == before.nodes
