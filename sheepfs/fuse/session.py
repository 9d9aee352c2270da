"""One mount from beginning to end: mount, serve, flush, unmount.

Always holds:
- Whatever ends the mount, every open volume is flushed and detached before the device is closed.
- The mount leaves the tree while requests are still served, so that unmounting cannot hang on us.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

import pyfuse3
import trio

from sheepfs.backend import Namespace
from sheepfs.fuse import mountpoint as mountpoints
from sheepfs.fuse.handles import Handles
from sheepfs.fuse.namespace import Directory
from sheepfs.fuse.tap import Tap, socketpair

log = logging.getLogger(__name__)


async def serve(
    mountpoint: str,
    namespace: Namespace,
    *,
    ready: Callable[[], None],
    stop: trio.Event,
    allow_other: bool = False,
    read_only: bool = False,
) -> None:
    """Mount `namespace` and serve it until `stop` is set or someone unmounts it.

    Only one call at a time in a process: pyfuse3 has global state.

    Args:
        mountpoint: an existing directory, checked by `mountpoint.check`.
        namespace: what the directory shows; what it says has changed is forgotten by the kernel.
        ready: called once when programs can use the mount.
        stop: ends the mount when set.
        allow_other: let other users than the one who mounts use it.
        read_only: refuse every change.

    Raises:
        MountError: the mount could not be made.

    Durability: on return all that was written is durable, or the log says what is not.
    Cancellation: unmounts at once and loses what was not flushed.
    """
    device = await trio.to_thread.run_sync(
        lambda: mountpoints.mount(mountpoint, allow_other=allow_other, read_only=read_only)
    )
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, device)
        unmount = cleanup.enter_context(contextlib.ExitStack())
        unmount.callback(mountpoints.unmount, mountpoint)
        pair = socketpair()
        cleanup.callback(pair.ours.close)
        # Closed when no task uses them any more; libfuse closes its end itself.
        library = cleanup.enter_context(contextlib.ExitStack())
        async with trio.open_nursery() as nursery:
            handles = Handles(namespace, nursery)
            pyfuse3.init(Directory(namespace, handles), f"/dev/fd/{pair.libfuse.detach()}", set())
            library.callback(pyfuse3.close, unmount=False)
            tap = Tap(device, pair.ours, handles, nursery, ready)
            namespace.on_change.append(tap.changed)
            cleanup.callback(namespace.on_change.remove, tap.changed)
            ended = trio.Event()
            nursery.start_soon(_serve_tap, tap, ended)
            nursery.start_soon(_set_when_set, stop, ended)
            await ended.wait()
            log.info("flushing and detaching open VDIs")
            await handles.shut_down()
            if stop.is_set():
                await trio.to_thread.run_sync(mountpoints.unmount, mountpoint)
            # Else the kernel ended it, and what is at the mount point now may not be ours.
            if stop.is_set() or not mountpoints.is_dead(mountpoint):
                unmount.pop_all()
            nursery.cancel_scope.cancel()


async def _set_when_set(first: trio.Event, second: trio.Event) -> None:
    await first.wait()
    second.set()


async def _serve_tap(tap: Tap, ended: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tap.drain_queue)
        nursery.start_soon(tap.serve_libfuse)
        nursery.start_soon(pyfuse3.main)
        await tap.serve_kernel()
        ended.set()
