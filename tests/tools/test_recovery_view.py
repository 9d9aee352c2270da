"""How far recovery is, as people read it."""

from __future__ import annotations

from typing import Any

import pytest

from sheepfs_tools.durations import format_duration, parse_duration
from sheepfs_tools.sheepctl.analysis.recovery_view import node_recoveries, sentence, whole_recovery


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800), ("0", 0)],
)
def test_lengths_of_time_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "1w", "1 2", "soon", "1e9", "nan", "inf"])
def test_what_is_no_length_of_time_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="length of time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59.4, "59 s"), (60, "1 min"), (95, "1 min 35 s"), (1795, "29 min"),
        (5400, "1 h 30 min"), (7200, "2 h"), (97_200, "1 d 3 h"),
    ],
)  # fmt: skip
def test_lengths_of_time_are_written_with_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def status(left: int, done: int, rate: int, waits: str = "", groups: int = 3) -> dict[str, Any]:
    told = {
        "groups_left": groups,
        "objects_left": left // 10,
        "bytes_left": left,
        "objects_done": done // 10,
        "bytes_done": done,
        "bytes_per_s": rate,
        "for_s": 1.0,
        "waits": waits,
    }
    return {"recovery": told}


def test_the_slowest_node_decides_how_long_it_takes() -> None:
    nodes = node_recoveries(
        {1: status(600, 400, 10), 2: status(0, 0, 0, groups=0), 3: status(300, 700, 1), 4: "dead"}
    )
    assert [node.node for node in nodes] == [1, 2, 3]
    whole = whole_recovery(nodes)
    assert whole is not None
    assert (whole.percent, whole.left_s, whole.bytes_per_s) == (55, 300, 11)
    assert sentence(whole) == "recovery is at 55 %, 5 min left"


def test_a_node_that_waits_is_named_and_the_end_is_open() -> None:
    whole = whole_recovery(node_recoveries({3: status(300, 0, 0, "the disk is full")}))
    assert whole is not None
    assert whole.left_s is None
    assert sentence(whole) == "recovery is at 0 %, and waits (node 3: the disk is full)"


def test_nodes_of_an_older_version_and_of_nothing_to_do_are_no_recovery() -> None:
    assert whole_recovery(node_recoveries({1: {}, 2: status(0, 9, 0, groups=0)})) is None
