"""The simulation's model of a sector, against all orders in which its writes may take effect."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.registers import SECTOR, ZEROS, Register, Volume, Write, stamp, value_of


def orders(writes: list[Write]) -> list[tuple[Write, ...]]:
    """Give every order that agrees with who was complete before whom was issued."""
    return [
        order
        for order in itertools.permutations(writes)
        if not any(
            later.completed is not None and later.completed < earlier.issued
            for i, earlier in enumerate(order)
            for later in order[i + 1 :]
        )
    ]


def last_ones(writes: list[Write], since: int) -> set[int]:
    """What a read that begins at event `since` and ends after the last event may give."""
    found = set()
    for order in orders(writes):
        values = [ZEROS, *(write.value for write in order)]
        done = [
            i for i, w in enumerate(order, 1) if w.completed is not None and w.completed < since
        ]
        found |= set(values[max(done, default=0) :])
    return found


@st.composite
def histories(draw: st.DrawFn) -> list[Write]:
    """Up to five writes of one sector; some are not complete."""
    count = draw(st.integers(1, 5))
    events = draw(st.permutations(range(1, 2 * count + 1)))
    writes = []
    for value in range(1, count + 1):
        first, second = sorted(events[2 * value - 2 : 2 * value])
        completed = second if draw(st.booleans()) else None
        writes.append(Write(value, first, completed))
    return sorted(writes, key=lambda write: write.issued)


@given(histories(), st.integers(0, 12))
def test_a_read_gives_what_some_order_of_the_writes_explains(
    writes: list[Write], since: int
) -> None:
    assert Register(log=list(writes)).in_force(since) == last_ones(writes, since)


@given(histories(), st.integers(1, 12))
def test_a_flush_forgets_nothing_that_may_still_be_read(writes: list[Write], issued: int) -> None:
    register = Register(log=list(writes))
    register.flushed(issued)
    assert last_ones(writes, 100) <= register.in_force(100)
    # Nor does it keep what was overwritten before it.
    assert register.in_force(100) <= last_ones(writes, issued)


@given(histories(), st.integers(1, 12))
def test_a_loss_brings_back_nothing_from_before_the_flush(writes: list[Write], issued: int) -> None:
    register = Register(log=list(writes))
    register.flushed(issued)
    register.lost(holder=True)
    assert register.in_force(100) <= last_ones(writes, issued)
    assert {w.value for w in writes if w.issued > issued} <= register.in_force(100)


@given(histories(), st.integers(1, 12))
def test_what_a_holder_goes_on_with_after_a_loss_ends_all_doubt(
    writes: list[Write], issued: int
) -> None:
    register = Register(log=list(writes))
    register.flushed(issued)
    register.lost(holder=False)
    assert register.in_force(100) >= register.floor
    for write in writes:
        write.completed = write.completed or 50
    register.log.append(Write(99, 60, 61))
    assert register.in_force(100) == {99}


def test_what_is_complete_soon_after_a_loss_may_be_gone_until_a_flush_says_that_it_is_not() -> None:
    register = Register(floor={1}, base={1})
    write = Write(2, 1)
    register.log.append(write)
    register.lost(holder=False)
    write.completed = 3
    assert register.in_force(5) == {1, 2}
    register.flushed(6)
    assert register.in_force(7) == {2}


def test_what_was_read_after_a_loss_stays() -> None:
    volume = Volume(1, 16)
    volume.begin(3, 1, 7, 1).completed = 2
    volume.lost(holder=True)
    before = stamp(1, 3, 7)
    volume.check(3, before, 5)
    volume.check(3, before, 6)
    with pytest.raises(AssertionError, match="reads 0"):
        volume.check(3, bytes(SECTOR), 7)


def test_a_read_that_takes_long_may_give_what_was_there_when_it_began() -> None:
    volume = Volume(1, 16)
    with volume.reading():
        volume.begin(3, 1, 7, 2).completed = 3
        volume.flushed(4)
        volume.check(3, bytes(SECTOR), 1)
        volume.check(3, stamp(1, 3, 7), 1)
        with pytest.raises(AssertionError, match="reads 0"):
            volume.check(3, bytes(SECTOR), 5)
    with pytest.raises(AssertionError, match="reads 0"):
        volume.check(3, bytes(SECTOR), 1)


def test_a_snapshot_has_what_was_there_at_one_moment_while_it_was_made() -> None:
    volume = Volume(1, 16)
    volume.begin(3, 1, 7, 1).completed = 2
    with volume.reading():
        under_way = volume.begin(3, 1, 8, 4)
        under_way.completed = 5
        volume.flushed(6)
        snapshot = volume.frozen(3)
    volume.begin(3, 1, 9, 8).completed = 9
    with pytest.raises(AssertionError, match="reads 9"):
        snapshot.check(3, stamp(1, 3, 9), 10)
    snapshot.check(3, stamp(1, 3, 7), 10)
    with pytest.raises(AssertionError, match="reads"):
        snapshot.check(3, stamp(1, 3, 8), 11)
    snapshot.check(4, bytes(SECTOR), 12)


def test_a_sector_of_elsewhere_or_a_torn_one_is_none() -> None:
    assert value_of(1, 3, stamp(1, 3, 7)) == 7
    for data in (stamp(1, 4, 7), stamp(2, 3, 7), stamp(1, 3, 7)[:256] + stamp(1, 3, 8)[256:]):
        if data == stamp(1, 3, 7):
            continue  # Both halves are alike.
        with pytest.raises(AssertionError):
            value_of(1, 3, data)
