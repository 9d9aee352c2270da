"""What is checked next, and what it means when copies differ."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError
from storaged.logic.scrub import (
    BAD,
    BUSY_SHARE,
    DAY_S,
    END_OF_GROUP,
    MISSING,
    START,
    Activity,
    Alarm,
    Copy,
    Kind,
    Level,
    Pass,
    Position,
    Schedule,
    State,
    allowed_rate,
    hold_the_same,
    judge,
    policy_of,
)
from storaged.logic.scrubstate import (
    DAMAGED,
    MAX_PROBLEMS,
    UNEQUAL,
    Findings,
    Problem,
    decode,
    encode,
)

states = st.builds(
    State, st.integers(1, 3), st.integers(0, 1), st.sampled_from((b"x", b"y")), st.booleans()
)
copies_of_members = st.dictionaries(
    st.integers(1, 5), st.one_of(states, st.sampled_from((MISSING, BAD))), min_size=1, max_size=5
)
POLICY = policy_of(True, 1e6, 1, 14)


@given(copies_of_members)
def test_only_a_good_copy_that_no_other_contradicts_is_a_source(copies: dict[int, Copy]) -> None:
    verdict = judge(copies)
    known = [copy for copy in copies.values() if isinstance(copy, State)]
    good = [copy for copy in known if copy.is_good]
    if isinstance(verdict, Level):
        source = copies[verdict.source]
        assert isinstance(source, State)
        assert source.is_good
        assert all(copy.age <= source.age for copy in known)
        assert all(copy.table == source.table for copy in good if copy.age == source.age)
        assert set(verdict.behind) == {node for node in copies if copies[node] != source}
        assert verdict.behind
    elif verdict is None:
        assert len(set(copies.values())) == 1
        assert good == known
        assert BAD not in copies.values()
    else:
        newest = max((copy.age for copy in known), default=None)
        tables = {copy.table for copy in good if copy.age == newest}
        assert len(tables) != 1


@given(copies_of_members)
def test_what_a_verdict_asks_for_makes_all_copies_equal(copies: dict[int, Copy]) -> None:
    verdict = judge(copies)
    if isinstance(verdict, Level):
        done = {**copies, **dict.fromkeys(verdict.behind, copies[verdict.source])}
        assert judge(done) is None


def test_good_copies_that_differ_at_one_version_are_an_alarm() -> None:
    verdict = judge({1: State(7, 0, b"x"), 2: State(7, 0, b"y"), 3: State(7, 0, b"x")})
    assert isinstance(verdict, Alarm)
    assert "different bytes" in verdict.why
    later = judge({1: State(7, 0, b"x"), 2: State(7, 4, b"y"), 3: State(7, 0, b"x")})
    assert later == Level(2, (1, 3))


@given(copies_of_members)
def test_copies_of_one_version_with_the_same_bytes_need_no_repair(copies: dict[int, Copy]) -> None:
    if hold_the_same(copies):
        assert not {MISSING, BAD} & set(copies.values())
        verdict = judge(copies)
        assert verdict is None or isinstance(verdict, Level)
    assert hold_the_same({1: State(7, 24, b"x"), 2: State(7, 0, b"x")})
    assert not hold_the_same({1: State(7, 24, b"x"), 2: State(7, 0, b"y")})
    assert not hold_the_same({1: State(7, 0, b"x", is_good=False)})


groups_of_a_node = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 9)), unique=True, max_size=12
).map(sorted)


@given(groups_of_a_node, st.lists(st.booleans(), min_size=40, max_size=40))
def test_a_pass_that_is_interrupted_does_every_object_once(
    groups: list[tuple[int, int]], interruptions: list[bool]
) -> None:
    work, stops = Pass(0.0), iter(interruptions)
    work.begin()
    seen = []

    def go_on() -> bool:
        for pool, pg in work.left_of(groups):
            here = work.position
            assert here is not None
            done = here.oid if here[:2] == (pool, pg) else -1
            for oid in (0, 5, 9):
                if oid > done:
                    seen.append((pool, pg, oid))
                    work.advance(work.number, Position(pool, pg, oid))
                    if next(stops, False):
                        return False
            work.advance(work.number, Position(pool, pg, END_OF_GROUP))
        return work.finish(work.number, 1.0)

    last = 0.0
    while not go_on():
        assert work.progress(groups) >= last
        last = work.progress(groups)
    assert seen == [(pool, pg, oid) for pool, pg in groups for oid in (0, 5, 9)]
    assert (work.position, work.completed) == (None, 1)


def test_who_works_for_a_pass_that_was_begun_anew_changes_nothing() -> None:
    work = Pass(0.0)
    work.begin()
    former = work.number
    work.begin()
    work.advance(former, Position(3, 4, 5))
    assert work.position == START
    assert not work.finish(former, 9.0)
    assert (work.finished, work.position) == (0.0, START)


@given(st.integers(1, 10_000))
def test_a_new_node_waits_half_an_interval_and_no_more_than_one(node: int) -> None:
    schedule = Schedule.fresh(node, 1000.0, POLICY)
    for kind in Kind:
        interval_s = POLICY.intervals_s[kind]
        wait_s = schedule.due_in_s(kind, 1000.0, POLICY)
        assert interval_s / 2 <= wait_s <= interval_s
    assert schedule.next(1000.0, POLICY) is None


def test_a_light_pass_goes_before_a_deep_one_and_nothing_is_done_while_paused() -> None:
    schedule = Schedule.fresh(1, 0.0, POLICY)
    assert schedule.next(15 * DAY_S, policy_of(False, 1e6, 1, 14)) is None
    assert schedule.next(15 * DAY_S, POLICY) is Kind.LIGHT
    schedule.passes[Kind.LIGHT].finish(schedule.passes[Kind.LIGHT].number, 15 * DAY_S)
    assert schedule.next(15 * DAY_S, POLICY) is Kind.DEEP
    assert schedule.next(16 * DAY_S, POLICY) is Kind.LIGHT
    assert schedule.passes[Kind.DEEP].position == START


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0, 0.0])
def test_senseless_settings_do_not_stop_or_flood_anything(number: float) -> None:
    policy = policy_of(True, number, number, number)
    assert policy.rate > 0
    assert all(1 <= interval_s < math.inf for interval_s in policy.intervals_s.values())


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_busier_clients_leave_less_but_always_something(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 100 >= allowed_rate(100, low) >= allowed_rate(100, high) >= 100 * BUSY_SHARE * 0.999
    assert allowed_rate(100, 50) == 100


def test_activity_is_requests_per_second_between_two_looks() -> None:
    activity = Activity()
    activity.observe(1000, 10.0)
    activity.observe(1600, 10.2)
    activity.observe(2000, 12.0)
    assert activity.per_second == 500


@given(
    st.floats(-1e6, 1e6),
    st.one_of(
        st.none(), st.tuples(st.integers(1, 5), st.integers(0, 999), st.integers(-1, 1 << 64))
    ),
    st.lists(st.integers(0, 1023), max_size=5),
    st.floats(0, 1e7),
)
def test_what_is_kept_comes_back_as_much_later_as_the_clock_says(
    finished: float, position: tuple[int, int, int] | None, blocks: list[int], away_s: float
) -> None:
    where = None if position is None else Position(*position)
    schedule = Schedule({kind: Pass(finished, where, 3) for kind in Kind})
    findings = Findings(5, 6, 7, 8)
    findings.add(Problem(1 << 63, DAMAGED, "bad", tuple(blocks)))
    data = encode(schedule, findings, now=2e6, wall=1e9)
    again, found = decode(data, now=50.0, wall=1e9 + away_s)
    assert found == findings
    for kind in Kind:
        assert again.passes[kind].position == where
        assert again.passes[kind].completed == 3
        assert 50.0 - again.passes[kind].finished == pytest.approx(
            2e6 - finished + away_s, abs=1e-3
        )


def test_a_clock_that_went_back_makes_no_pass_wait_longer_than_an_interval() -> None:
    schedule = Schedule.fresh(1, 100.0, POLICY)
    data = encode(schedule, Findings(), now=100.0, wall=1e9)
    again, _ = decode(data, now=0.0, wall=1e9 - 1e8)
    assert again.due_in_s(Kind.DEEP, 0.0, POLICY) <= POLICY.intervals_s[Kind.DEEP]


@given(st.data())
def test_what_was_kept_and_got_damaged_is_refused(data: st.DataObject) -> None:
    kept = bytearray(encode(Schedule.fresh(1, 0.0, POLICY), Findings(1, 2, 3, 4), 0.0, 1e9))
    place = data.draw(st.integers(0, len(kept) - 1))
    flipped = kept[place] ^ data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        decode(bytes(kept[:place]) + bytes([flipped]) + bytes(kept[place + 1 :]), 0.0, 1e9)
    with pytest.raises(ProtocolError):
        decode(bytes(kept[:place]), 0.0, 1e9)


def test_problems_are_told_once_and_are_limited() -> None:
    findings = Findings()
    assert findings.add(Problem(1, DAMAGED, "a", (3,)))
    assert not findings.add(Problem(1, DAMAGED, "b", (3,)))
    assert findings.add(Problem(1, DAMAGED, "b", (3, 4)))
    findings.solved(1, UNEQUAL)
    assert 1 in findings.problems
    findings.solved(1, DAMAGED)
    for oid in range(MAX_PROBLEMS + 10):
        findings.add(Problem(oid, UNEQUAL, ""))
    assert len(findings.problems) == MAX_PROBLEMS
