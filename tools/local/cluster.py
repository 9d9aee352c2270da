"""A whole cluster on one machine: etcd, storage daemons and mounts as processes of their own.

`tools/quickstart` and the end-to-end tests are built on it. All state is below one directory;
whoever opens that directory again finds the processes and the data.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sheepfs_tools.local.processes import ManagedProcess, StartError, wait_for

FIRST_PORTS = range(12370, 12470)
"""Tried first: outside of what the kernel gives to outgoing connections."""


def is_mounted(path: Path) -> bool:
    """Tell whether something is mounted at `path`, without touching it (it might hang)."""
    wanted = str(path).replace("\\", "\\134").replace(" ", "\\040")
    with open("/proc/self/mountinfo") as table:
        return any(line.split(" ", 5)[4] == wanted for line in table)


def unmount_lazily(path: Path) -> None:
    """Take a mount away whatever its server does; who has files open gets ENOTCONN."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    subprocess.run([*command, str(path)], capture_output=True, check=False)


class LocalCluster:
    """Args are only needed the first time; `DIR/cluster.json` remembers the ports.

    Attributes:
        etcd, nodes, mounts: the processes; nodes are numbered from 1.
        node_options: further options of all storage daemons that are started.
    """

    def __init__(self, directory: Path, node_count: int = 3, cluster: str = "default") -> None:
        self.directory = directory.resolve()
        self.run = self.directory / "run"
        self.node_count = node_count
        self.cluster = cluster
        self.env: dict[str, str] = {}
        self.node_options: list[str] = []
        self._taken: set[int] = set()
        self._reserved: dict[int, int] = {}
        """Port -> descriptor of the file whose lock keeps others away from it."""
        self.ports: dict[str, int] = {}
        self.mounts: dict[Path, ManagedProcess] = {}
        self._restore()
        self._describe()

    # Ports and the state file -------------------------------------------------------------

    @property
    def _state_file(self) -> Path:
        return self.directory / "cluster.json"

    def _restore(self) -> None:
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read {self._state_file}: {error}") from error
        self.ports = {str(name): int(port) for name, port in state["ports"].items()}
        self.node_count = int(state["node_count"])
        for path in state["mounts"]:
            self._add_mount(Path(path))

    def _save(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {
            "ports": self.ports,
            "node_count": self.node_count,
            "mounts": [str(path) for path in self.mounts],
        }
        replacement = self._state_file.with_suffix(".new")
        replacement.write_text(json.dumps(state, indent=1))
        replacement.rename(self._state_file)

    def _free_port(self, preferred: int | None) -> int:
        for port in [*([preferred] if preferred else []), *FIRST_PORTS, *[0] * 20]:
            if port in self._taken or not self._reserve(port):
                continue
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
                found = int(probe.getsockname()[1])
            self._taken.add(found)
            return found
        raise StartError("no free TCP port on 127.0.0.1")

    def _reserve(self, port: int) -> bool:
        """Keep other clusters away from a port, also while nobody listens there.

        It lasts until the cluster is stopped. A restarted daemon must find its port free.
        """
        if not port or port in self._reserved:
            return True
        path = Path(tempfile.gettempdir()) / f"sheepfs-port-{port}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return True  # Another user's; whether the port is free will be seen.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._reserved[port] = fd
        return True

    def _release_ports(self) -> None:
        for fd in self._reserved.values():
            os.close(fd)
        self._reserved.clear()

    def _choose_ports(self) -> None:
        """Keep the ports of what runs; look for free ones for the rest."""
        processes = {"etcd": self.etcd, "etcd-peer": self.etcd}
        for number, node in self.nodes.items():
            processes |= {f"node{number}": node, f"node{number}-metrics": node}
        processes |= {f"{mount.name}-metrics": mount for mount in self.mounts.values()}
        kept = {
            name
            for name, process in processes.items()
            if process.pid is not None and name in self.ports
        }
        self._taken = {self.ports[name] for name in kept}
        for name in processes:
            if name not in kept:
                self.ports[name] = self._free_port(self.ports.get(name))
        self._save()
        self._describe()

    def _describe(self) -> None:
        """Make the process descriptions from the ports."""
        client, peer = (f"http://{self.address(name)}" for name in ("etcd", "etcd-peer"))
        self.etcd = ManagedProcess(
            "etcd",
            self.run,
            [
                *self.enter("etcd"),
                *("etcd", "--name=local", f"--data-dir={self.directory / 'etcd'}"),
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                *(f"--initial-cluster=local={peer}", "--auto-compaction-retention=1"),
                "--logger=zap",
            ],
        )
        self.nodes = {
            number: ManagedProcess(
                f"node{number}",
                self.run,
                [
                    *self.enter(f"node{number}"),
                    *(sys.executable, "-m", "storaged.main", str(self.node_directory(number))),
                    *("--listen", self.address(f"node{number}"), *self.options),
                    *("--metrics", f"127.0.0.1:{self.ports.get(f'node{number}-metrics')}"),
                    *self.node_options,
                ],
                self.env,
            )
            for number in range(1, self.node_count + 1)
        }

    # What others need to know ---------------------------------------------------------------

    def address(self, name: str) -> str:
        """host:port at which a process listens."""
        return f"127.0.0.1:{self.ports.get(name)}"

    def enter(self, name: str) -> list[str]:
        """Words before a process's command line: they take it to where it runs."""
        return []

    @property
    def etcd_address(self) -> str:
        """host:port for SHEEPFS_ETCD."""
        return self.address("etcd")

    @property
    def options(self) -> list[str]:
        """Options that every program of sheepfs takes to find this cluster."""
        return ["--etcd", self.etcd_address, "--cluster", self.cluster]

    def node_directory(self, number: int) -> Path:
        """Data directory of a storage daemon."""
        return self.directory / f"node{number}"

    def sheepctl(
        self, *arguments: str, check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run `sheepctl` on this cluster; its output is captured."""
        done = subprocess.run(
            self._sheepctl(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise StartError(f"sheepctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def start_sheepctl(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `sheepctl` on this cluster; the caller reads its output and ends it."""
        return subprocess.Popen(self._sheepctl(*arguments), stdout=subprocess.PIPE, text=True)

    def _sheepctl(self, *arguments: str) -> list[str]:
        program = (sys.executable, "-m", "sheepfs_tools.sheepctl")
        return [*self.enter("sheepctl"), *program, *self.options, *arguments]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second quickstart in this directory out while this one changes things."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StartError(f"another quickstart is at work in {self.directory}") from error
            yield

    # Start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start etcd and every storage daemon that is not running; wait until all are ready."""
        self._choose_ports()
        self.start_etcd()
        for number in self.nodes:
            # The first time one after the other: node ids are given out in order of joining.
            self.start_node(number, wait=not self.node_directory(number).exists())
        for number in self.nodes:
            self.wait_node(number)

    def start_etcd(self) -> None:
        """Start etcd, unless it runs, and wait until it answers."""
        if self.etcd.pid is None:
            (self.directory / "etcd").mkdir(mode=0o700, parents=True, exist_ok=True)
            self.etcd.start()
        self.etcd.wait_ready(self.is_etcd_healthy, 30)

    def is_etcd_healthy(self) -> bool:
        """Tell whether etcd answers."""
        try:
            with urllib.request.urlopen(f"http://{self.etcd_address}/health", timeout=1) as reply:
                return b"true" in reply.read()
        except OSError:
            return False

    def start_node(self, number: int, wait: bool = True) -> None:
        """Start a storage daemon, unless it runs."""
        node = self.nodes[number]
        if node.pid is None:
            node.start()
        if wait:
            self.wait_node(number)

    def wait_node(self, number: int) -> None:
        """Wait until the daemon accepts connections (it listens once it has joined)."""
        self.nodes[number].wait_ready(lambda: self.is_listening(f"node{number}"), 30)

    def is_listening(self, name: str) -> bool:
        """Tell whether a process accepts connections."""
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.ports[name])) == 0

    def _add_mount(self, path: Path) -> ManagedProcess:
        name = "mount" if not self.mounts else f"mount{len(self.mounts) + 1}"
        self.mounts[path] = process = ManagedProcess(name, self.run, [])
        return process

    def mount(self, path: Path) -> None:
        """Mount the cluster at `path`, unless it is; return when it is there."""
        path = path.resolve() if not is_mounted(path) else path
        process = self.mounts.get(path) or self._add_mount(path)
        metrics = f"{process.name}-metrics"
        if process.pid is None:
            if metrics not in self.ports:
                self.ports[metrics] = self._free_port(None)
            if is_mounted(path):
                # Left by a mount that died: every access gives ENOTCONN until it is gone.
                unmount_lazily(path)
            path.mkdir(parents=True, exist_ok=True)
            process.argv = [
                *self.enter(process.name),
                *(sys.executable, "-m", "sheepfs.mount", str(path), "-f", *self.options),
                *("--metrics", f"127.0.0.1:{self.ports[metrics]}"),
            ]
            process.env = self.env
            self._save()
            process.start()
        process.wait_ready(lambda: is_mounted(path), 30)

    # Stop ------------------------------------------------------------------------------------

    def unmount(self, path: Path) -> None:
        """End a mount; one that does not go within 15 s is taken away by force."""
        self.mounts[path].stop()
        if is_mounted(path):
            unmount_lazily(path)
        wait_for(lambda: not is_mounted(path), 5, f"{path} to be unmounted")

    def stop(self) -> None:
        """Stop everything in order: mounts (they flush), daemons, etcd. Data stays."""
        for path in self.mounts:
            self.unmount(path)
        for node in self.nodes.values():
            node.signal(signal.SIGTERM)
        for node in self.nodes.values():
            node.stop()
        self.etcd.stop()
        self._release_ports()

    def destroy(self) -> None:
        """Kill everything, take the mounts away, remove the data: for tests."""
        for path, process in self.mounts.items():
            process.kill()
            if is_mounted(path):
                unmount_lazily(path)
        for process in self.processes():
            process.kill()
        self._release_ports()
        shutil.rmtree(self.directory, ignore_errors=True)

    def processes(self) -> list[ManagedProcess]:
        """All that belongs to the cluster, in the order in which it starts."""
        return [self.etcd, *self.nodes.values(), *self.mounts.values()]

    def running(self) -> list[str]:
        """Names of what runs."""
        return [process.name for process in self.processes() if process.pid is not None]
