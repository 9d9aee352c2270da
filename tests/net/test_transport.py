"""What a transport promises: TCP's, and the one of the simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
from sim.network import SimNetwork

from sheepfs.core.errors import UsageError
from sheepfs.net.transport import TCP, Listener, Network, Transport

DEADLINE_S = 10.0


class Pair:
    """A client's network, and where a server listens."""

    def __init__(self, near: Network, far: Network, host: str) -> None:
        self.near = near
        self.far = far
        self.host = host
        self.opened: list[Transport] = []

    async def listen(self) -> Listener:
        return await self.far.listen(f"{self.host}:0")

    async def connected(
        self, nursery: trio.Nursery
    ) -> tuple[Transport, Transport, trio.CancelScope]:
        """Give both ends of a stream, and what ends the listener."""
        listener = await self.listen()
        accepted = trio.Event()
        ends: list[Transport] = []
        scope = trio.CancelScope()

        async def serve(transport: Transport) -> None:
            ends.append(transport)
            accepted.set()
            await trio.sleep_forever()

        async def run() -> None:
            with scope:
                await listener.serve(serve)

        nursery.start_soon(run)
        near = await self.near.connect(f"{self.host}:{listener.port}")
        await accepted.wait()
        self.opened += [near, ends[0]]
        return near, ends[0], scope


@pytest.fixture(params=["tcp", "simulated"])
async def pair(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[Pair]:
    if request.param == "tcp":
        real = Pair(TCP, TCP, "127.0.0.1")
        yield real
        for transport in real.opened:
            transport.close()
        return
    network = SimNetwork(random.Random(1))
    nursery.start_soon(network.run)
    yield Pair(network.host("near"), network.host("far"), "far")


async def read_all(transport: Transport, length: int) -> bytes:
    """Read so much, or to the end of the stream."""
    data = bytearray()
    space = memoryview(bytearray(1 << 16))
    with trio.fail_after(DEADLINE_S):
        while len(data) < length:
            try:
                got = transport.read(space)
            except BlockingIOError:
                await transport.wait_readable()
                continue
            if not got:
                break
            data += space[:got]
    return bytes(data)


async def write_all(transport: Transport, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[transport.write([view[:100_000], view[100_000:300_000]]) :]
        except BlockingIOError:
            await transport.wait_writable()


async def test_bytes_arrive_in_order_both_ways(pair: Pair, nursery: trio.Nursery) -> None:
    near, far, _ = await pair.connected(nursery)
    data = random.Random(2).randbytes(3_000_000)
    nursery.start_soon(write_all, near, data)
    nursery.start_soon(write_all, far, data[::-1])
    assert await read_all(far, len(data)) == data
    assert await read_all(near, len(data)) == data[::-1]


async def test_reading_never_waits(pair: Pair, nursery: trio.Nursery) -> None:
    near, far, _ = await pair.connected(nursery)
    with pytest.raises(BlockingIOError):
        near.read(memoryview(bytearray(1)))
    far.write([b"abc"])
    await near.wait_readable()
    assert near.read(memoryview(bytearray(2))) == 2
    assert near.read(memoryview(bytearray(2))) == 1


async def test_a_writer_must_wait_for_its_reader(pair: Pair, nursery: trio.Nursery) -> None:
    near, far, _ = await pair.connected(nursery)
    written = 0
    piece = bytes(1 << 20)
    with suppress(BlockingIOError):
        while written < 1 << 30:
            written += near.write([piece])
    assert written < 1 << 30
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as reading:
            reading.start_soon(read_all, far, written)
            await near.wait_writable()


async def test_a_closed_stream_ends_for_the_other_side(pair: Pair, nursery: trio.Nursery) -> None:
    near, far, _ = await pair.connected(nursery)
    near.write([b"last"])
    near.close()
    near.close()
    assert await read_all(far, 100) == b"last"
    with pytest.raises(OSError, match=r"clos|descriptor|failed|listens"):
        near.write([b"x"])
    with pytest.raises((OSError, trio.ClosedResourceError)):
        await near.wait_readable()


async def test_writing_to_who_has_closed_breaks_the_stream(
    pair: Pair, nursery: trio.Nursery
) -> None:
    near, far, _ = await pair.connected(nursery)
    far.close()
    with trio.fail_after(DEADLINE_S):
        while True:
            try:
                near.write([b"x"])
            except OSError:
                break
            await trio.sleep(0.001)


async def test_a_port_that_nobody_listens_at_refuses(pair: Pair, nursery: trio.Nursery) -> None:
    listener = await pair.listen()
    scope = trio.CancelScope()
    nursery.start_soon(_serve_until, listener, scope)
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(OSError, match=r"clos|descriptor|failed|listens"):
        await pair.near.connect(f"{pair.host}:{listener.port}")


async def _serve_until(listener: Listener, scope: trio.CancelScope) -> None:
    async def serve(transport: Transport) -> None: ...

    with scope:
        await listener.serve(serve)


async def test_a_port_is_listened_at_once(pair: Pair, nursery: trio.Nursery) -> None:
    listener = await pair.listen()
    nursery.start_soon(_serve_until, listener, trio.CancelScope())
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(UsageError):
        await pair.far.listen(f"{pair.host}:{listener.port}")
    nursery.cancel_scope.cancel()


async def test_what_a_cut_holds_up_arrives_when_it_is_mended(nursery: trio.Nursery) -> None:
    network = SimNetwork(random.Random(3))
    nursery.start_soon(network.run)
    pair = Pair(network.host("near"), network.host("far"), "far")
    near, far, _ = await pair.connected(nursery)
    network.cut("near", "far")
    near.write([b"one"])
    far.write([b"two"])
    assert await read_all(near, 3) == b"two"
    await trio.sleep(0.05)
    with pytest.raises(BlockingIOError):
        far.read(memoryview(bytearray(3)))
    network.mend()
    assert await read_all(far, 3) == b"one"


async def test_a_killed_program_resets_and_a_host_without_power_says_nothing(
    nursery: trio.Nursery,
) -> None:
    network = SimNetwork(random.Random(4))
    nursery.start_soon(network.run)
    pair = Pair(network.host("near"), network.host("far"), "far")
    near, _, _ = await pair.connected(nursery)
    network.host("far").die(silent=False)
    await near.wait_readable()
    with pytest.raises(ConnectionResetError):
        near.read(memoryview(bytearray(1)))
    network.host("far").live()
    near, _, _ = await pair.connected(nursery)
    network.host("far").die(silent=True)
    near.write([b"anybody?"])
    with trio.move_on_after(0.1) as silence:
        await near.wait_readable()
    assert silence.cancelled_caught
    network.host("far").live()
    await near.wait_readable()
    with pytest.raises(ConnectionResetError):
        near.read(memoryview(bytearray(1)))
