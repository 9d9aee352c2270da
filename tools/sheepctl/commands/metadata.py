"""The commands `sheepctl metadata export|import`: the etcd part of a cluster as a file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from sheepfs.core.errors import ProtocolError, SheepError
from sheepfs.core.keys import Keys
from sheepfs.core.metadata_export import Export
from sheepfs.net.etcd import Etcd
from sheepfs.net.metadata_transfer import export_metadata, import_metadata
from sheepfs.net.store import Store
from sheepfs_tools.progress import progress
from sheepfs_tools.sheepctl.analysis.export_age import refuse_older
from sheepfs_tools.sheepctl.output import moment, print_json
from sheepfs_tools.transfer.files import (
    STREAM,
    check_stdout,
    check_target,
    file_errors,
    new_file,
    open_input,
    read_stream,
    write_all,
)
from storaged.store.offline import OfflineDirectory
from storaged.store.salvage import Salvage


@asynccontextmanager
async def _store(arguments: argparse.Namespace) -> AsyncIterator[tuple[Store, Keys]]:
    keys = Keys(arguments.cluster)
    store = Etcd(arguments.etcd)
    try:
        yield store, keys
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()


async def metadata_export(arguments: argparse.Namespace) -> int:
    """Write all that etcd knows of the cluster to a file."""
    path = arguments.file
    if path != STREAM:
        check_target(path, arguments.force)
    async with _store(arguments) as (store, keys):
        export = await export_metadata(store, keys, time.time())
    data = export.encode()
    if path == STREAM:
        await write_all(check_stdout(), data)
    else:
        async with new_file(path) as (fd, _):
            await write_all(fd, data)
    vdis = sum(key.startswith("vdis/") for key in export.keys)
    facts = {
        "cluster": export.cluster,
        "file": path,
        "keys": len(export.keys),
        "vdis": vdis,
        "revision": export.revision,
        "bytes": len(data),
    }
    if arguments.json and path != STREAM:
        print_json(facts)
    else:
        print(
            f"Exported cluster {export.name} to {path}: {len(export.keys)} keys, {vdis} VDIs",
            file=sys.stderr if path == STREAM else sys.stdout,
        )
    return 0


async def read_export(path: str) -> Export:
    """Read and check an export, from a file or from standard input (`-`).

    Raises:
        SheepError: it cannot be read, or it is no whole export.
    """
    with file_errors(path), open_input(path) as fd:
        parts = [data async for data in read_stream(fd)]
    try:
        return Export.decode(b"".join(parts))
    except ProtocolError as error:
        raise SheepError(f"{path}: {error}") from error


async def metadata_import(arguments: argparse.Namespace) -> int:
    """Put an exported cluster into an etcd that has none of its name."""
    export = await read_export(arguments.file)
    with ExitStack() as stack:
        paths = dict.fromkeys(map(Path, arguments.data))
        salvage = Salvage([stack.enter_context(OfflineDirectory.open(path)) for path in paths])
        refuse_older(export, salvage)
    async with _store(arguments) as (store, keys):
        total = sum(map(len, export.keys.values()))
        with progress("import", total, arguments.json) as moved:
            done = await import_metadata(store, keys, export, time.time(), moved)
    if arguments.json:
        print_json(
            {
                "cluster": export.cluster,
                "name": arguments.cluster,
                "keys": done.keys,
                "resumed": done.resumed,
                "exported": export.created,
            }
        )
        return 0
    print(
        f"Imported cluster {arguments.cluster}: {done.keys} keys, as of {moment(export.created)}."
        " Start the daemons now."
    )
    return 0
