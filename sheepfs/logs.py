"""Logs that an operator can follow: one line for each event, as text or as JSON, never a flood.

An event that programs may look for has fields: `log.info("text", extra=fields(node=3))`. As text
they follow the message as `node=3`; as JSON they are keys of the line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import trio

from sheepfs.core.traffic import KINDS, Traffic

log = logging.getLogger(__name__)

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
BURST = 50
"""Lines of one kind within `BURST_S`; those beyond are counted only."""
BURST_S = 10.0
COMPLAIN_S = 30.0
"""What lasts, like a store that stays away, is logged this often (I12)."""
SLOW_EVERY_S = 10.0
SLOW_EXPONENT = 20
"""What takes 2^20 microseconds, a good second, is slow."""


class Complaint:
    """A warning about something that lasts: it is due at once, then every `COMPLAIN_S`."""

    def __init__(self) -> None:
        self._next = float("-inf")

    def due(self) -> bool:
        """Tell whether to warn now; who asks does so if it is."""
        now = trio.current_time()
        if now < self._next:
            return False
        self._next = now + COMPLAIN_S
        return True

    def end(self) -> None:
        """It lasts no longer: the next one is due at once."""
        self._next = float("-inf")


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Give the argument `extra` of a log call."""
    return {"fields": values}


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add `--log-format`, `--log-level` and `-v`."""
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="one line of text or of JSON for each event (default: text)",
    )
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="log this and what is more urgent (default: info)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_const", const="debug", dest="log_level", help="log all"
    )


class TextFormatter(logging.Formatter):
    """`TIME LEVEL module: message key=value …`; a traceback follows on lines of its own."""

    def __init__(self, *, stamped: bool = True, level: bool = True) -> None:
        """`stamped` and `level`: whether the line says when it was, and how urgent it is."""
        start = "%(asctime)s " if stamped else ""
        super().__init__(start + ("%(levelname)s " if level else "") + "%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Put the fields behind the message, and all into one line."""
        values: dict[str, object] = getattr(record, "fields", {})
        line = super().formatMessage(record)
        for key, value in values.items():
            line += f" {key}={_logfmt(value)}"
        return line.replace("\r", "\\r").replace("\n", "\\n")


def _logfmt(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """`{"time": …, "level": …, "module": …, "message": …, fields …}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "module": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        values: dict[str, object] = getattr(record, "fields", {})
        return json.dumps({**values, **content}, default=str)


class NoFlood(logging.Filter):
    """Lets through so many lines of one kind (module and text before its arguments)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since = clock()
        self._seen: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is logged; the last one before others are left out says so."""
        if record.levelno <= logging.DEBUG:
            return True
        now = self._clock()
        if now >= self._since + BURST_S:
            self._since = now
            self._seen.clear()
        kind = (record.name, str(record.msg))
        count = self._seen[kind] = self._seen.get(kind, 0) + 1
        if count == BURST:
            record.msg = f"{record.getMessage()} (more like this is left out for {BURST_S:g} s)"
            record.args = None
        return count <= BURST


def log_to(handler: logging.Handler, log_format: str, level: str, text: TextFormatter) -> None:
    """Log to `handler` alone from now on.

    Args:
        log_format: `text` or `json`.
        level: one of LEVELS.
        text: how text lines look there.
    """
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    handler.addFilter(NoFlood())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    # Libraries speak at their own levels: their details are of no use to an operator.
    root.setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
    for ours in ("sheepfs", "storaged", "__main__"):
        logging.getLogger(ours).setLevel(level.upper())


def log_to_stderr(log_format: str, level: str) -> None:
    """Log to standard error; under systemd the journal adds the time."""
    text = TextFormatter(stamped=not os.environ.get("JOURNAL_STREAM"))
    log_to(logging.StreamHandler(), log_format, level, text)


async def watch_slow(rows: Callable[[], Iterable[tuple[str, Traffic]]]) -> None:
    """Say every ten seconds of what slow requests have ended: a line for each name and kind.

    Args:
        rows: gives (name, figures).
    """
    before: dict[tuple[str, str], int] = {}
    while True:
        now: dict[tuple[str, str], int] = {}
        for name, traffic in rows():
            for kind in KINDS:
                slow = now[name, kind] = getattr(traffic, kind).slower_than(SLOW_EXPONENT)
                count = slow - before.get((name, kind), 0)
                if count > 0:
                    log.warning(
                        "slow: %d %s requests of %s took longer than 1 s", count, kind, name,
                        extra=fields(event="slow", name=name, operation=kind, count=count),
                    )  # fmt: skip
        before = now
        await trio.sleep(SLOW_EVERY_S)
