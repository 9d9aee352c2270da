"""The program `sheepfs MOUNTPOINT`: mounts a cluster, whose VDIs then are raw files."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NoReturn

import trio

from sheepfs.backend import Namespace
from sheepfs.core.errors import SheepError, UsageError
from sheepfs.core.names import check_cluster_name
from sheepfs.fuse import daemon
from sheepfs.fuse import mountpoint as mountpoints
from sheepfs.fuse.session import serve
from sheepfs.logs import FORMATS, LEVELS, add_log_options, log_to_stderr
from sheepfs.net.exporter import Exporter
from sheepfs.net.transport import TCP
from sheepfs.service import DEFAULT_CLUSTER, DEFAULT_ETCD, calm_garbage_collector, run_program

log = logging.getLogger(__name__)

Connect = Callable[[str, str, str], AbstractAsyncContextManager[Namespace]]
"""(etcd address, cluster, owner) -> the cluster's namespace."""

EXIT_FAILED, EXIT_USAGE = 1, 2

DESCRIPTION = """\
Mount a sheepfs cluster: every virtual disk image (VDI) in it is a raw file in MOUNTPOINT.
Works as root, and as an ordinary user through fusermount3 (package fuse3).
"""
EPILOG = """\
examples:
  sheepfs /mnt/vdis                                mount the cluster of the etcd on this host
  sheepfs --etcd 10.0.0.1:2379 /mnt/vdis           ... of the etcd on another host
  qemu-img create -f raw /mnt/vdis/vm1.raw 20G     a disk of 20 GiB; takes no space yet
  qemu-system-x86_64 -drive file=/mnt/vdis/vm1.raw,format=raw,cache=none,aio=io_uring ...
  umount /mnt/vdis                                 (ordinary users: fusermount3 -u /mnt/vdis)
  127.0.0.1:2379 /mnt/vdis fuse.sheepfs allow_other,_netdev 0 0        a line of /etc/fstab

good to know:
  One host writes to a VDI at a time. The first write, truncate or lock attaches it; where another
  host holds it, writing fails at once with EBUSY, and QEMU says: Failed to get "write" lock.
  Reading is always allowed. A file that a program has open is not deleted (EBUSY).
  fsync, close and O_SYNC return when the data is on stable storage of every current replica.
  SIGTERM flushes and detaches every open VDI, then unmounts; a second one does not wait for it.
  Directories, links and device files cannot be made. Names: 1 to 128 bytes, no leading dot, no @.

environment:
  SHEEPFS_ETCD      address of etcd, as --etcd      (default: 127.0.0.1:2379)
  SHEEPFS_CLUSTER   name of the cluster, as --cluster   (default: default)

exit status: 0 mounted (in the foreground: unmounted), 1 failed, 2 wrong usage or mount point
"""

_OPTIONS = frozenset(
    ["allow_other", "ro", "etcd", "cluster", "log_file", "log_format", "log_level", "metrics"]
)
_IGNORED_OPTIONS = frozenset(
    [
        "rw",
        "defaults",
        "auto",
        "noauto",
        "nofail",
        "_netdev",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "dev",
        "nodev",
        "suid",
        "nosuid",
        "exec",
        "noexec",
        "async",
        "sync",
        "atime",
        "noatime",
        "relatime",
        "norelatime",
        "diratime",
        "nodiratime",
        "default_permissions",
        "big_writes",
    ]
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    mountpoint: str
    etcd: str
    cluster: str
    foreground: bool
    allow_other: bool
    read_only: bool
    log_file: str | None
    metrics: str | None
    log_format: str
    log_level: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sheepfs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="[ETCD] MOUNTPOINT",
        help="an existing directory; mount(8) puts the etcd address before it",
    )
    parser.add_argument("--etcd", metavar="HOST:PORT", help="address of etcd")
    parser.add_argument("--cluster", metavar="NAME", help="name of the cluster in that etcd")
    parser.add_argument("-f", "--foreground", action="store_true", help="do not daemonize")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="allow_other (other users may use it too), ro, etcd=, cluster=, log_file=, "
        "log_format=, log_level=, metrics=; the usual options of fstab are accepted",
    )
    parser.add_argument("--log-file", metavar="FILE", help="log there instead of to syslog")
    parser.add_argument(
        "--metrics",
        metavar="ADDR:PORT",
        help="serve metrics for Prometheus there, over HTTP (default: nowhere)",
    )
    add_log_options(parser)
    return parser


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line and the environment; ends the program on --help and wrong usage."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if len(args.paths) > 2:
        parser.error("one mount point, please")
    options: dict[str, str] = {}
    for option in ",".join(args.options).split(","):
        name, _, value = option.partition("=")
        if name in _OPTIONS:
            options[name] = value
        elif name and name not in _IGNORED_OPTIONS and not name.startswith(("x-", "comment")):
            parser.error(f"unknown mount option {option!r}")
    # mount(8) gives the first column of fstab, which may be just a word.
    source = args.paths[0] if len(args.paths) == 2 and ":" in args.paths[0] else None
    environment = os.environ
    settings = Settings(
        mountpoint=args.paths[-1],
        etcd=args.etcd
        or options.get("etcd")
        or source
        or environment.get("SHEEPFS_ETCD")
        or DEFAULT_ETCD,
        cluster=args.cluster
        or options.get("cluster")
        or environment.get("SHEEPFS_CLUSTER")
        or DEFAULT_CLUSTER,
        foreground=args.foreground,
        allow_other="allow_other" in options,
        read_only="ro" in options,
        log_file=args.log_file or options.get("log_file"),
        metrics=args.metrics or options.get("metrics"),
        log_format=options.get("log_format") or args.log_format,
        log_level=options.get("log_level") or args.log_level,
    )
    if settings.log_format not in FORMATS or settings.log_level not in LEVELS:
        parser.error(f"log_format= takes {', '.join(FORMATS)}; log_level= {', '.join(LEVELS)}")
    try:
        check_cluster_name(settings.cluster)
    except UsageError as error:
        parser.error(str(error))
    return settings


