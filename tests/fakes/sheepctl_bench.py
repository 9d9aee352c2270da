"""sheepctl in this process, on an etcd in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import trio

from fakes.etcd import FakeEtcd, FakeServer
from fakes.snapshot_taker import KEYS, put
from sheepfs.core.metadata import ClusterConfig
from sheepfs_tools.sheepctl.__main__ import main

CLUSTER = "ab" * 16


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Bench:
    """A cluster without nodes, and sheepctl.

    Args:
        read: gives what was printed since the last call (out, err).
    """

    def __init__(self, server: FakeServer, read: Callable[[], tuple[str, str]]) -> None:
        self.server = server
        self._read = read
        self.put(KEYS.config, ClusterConfig(CLUSTER).encode())

    def __call__(self, line: str, *more: str) -> Done:
        self._read()
        code = main(["--cluster", "test", *line.split(), *more])
        return Done(code, *self._read())

    def good(self, line: str, *more: str) -> Done:
        done = self(line, *more)
        assert done.code == 0, done.err
        assert done.err == "" or "note:" in done.err
        return done

    def bad(self, code: int, line: str, *more: str) -> str:
        """Fail with a code and one line; gives the line."""
        done = self(line, *more)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done
        return done.err

    def put(self, key: str, value: bytes) -> None:
        trio.run(put, FakeEtcd(self.server), key, value)
