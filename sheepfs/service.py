"""What programs need to be good services: readiness, common options, an end."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

DEFAULT_ETCD = "127.0.0.1:2379"
DEFAULT_CLUSTER = "default"


def notify(state: str) -> None:
    """Tell the service manager (`READY=1`, `STOPPING=1`, `STATUS=…`); nothing without one.

    Source: sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError as error:
        logging.getLogger(__name__).warning("cannot notify the service manager: %s", error)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's `main` and end the process with what it gives, or with its SystemExit.

    The interpreter's own end is left out: on a busy machine grpc's threads have been seen to keep
    it waiting for a minute and more, after all was said and closed.
    """
    try:
        code: object = main() or 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Nobody reads on, or the disk is full: what was to be said is not.
            code = code or 1
    os._exit(code)


def calm_garbage_collector() -> None:
    """Collect cycles rarely: the data path makes many short-lived objects and no cycles.

    Called once everything long-lived is there; it is never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add `--etcd` and `--cluster`, with their environment variables as defaults."""
    parser.add_argument(
        "--etcd",
        metavar="HOST:PORT[,…]",
        default=os.environ.get("SHEEPFS_ETCD", DEFAULT_ETCD),
        help=f"etcd's members (env SHEEPFS_ETCD, default {DEFAULT_ETCD})",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        default=os.environ.get("SHEEPFS_CLUSTER", DEFAULT_CLUSTER),
        help=f"name of the cluster (env SHEEPFS_CLUSTER, default {DEFAULT_CLUSTER})",
    )
