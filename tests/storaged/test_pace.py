"""How fast a node recovers beside its clients."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from sheepfs.core.metadata import RecoveryRecord
from storaged.logic.pace import CEILING, FLOOR, IDLE_S, LATE_S, Pace
from storaged.recovery.pacing import LOOK_EVERY_S, Pacer

MIB = 1 << 20
looks = st.lists(
    st.tuples(
        st.floats(0.0001, 3600), st.integers(0, 1000), st.floats(0, 0.1), st.integers(1, 4 * MIB)
    ),
    max_size=60,
)


@given(looks, st.sampled_from([0, MIB, 5 * MIB, 100 * MIB]))
def test_never_more_than_the_limit_and_never_less_than_the_floor(
    events: list[tuple[float, int, float, int]], limit: int
) -> None:
    pace = Pace(0.0, limit)
    now, through, last = 0.0, 0, 0
    for elapsed, requests, late_s, size in events:
        now += elapsed
        pace.observe(now, requests, late_s)
        floor = min(FLOOR, limit) if limit else FLOOR
        assert floor <= pace.rate <= (limit or CEILING)
        wait_s = pace.take(now, size)
        if not wait_s:
            through, last = through + size, size
            if limit:
                # All but the last was paid for by the time that has passed.
                assert through - last <= limit * now + 4 * MIB
        else:
            assert wait_s <= 4 * MIB / floor
            assert pace.take(now + wait_s * 1.001 + 1e-6, 1) == 0.0
            now += wait_s * 1.001 + 1e-6
            through, last = through + 1, 1


@given(st.integers(1, 100), st.floats(2 * LATE_S, 1))
def test_a_node_that_is_late_for_its_clients_slows_down_to_the_floor(
    requests: int, late_s: float
) -> None:
    pace = Pace(0.0)
    rates = []
    for look in range(1, 40):
        pace.observe(look * 0.02, requests, late_s)
        rates.append(pace.rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == FLOOR


def test_without_clients_it_goes_at_full_speed_and_yields_when_they_come() -> None:
    pace = Pace(0.0)
    pace.observe(IDLE_S + 0.1, 0, 0.5)
    assert (pace.rate, pace.yields) == (CEILING, False)
    pace.observe(IDLE_S + 0.12, 1, 0.0)
    assert pace.rate < CEILING / 50
    assert pace.yields


def test_clients_that_are_served_in_time_let_it_become_faster() -> None:
    pace = Pace(0.0)
    for look in range(1, 1000):
        pace.observe(look * 0.02, 5, LATE_S / 2)
    assert pace.rate == CEILING


async def moved_in(pacer: Pacer, seconds: float) -> int:
    moved = 0
    with trio.move_on_after(seconds):
        while True:
            await pacer.turn(MIB)
            moved += MIB
            await trio.lowlevel.checkpoint()
    return moved


@pytest.mark.parametrize("limit", [2 * MIB, 20 * MIB])
async def test_a_node_pulls_as_much_as_operators_allow(
    limit: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    pacer = Pacer(lambda: 0)
    pacer.follow(lambda: RecoveryRecord(bandwidth=limit))
    nursery.start_soon(pacer.run)
    await moved_in(pacer, 2)
    moved = await moved_in(pacer, 10)
    assert 9 * limit <= moved <= 10 * limit + 2 * MIB


async def test_a_source_that_is_busy_with_clients_serves_fewer_pulls(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    requests = 0
    pacer = Pacer(lambda: requests)
    nursery.start_soon(pacer.run)

    async def served(count: int) -> int:
        nonlocal requests
        served = 0
        until = trio.current_time() + 2
        while trio.current_time() < until:
            if await pacer.turn_to_serve(4 * MIB):
                served += 1
            requests += count
            await trio.sleep(LOOK_EVERY_S)
        return served

    await served(0)
    assert await served(0) == 100
    assert 2 <= await served(3) < 50
