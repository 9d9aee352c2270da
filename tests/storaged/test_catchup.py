"""What a joining node must do, and in which order; and how far it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.geometry import data_object, make_layer
from storaged.logic.catchup import Levels, Listed, plan, waves
from storaged.logic.progress import Progress

objects = st.dictionaries(
    st.integers(1, 8), st.tuples(st.integers(1, 3), st.integers(0, 1), st.booleans())
)


def listed(copies: dict[int, tuple[int, int, bool]]) -> list[Listed]:
    return [Listed(oid, *copy) for oid, copy in copies.items()]


@given(objects, objects, st.sets(st.integers(1, 8)), st.sets(st.integers(1, 8)))
def test_each_object_is_pulled_equal_or_a_stray_by_what_the_lists_and_changes_say(
    ours: dict[int, tuple[int, int, bool]],
    theirs: dict[int, tuple[int, int, bool]],
    fresh: set[int],
    missed: set[int],
) -> None:
    missed -= fresh
    todo = plan(listed(ours), listed(theirs), fresh, missed)
    for oid in range(1, 9):
        expected = ""
        if oid in fresh:
            pass
        elif oid in missed:
            expected = "pull"
        elif oid in theirs:
            both = (ours.get(oid), theirs[oid])
            same = both[0] == both[1] and not theirs[oid][2]
            expected = "equal" if same else "pull"
        elif oid in ours:
            expected = "stray"
        found = {"pull": todo.pull, "equal": todo.equal, "stray": todo.strays}
        assert [kind for kind, oids in found.items() if oid in oids] == [expected] * bool(expected)


def test_what_clients_write_to_comes_first_but_not_before_what_it_may_be_made_of() -> None:
    old, new = make_layer(1, 1, 3), make_layer(2, 1, 3)
    oids = [data_object(layer, index) for layer in (new, old) for index in range(3)]
    missed = {data_object(new, 2), data_object(old, 1)}
    assert waves(oids, missed) == [
        [data_object(old, 1), data_object(old, 0), data_object(old, 2)],
        [data_object(new, 2), data_object(new, 0), data_object(new, 1)],
    ]


def test_what_is_known_of_a_group_ends_with_its_change() -> None:
    levels = Levels()
    level = levels.of(3, 1, 7)
    level.bring(5)
    level.miss(6, 100)
    level.miss(6, 90)
    assert (level.fresh, level.missed) == ({5}, {6: 100})
    level.miss(5, 8)
    level.bring(6)
    assert (level.fresh, level.missed) == ({6}, {5: 8})
    assert levels.of(3, 1, 7) is level
    assert levels.of(3, 1, 9).missed == {}


def test_progress_counts_down_and_tells_the_rate_of_late() -> None:
    progress = Progress()
    group, other = (3, 0, 5), (3, 1, 5)
    progress.begin([group, other], 100.0)
    assert progress.unknown() == [group, other]
    progress.found(group, 10, 1000)
    progress.found(other, 0, 0)
    for second in range(1, 6):
        progress.done(group, 100, 50, 100.0 + second)
    status = progress.status(105.0)
    assert (status["objects_left"], status["bytes_left"]) == (5, 500)
    assert (status["objects_done"], status["bytes_done"]) == (5, 250)
    assert status["bytes_per_s"] == 50
    assert progress.status(200.0)["bytes_per_s"] == 0
    progress.begin([group], 201.0)
    assert progress.status(201.0)["objects_done"] == 5, "it is the same recovery yet"
    progress.begin([], 202.0)
    assert progress.status(202.0)["groups_left"] == progress.status(202.0)["for_s"] == 0
    progress.begin([other], 203.0)
    assert progress.status(203.0)["objects_done"] == 0
