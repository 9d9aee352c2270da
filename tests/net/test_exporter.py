"""The port for metrics: what a scraper gets, and what strangers cannot do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from fakes.waiting import wait_until
from sheepfs.core.exposition import CONTENT_TYPE
from sheepfs.net import exporter
from sheepfs.net.exporter import Exporter
from sheepfs.net.transport import TCP

DEADLINE_S = 10.0
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class Port:
    """An exporter that listens, and how often its text was made."""

    def __init__(self) -> None:
        self.made = 0
        self.large = 0
        self.number = 0
        self.exporter = Exporter(self.pieces)

    def pieces(self) -> Iterator[str]:
        self.made += 1
        yield "# HELP sheepfs_x X.\n# TYPE sheepfs_x gauge\n"
        yield "#" * self.large
        yield "sheepfs_x 1\n"

    async def open(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.number)

    async def ask(self, request: bytes) -> bytes:
        """Send, then give all that comes until the server closes."""
        with trio.fail_after(DEADLINE_S):
            stream = await self.open()
            async with stream:
                await stream.send_all(request)
                return await read_to_end(stream)


async def read_to_end(stream: trio.SocketStream) -> bytes:
    answer = b""
    try:
        while part := await stream.receive_some():
            answer += part
    except trio.BrokenResourceError:
        pass  # A reset: it closed with more of our bytes under way.
    return answer


async def read_answer(stream: trio.SocketStream) -> bytes:
    """Give one answer whose body ends with the metric, of a connection that stays open."""
    answer = b""
    while b"sheepfs_x 1\n" not in answer or not answer.endswith(b"\n"):
        part = await stream.receive_some()
        assert part, answer
        answer += part
    return answer


def closing(request: bytes) -> bytes:
    return request.replace(b"Host:", b"Connection: close\r\nHost:")


@pytest.fixture
async def port(nursery: trio.Nursery) -> Port:
    made = Port()
    listener = await TCP.listen("127.0.0.1:0")
    made.number = listener.port
    nursery.start_soon(made.exporter.serve, listener)
    return made


async def test_a_scrape_gives_the_metrics_and_those_of_the_process(port: Port) -> None:
    answer = await port.ask(closing(SCRAPE))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert CONTENT_TYPE.encode() in head
    assert b"sheepfs_x 1\n" in body
    assert b"process_cpu_seconds_total" in body


async def test_other_paths_and_methods_are_refused_and_the_connection_stays(port: Port) -> None:
    requests = [
        (b"GET /healthz HTTP/1.1", b"200"),
        (b"GET /nothing HTTP/1.1", b"404"),
        (b"DELETE /metrics HTTP/1.1", b"405"),
        (b"HEAD /metrics HTTP/1.1", b"200"),
    ]
    together = b"".join(line + b"\r\nHost: x\r\n\r\n" for line, _ in requests[:-1])
    answer = await port.ask(together + closing(requests[-1][0] + b"\r\nHost: x\r\n\r\n"))
    codes = [line.split()[1] for line in answer.split(b"\n") if line.startswith(b"HTTP/")]
    assert codes == [code for _, code in requests]
    assert not answer.endswith(b"sheepfs_x 1\n")


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", b"400"),
        (b"hello\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5_000 + b"\r\n", b"431"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nabc", b"413"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz", b"4"),
    ],
)
async def test_garbage_is_refused_and_the_connection_closed(
    port: Port, request_bytes: bytes, code: bytes
) -> None:
    answer = await port.ask(request_bytes)
    # Whoever sends more than is read may get a reset in place of the answer.
    assert not answer or answer.split()[1].startswith(code)
    assert b"sheepfs_x 1" in await port.ask(closing(SCRAPE))


async def test_who_is_slow_is_disconnected(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "REQUEST_TIMEOUT_S", 0.2)
    with trio.fail_after(DEADLINE_S):
        stream = await port.open()
        async with stream:
            await stream.send_all(b"GET /met")
            assert await read_to_end(stream) == b""


async def test_who_dribbles_gains_no_time(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "REQUEST_TIMEOUT_S", 0.2)

    async def dribble(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(b"G")
            await trio.sleep(0.02)

    with trio.fail_after(DEADLINE_S):
        async with await port.open() as stream:
            with pytest.raises(trio.BrokenResourceError):
                await dribble(stream)


async def test_many_who_only_connect_do_not_keep_prometheus_out(port: Port) -> None:
    idle = [await port.open() for _ in range(3 * exporter.MAX_CONNECTIONS)]
    assert b"sheepfs_x 1" in await port.ask(closing(SCRAPE))
    for stream in idle:
        await stream.aclose()


async def test_who_takes_no_answer_is_disconnected(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(port, "large", 32 << 20)
    async with await port.open() as stream:
        await stream.send_all(SCRAPE)
        await wait_until(lambda: port.made, DEADLINE_S)
        await wait_until(lambda: not port.exporter.connections, DEADLINE_S)
        assert len(await read_to_end(stream)) < port.large


async def test_a_flood_of_scrapes_makes_the_text_once_a_second(port: Port) -> None:
    began = trio.current_time()
    with trio.fail_after(DEADLINE_S):
        async with await port.open() as stream:
            for _ in range(20):
                await stream.send_all(SCRAPE)
                await read_answer(stream)
    assert port.made <= trio.current_time() - began + 1
    assert trio.current_time() - began >= 20 * exporter.PAUSE_S


async def test_other_tasks_run_while_the_text_is_made() -> None:
    ran = 0

    def pieces() -> Iterator[str]:
        nonlocal ran
        for number in range(50):
            seen.append(ran)
            yield f"sheepfs_{number} 1\n"

    async def other() -> None:
        nonlocal ran
        while True:
            ran += 1
            await trio.lowlevel.checkpoint()

    seen: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await Exporter(pieces).text()
        nursery.cancel_scope.cancel()
    assert seen[-1] >= 40
