from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from sheepfs.core.errors import UnreachableError
from sheepfs.net.transport import TCP
from storaged.logic.reachability import Outcome, Reachability
from storaged.membership.ping import ping
from storaged.server import Server

RUN = (1, 100)
CLUSTER = "c" * 32


def test_a_refusal_counts_at_once_and_an_answer_takes_it_back() -> None:
    reach = Reachability()
    assert reach.note(RUN, Outcome.DEAD, 0.0, 0.0)
    assert reach.unreachable() == {RUN}
    assert not reach.note(RUN, Outcome.DEAD, 1.0, 1.0)
    assert reach.note(RUN, Outcome.ALIVE, 2.0, 2.0)
    assert not reach.unreachable()


@pytest.mark.parametrize(
    ("pings", "is_gone"),
    [
        ([(0.0, 1.0)], False),
        ([(0.0, 1.0), (1.0, 2.0), (1.5, 2.5)], False),
        ([(0.0, 1.0), (3.0, 4.0)], False),
        ([(0.0, 1.0), (1.0, 2.0), (2.1, 3.1)], True),
    ],
)
def test_silence_counts_when_it_is_three_pings_and_three_seconds(
    pings: list[tuple[float, float]], is_gone: bool
) -> None:
    reach = Reachability()
    for sent, now in pings:
        reach.note(RUN, Outcome.SILENT, sent, now)
    assert bool(reach.unreachable()) == is_gone


def test_one_answer_ends_a_silence() -> None:
    reach = Reachability()
    for now in (1.0, 2.0, 3.0):
        reach.note(RUN, Outcome.SILENT, now - 1, now)
    reach.note(RUN, Outcome.ALIVE, 3.0, 3.1)
    reach.note(RUN, Outcome.SILENT, 3.5, 4.5)
    assert not reach.unreachable()


def test_a_run_that_was_voted_out_counts_as_gone_until_it_answers() -> None:
    reach = Reachability()
    assert reach.unreachable({RUN}) == {RUN}
    reach.note(RUN, Outcome.SILENT, 0.0, 1.0)
    assert reach.unreachable({RUN}) == {RUN}
    assert reach.note(RUN, Outcome.ALIVE, 1.0, 1.1)
    assert not reach.unreachable({RUN})


def test_runs_that_nobody_asks_about_are_forgotten() -> None:
    reach = Reachability()
    reach.note(RUN, Outcome.DEAD, 0.0, 0.0)
    reach.forget_all_but({(1, 101)})
    assert not reach.unreachable()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A daemon's port: run 100 of node 1."""
    server = Server(CLUSTER, {}, lambda: {"node": 1, "incarnation": 100})
    listener = await TCP.listen("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield f"127.0.0.1:{listener.port}"
        nursery.cancel_scope.cancel()


async def test_the_run_that_listens_is_there(address: str) -> None:
    assert await ping(address, 100, CLUSTER)


async def test_another_run_at_its_address_proves_it_over(address: str) -> None:
    assert not await ping(address, 99, CLUSTER)


async def test_another_cluster_at_its_address_proves_it_over(address: str) -> None:
    assert not await ping(address, 100, "d" * 32)


async def test_a_port_that_refuses_proves_it_over() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    assert not await ping(f"127.0.0.1:{port}", 100, CLUSTER)


async def test_a_port_that_accepts_and_says_nothing_proves_nothing() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with trio.move_on_after(0.2) as deadline:
        await ping(f"127.0.0.1:{port}", 100, CLUSTER)
    assert deadline.cancelled_caught
    await listener.aclose()


async def test_connections_that_are_closed_unanswered_prove_nothing() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]

    async def close_each() -> None:
        while True:
            await (await listener.accept()).aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close_each)
        with pytest.raises(UnreachableError):
            await ping(f"127.0.0.1:{port}", 100, CLUSTER)
        nursery.cancel_scope.cancel()
    await listener.aclose()