def _cluster_connect(etcd: str, cluster: str, owner: str) -> AbstractAsyncContextManager[Namespace]:
    # Here, not above: --help and a bad mount point need neither etcd nor its threads.
    from sheepfs.connecting import connect

    return connect(etcd, cluster, owner, stays=True)


def main(arguments: Sequence[str] | None = None, connect: Connect = _cluster_connect) -> int:
    """Run the program; `connect` is another one in tests.

    Returns:
        The exit status.
    """
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    how = (settings.log_format, settings.log_level)
    log_to_stderr(*how)
    try:
        path = mountpoints.check(settings.mountpoint)
        if settings.foreground:
            if settings.log_file:
                daemon.log_to_file(settings.log_file, *how)
            return _serve(settings, path, connect, daemon.notify_systemd)
        log_file = settings.log_file and os.path.abspath(settings.log_file)
        with daemon.daemonized(log_file, *how) as child:
            return _serve(settings, path, connect, child.ready)
    except (SheepError, OSError) as error:
        print(f"sheepfs: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def _serve(settings: Settings, mountpoint: str, connect: Connect, ready: Callable[[], None]) -> int:
    with _plain_errors():
        trio.run(_mounted, settings, mountpoint, connect, ready)
    return 0


async def _mounted(
    settings: Settings, mountpoint: str, connect: Connect, ready: Callable[[], None]
) -> None:
    owner = f"{socket.gethostname()}:{os.getpid()}:{mountpoint}"
    stop, connected = trio.Event(), trio.Event()

    def is_ready() -> None:
        log.info(
            "cluster %s of etcd %s is mounted at %s", settings.cluster, settings.etcd, mountpoint
        )
        calm_garbage_collector()
        ready()

    async with trio.open_nursery() as nursery:
        starting = trio.CancelScope()
        nursery.start_soon(_watch_signals, mountpoint, stop, connected, starting)
        with starting:
            async with connect(settings.etcd, settings.cluster, owner) as namespace:
                connected.set()
                if settings.metrics:
                    exporter = Exporter(namespace.metrics)
                    listener = await TCP.listen(settings.metrics)
                    log.info("metrics are served at port %d", listener.port)
                    nursery.start_soon(exporter.serve, listener)
                await serve(
                    mountpoint,
                    namespace,
                    ready=is_ready,
                    stop=stop,
                    allow_other=settings.allow_other,
                    read_only=settings.read_only,
                )
        nursery.cancel_scope.cancel()
    if not connected.is_set():
        raise SheepError("stopped by a signal before the mount was ready")
    log.info("%s is unmounted", mountpoint)


async def _watch_signals(
    mountpoint: str, stop: trio.Event, connected: trio.Event, starting: trio.CancelScope
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            name = signal.Signals(number).name
            if not connected.is_set():
                starting.cancel()
            elif not stop.is_set():
                log.info("%s: stopping; a second signal does not wait for flushes", name)
                stop.set()
            else:
                log.error("%s again: unmounting now, what was not flushed may be lost", name)
                mountpoints.unmount(mountpoint)
                os._exit(EXIT_FAILED)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Show the error inside of trio's exception groups."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, SheepError | OSError):
            raise error from group
        raise


def run() -> NoReturn:
    """Be the program."""
    run_program(main)


if __name__ == "__main__":
    run()
