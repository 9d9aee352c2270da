"""What daemons and mounts log: one line for each event, and never a flood."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import trio

from sheepfs.core.traffic import Traffic
from sheepfs.logs import (
    BURST,
    BURST_S,
    NoFlood,
    TextFormatter,
    fields,
    log_to,
    watch_slow,
)

log = logging.getLogger("sheepfs.test")


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("sheepfs", "storaged", "__main__")}
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


@pytest.fixture
def logged() -> Callable[[str], Callable[[], list[str]]]:
    """Give a function that begins to log in a format; what it gives tells the lines so far."""

    def begin(log_format: str, level: str = "info") -> Callable[[], list[str]]:
        stream = io.StringIO()
        log_to(logging.StreamHandler(stream), log_format, level, TextFormatter(stamped=False))
        return lambda: stream.getvalue().splitlines()

    return begin


def test_fields_follow_the_text(logged: Callable[[str], Callable[[], list[str]]]) -> None:
    lines = logged("text")
    log.info("node %d is down", 3, extra=fields(node=3, reason='a "b"', zone="", path="/a=b"))
    assert lines() == [
        'INFO sheepfs.test: node 3 is down node=3 reason="a \\"b\\"" zone="" path="/a=b"'
    ]


def test_json_has_them_as_keys_and_nothing_else_takes_their_place(
    logged: Callable[[str], Callable[[], list[str]]],
) -> None:
    lines = logged("json")
    log.warning("node %d is down", 3, extra=fields(node=3, level="x"))
    (line,) = map(json.loads, lines())
    assert line["time"].endswith("Z")
    del line["time"]
    assert line == {
        "node": 3, "level": "warning", "module": "sheepfs.test", "message": "node 3 is down",
    }  # fmt: skip


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_name_with_line_breaks_makes_no_second_line(
    logged: Callable[[str], Callable[[], list[str]]], log_format: str
) -> None:
    lines = logged(log_format)
    log.info("%s is gone", "a\nCRITICAL x: y\r", extra=fields(name="b\nc"))
    assert len(lines()) == 1


def test_an_exception_in_json_is_one_line(
    logged: Callable[[str], Callable[[], list[str]]],
) -> None:
    lines = logged("json")
    try:
        raise ValueError("why\nnot")
    except ValueError:
        log.exception("it failed")
    (line,) = map(json.loads, lines())
    assert "ValueError: why\nnot" in line["exception"]


def test_levels_are_ours_and_libraries_keep_to_info(
    logged: Callable[..., Callable[[], list[str]]],
) -> None:
    lines = logged("text", "debug")
    log.debug("ours")
    logging.getLogger("grpc").debug("theirs")
    lines_at_warning = logged("text", "warning")
    log.info("ours")
    logging.getLogger("grpc").info("theirs")
    log.warning("ours")
    assert lines() == ["DEBUG sheepfs.test: ours"]
    assert lines_at_warning() == ["WARNING sheepfs.test: ours"]


def test_a_flood_of_one_kind_ends_with_a_word_and_begins_again_later() -> None:
    now = 0.0
    no_flood = NoFlood(lambda: now)

    def passed(message: str, *arguments: object) -> list[str]:
        record = logging.LogRecord("m", logging.INFO, "", 0, message, arguments, None)
        return [record.getMessage()] if no_flood.filter(record) else []

    through = [line for number in range(1000) for line in passed("object %d is bad", number)]
    assert len(through) == BURST
    assert through[0] == "object 0 is bad"
    assert through[-1] == f"object {BURST - 1} is bad (more like this is left out for 10 s)"
    assert passed("another %d", 1) == ["another 1"]
    now = BURST_S
    assert passed("object %d is bad", 7) == ["object 7 is bad"]


async def test_slow_requests_are_told_once_for_each_name_and_kind(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    traffic = Traffic()
    with trio.move_on_after(35):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_slow, lambda: [("vm1.raw", traffic)])
            await trio.sleep(5)
            for took_s in (0.9, 1.2, 70.0):
                traffic.write.add(int(took_s * 1e9), 4096)
            await trio.sleep_forever()
    assert [record.getMessage() for record in caplog.records] == [
        "slow: 2 write requests of vm1.raw took longer than 1 s"
    ]
