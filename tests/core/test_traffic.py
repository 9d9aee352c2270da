"""Counters and histograms, against lists of what was counted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import ProtocolError
from sheepfs.core.traffic import BUCKETS, KINDS, Meter, Traffic

TIMES = st.lists(st.integers(0, 10**13), max_size=60)


def meter_of(times: list[int], size: int = 0) -> Meter:
    meter = Meter()
    for took in times:
        meter.add(took, size)
    return meter


def state(meter: Meter) -> tuple[Any, ...]:
    return (meter.buckets, meter.bytes, meter.nanoseconds, meter.errors)


@given(TIMES)
def test_count_mean_and_bytes_are_those_of_what_was_added(times: list[int]) -> None:
    meter = meter_of(times, 4096)
    assert meter.count == len(times)
    assert meter.bytes == 4096 * len(times)
    assert meter.mean_s == pytest.approx(sum(times) / len(times) / 1e9 if times else 0)


@given(TIMES.filter(bool), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(times: list[int], share: float) -> None:
    exact = sorted(times)[math.ceil(share * len(times)) - 1] // 1000
    found_us = meter_of(times).quantile_s(share) * 1e6
    upper = 1 << exact.bit_length()
    assert (upper >> 1) * 0.999 <= found_us <= upper * 1.001


def test_the_quantile_of_nothing_is_zero() -> None:
    assert Meter().quantile_s(0.99) == 0


@given(st.integers(1, 20), st.integers(0, 10**12))
def test_many_at_once_count_as_one_after_the_other(count: int, took: int) -> None:
    together = Meter()
    together.add_many(count, took, 4096 * count)
    assert state(together) == state(meter_of([took] * count, 4096))


@given(TIMES, TIMES)
def test_what_came_since_is_what_was_added_since(before: list[int], after: list[int]) -> None:
    older, newer = meter_of(before, 512), meter_of(before + after, 512)
    assert state(newer.since(older)) == state(meter_of(after, 512))
    assert state(older.plus(meter_of(after, 512))) == state(newer)


def test_counters_that_went_back_began_anew() -> None:
    assert state(meter_of([5_000]).since(meter_of([1, 2, 3]))) == state(meter_of([5_000]))


def test_slower_than_counts_what_took_at_least_so_long() -> None:
    meter = meter_of([(1 << 20) * 1000 - 1, (1 << 20) * 1000, 5_000_000_000])
    assert meter.slower_than(20) == 2


@given(TIMES, st.integers(0, 9))
def test_what_is_encoded_is_decoded(times: list[int], errors: int) -> None:
    traffic = Traffic(read=meter_of(times, 7))
    traffic.flush.errors = errors
    again = Traffic.decode(json.loads(json.dumps(traffic.encode())))
    for kind in KINDS:
        assert state(getattr(again, kind)) == state(getattr(traffic, kind))


GOOD: dict[str, Any] = Meter().encode()


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {**GOOD, "buckets": [0] * (BUCKETS + 1)},
        {**GOOD, "buckets": [-1]},
        {**GOOD, "buckets": ["1"]},
        {**GOOD, "buckets": [1.5]},
        {**GOOD, "buckets": [True]},
        {**GOOD, "buckets": 3},
        {**GOOD, "bytes": 1 << 63},
        {**GOOD, "ns": float("nan")},
        {**GOOD, "errors": None},
    ],
)
def test_what_is_no_meter_is_refused(bad: object) -> None:
    with pytest.raises(ProtocolError):
        Meter.decode(bad)


VALUES = st.none() | st.integers(-2, 1 << 64) | st.lists(st.integers(-1, 9), max_size=70)
METERS = st.fixed_dictionaries({key: VALUES for key in ("buckets", "bytes", "ns", "errors")})


@given(st.fixed_dictionaries({kind: METERS for kind in KINDS}))
def test_any_json_is_traffic_or_refused(content: object) -> None:
    try:
        traffic = Traffic.decode(content)
    except ProtocolError:
        return
    assert traffic.total >= 0
