"""Images: reading, data ranges and changes of stored maps, and how little is asked for them."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.memory_objects import MemoryObjects
from sheepfs.core.errors import ObjectNotFoundError, ProtocolError
from sheepfs.core.geometry import BLOCK_SIZE, MAP_ENTRIES_PER_OBJECT, OBJECT_SIZE, make_layer
from sheepfs.layers.image import IN_FLIGHT, Change, Image
from sheepfs.pipeline import in_order

A, B, C = (make_layer(serial, 1, 3) for serial in (1, 2, 3))
MAP_1, MAP_2 = (make_layer(serial, 1, 3) for serial in (8, 9))
X, Y = b"x" * BLOCK_SIZE, b"y" * BLOCK_SIZE


async def extents(image: Image) -> list[tuple[int, int]]:
    return [found async for found in image.extents()]


async def changes(image: Image, older: Image) -> list[Change]:
    return [found async for found in image.changes(older)]


async def test_reads_go_to_the_owner_that_the_map_names_and_holes_are_zeros() -> None:
    objects = MemoryObjects()
    objects.fill(A, 0, 1023, X)
    objects.fill(B, 1, 0, Y)
    image = objects.image(4 * OBJECT_SIZE + 100, MAP_1, {0: A, 1: B})
    border = OBJECT_SIZE - 2
    assert await image.read(border, 4) == b"xxyy"
    assert await image.read(0, OBJECT_SIZE * 3) == bytes(OBJECT_SIZE - BLOCK_SIZE) + X + Y + bytes(
        2 * OBJECT_SIZE - BLOCK_SIZE
    )
    assert await image.read(4 * OBJECT_SIZE + 90, 4096) == bytes(10)
    assert await image.read(image.size, 1) == b""


async def test_an_object_that_the_map_names_and_nobody_has_is_an_error() -> None:
    objects = MemoryObjects()
    image = objects.image(OBJECT_SIZE, MAP_1, {0: A})
    with pytest.raises(ObjectNotFoundError):
        await image.read(0, 1)
    with pytest.raises(ObjectNotFoundError):
        await extents(image)


async def test_a_map_page_that_cannot_be_is_refused() -> None:
    objects = MemoryObjects()
    image = objects.image(OBJECT_SIZE, MAP_1, {0: 1 << 60})
    with pytest.raises(ProtocolError):
        await image.read(0, 1)


async def test_data_ranges_are_in_order_joined_across_objects_and_cut_at_the_size() -> None:
    objects = MemoryObjects()
    objects.fill(A, 0, 1022, X + X)
    objects.fill(B, 1, 0, X)
    objects.fill(B, 1, 5, X)
    objects.fill(C, 100, 3, X)
    size = 100 * OBJECT_SIZE + 3 * BLOCK_SIZE + 7
    image = objects.image(size, MAP_1, {0: A, 1: B, 100: C})
    one = OBJECT_SIZE + 5 * BLOCK_SIZE
    assert await extents(image) == [
        (1022 * BLOCK_SIZE, OBJECT_SIZE + BLOCK_SIZE),
        (one, one + BLOCK_SIZE),
        (size - 7, size),
    ]


async def test_nothing_is_loaded_where_nothing_exists() -> None:
    objects = MemoryObjects()
    far = 5 * MAP_ENTRIES_PER_OBJECT + 100_000
    objects.fill(A, far, 0, X)
    size = 100 * MAP_ENTRIES_PER_OBJECT * OBJECT_SIZE
    image = objects.image(size, MAP_1, {far: A})
    assert await extents(image) == [(far * OBJECT_SIZE, far * OBJECT_SIZE + BLOCK_SIZE)]
    assert objects.asked == {"extents map": 1, "fetch map": 1, "extents data": 1}
    assert await image.read(0, 10) == bytes(10)
    assert objects.asked["fetch data"] == 0


async def test_equal_owners_are_equal_without_being_asked_for() -> None:
    objects = MemoryObjects()
    owners = dict.fromkeys(range(50), A)
    for index in owners:
        objects.fill(A, index, 0, X)
    older = objects.image(50 * OBJECT_SIZE, MAP_1, owners)
    newer = objects.image(50 * OBJECT_SIZE, MAP_2, owners)
    assert await changes(newer, older) == []
    assert not any(objects.asked[f"{what} data"] for what in ("sums", "fetch", "extents"))


async def test_changes_name_only_blocks_whose_checksums_differ() -> None:
    objects = MemoryObjects()
    objects.fill(A, 0, 0, X * 8)
    objects.fill(B, 0, 0, X * 2 + Y * 2 + bytes(2 * BLOCK_SIZE) + X * 2)
    objects.fill(A, 1, 3, X)  # Becomes a hole.
    objects.fill(B, 2, 7, Y)  # Was one.
    older = objects.image(3 * OBJECT_SIZE, MAP_1, {0: A, 1: A})
    newer = objects.image(3 * OBJECT_SIZE, MAP_2, {0: B, 2: B})
    block = BLOCK_SIZE
    one, two = OBJECT_SIZE + 3 * block, 2 * OBJECT_SIZE + 7 * block
    assert await changes(newer, older) == [
        Change(2 * block, 4 * block, True),
        Change(4 * block, 6 * block, False),
        Change(one, one + block, False),
        Change(two, two + block, True),
    ]
    assert objects.asked["fetch data"] == 0


async def test_changes_end_at_the_size_and_what_grew_differs_from_zeros() -> None:
    objects = MemoryObjects()
    objects.fill(A, 0, 0, X * 4)
    objects.fill(B, 3, 0, X * 4)
    small = objects.image(4 * BLOCK_SIZE, MAP_1, {0: A})
    big = objects.image(3 * OBJECT_SIZE + 5000, MAP_2, {0: A, 3: B})
    assert await changes(big, small) == [Change(3 * OBJECT_SIZE, 3 * OBJECT_SIZE + 5000, True)]
    assert await changes(small, big) == []


blocks = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 1022, 1023])), st.sampled_from([X, Y])
)


@settings(max_examples=30, deadline=None)
@given(blocks, blocks, st.integers(1, 4 * OBJECT_SIZE), st.integers(1, 4 * OBJECT_SIZE))
def test_what_is_not_named_is_equal_and_what_is_named_zero_is_zeros(
    old: dict[tuple[int, int], bytes], new: dict[tuple[int, int], bytes], old_size: int, size: int
) -> None:
    async def run() -> None:
        objects = MemoryObjects()
        images = []
        for layer, map_layer, content, length in ((A, MAP_1, old, old_size), (B, MAP_2, new, size)):
            kept = {p: d for p, d in content.items() if _start(p) + BLOCK_SIZE <= length}
            for (index, block), data in kept.items():
                objects.fill(layer, index, block, data)
            images.append(objects.image(length, map_layer, {i: layer for i, _ in kept}))
        older, newer = images
        before = (await older.read(0, size)).ljust(size, b"\0")
        after = await newer.read(0, size)
        rebuilt = bytearray(before)
        end = 0
        for change in await changes(newer, older):
            assert end <= change.start < change.end <= size
            end = change.end
            data = after[change.start : end]
            assert change.is_data or not any(data)
            rebuilt[change.start : end] = data if change.is_data else bytes(len(data))
        assert bytes(rebuilt) == after
        sparse = bytearray(size)
        for start, stop in await extents(newer):
            sparse[start:stop] = after[start:stop]
        assert bytes(sparse) == after

    trio.run(run)


def _start(place: tuple[int, int]) -> int:
    return place[0] * OBJECT_SIZE + place[1] * BLOCK_SIZE


async def test_iterating_may_stop_in_the_middle() -> None:
    objects = MemoryObjects()
    for index in range(0, 60, 2):
        objects.fill(A, index, 0, X)
    image = objects.image(60 * OBJECT_SIZE, MAP_1, {i: A for i in range(0, 60, 2)})
    async with aclosing(image.extents()) as ranges:
        async for _ in ranges:
            break
    assert objects.asked["extents data"] == IN_FLIGHT


async def numbers(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number


async def test_results_come_in_order_however_long_each_takes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    running = most = 0
    rng = random.Random(1)

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(rng.random())
        running -= 1
        return number

    async with in_order(work, numbers(40), 8) as results:
        assert [result async for result in results] == list(range(40))
    assert most == 8


async def test_an_error_in_the_pipeline_comes_out_as_itself() -> None:
    async def work(number: int) -> int:
        await trio.lowlevel.checkpoint()
        if number == 7:
            raise ObjectNotFoundError("gone")
        return number

    async def take_all() -> None:
        async with in_order(work, numbers(40), 4) as results:
            async for _ in results:
                pass

    with pytest.raises(ObjectNotFoundError):
        await take_all()


@pytest.mark.parametrize("good", [0, 1, 5])
async def test_an_error_of_the_items_is_never_taken_for_their_end(good: int) -> None:
    async def failing() -> AsyncGenerator[int]:
        for number in range(good):
            yield number
        raise ObjectNotFoundError("gone")

    async def work(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number

    async def take_all() -> None:
        async with in_order(work, failing(), 4) as results:
            async for _ in results:
                pass

    with pytest.raises(ObjectNotFoundError):
        await take_all()
