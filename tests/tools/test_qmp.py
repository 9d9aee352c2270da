"""Freezing a guest, with a fake guest agent on a unix socket."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from sheepfs.net.groups import plain_errors
from sheepfs_tools import qmp
from sheepfs_tools.qmp import GuestAgentError, frozen

Answer = Callable[["FakeAgent", trio.SocketStream], Awaitable[None]]


class FakeAgent:
    """Answers as qemu-ga does; `misfortunes` replaces what happens for a command, once."""

    def __init__(self) -> None:
        self.frozen = False
        self.commands: list[str] = []
        self.misfortunes: dict[str, Answer] = {}
        self.greeting = b""
        self.silent = False

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = b""
        try:
            await stream.send_all(self.greeting)
            async for data in stream:
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    await self._answer(stream, json.loads(line.lstrip(b"\xff")))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _answer(self, stream: trio.SocketStream, request: dict[str, Any]) -> None:
        command = request["execute"]
        if self.silent:
            return
        if command == "guest-sync-delimited":
            reply = b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode()
        else:
            self.commands.append(command.removeprefix("guest-fsfreeze-"))
            count = 2 if self.frozen or command.endswith("freeze") else 0
            self.frozen = command.endswith("-freeze")
            if misfortune := self.misfortunes.pop(command.removeprefix("guest-fsfreeze-"), None):
                await misfortune(self, stream)
                return
            reply = json.dumps({"return": count}).encode()
        await stream.send_all(reply + b"\n")


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent()
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    with plain_errors():
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_listeners, agent.serve, [trio.SocketListener(listener)])
            nursery.start_soon(serve)
            yield agent
            nursery.cancel_scope.cancel()


async def silence(agent: FakeAgent, stream: trio.SocketStream) -> None:
    pass


async def death(agent: FakeAgent, stream: trio.SocketStream) -> None:
    await stream.aclose()


async def refusal(agent: FakeAgent, stream: trio.SocketStream) -> None:
    agent.frozen = False
    error = {"class": "GenericError", "desc": "failed to open /boot"}
    await stream.send_all(json.dumps({"error": error}).encode() + b"\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qga"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SYNC_S", "FREEZE_S", "THAW_S"):
        monkeypatch.setattr(qmp, name, 0.3)
    monkeypatch.setattr(qmp, "_RETRY_S", 0.02)


async def freeze(path: Path) -> None:
    async with frozen(str(path)):
        raise AssertionError("the block must not run")


async def test_the_guest_is_frozen_during_the_block_and_only_then(path: Path) -> None:
    async with running(path) as agent:
        async with frozen(str(path)) as state:
            assert agent.frozen
            assert state.file_systems == 2
        assert agent.commands == ["freeze", "thaw"]
        assert not state.thawed_early


async def test_what_an_earlier_client_left_unread_is_skipped(path: Path) -> None:
    async with running(path) as agent:
        agent.greeting = b'{"return": 7}\n{"ret\xff{"return": 12345}\n'
        async with frozen(str(path)):
            assert agent.frozen
        assert not agent.frozen


async def test_a_guest_that_thawed_by_itself_is_told(path: Path) -> None:
    async with running(path) as agent:
        async with frozen(str(path)) as state:
            agent.frozen = False
        assert state.thawed_early


async def test_an_error_in_the_block_thaws_and_comes_out(path: Path) -> None:
    async def fail() -> None:
        async with frozen(str(path)):
            raise ValueError("snapshot failed")

    async with running(path) as agent:
        with pytest.raises(ValueError, match="snapshot failed"):
            await fail()
        assert agent.commands == ["freeze", "thaw"]


async def test_a_cancelled_block_thaws(path: Path) -> None:
    async with running(path) as agent:
        with trio.move_on_after(0.05) as scope:
            async with frozen(str(path)):
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert agent.commands == ["freeze", "thaw"]


async def test_a_cancelled_freeze_thaws(path: Path) -> None:
    async with running(path) as agent:
        agent.misfortunes["freeze"] = silence
        with trio.move_on_after(0.05) as scope:
            await freeze(path)
        assert scope.cancelled_caught
        assert agent.commands == ["freeze", "thaw"]
        assert not agent.frozen


@pytest.mark.parametrize(
    ("misfortune", "what"),
    [(silence, "not frozen within"), (death, "closed the connection"), (refusal, "open /boot")],
)
async def test_a_freeze_whose_answer_is_lost_or_bad_is_taken_back(
    path: Path, misfortune: Answer, what: str
) -> None:
    async with running(path) as agent:
        agent.misfortunes["freeze"] = misfortune
        with pytest.raises(GuestAgentError, match=what):
            await freeze(path)
        assert agent.commands == ["freeze", "thaw"]
        assert not agent.frozen


@pytest.mark.parametrize("misfortune", [death, refusal])
async def test_a_thaw_that_fails_is_tried_again(path: Path, misfortune: Answer) -> None:
    async with running(path) as agent:
        agent.misfortunes["thaw"] = misfortune
        async with frozen(str(path)):
            pass
        assert agent.commands == ["freeze", "thaw", "thaw"]


async def test_a_guest_that_cannot_be_thawed_is_said_loudly(path: Path) -> None:
    async def run(agent: FakeAgent) -> None:
        async with frozen(str(path)):
            agent.silent = True

    async with running(path) as agent:
        with pytest.raises(GuestAgentError, match="MAY STILL BE FROZEN"):
            await run(agent)


@pytest.mark.parametrize("where", ["in the block", "while it waits"])
def test_ctrl_c_thaws(path: Path, where: str) -> None:
    async def main() -> None:
        async with running(path) as agent:
            agents.append(agent)
            async with frozen(str(path)):
                if where == "in the block":
                    signal.raise_signal(signal.SIGINT)
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                await trio.sleep_forever()

    agents: list[FakeAgent] = []
    # A shell starts what runs in the background with SIGINT ignored.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
    finally:
        signal.signal(signal.SIGINT, former)
    assert agents[0].commands == ["freeze", "thaw"]


async def test_nobody_listening_is_one_sentence(path: Path) -> None:
    with pytest.raises(GuestAgentError, match="no QEMU listens there"):
        await freeze(path)
    path.touch()
    with pytest.raises(GuestAgentError, match="no QEMU listens there"):
        await freeze(path)


async def test_an_agent_that_does_not_run_is_told_and_nothing_is_frozen(path: Path) -> None:
    async with running(path) as agent:
        agent.silent = True
        with pytest.raises(GuestAgentError, match="is qemu-guest-agent running"):
            await freeze(path)
        assert agent.commands == []


async def test_a_monitor_instead_of_an_agent_is_told(path: Path) -> None:
    async with running(path) as agent:
        agent.greeting = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
        agent.silent = True
        with pytest.raises(GuestAgentError, match="QEMU's monitor"):
            await freeze(path)


async def test_junk_instead_of_an_answer_is_told(path: Path) -> None:
    async def junk(agent: FakeAgent, stream: trio.SocketStream) -> None:
        await stream.send_all(b"nonsense\n")

    async with running(path) as agent:
        agent.misfortunes["freeze"] = junk
        with pytest.raises(GuestAgentError, match="no answer of a guest agent"):
            await freeze(path)
        assert not agent.frozen
