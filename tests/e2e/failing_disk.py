"""Disks that fail: file systems whose block layer gives EIO when it is told to.

What fails is below the kernel's block layer, so that page cache, journal and error reporting are
real: file system, loop device, a file that qemu-storage-daemon exports by FUSE, and there blkdebug.

The loop device has no direct I/O: that sends writes at the same time, and QEMU's export (seen in
7.2) lets one overwrite another one's buffer. Without, the kernel sends one after the other, and
keeps what it has read in the exported file's page cache as well: `forget` empties that, too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from e2e.cluster import run
from e2e.power import missing as missing_for_mkfs
from sheepfs_tools.local.cluster import is_mounted, unmount_lazily
from sheepfs_tools.local.processes import StartError, wait_for

START_S = 20.0
END_S = 20.0


def missing(kind: str) -> str:
    """Tell what such a disk needs and is not there."""
    if shutil.which("qemu-storage-daemon") is None:
        return "needs qemu-storage-daemon"
    return missing_for_mkfs(kind)


class BlockLayer:
    """A file whose reads, writes and flushes fail as told.

    Attributes:
        path: the file.
    """

    def __init__(self, directory: Path, size: str) -> None:
        image, self.path = directory / "image", directory / "exported"
        run("truncate", "-s", size, image)
        self.path.touch()
        monitor = directory / "monitor"
        self._rules = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._received = b""
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=disk,discard=unmap,filename={image}"),
                *("--blockdev", "driver=raw,node-name=top,discard=unmap,file=disk"),
                *("--export", f"fuse,id=export,node-name=top,mountpoint={self.path},writable=on"),
                *("--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"),
                *("--monitor", "chardev=monitor"),
            ]
        )
        try:
            wait_for(lambda: is_mounted(self.path), START_S, f"{self.path} to be exported")
            self._socket.settimeout(START_S)
            wait_for(
                lambda: not self._socket.connect_ex(str(monitor)), START_S, f"{monitor} to listen"
            )
            self._answer()  # The greeting.
            self._tell("qmp_capabilities")
        except BaseException:
            self.end()
            raise

    def fail(self, *kinds: str, once: bool = False) -> None:
        """Give EIO from now on.

        Args:
            kinds: "read", "write", "flush"; nothing else fails, not even what failed before.
            once: the first of each kind only.
        """
        lower = "disk"
        if kinds:
            # A blkdebug node's rules are what it was made with: another one takes its place.
            self._rules += 1
            lower = f"rules{self._rules}"
            rules = [{"event": "none", "iotype": kind, "errno": 5, "once": once} for kind in kinds]
            faulty = {"driver": "blkdebug", "image": "disk", "inject-error": rules}
            self._tell("blockdev-add", **faulty, **{"node-name": lower, "discard": "unmap"})
        # Without "unmap" a hole that is punched would keep what it held.
        top = {"driver": "raw", "node-name": "top", "file": lower, "discard": "unmap"}
        self._tell("blockdev-reopen", options=[top])

    def _tell(self, command: str, **arguments: Any) -> None:
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        self._socket.sendall(line.encode())
        while "return" not in (answer := self._answer()):
            assert "error" not in answer, f"{line}: {answer}"

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            piece = self._socket.recv(1 << 16)
            assert piece, "qemu-storage-daemon has ended"
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Take it away; nobody uses it any more."""
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        if is_mounted(self.path):
            unmount_lazily(self.path)


class FailingDisk:
    """A file system of its own at `path`, and below it a block layer that fails as told.

    Args:
        directory: is made, for all that belongs to it.
        kind: "ext4" or "xfs".
    """

    def __init__(self, directory: Path, kind: str, size: str = "1G") -> None:
        self.path = directory / "mounted"
        self.path.mkdir(parents=True)
        self._layer = BlockLayer(directory, size)
        self.fail = self._layer.fail
        try:
            run(f"mkfs.{kind}", "-q", self._layer.path)
            self.mount()
        except BaseException:
            self.destroy()
            raise

    def mount(self) -> None:
        """Mount it on a loop device that goes with the last mount of it."""
        loop = run("losetup", "--find", "--show", self._layer.path).strip()
        try:
            run("mount", loop, self.path)
        finally:
            run("losetup", "--detach", loop)

    def unmount(self) -> None:
        """Take the file system away; whoever used it has ended, or ends soon."""

        def unmounted() -> bool:
            run("umount", self.path, check=False)
            return not is_mounted(self.path)

        wait_for(unmounted, END_S, f"{self.path} to be free")

    def forget(self) -> None:
        """Have everything that is not dirty read from the block layer the next time."""
        files = (path for path in self.path.rglob("*") if path.is_file())
        for path in (*files, self._layer.path):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def destroy(self) -> None:
        """Take everything away, whatever state it is in."""
        try:
            self.fail()  # Nothing from here on: a file system that can write goes sooner.
            if is_mounted(self.path):
                self.unmount()
        except (AssertionError, OSError, StartError, ValueError):
            unmount_lazily(self.path)
        finally:
            self._layer.end()
