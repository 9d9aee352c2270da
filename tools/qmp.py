"""Freezing a guest's file systems for a snapshot, through QEMU's guest agent.

Start QEMU with the agent's own socket, and qemu-guest-agent inside the guest:

    -chardev socket,path=/run/vm1.qga,server=on,wait=off,id=qga0
    -device virtio-serial
    -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0

Always holds:
- Once the freeze was sent, a thaw is sent, whatever happens: an error, a cancellation, Ctrl-C, an
  answer that got lost, a connection that broke. It is tried for `THAW_S`, then said loudly.
Source: QEMU, qga/qapi-schema.json and docs/interop/qemu-ga.rst (guest-sync-delimited).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from sheepfs.core.errors import SheepError
from sheepfs.net.groups import plain_errors

SYNC_S = 5.0
"""For the agent's first answer."""
FREEZE_S = 30.0
"""For the freeze: the guest writes out its caches first."""
THAW_S = 30.0
_RETRY_S = 0.5
_MAX_ANSWER = 1 << 20
_DELIMITER = b"\xff"


class GuestAgentError(SheepError):
    """The guest cannot be frozen (or thawed); the text says why."""


@dataclass(slots=True)
class Frozen:
    """A frozen guest."""

    file_systems: int
    thawed_early: bool = False
    """Known after the block: the guest had thawed by itself before, so the freeze was no good."""


class _Agent:
    """One connection to the agent."""

    def __init__(self, stream: trio.SocketStream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._buffer = bytearray()

    async def sync(self) -> None:
        """Get in step: what an earlier client left unread, or half-written, is skipped."""
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        # The delimiter in front makes the agent forget half a request of an earlier client.
        await self._send(_DELIMITER + json.dumps(request).encode() + b"\n")
        while True:
            await self._until(_DELIMITER)
            if (await self._answer()).get("return") == number:
                return

    async def execute(self, command: str) -> int:
        """Run a command that returns a number. Raises GuestAgentError."""
        await self._send(json.dumps({"execute": command}).encode() + b"\n")
        answer = await self._answer()
        if "error" in answer:
            error = answer["error"]
            reason = error.get("desc", error) if isinstance(error, dict) else error
            raise GuestAgentError(f"{self._path}: the guest refused {command}: {reason}")
        result = answer.get("return")
        if not isinstance(result, int):
            raise GuestAgentError(f"{self._path}: {command} returned {result!r}, no number")
        return result

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise GuestAgentError(f"{self._path}: QEMU closed the connection") from error

    async def _answer(self) -> dict[str, Any]:
        line = await self._until(b"\n")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise GuestAgentError(f"{self._path}: no answer of a guest agent: {error}") from error
        if not isinstance(answer, dict):
            raise GuestAgentError(f"{self._path}: no answer of a guest agent: {answer!r}")
        return answer

    async def _until(self, end: bytes) -> bytes:
        """Take the bytes up to `end`, which is dropped."""
        while (place := self._buffer.find(end)) < 0:
            if b'"QMP"' in self._buffer:
                raise GuestAgentError(
                    f"{self._path} is QEMU's monitor (QMP); the guest agent's own socket is"
                    " needed: start QEMU with -chardev socket,path=...,server=on,wait=off,id=qga0"
                    " -device virtio-serial"
                    " -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"
                )
            if len(self._buffer) > _MAX_ANSWER:
                raise GuestAgentError(f"{self._path}: an answer without end")
            try:
                data = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise GuestAgentError(f"{self._path}: QEMU closed the connection")
            self._buffer += data
        found = bytes(self._buffer[:place])
        del self._buffer[: place + len(end)]
        return found


@asynccontextmanager
async def _connect(path: str) -> AsyncIterator[_Agent]:
    """Connect and get in step with the agent. Raises GuestAgentError."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as error:
        raise GuestAgentError(
            f"{path}: no QEMU listens there: {error.strerror or error}"
        ) from error
    async with stream:
        agent = _Agent(stream, path)
        with trio.move_on_after(SYNC_S) as scope:
            await agent.sync()
        if scope.cancelled_caught:
            raise GuestAgentError(
                f"{path}: no answer within {SYNC_S:g} s: is qemu-guest-agent running in the"
                " guest (and no other program connected to the socket)?"
            )
        yield agent


@asynccontextmanager
async def frozen(path: str) -> AsyncIterator[Frozen]:
    """Keep a guest's file systems frozen while the block runs.

    Args:
        path: unix socket of the guest agent's chardev.

    Raises:
        GuestAgentError: not frozen (the block does not run), or not thawed for certain.

    Cancellation: the guest is thawed first; that takes up to `THAW_S`.
    """
    sent = False
    try:
        async with _connect(path) as agent:
            with trio.move_on_after(FREEZE_S) as scope:
                sent = True
                state = Frozen(await agent.execute("guest-fsfreeze-freeze"))
        if scope.cancelled_caught:
            raise GuestAgentError(f"{path}: the guest was not frozen within {FREEZE_S:g} s")
        # Not connected meanwhile: QEMU serves one client at a time, and the thaw connects anew
        # in any case.
        yield state
    except BaseException as error:
        if sent:
            await _thaw_whatever_comes(path, error)
        raise
    else:
        thawed = await _thaw_whatever_comes(path, None)
        state.thawed_early = bool(state.file_systems) and not thawed


async def _thaw_whatever_comes(path: str, because: BaseException | None) -> int:
    """Thaw, shielded. In a task of its own: Ctrl-C is raised in the main task only, after it."""
    results: list[int | GuestAgentError] = []
    with plain_errors():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_thaw, path, results)
    result = results[0]
    if isinstance(result, GuestAgentError):
        if because is None:
            raise result
        because.add_note(str(result))
        return 0
    return result


@trio.lowlevel.enable_ki_protection
async def _thaw(path: str, results: list[int | GuestAgentError]) -> None:
    problem: GuestAgentError | None = None
    with trio.CancelScope(shield=True):
        with trio.move_on_after(THAW_S):
            while True:
                try:
                    async with _connect(path) as agent:
                        results.append(await agent.execute("guest-fsfreeze-thaw"))
                    return
                except GuestAgentError as error:
                    problem = error
                await trio.sleep(_RETRY_S)
        results.append(
            GuestAgentError(
                f"THE GUEST MAY STILL BE FROZEN: {problem or f'{path}: no answer to the thaw'};"
                " thaw it with: virsh domfsthaw, or fsfreeze -u in the guest, or reset it"
            )
        )
