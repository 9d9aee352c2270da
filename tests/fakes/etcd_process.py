"""A real etcd for tests: one member on free loopback ports, its data in a temporary directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 20.0


def free_ports(count: int) -> list[int]:
    """Find TCP ports of 127.0.0.1 that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class EtcdProcess:
    """One etcd; `stop` and `start` again keep address and data, `pause` makes it silent.

    `save` keeps its data, `restore` brings them back, as from a copy of the disk.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        client, peer = free_ports(2)
        self.endpoint = f"127.0.0.1:{client}"
        self._peer = f"http://127.0.0.1:{peer}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it serves."""
        url = f"http://{self.endpoint}"
        # Fast ticks: etcd makes no lease shorter than 1.5 elections.
        command = (
            f"etcd --name one --data-dir {self._directory}/data --logger zap --log-level error "
            f"--listen-client-urls {url} --advertise-client-urls {url} "
            f"--listen-peer-urls {self._peer} --initial-advertise-peer-urls {self._peer} "
            f"--initial-cluster one={self._peer} --heartbeat-interval 50 --election-timeout 500 "
            "--unsafe-no-fsync"
        ).split()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with (self._directory / "log").open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, cwd=self._directory
            )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_S
        while True:
            try:
                with opener.open(f"{url}/health", timeout=1) as reply:
                    if b"true" in reply.read():
                        return
            except (urllib.error.URLError, OSError):
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                log = (self._directory / "log").read_text(errors="replace")
                raise RuntimeError(f"etcd did not start:\n{log[-2000:]}")
            time.sleep(0.02)

    def save(self) -> None:
        """Keep a copy of the data as they are now; it is restarted for it."""
        self.stop()
        shutil.rmtree(self._directory / "saved", ignore_errors=True)
        shutil.copytree(self._directory / "data", self._directory / "saved")
        self.start()

    def restore(self) -> None:
        """Go back to what `save` kept."""
        self.stop()
        shutil.rmtree(self._directory / "data")
        shutil.copytree(self._directory / "saved", self._directory / "data")
        self.start()

    def pause(self) -> None:
        """Make it silent: connections stay, nothing answers."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """End `pause`."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """End it at once, as a crash would; no error if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def _send(self, number: int) -> None:
        if self._process is None:
            raise RuntimeError("etcd is not running")
        self._process.send_signal(number)
