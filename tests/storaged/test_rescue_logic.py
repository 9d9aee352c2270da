"""Choosing copies and blocks for a rescue, against naive oracles."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from storaged.logic.rescue import Assembly, Candidate, is_outdated, ranges, ranking

small = st.integers(0, 3)
candidates = st.lists(st.builds(Candidate, small, small, st.booleans(), st.booleans()), max_size=6)
sums = st.dictionaries(st.integers(0, 7), st.integers(0, 2))


@given(candidates)
def test_no_copy_stands_before_a_better_one(found: list[Candidate]) -> None:
    order = [found[place] for place in ranking(found)]
    assert sorted(order) == sorted(found)
    for i, one in enumerate(order):
        for later in order[i + 1 :]:
            if one.readable != later.readable:
                assert one.readable
            elif one.version != later.version:
                assert one.version > later.version
            elif one.lineage != later.lineage:
                assert one.lineage > later.lineage
            else:
                assert later.suspect or not one.suspect


def test_a_clean_copy_stands_before_a_dirty_one_of_the_same_version_only() -> None:
    dirty, clean = Candidate(5, 0, True, True), Candidate(5, 0, False, True)
    assert ranking([dirty, clean]) == [1, 0]
    assert ranking([Candidate(6, 0, True, True), clean]) == [0, 1]


@given(candidates)
def test_outdated_says_that_an_unreadable_copy_is_newer_than_all_others(
    found: list[Candidate],
) -> None:
    newest = max((c.version, c.lineage) for c in [*found, Candidate(0, 0, True, False)])
    can_be_read = any(c.readable and (c.version, c.lineage) == newest for c in found)
    assert is_outdated(found) == (newest > (0, 0) and not can_be_read)


@given(st.lists(st.integers(0, 2), min_size=8, max_size=8), st.lists(sums, max_size=4))
def test_each_block_comes_from_the_first_copy_that_has_it_undamaged(
    table: list[int], copies: list[dict[int, int]]
) -> None:
    assembly = Assembly(table)
    taken = [assembly.offer(copy) for copy in copies]
    for block, wanted in enumerate(table):
        good = [i for i, copy in enumerate(copies) if copy.get(block) == wanted and wanted]
        assert [i for i, blocks in enumerate(taken) if block in blocks] == good[:1]
        assert (block in assembly.lacking) == (wanted != 0 and not good)
    assert all(blocks == sorted(blocks) for blocks in taken)


@given(st.sets(st.integers(0, 40)))
def test_ranges_cover_exactly_the_numbers(numbers: set[int]) -> None:
    found = ranges(sorted(numbers))
    assert {n for start, end in found for n in range(start, end)} == numbers
    assert all(a[1] < b[0] for a, b in pairwise(found))
