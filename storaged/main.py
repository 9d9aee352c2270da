"""The program `sheepfs-storaged DATA_DIR`."""

from __future__ import annotations

import argparse
import logging
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

import trio

from sheepfs.core.errors import DiskError, SheepError, UsageError
from sheepfs.core.names import check_cluster_name
from sheepfs.logs import add_log_options, log_to_stderr
from sheepfs.net.groups import plain_errors
from sheepfs.service import (
    add_cluster_options,
    calm_garbage_collector,
    notify,
    run_program,
)
from storaged.daemon import Daemon, Options

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "0.0.0.0:7000"
EXIT_DISK_FAILED = 3
"""Not started again by systemd: a sync that failed must not succeed the second time (I5)."""

_EPILOG = """\
Start one daemon for each disk, with an empty directory and etcd's address: it joins the cluster by
itself and gets its share of the data. The first daemon makes the cluster. To leave for a while,
stop it with SIGTERM; what it missed is copied when it is back.

  sheepfs-storaged /srv/sheep/disk1 --etcd 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
  sheepfs-storaged /srv/sheep/disk2 --listen 0.0.0.0:7001 --zone rack2
"""


def build_parser() -> argparse.ArgumentParser:
    """Give the command line."""
    parser = argparse.ArgumentParser(
        prog="sheepfs-storaged",
        description="Keep replicas of virtual disks in DATA_DIR and serve them to the cluster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_dir", metavar="DATA_DIR", type=Path, help="directory on one disk")
    add_cluster_options(parser)
    parser.add_argument(
        "--listen",
        metavar="ADDR:PORT",
        default=DEFAULT_LISTEN,
        help=f"where to serve (default {DEFAULT_LISTEN}; port 0: any free one)",
    )
    parser.add_argument(
        "--advertise",
        metavar="ADDR:PORT",
        help="where others reach it (default: the listen address, or this host's towards etcd)",
    )
    parser.add_argument(
        "--zone",
        metavar="NAME",
        help="failure domain; copies go to different zones (default: the host's name)",
    )
    parser.add_argument(
        "--weight",
        metavar="GIB",
        type=float,
        help="share of data relative to other nodes (default: the disk's size in GiB)",
    )
    parser.add_argument(
        "--pgs",
        metavar="N",
        type=int,
        default=256,
        help="placement groups of each pool, if this daemon makes the cluster; for ever. 7 for each"
        " node there will be balance within 5 %% (default 256: up to 38 nodes)",
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDR:PORT",
        help="serve metrics for Prometheus there, over HTTP (default: nowhere)",
    )
    add_log_options(parser)
    return parser


async def _main(daemon: Daemon) -> None:
    with plain_errors(), trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                stopping = False
                async for number in signals:
                    if stopping:
                        log.warning("stopping at once")
                        nursery.cancel_scope.cancel()
                        return
                    log.info("got %s", signal.Signals(number).name)
                    notify("STOPPING=1")
                    stopping = True
                    daemon.stop()

            nursery.start_soon(stop_on_signal)
            await daemon.run(_ready)
            nursery.cancel_scope.cancel()


def _raise_open_files() -> None:
    """Object files stay open between requests: take as many descriptors as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ready(line: str) -> None:
    log.info("%s", line)
    calm_garbage_collector()
    notify(f"READY=1\nSTATUS={line}")


def main() -> None:
    """Run the daemon until a signal or a disk error.

    Exit codes: 0 stopped cleanly, 1 it failed (the reason is on stderr), 2 bad usage, 3 the disk
    failed.
    """
    args = build_parser().parse_args()
    log_to_stderr(args.log_format, args.log_level)
    _raise_open_files()
    try:
        check_cluster_name(args.cluster)
        if not 1 <= args.pgs <= 65536:
            raise UsageError(f"--pgs {args.pgs}: use 1 to 65536")
        if args.weight is not None and not 0 <= args.weight < 1e9:
            raise UsageError(f"--weight {args.weight}: use 0 or more")
        options = Options(
            args.data_dir, args.etcd, args.cluster, args.listen, args.advertise, args.zone,
            args.weight, args.pgs, args.metrics,
        )  # fmt: skip
        trio.run(_main, Daemon(options))
    except UsageError as error:
        print(f"sheepfs-storaged: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except DiskError as error:
        print(f"sheepfs-storaged: {error}", file=sys.stderr)
        raise SystemExit(EXIT_DISK_FAILED) from error
    except (SheepError, OSError) as error:
        print(f"sheepfs-storaged: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run() -> NoReturn:
    """Be the program."""
    run_program(main)


if __name__ == "__main__":
    run()
