"""The commands that make VDIs of VDIs: snapshot, clone, rollback, flatten, copies."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)

from sheepfs.cluster import Cluster
from sheepfs.connecting import connect
from sheepfs.core.errors import UsageError, VdiNotFoundError
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.names import (
    check_copies,
    check_tag,
    check_vdi_name,
    full_name,
    snapshot_file,
    split_name,
)
from sheepfs.holding.holding import TOOL
from sheepfs_tools.progress import Moved, progress
from sheepfs_tools.sheepctl.output import print_json, printable


def owner() -> str:
    """Name this process in messages to others."""
    return f"{socket.gethostname()}:{os.getpid()}{TOOL}"


@asynccontextmanager
async def as_mount(arguments: argparse.Namespace) -> AsyncIterator[Cluster]:
    """Connect as a mount does, with a lease in etcd and links to all nodes."""
    async with connect(arguments.etcd, arguments.cluster, owner()) as cluster:
        yield cluster


def file_name(text: str) -> str:
    """Give the name in the mount for a VDI or snapshot of the command line.

    `vm1` is `vm1.raw`; `vm1@daily`, `vm1.raw@daily` and `vm1@daily.raw` are `vm1@daily.raw`.
    """
    name, tag = split_name(text)
    return snapshot_file(full_name(name), tag) if tag else full_name(name)


async def find(cluster: Cluster, text: str) -> tuple[str, int]:
    """Find a VDI or snapshot; gives its name in the mount and its id (VdiNotFoundError)."""
    for candidate in dict.fromkeys((file_name(text), text)):
        try:
            return candidate, (await cluster.lookup(candidate)).id
        except VdiNotFoundError:
            continue
    what = "snapshot" if "@" in text else "VDI"
    lists = "snapshot list" if "@" in text else "vdi list"
    raise VdiNotFoundError(f"there is no {what} {printable(text)!r}: sheepctl {lists} shows all")


@contextmanager
def objects_progress(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (objects done, objects in all), shown as a bar."""
    with ExitStack() as stack:
        moved: Moved | None = None
        before = 0

        def told(done: int, total: int) -> None:
            nonlocal moved, before
            if moved is None:
                moved = stack.enter_context(progress(title, total * OBJECT_SIZE, quiet))
            moved((done - before) * OBJECT_SIZE)
            before = done

        yield told


async def vdi_snapshot(arguments: argparse.Namespace) -> int:
    """Keep a VDI as it is now; works while a VM writes to it, on whatever host."""
    tag = arguments.tag or time.strftime("%Y-%m-%d-%H%M%S")
    check_tag(tag)
    if "@" in arguments.name:
        raise UsageError(f"{printable(arguments.name)} is a snapshot: clone it to change it")
    async with as_mount(arguments) as cluster:
        name, vdi = await find(cluster, arguments.name)
        freezing: AbstractAsyncContextManager[object] = nullcontext()
        if arguments.freeze:
            # Imported late: most snapshots are taken without.
            from sheepfs_tools.qmp import frozen

            freezing = frozen(arguments.freeze)
        async with freezing:
            start = time.monotonic()
            made = await cluster.snapshot(vdi, tag)
            took_s = time.monotonic() - start
    if arguments.json:
        print_json({"vdi": name, "tag": tag, "name": made.name, "id": made.id, "seconds": took_s})
    else:
        print(f"{made.name} is {printable(name)} as of now ({1000 * took_s:.0f} ms)")
    return 0


async def vdi_clone(arguments: argparse.Namespace) -> int:
    """Make a VDI that begins as another, or as a snapshot, and shares its data."""
    new = full_name(arguments.new)
    check_vdi_name(new)
    async with as_mount(arguments) as cluster:
        name, source = await find(cluster, arguments.source)
        start = time.monotonic()
        made = await cluster.clone(source, new)
        took_s = time.monotonic() - start
    if arguments.json:
        print_json({"name": new, "id": made.id, "source": name, "seconds": took_s})
    else:
        print(f"{new} is a clone of {printable(name)} ({1000 * took_s:.0f} ms)")
    return 0


async def vdi_rollback(arguments: argparse.Namespace) -> int:
    """Make a VDI as one of its snapshots is; what was written since is gone."""
    vdi_name, tag = split_name(f"{full_name(split_name(arguments.name)[0])}@{arguments.tag}")
    async with as_mount(arguments) as cluster:
        name, vdi = await find(cluster, vdi_name)
        found = await cluster.catalog.snapshot(name, tag)
        await cluster.rollback(vdi, found.record)
    if arguments.json:
        print_json({"name": name, "tag": tag, "size": found.record.size})
    else:
        print(f"{printable(name)} is as {snapshot_file(name, tag)} again")
    return 0


async def vdi_flatten(arguments: argparse.Namespace) -> int:
    """Cut a clone loose: give it data of its own for all that it shares with its origin."""
    async with as_mount(arguments) as cluster:
        name, vdi = await find(cluster, arguments.name)
        with objects_progress(f"flattening {name}", arguments.json) as told:
            await cluster.flatten(vdi, told)
    if arguments.json:
        print_json({"name": name})
    else:
        print(f"{printable(name)} depends on no other VDI now")
    return 0


async def vdi_copies(arguments: argparse.Namespace) -> int:
    """Keep another number of replicas of a VDI; snapshots keep the number they have."""
    check_copies(arguments.copies)
    async with as_mount(arguments) as cluster:
        name, vdi = await find(cluster, arguments.name)
        with objects_progress(f"copying {name}", arguments.json) as told:
            await cluster.change_copies(vdi, arguments.copies, told)
    if arguments.json:
        print_json({"name": name, "copies": arguments.copies})
    else:
        print(f"{printable(name)} has {arguments.copies} copies now")
    return 0
