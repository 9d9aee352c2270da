"""The byte-range lock table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sheepfs.fuse.locks import MAX_OFFSET, Lock, LockTable, foreign_conflict, means_to_write


def lock(owner: int, start: int, end: int, *, exclusive: bool = True, handle: int = 0) -> Lock:
    return Lock(owner, handle or owner, 1000 + owner, start, end, exclusive)


def test_overlapping_exclusive_lock_of_another_owner_is_refused() -> None:
    table = LockTable()
    assert table.acquire(lock(1, 0, 9)) is None
    assert table.acquire(lock(2, 9, 20)) == lock(1, 0, 9)
    assert table.acquire(lock(2, 10, 20)) is None


def test_shared_locks_overlap_and_keep_a_writer_out() -> None:
    table = LockTable()
    assert table.acquire(lock(1, 0, 9, exclusive=False)) is None
    assert table.acquire(lock(2, 5, 15, exclusive=False)) is None
    assert table.acquire(lock(3, 15, 15)) == lock(2, 5, 15, exclusive=False)


def test_the_conflict_with_the_lowest_start_is_told() -> None:
    table = LockTable()
    table.acquire(lock(1, 50, 59))
    table.acquire(lock(2, 10, 19))
    assert table.conflict(lock(3, 0, 100)) == lock(2, 10, 19)


def test_unlocking_the_middle_leaves_both_sides() -> None:
    table = LockTable()
    table.acquire(lock(1, 0, 99))
    assert table.release(1, 40, 59)
    assert sorted(held[3:5] for held in table.held) == [(0, 39), (60, 99)]
    assert not table.release(1, 40, 59)


def test_an_owner_converts_part_of_its_lock() -> None:
    table = LockTable()
    table.acquire(lock(1, 0, 99))
    table.acquire(lock(1, 40, 59, exclusive=False))
    assert table.conflict(lock(2, 50, 50, exclusive=False)) is None
    assert table.conflict(lock(2, 39, 39, exclusive=False)) is not None


def test_adjacent_equal_locks_become_one() -> None:
    table = LockTable()
    table.acquire(lock(1, 0, 9))
    table.acquire(lock(1, 20, MAX_OFFSET))
    table.acquire(lock(1, 10, 19))
    assert table.held == [lock(1, 0, MAX_OFFSET)]


def test_releasing_a_handle_drops_what_was_locked_through_it() -> None:
    table = LockTable()
    table.acquire(lock(1, 0, 9, handle=5))
    table.acquire(lock(2, 10, 19, handle=6))
    assert table.release_handle(5)
    assert not table.release_handle(5)
    assert table.held == [lock(2, 10, 19, handle=6)]


def test_foreign_holder_looks_like_a_qemu_that_writes() -> None:
    for byte in (100, 101, 102, 103, 200, 201, 202, 203):
        assert foreign_conflict(lock(1, byte, byte, exclusive=False)) is None
    tested = {b for b in range(200, 204) if foreign_conflict(lock(1, b, b)) is not None}
    assert tested == {201, 203}
    assert foreign_conflict(lock(1, 0, 0, exclusive=False)) is not None
    assert foreign_conflict(lock(1, 0, MAX_OFFSET)) is not None


def test_qemu_that_locked_the_write_byte_means_to_write() -> None:
    table = LockTable()
    assert means_to_write(lock(1, 101, 101, exclusive=False), table)
    assert not means_to_write(lock(1, 201, 201), table)
    assert not means_to_write(lock(1, 0, MAX_OFFSET), table)
    table.acquire(lock(1, 100, 101, exclusive=False))
    assert means_to_write(lock(1, 201, 201), table)
    assert not means_to_write(lock(2, 201, 201), table)


SPAN = 24
steps = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.integers(0, SPAN - 1),
        st.integers(0, SPAN - 1),
        st.sampled_from(["shared", "exclusive", "unlock"]),
    ),
    max_size=40,
)


@given(steps)
def test_table_agrees_with_a_lock_for_each_byte(
    actions: list[tuple[int, int, int, str]],
) -> None:
    table = LockTable()
    naive: list[dict[int, bool]] = [{} for _ in range(SPAN)]
    for owner, a, b, what in actions:
        start, end = min(a, b), max(a, b)
        if what == "unlock":
            changed = any(naive[i].pop(owner, None) is not None for i in range(start, end + 1))
            for i in range(start, end + 1):
                naive[i].pop(owner, None)
            assert table.release(owner, start, end) == changed
        else:
            exclusive = what == "exclusive"
            blocked = any(
                other != owner and (held or exclusive)
                for i in range(start, end + 1)
                for other, held in naive[i].items()
            )
            got = table.acquire(lock(owner, start, end, exclusive=exclusive))
            assert (got is not None) == blocked
            if not blocked:
                for i in range(start, end + 1):
                    naive[i][owner] = exclusive
        seen: list[dict[int, bool]] = [{} for _ in range(SPAN)]
        for held in table.held:
            for i in range(held.start, held.end + 1):
                assert held.owner not in seen[i]
                seen[i][held.owner] = held.exclusive
        assert seen == naive
