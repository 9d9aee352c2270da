"""When a store counts as one that went back, and when no more."""

from __future__ import annotations

import pytest

from sheepfs.net.history import RevisionGuard, WentBackError

BASE = 1 << 40


def test_replies_that_overtake_each_other_are_fine() -> None:
    guard = RevisionGuard("etcd")
    before = guard.known
    guard.note(9, before)
    guard.note(7, before)
    assert guard.known.revision == 9
    with pytest.raises(WentBackError):
        guard.note(8, guard.known)
    with pytest.raises(WentBackError):
        guard.note(100, guard.known)


def test_requests_under_way_when_it_is_vouched_for_do_not_undo_that() -> None:
    guard = RevisionGuard("etcd")
    guard.look(0, 50, guard.known)
    with pytest.raises(WentBackError):
        guard.look(0, 2, guard.known)
    first, second, third = guard.known, guard.known, guard.known
    guard.look(BASE, 4, first)
    guard.look(BASE, 4, second)
    guard.note(5, third)
    assert not guard.went_back
    guard.note(6, guard.known)
    with pytest.raises(WentBackError):
        guard.note(5, guard.known)


def test_a_base_that_is_no_higher_vouches_for_nothing() -> None:
    guard = RevisionGuard("etcd")
    guard.look(BASE, 50, guard.known)
    for _ in range(2):
        with pytest.raises(WentBackError):
            guard.look(BASE, 49, guard.known)
    guard.look(2 * BASE, 3, guard.known)
    assert not guard.went_back
