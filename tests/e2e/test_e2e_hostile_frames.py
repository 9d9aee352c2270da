"""Garbage at a daemon's port: others are served meanwhile, and memory stays bounded."""

from __future__ import annotations

import json
import socket
import struct
import threading
from pathlib import Path
from random import Random

from e2e.cluster import Mounted, run, seconds
from sheepfs.core.wire import HEADER_SIZE, MAX_FRAME, VERSION, Op, encode

ALLOWED_GROWTH_KIB = 128 << 10
SLOWEST_READ_S = 5.0


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def greeting(cluster: str) -> bytes:
    body = json.dumps({"cluster": cluster, "protocol": VERSION, "client": "stranger"}).encode()
    return encode(0, Op.HELLO, 1, body) + body


class Attacker:
    """Sends frames of every bad kind; a connection that the daemon ended is opened again."""

    def __init__(self, port: int, cluster: str, seed: int) -> None:
        self._port = port
        self._random = Random(seed)
        self._good = greeting(cluster)
        self._kinds = (
            self._noise,
            self._truncated,
            self._oversized,
            self._wrong_cluster,
            self._flipped,
            self._replayed,
            self._early,
        )
        self.sent = 0

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.randint(1, 300))

    def _truncated(self) -> bytes:
        return self._good[: self._random.randint(1, len(self._good) - 1)]

    def _oversized(self) -> bytes:
        length = self._random.choice((MAX_FRAME + 1, 1 << 31, (1 << 32) - 1))
        return struct.pack("<I", length) + self._random.randbytes(HEADER_SIZE)

    def _wrong_cluster(self) -> bytes:
        return greeting(f"{self._random.getrandbits(128):032x}")

    def _flipped(self) -> bytes:
        frame = bytearray(self._good)
        frame[self._random.randrange(len(frame))] ^= 1 << self._random.randrange(8)
        return bytes(frame)

    def _replayed(self) -> bytes:
        # The second frame has the checksum of another session.
        return self._good + encode(0, Op.WRITE, 2, bytes(4096), oid=1 << 28, pool=3) + bytes(4096)

    def _early(self) -> bytes:
        return encode(0, self._random.choice(list(Op)[1:]), 1)

    def run(self, frames: int) -> None:
        connection: socket.socket | None = None
        while self.sent < frames:
            try:
                if connection is None:
                    connection = socket.create_connection(("127.0.0.1", self._port), timeout=5)
                    connection.settimeout(5)
                # Several frames in one connection, some of which the daemon never looks at: it
                # has hung up. Each connection's first frame is one it must look at.
                connection.sendall(self._random.choice(self._kinds)())
                self.sent += 1
                if self._random.random() < 0.3:
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                    raise ConnectionResetError
            except OSError:
                if connection is not None:
                    connection.close()
                connection = None
        if connection is not None:
            connection.close()


def test_hostile_frames_neither_stop_a_daemon_nor_grow_it(mounted: Mounted, soak: bool) -> None:
    frames = 100_000 if soak else 20_000
    path = mounted.create("bystander", "64M")
    run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=16", "conv=fsync,notrunc")
    expected = path.read_bytes()
    node = mounted.cluster.nodes[1]
    pid = node.pid
    assert pid is not None
    before = resident_kib(pid)
    cluster = str(mounted.status()["uuid"])
    attackers = [Attacker(mounted.cluster.ports["node1"], cluster, seed) for seed in range(3)]
    threads = [
        threading.Thread(target=attacker.run, args=(frames // len(attackers) + 1,))
        for attacker in attackers
    ]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest = max(slowest, seconds(lambda: run("dd", f"if={path}", "of=/dev/null", "bs=1M")))
        assert resident_kib(pid) - before < ALLOWED_GROWTH_KIB
    for thread in threads:
        thread.join()
    assert sum(attacker.sent for attacker in attackers) >= frames
    assert node.pid == pid, node.last_words()
    assert slowest < SLOWEST_READ_S
    assert path.read_bytes() == expected
    assert mounted.status()["verdict"] == "ok"
