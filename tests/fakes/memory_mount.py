"""The program `sheepfs` on a cluster in memory: `python memory_mount.py [options] MOUNTPOINT`.

Environment: MEMORY_JOURNAL, a file that gets a line for each thing that reaches the "cluster";
MEMORY_VDIS, names to start with, separated by commas (`name*2000` makes 2,000 of them);
MEMORY_AT_ONCE=1, I/O completes before its call returns; MEMORY_PID, a file for the process id;
MEMORY_OLD_COPY=1, the kernel's 64-bit COPY_FILE_RANGE is unknown, as before Linux 6.18;
MEMORY_CONTROL, a socket on which it does what another host would do (`control`):

    snapshot NAME TAG | protect NAME | resize NAME SIZE | write NAME OFFSET TEXT
    fill NAME SIZE        fully written, without using memory for it
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fakes.memory_backend import BLOCK, MemoryCluster, MemoryNamespace, memory_namespace
from sheepfs.core.errors import UnreachableError
from sheepfs.fuse import requests
from sheepfs.fuse.copies import CopyRequests
from sheepfs.fuse.handles import Handles
from sheepfs.fuse.protocol import Op
from sheepfs.fuse.replies import Replies
from sheepfs.mount import main


def control(path: Path, command: str) -> None:
    """Let a mount's other host do something, and wait until it is done."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(path))
        client.sendall(command.encode())
        answer = client.recv(4096).decode()
    assert answer == "done", answer


async def _obey(other: MemoryNamespace, command: str) -> None:
    what, name, *arguments = command.split()
    vdi = other._find(name)
    if what == "snapshot":
        await other.snapshot(vdi.attributes.id, arguments[0])
    elif what == "protect":
        vdi.protected = True
    elif what == "resize":
        vdi.size = int(arguments[0])
        other.cluster.changed(vdi, other)
    elif what == "write":
        vdi.put(int(arguments[0]), arguments[1].encode())
        other.cluster.changed(vdi, other)
    elif what == "fill":
        vdi.size = int(arguments[0])
        vdi.blocks = dict.fromkeys(range(vdi.size // BLOCK), b"\xa5" * BLOCK)
        other.cluster.changed(vdi, other)
    else:
        raise ValueError(command)


async def _serve_control(path: str, other: MemoryNamespace) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        while True:
            client, _ = await listener.accept()
            with client:
                command = (await client.recv(4096)).decode()
                try:
                    await _obey(other, command)
                    answer = "done"
                except Exception as error:
                    answer = f"{command}: {error!r}"
                await client.send(answer.encode())


class _OldCopyRequests(CopyRequests):
    def __init__(self, replies: Replies, handles: Handles, nursery: trio.Nursery) -> None:
        super().__init__(replies, handles, nursery)
        self.answers[Op.COPY_FILE_RANGE_64] = lambda unique, _: replies.finish(unique, errno.ENOSYS)


@asynccontextmanager
async def connect(etcd: str, cluster: str, owner: str) -> AsyncIterator[MemoryNamespace]:
    if cluster == "unreachable":
        raise UnreachableError(f"etcd {etcd} does not answer")
    if pid_file := os.environ.get("MEMORY_PID"):
        Path(pid_file).write_text(str(os.getpid()))
    path = os.environ.get("MEMORY_JOURNAL")
    if path:
        journal = open(path, "a", buffering=1)  # noqa: SIM115
        memory = MemoryCluster(lambda entry: print(entry, file=journal))
    else:
        memory = MemoryCluster()
    if os.environ.get("MEMORY_OLD_COPY") == "1":
        vars(requests)["CopyRequests"] = _OldCopyRequests
    at_once = os.environ.get("MEMORY_AT_ONCE") == "1"
    async with (
        memory_namespace(memory, asynchronous=False) as other,
        trio.open_nursery() as nursery,
        memory_namespace(memory, asynchronous=not at_once) as namespace,
    ):
        if path := os.environ.get("MEMORY_CONTROL"):
            nursery.start_soon(_serve_control, path, other)
        for spec in filter(None, os.environ.get("MEMORY_VDIS", "").split(",")):
            name, _, count = spec.partition("*")
            for number in range(int(count or 1)):
                full = f"{name}{number:04}.raw" if count else name
                made = await namespace.create(full, 0o644, os.getuid(), os.getgid())
                namespace._by_id(made.id).size = 1 << 20
        yield namespace
        memory.journal("closed")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main(connect=connect))
