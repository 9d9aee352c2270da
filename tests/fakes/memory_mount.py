"""The program `sheepfs` on a cluster in memory: `python memory_mount.py [options] MOUNTPOINT`.

Environment: MEMORY_JOURNAL, a file that gets a line for each thing that reaches the "cluster";
MEMORY_VDIS, names to start with, separated by commas (`name*2000` makes 2,000 of them);
MEMORY_AT_ONCE=1, I/O completes before its call returns; MEMORY_PID, a file for the process id.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fakes.memory_backend import MemoryCluster, MemoryNamespace, memory_namespace
from sheepfs.core.errors import UnreachableError
from sheepfs.mount import main


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
    at_once = os.environ.get("MEMORY_AT_ONCE") == "1"
    async with memory_namespace(memory, asynchronous=not at_once) as namespace:
        for spec in filter(None, os.environ.get("MEMORY_VDIS", "").split(",")):
            name, _, count = spec.partition("*")
            for number in range(int(count or 1)):
                full = f"{name}{number:04}.raw" if count else name
                made = await namespace.create(full, 0o644, os.getuid(), os.getgid())
                namespace._by_id(made.id).size = 1 << 20
        yield namespace
        memory.journal("closed")


if __name__ == "__main__":
    sys.exit(main(connect=connect))
