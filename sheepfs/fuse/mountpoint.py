"""Mounting and unmounting: as root with mount(2), as an ordinary user through fusermount3.

A mount whose process is gone is recognized by ENOTCONN and detached before the next one is made.
"""

from __future__ import annotations

import array
import ctypes
import errno
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from sheepfs.core.errors import SheepError, UsageError

log = logging.getLogger(__name__)

FSTYPE = "fuse.sheepfs"
SOURCE = "sheepfs"
FUSERMOUNT_TIMEOUT_S = 10.0
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


class MountError(SheepError):
    """The kernel or fusermount3 would not mount."""


def _mount_type(mountpoint: str) -> str | None:
    """Give the file system type of the topmost mount at `mountpoint`, if one is there."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        if where == mountpoint:
            found = after.split()[0]
    return found


def check(mountpoint: str) -> str:
    """Make sure that `mountpoint` can be mounted on; a dead mount there is detached first.

    Returns:
        The absolute path without symbolic links.

    Raises:
        UsageError: not a directory, or a live sheepfs mount.
    """
    # The last component of a dead mount cannot be stat'ed, so only its parent is resolved.
    absolute = os.path.abspath(mountpoint)
    if not os.path.islink(absolute):
        parent = os.path.realpath(os.path.dirname(absolute))
        path = os.path.join(parent, os.path.basename(absolute))
    else:
        path = os.path.realpath(absolute)
    if is_dead(path):
        log.warning("%s has a mount whose process is gone; detaching it", path)
        unmount(path)
        return check(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UsageError(f"mount point {mountpoint} does not exist") from None
    except OSError as error:
        raise UsageError(f"mount point {mountpoint}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"mount point {mountpoint} is not a directory")
    if _mount_type(path) == FSTYPE:
        raise UsageError(f"{mountpoint} already has a sheepfs mount")
    return path


def is_dead(mountpoint: str) -> bool:
    """Tell whether there is a mount whose process is gone or has lost the kernel."""
    try:
        # Not stat(2), which for a second after the process's end gives what the kernel remembers.
        os.close(os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def mount(mountpoint: str, *, allow_other: bool, read_only: bool) -> int:
    """Mount and give the connection's /dev/fuse descriptor, not blocking.

    Raises:
        MountError: with a sentence that says why.
    """
    if os.geteuid() == 0:
        device = _mount_as_root(mountpoint, allow_other=allow_other, read_only=read_only)
    else:
        device = _mount_as_user(mountpoint, allow_other=allow_other, read_only=read_only)
    os.set_blocking(device, False)
    return device


def _mount_as_root(mountpoint: str, *, allow_other: bool, read_only: bool) -> int:
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open /dev/fuse: {error.strerror} (modprobe fuse?)") from error
    options = (
        f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()},"
        "default_permissions" + (",allow_other" if allow_other else "")
    )
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    if _libc.mount(
        SOURCE.encode(), os.fsencode(mountpoint), FSTYPE.encode(), flags, options.encode()
    ):
        code = ctypes.get_errno()
        os.close(device)
        raise MountError(f"cannot mount {mountpoint}: {os.strerror(code)}")
    return device


def _run_fusermount(*arguments: str, commfd: int | None = None) -> str:
    """Run fusermount3; give why it failed, or an empty string."""
    program = shutil.which("fusermount3")
    if program is None:
        return "fusermount3 is not installed (package fuse3)"
    try:
        result = subprocess.run(
            [program, *arguments],
            env=None if commfd is None else {**os.environ, "_FUSE_COMMFD": str(commfd)},
            pass_fds=() if commfd is None else (commfd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=FUSERMOUNT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"fusermount3 did not end within {FUSERMOUNT_TIMEOUT_S:.0f} s"
    if not result.returncode:
        return ""
    return result.stderr.decode(errors="replace").strip() or "fusermount3 failed"


def _mount_as_user(mountpoint: str, *, allow_other: bool, read_only: bool) -> int:
    options = [f"fsname={SOURCE}", "subtype=sheepfs", "default_permissions", "nosuid", "nodev"]
    options += ["allow_other"] if allow_other else []
    options += ["ro"] if read_only else []
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            why = _run_fusermount("-o", ",".join(options), "--", mountpoint, commfd=theirs.fileno())
        if why:
            raise MountError(f"cannot mount {mountpoint}: {why}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if len(descriptors) != 1:
        raise MountError(f"cannot mount {mountpoint}: fusermount3 sent no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(mountpoint: str) -> None:
    """Take the mount out of the tree at once; files still open keep working until its end.

    A mount that is not there any more is no error; others are logged.
    """
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW):
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOENT):
                log.error("cannot unmount %s: %s", mountpoint, os.strerror(code))
        return
    why = _run_fusermount("-u", "-z", "--", mountpoint)
    if why and _mount_type(mountpoint) == FSTYPE:
        log.error("cannot unmount %s: %s", mountpoint, why)
