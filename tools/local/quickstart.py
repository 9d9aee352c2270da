"""Start a one-machine cluster, or stop it: what `tools/quickstart` runs once all is installed.

usage: tools/quickstart [--dir DIR] [--mount DIR] [--detach | --stop]

Starts etcd, three storage daemons and a mount on this machine, and makes a first virtual disk.
Runs until Ctrl-C. Data stays in --dir: the next run finds it again.

  --dir DIR    where data, logs and pid files are kept (default: ./.sheepfs)
  --mount DIR  where the disks are shown as files (default: ./mnt)
  --detach     start, then return; everything goes on running
  --stop       stop what runs for --dir: no process and no mount is left, the data is
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from sheepfs_tools.local.cluster import LocalCluster
from sheepfs_tools.local.processes import StartError

FIRST_VDI = ("vm1", "20G")


def next_steps(cluster: LocalCluster, mount: Path, detached: bool) -> str:
    """Give what a person can do now."""
    bin_directory = Path(sys.executable).parent
    disk = shlex.quote(str(mount / "vm1.raw"))
    where = shlex.quote(str(cluster.directory))
    stop = f"tools/quickstart --dir {where} --stop" if detached else "press Ctrl-C"
    return f"""
A sheepfs cluster runs on this machine; every virtual disk is a file in {mount}

  Look around     ls -l {shlex.quote(str(mount))}
  Boot a VM       qemu-system-x86_64 -m 2G -cdrom installer.iso \\
                    -drive file={disk},format=raw,if=virtio,cache=none
  Another disk    qemu-img create -f raw {shlex.quote(str(mount / "vm2.raw"))} 20G
  Administer      export SHEEPFS_ETCD={cluster.etcd_address} PATH={bin_directory}:$PATH
                  sheepctl cluster status; sheepctl top
  Metrics         curl http://127.0.0.1:{cluster.ports["node1-metrics"]}/metrics
  Break it        kill -9 {cluster.nodes[3].pid}    (a storage daemon; disks go on working)
  Stop            {stop}    (the disks stay in {where})
"""


def start(cluster: LocalCluster, mount: Path) -> None:
    """Bring everything up and make the first VDI if there is none."""
    print("Starting etcd and three storage daemons ...", flush=True)
    cluster.start()
    print(f"Mounting at {mount} ...", flush=True)
    cluster.mount(mount)
    if not json.loads(cluster.sheepctl("vdi", "list", "--json").stdout):
        cluster.sheepctl("vdi", "create", *FIRST_VDI)


def stop_on(signal_number: int, _frame: FrameType | None) -> None:
    """Make SIGTERM and SIGHUP (the terminal is gone) do what Ctrl-C does."""
    raise KeyboardInterrupt


def watch(cluster: LocalCluster) -> None:
    """Say what ends by itself; return when nothing is left (another quickstart stopped it)."""
    alive = cluster.running()
    while alive:
        time.sleep(0.5)
        before, alive = alive, cluster.running()
        for process in cluster.processes():
            if process.name in before and process.name not in alive:
                print(f"{process.name} has ended. Its log: {process.log}", flush=True)


def run(cluster: LocalCluster, mount: Path, detach: bool) -> int:
    """Start, say what to do next, and (unless detached) stay until Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on)
    already = len(cluster.running()) == len(cluster.processes())
    try:
        with cluster.lock():
            start(cluster, mount)
        print(next_steps(cluster, mount, detach or already), flush=True)
        if detach or already:
            return 0
        watch(cluster)
    except KeyboardInterrupt:
        print("\nStopping ...", flush=True)
    except StartError:
        if not already:
            cluster.stop()
        raise
    cluster.stop()
    print(f"Stopped. The data is in {cluster.directory}")
    return 0


def main() -> int:
    """Entry point."""
    usage, _, text = (__doc__ or "").partition("\n\n")[2].partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools/quickstart",
        usage=usage.removeprefix("usage: "),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, default=Path(".sheepfs"), help=argparse.SUPPRESS)
    parser.add_argument("--mount", type=Path, default=Path("mnt"), help=argparse.SUPPRESS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--detach", action="store_true", help=argparse.SUPPRESS)
    how.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.help:
        print(f"{usage}\n\n{text}", end="")
        return 0
    mount = Path(os.path.abspath(arguments.mount))
    try:
        cluster = LocalCluster(arguments.dir)
        if arguments.stop:
            if not cluster.directory.is_dir():
                print(f"Nothing was ever started in {cluster.directory}")
                return 0
            with cluster.lock():
                cluster.stop()
            print(f"Stopped. The data is in {cluster.directory}")
            return 0
        return run(cluster, mount, arguments.detach)
    except (StartError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
