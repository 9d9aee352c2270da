"""Several operations in flight, their results in order, and never more than so many of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import trio

from sheepfs.net.groups import plain_errors

Item = TypeVar("Item")
Result = TypeVar("Result")


async def gather(
    work: Callable[[Item], Awaitable[Result]], items: list[Item]
) -> list[tuple[Item, Result]]:
    """Do `work` for all items at the same time; give (item, result) in their order.

    Raises:
        What `work` raises first; the others are cancelled.
    """
    results: dict[int, Result] = {}

    async def one(number: int, item: Item) -> None:
        results[number] = await work(item)

    with plain_errors():
        async with trio.open_nursery() as nursery:
            for number, item in enumerate(items):
                nursery.start_soon(one, number, item)
    return [(item, results[number]) for number, item in enumerate(items)]


@asynccontextmanager
async def in_order(
    work: Callable[[Item], Awaitable[Result]], items: AsyncGenerator[Item, None], limit: int
) -> AsyncIterator[AsyncIterator[Result]]:
    """Do `work` for items as they come, up to `limit` ahead of who takes the results.

    An error, of `items` or of `work`, cancels the rest and comes out of the block as itself.
    """
    # What counts is what was begun and not yet taken: that is what occupies memory.
    slots = trio.Semaphore(limit)
    # None is the end. Only a feed that did not fail says it: a closed channel would end the results
    # like a good end, before the error has cancelled who takes them.
    send, receive = trio.open_memory_channel[tuple[trio.Event, list[Result]] | None](limit)

    async def one(item: Item, done: trio.Event, box: list[Result]) -> None:
        box.append(await work(item))
        done.set()

    async def feed(nursery: trio.Nursery) -> None:
        async with aclosing(items):
            async for item in items:
                await slots.acquire()
                done, box = trio.Event(), list[Result]()
                nursery.start_soon(one, item, done, box)
                await send.send((done, box))
        await send.send(None)

    async def results() -> AsyncGenerator[Result, None]:
        while (entry := await receive.receive()) is not None:
            done, box = entry
            await done.wait()
            yield box.pop()
            slots.release()

    with plain_errors(), send, receive:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed, nursery)
            async with aclosing(results()) as taken:
                yield taken
            nursery.cancel_scope.cancel()
