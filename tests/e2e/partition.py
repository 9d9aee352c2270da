"""Hosts of their own for the parts of a cluster, and a network between them that can be cut.

Each host is a network namespace; a bridge in one more namespace joins them. Nothing of it is seen
by the machine's own network, and all rules that cut are inside of the namespaces.

Always holds:
- The namespaces' names tell who made them (pid and start time). What a killed owner has left, with
  the processes that run there, goes when the next one begins.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sheepfs_tools.local.cluster import LocalCluster, is_mounted, unmount_lazily
from sheepfs_tools.local.processes import process_start, wait_for

NAMESPACES = Path("/run/netns")
PREFIX = "sheepfs-hosts"
SWITCH = "switch"
ADMIN = "admin"
"""The host of whoever looks on: it is never cut off."""
NETWORK = "10.77.0"


def missing() -> str:
    """Say why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for program in ("ip", "nsenter", "iptables"):
        if shutil.which(program) is None:
            return f"needs {program}"
    done = subprocess.run(
        ["unshare", "--net", "iptables", "-A", "INPUT", "-s", "127.0.0.9", "-j", "DROP"],
        capture_output=True,
        check=False,
    )
    return "this kernel has no iptables" if done.returncode else ""


class Hosts:
    """Network namespaces that reach each other until they are cut."""

    def __init__(self, names: Sequence[str]) -> None:
        remove_left_over()
        self.names = tuple(names)
        self._names = (*names, ADMIN)
        self._owner = f"{PREFIX}-{os.getpid()}-{process_start(os.getpid())}"
        self._number = {name: number for number, name in enumerate(self._names, 1)}
        self._cut: set[str] = set()
        """Hosts that have rules."""

    def _namespace(self, host: str) -> str:
        return f"{self._owner}-{host}"

    def make(self) -> None:
        """Make all hosts, and let them reach each other."""
        switch = self._namespace(SWITCH)
        for name in (SWITCH, *self._names):
            _run("ip", "netns", "add", self._namespace(name))
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for name, number in self._number.items():
            host, port = self._namespace(name), f"port{number}"
            _run(
                *("ip", "link", "add", port, "netns", switch, "type", "veth"),
                *("peer", "name", "eth0", "netns", host),
            )
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", host, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", host, "link", "set", device, "up")

    def remove(self) -> None:
        """Take the hosts away, with whatever still runs on them."""
        _remove(self._owner)

    def address(self, host: str) -> str:
        """Give a host's IP address."""
        return f"{NETWORK}.{self._number[host]}"

    def enter(self, host: str) -> list[str]:
        """Words before a command line that make it run on a host."""
        # Not `ip netns exec`: mounts made below that are seen by nobody else.
        return ["nsenter", f"--net={NAMESPACES / self._namespace(host)}"]

    # Cuts --------------------------------------------------------------------------------------

    def cut_one_way(self, source: str, target: str) -> None:
        """Let what `source` sends to `target` vanish; the other way everything passes."""
        self._rule(target, "INPUT", "-s", self.address(source), "-j", "DROP")

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between two hosts, and nobody be told."""
        self.cut_one_way(one, other)
        self.cut_one_way(other, one)

    def refuse(self, one: str, other: str) -> None:
        """Let nothing pass between two hosts; who tries gets a reset, as from a firewall."""
        for source, target in ((one, other), (other, one)):
            self._rule(
                *(source, "OUTPUT", "-d", self.address(target), "-p", "tcp", "-j", "REJECT"),
                *("--reject-with", "tcp-reset"),
            )

    def isolate(self, host: str) -> None:
        """Let nothing pass between a host and all others."""
        for chain in ("INPUT", "OUTPUT"):
            self._rule(host, chain, "!", "-i" if chain == "INPUT" else "-o", "lo", "-j", "DROP")

    def heal(self) -> None:
        """End all cuts."""
        for host in self._cut:
            _run(*self.enter(host), "iptables", "-w", "-F")
        self._cut.clear()

    def _rule(self, host: str, chain: str, *rule: str) -> None:
        self._cut.add(host)
        _run(*self.enter(host), "iptables", "-w", "-A", chain, *rule)


class HostsCluster(LocalCluster):
    """A cluster whose etcd, daemons and mounts have a host each.

    The mounts are on the hosts `client1`, `client2`, in the order in which they are made.
    """

    def __init__(self, directory: Path, node_count: int = 3, clients: int = 2) -> None:
        nodes = [f"node{number}" for number in range(1, node_count + 1)]
        mounts = [f"client{number}" for number in range(1, clients + 1)]
        self.hosts = Hosts(["etcd", *nodes, *mounts])
        super().__init__(directory, node_count)

    def _choose_ports(self) -> None:
        self.ports = {"etcd": 2379, "etcd-peer": 2380}
        self.ports |= {f"node{number}": 7000 for number in self.nodes}
        self.ports |= {f"node{number}-metrics": 7001 for number in self.nodes}
        self._describe()

    def start(self) -> None:
        """Make the hosts, unless they are there, and start everything on them."""
        if not self.ports:
            self.hosts.make()
        super().start()

    def destroy(self) -> None:
        """End everything and take the hosts away."""
        try:
            super().destroy()
        finally:
            self.hosts.remove()

    def host(self, name: str) -> str:
        """Give the host of a process."""
        if name.startswith("mount"):
            return f"client{name.removeprefix('mount') or 1}"
        return ADMIN if name == "sheepctl" else name.removesuffix("-peer")

    def address(self, name: str) -> str:
        """host:port at which a process listens."""
        return f"{self.hosts.address(self.host(name))}:{self.ports.get(name)}"

    def enter(self, name: str) -> list[str]:
        """Words before a process's command line."""
        return self.hosts.enter(self.host(name))

    def is_listening(self, name: str) -> bool:
        """Tell whether a process accepts connections."""
        host, port = self.address(name).split(":")
        probe = ["timeout", "1", "bash", "-c", f": </dev/tcp/{host}/{port}"]
        done = subprocess.run([*self.hosts.enter(ADMIN), *probe], capture_output=True, check=False)
        return done.returncode == 0

    def is_etcd_healthy(self) -> bool:
        """Tell whether etcd listens; whoever needs it waits until it answers."""
        return self.is_listening("etcd")


def remove_left_over() -> None:
    """Remove the hosts of owners that are gone."""
    owners = set()
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        pid, start, _ = path.name.removeprefix(f"{PREFIX}-").split("-", 2)
        if process_start(int(pid)) != int(start):
            owners.add(f"{PREFIX}-{pid}-{start}")
    for owner in owners:
        _remove(owner)


def _remove(owner: str) -> None:
    for path in NAMESPACES.glob(f"{owner}-*"):
        _end_processes(path.name)
        subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


def _end_processes(namespace: str) -> None:
    """Kill what runs in a namespace; a mount among it is taken away."""

    def pids() -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
        )
        found = map(int, done.stdout.split())
        return [pid for pid in found if process_start(pid) is not None]

    for pid in pids():
        with suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            os.kill(pid, signal.SIGKILL)
            for path in map(Path, arguments):
                if path.is_absolute() and is_mounted(path):
                    unmount_lazily(path)
    wait_for(lambda: not pids(), 15, f"processes of {namespace} to end")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
