"""What a client makes of a daemon's greeting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from sheepfs.core.errors import ProtocolError
from sheepfs.core.seen import Seen
from sheepfs.net.link import connect_node
from sheepfs.net.transport import TCP
from storaged.server import Server

CLUSTER = "c" * 32


@asynccontextmanager
async def daemon(**told: Any) -> AsyncIterator[str]:
    """A daemon's port that tells this of itself."""
    server = Server(CLUSTER, {}, lambda: told)
    listener = await TCP.listen("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield f"127.0.0.1:{listener.port}"
        nursery.cancel_scope.cancel()


async def test_a_link_knows_what_its_daemon_has_seen() -> None:
    async with (
        daemon(node=1, incarnation=100, seen=Seen(7, 8, 9)) as address,
        connect_node(address, CLUSTER) as link,
    ):
        assert (link.node, link.incarnation, link.seen) == (1, 100, Seen(7, 8, 9))


async def test_a_daemon_that_does_not_tell_what_it_has_seen_is_no_witness() -> None:
    async with daemon(node=1, incarnation=100) as address, connect_node(address, CLUSTER) as link:
        assert link.seen == Seen(0, 0, 0)


@pytest.mark.parametrize(
    "told",
    [
        {"node": 1},
        {"node": "1", "incarnation": 100},
        {"node": 1, "incarnation": 100, "seen": None},
        {"node": 1, "incarnation": 100, "seen": [1, 2]},
        {"node": 1, "incarnation": 100, "seen": [1, 2, "3"]},
        {"node": 1, "incarnation": 100, "seen": {"epoch": 1}},
    ],
)
async def test_a_greeting_that_is_none_is_refused(told: dict[str, Any]) -> None:
    async with daemon(**told) as address:
        with pytest.raises(ProtocolError, match="greeting"):
            async with connect_node(address, CLUSTER):
                pytest.fail("it was taken")
