"""Patches made of pieces, against plain lists of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core.errors import CorruptError, ProtocolError
from sheepfs.core.geometry import BLOCK_SIZE, BLOCKS_PER_OBJECT
from storaged.store.format import SUMS, block_sum
from storaged.store.patch import Difference, PatchBuilder

_SUMS = SUMS[BLOCKS_PER_OBJECT]
_BLOCKS = [bytes([n]) * BLOCK_SIZE for n in range(4)]
_DIGESTS = [block_sum(data) for data in _BLOCKS]
_PLACES = (0, 1, 2, 63, 64, 65, 511, 1022, 1023)
"""Blocks that differ from copy to copy; all others are zeros."""
_contents = st.lists(st.integers(0, 3), min_size=len(_PLACES), max_size=len(_PLACES))
_cuts = st.lists(st.integers(0, BLOCKS_PER_OBJECT), max_size=3)


def copy_of(content: list[int]) -> list[int]:
    """Give a copy: for each block the number of its content."""
    blocks = [0] * BLOCKS_PER_OBJECT
    for place, number in zip(_PLACES, content, strict=True):
        blocks[place] = number
    return blocks


def digests(blocks: list[int]) -> bytes:
    return _SUMS.pack(*(_DIGESTS[number] for number in blocks))


def piece(source: list[int], known: bytes, first: int, end: int) -> bytes:
    """Give what a source answers to PULL."""
    theirs = _SUMS.unpack(known)
    differs = [i for i in range(first, end) if theirs[i] != _DIGESTS[source[i]]]
    zeros = [i for i in differs if not source[i]]
    data = [_BLOCKS[source[i]] for i in differs if source[i]]
    return Difference(5, 1, differs, zeros, {}, data).encode()


@given(_contents, st.lists(_contents, min_size=1, max_size=4), _cuts)
def test_pieces_of_a_source_that_changes_and_what_changed_make_its_last_state(
    before: list[int], states: list[list[int]], cuts: list[int]
) -> None:
    copy = copy_of(before)
    known = digests(copy)
    builder = PatchBuilder(known)
    bounds = [0, *sorted(cuts), BLOCKS_PER_OBJECT]
    for turn, (first, end) in enumerate(itertools.pairwise(bounds)):
        builder.add(piece(copy_of(states[turn % len(states)]), known, first, end))
    last = copy_of(states[-1])
    builder.add(piece(last, builder.digests, 0, BLOCKS_PER_OBJECT))
    patch = builder.patch(5, 1)
    assert patch.table == digests(last)
    result = b"".join(_BLOCKS[number] for number in copy)
    for start, stop, data in patch.steps:
        size = (stop - start) * BLOCK_SIZE
        assert data is None or len(data) == size
        written = bytes(size) if data is None else bytes(data)
        result = result[: start * BLOCK_SIZE] + written + result[stop * BLOCK_SIZE :]
    assert result == b"".join(_BLOCKS[number] for number in last)
    changed = {i for i in range(BLOCKS_PER_OBJECT) if copy[i] != last[i]}
    assert changed <= patch.differs


def test_a_piece_that_contradicts_itself_is_refused() -> None:
    known = digests(copy_of([0] * len(_PLACES)))
    good = piece(copy_of([1] * len(_PLACES)), known, 0, BLOCKS_PER_OBJECT)
    zeros = Difference(5, 1, [7], [], {}, [bytes(BLOCK_SIZE)]).encode()
    both = Difference(5, 1, [7], [7], {7: 9}, []).encode()
    for bad, error in (
        (good[:-1], ProtocolError),
        (good[:100], ProtocolError),
        (zeros, CorruptError),
        (both, ProtocolError),
    ):
        builder = PatchBuilder(known)
        with pytest.raises(error):
            builder.add(bad)
