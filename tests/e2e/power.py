"""Clusters that lose power: their disks are file systems, shut down without flushing the log."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path

from e2e.cluster import Mounted
from sheepfs_tools.local.cluster import LocalCluster, is_mounted
from sheepfs_tools.local.processes import wait_for

HEALTHY_S = 180.0
"""For nodes to start, replay their logs and catch up, all at once, on a machine that is busy."""
_SHUTDOWN = 0x8004587D
"""_IOR('X', 125, u32), of ext4 and XFS."""
_WITHOUT_LOG_FLUSH = 2


def missing(kind: str) -> str:
    """Tell what such a disk needs and is not there."""
    if os.geteuid() != 0:
        return "needs root to mount"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    return "" if shutil.which(f"mkfs.{kind}") else f"needs mkfs.{kind}"


class LosableDisk:
    """A file system of its own at `path`.

    Args:
        kind: "ext4" or "xfs".
    """

    def __init__(self, image: Path, path: Path, kind: str, size: str = "1G") -> None:
        self.path = path
        self._image = image
        self._options = ("-o", "nouuid") if kind == "xfs" else ()
        _run("truncate", "-s", size, image)
        _run(f"mkfs.{kind}", "-q", image)
        path.mkdir(parents=True)
        self.mount()

    def mount(self) -> None:
        """Bring the power back: the file system replays its log.

        On a loop device of its own each time: another mount namespace that was made meanwhile
        may keep the one without power, and `mount -o loop` would give just that again.
        """
        loop = _run("losetup", "--find", "--show", self._image).strip()
        try:
            _run("mount", *self._options, loop, self.path)
        finally:
            # It goes with the last mount of it.
            _run("losetup", "--detach", loop)

    def cut(self) -> None:
        """Cut the power: nothing that was not synced reaches the disk from here on."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Take it away; whoever used it has ended, and what it had under way ends soon."""
        wait_for(lambda: _succeeds("umount", self.path), 30, f"{self.path} to be free")


class Powered:
    """A mounted cluster whose nodes have disks of their own."""

    def __init__(self, directory: Path, kind: str) -> None:
        cluster = LocalCluster(directory / "data")
        cluster.directory.mkdir(parents=True)
        self.disks = {}
        for number in cluster.nodes:
            disk = LosableDisk(directory / f"{number}.img", directory / f"disk{number}", kind)
            (disk.path / "data").mkdir()
            cluster.node_directory(number).symlink_to(disk.path / "data")
            self.disks[number] = disk
        self.mounted = Mounted(cluster, directory / "mnt")

    def start(self) -> None:
        """Start everything; nodes may come and go as often as power is cut."""
        self.mounted.start()
        self.mounted.cluster.sheepctl("node", "patience", "--longest", "0")

    def cut(self, *numbers: int) -> None:
        """Cut the power of these nodes, and bring it back."""
        for number in numbers:
            self.disks[number].cut()
        for number in numbers:
            self.mounted.cluster.nodes[number].kill()
        for number in numbers:
            self.disks[number].unmount()
            self.disks[number].mount()
            self.mounted.cluster.start_node(number, wait=False)
        self.mounted.wait_healthy(HEALTHY_S)

    def cut_all(self, user: subprocess.Popen[bytes], *, etcd: bool) -> None:
        """Cut the power of the whole site, and bring it back; `user` stays dead.

        Args:
            user: a program that has files of the mount open.
            etcd: whether etcd is killed as well.
        """
        cluster = self.mounted.cluster
        for disk in self.disks.values():
            disk.cut()
        user.kill()
        dying = [process for process in cluster.processes() if etcd or process is not cluster.etcd]
        for process in dying:
            process.signal(signal.SIGKILL)
        for process in dying:
            process.kill()
        user.wait(30)
        for disk in self.disks.values():
            disk.unmount()
            disk.mount()
        cluster.start()
        cluster.mount(self.mounted.path)
        self.mounted.wait_healthy(HEALTHY_S)

    def destroy(self) -> None:
        """Take everything away."""
        self.mounted.cluster.destroy()
        for disk in self.disks.values():
            if is_mounted(disk.path):
                disk.unmount()


def _succeeds(*argv: str | Path) -> bool:
    words = [str(word) for word in argv]
    return not subprocess.run(words, capture_output=True, check=False).returncode


def _run(*argv: str | Path) -> str:
    """Run a program; give what it prints."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout
