"""The program `sheepfs`: starting, ending, dying, and what it says when it cannot start."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.mount_process import TESTS, TIMEOUT_S, MountProcess, environment, mounted

PROGRAM = [sys.executable, str(TESTS / "fakes" / "memory_mount.py")]


def sheepfs(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program until it ends or is in the background."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def wait_until_ended(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    deadline = time.monotonic() + TIMEOUT_S
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll((deadline - time.monotonic()) * 1000), f"process {pid} does not end"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_flushes_detaches_and_unmounts(
    unmounted: MountProcess, number: signal.Signals
) -> None:
    unmounted.start()
    writer = unmounted.spawn("f = open('a.raw', 'wb', 0); f.write(b'x'); print(); sys.stdin.read()")
    assert writer.stdout is not None
    writer.stdout.readline()
    assert unmounted.stop(number) == 0
    assert not mounted(unmounted.path)
    assert unmounted.journal[-3:] == ["flush a.raw", "detach a.raw", "closed"]


def test_second_signal_does_not_wait(unmounted: MountProcess) -> None:
    unmounted.start(MEMORY_VDIS="stuck.raw")
    writer = unmounted.spawn("f = os.open('stuck.raw', os.O_RDWR); os.write(f, b'x'); print()\n"
                             "sys.stdin.read()")  # fmt: skip
    assert writer.stdout is not None
    writer.stdout.readline()
    assert unmounted.process is not None
    unmounted.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + TIMEOUT_S
    while "flushing and detaching" not in unmounted.log:
        assert time.monotonic() < deadline
    assert unmounted.stop() == 1
    assert not mounted(unmounted.path)


def test_umount_ends_the_program_and_detaches(unmounted: MountProcess) -> None:
    unmounted.start()
    unmounted.ok("sh", "-c", "echo data > a.raw")
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*command, str(unmounted.path)], timeout=TIMEOUT_S, check=True)
    assert unmounted.process is not None
    assert unmounted.process.wait(TIMEOUT_S) == 0
    unmounted.process = None
    assert unmounted.journal[-2:] == ["detach a.raw", "closed"]


def test_after_a_crash_programs_get_enotconn_and_a_restart_mounts_again(
    unmounted: MountProcess,
) -> None:
    unmounted.start(MEMORY_VDIS="stall.raw")
    reader = unmounted.spawn("""
f = open("a.raw", "wb", 0)
g = open("stall.raw", "rb", 0)
print("open")
for call in (lambda: g.read(10), lambda: f.write(b"x")):
    try: call()
    except OSError as e: print(e.errno)
""")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    assert unmounted.stop(signal.SIGKILL) == -signal.SIGKILL
    codes = reader.communicate(timeout=TIMEOUT_S)[0].split()
    assert set(codes) <= {str(errno.ENOTCONN), str(errno.ECONNABORTED)}
    assert len(codes) == 2
    unmounted.fails("not connected", "ls")
    unmounted.start()
    unmounted.ok("sh", "-c", "echo data > b.raw")
    assert unmounted.stop() == 0
    assert not mounted(unmounted.path)


@pytest.fixture
def daemon(unmounted: MountProcess, tmp_path: Path) -> Iterator[Path]:
    """Where the background process of a test writes its log; it is ended afterwards."""
    log_file = tmp_path / "daemon.log"
    yield log_file
    if mounted(unmounted.path):
        subprocess.run(["umount", "-l", str(unmounted.path)], timeout=10, check=False)


def test_program_goes_into_the_background_when_the_mount_is_ready(
    unmounted: MountProcess, daemon: Path
) -> None:
    pid_file = daemon.with_name("pid")
    result = sheepfs(
        "--log-file", daemon, unmounted.path, MEMORY_PID=str(pid_file),
        MEMORY_JOURNAL=str(unmounted.journal_file),
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert mounted(unmounted.path)
    unmounted.ok("sh", "-c", "echo data > a.raw")
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until_ended(pid)
    assert not mounted(unmounted.path)
    assert "is unmounted" in daemon.read_text()
    assert unmounted.journal[-1] == "closed"


def test_unreachable_cluster_is_told_on_the_terminal(unmounted: MountProcess) -> None:
    for foreground in ([], ["-f"]):
        result = sheepfs("--cluster", "unreachable", *foreground, unmounted.path)
        assert result.returncode == 1
        assert "sheepfs: etcd 127.0.0.1:2379 does not answer\n" in result.stderr
        assert "Traceback" not in result.stderr
        assert not mounted(unmounted.path)


def test_bad_mountpoint_gets_one_clear_line(tmp_path: Path) -> None:
    result = sheepfs(tmp_path / "none")
    assert (result.returncode, result.stderr) == (
        2,
        f"sheepfs: mount point {tmp_path}/none does not exist\n",
    )
    (tmp_path / "file").touch()
    result = sheepfs(tmp_path / "file")
    assert (result.returncode, result.stderr) == (
        2,
        f"sheepfs: mount point {tmp_path}/file is not a directory\n",
    )


def test_second_mount_at_the_same_place_is_refused(unmounted: MountProcess) -> None:
    unmounted.start()
    result = sheepfs("-f", unmounted.path)
    assert result.returncode == 2
    assert result.stderr == f"sheepfs: {unmounted.path} already has a sheepfs mount\n"
    unmounted.ok("ls")


def test_directory_that_is_not_empty_is_mounted_over(unmounted: MountProcess) -> None:
    (unmounted.path / "below").touch()
    unmounted.start()
    assert unmounted.ok("ls") == ""


def test_read_only_mount_refuses_changes(unmounted: MountProcess) -> None:
    unmounted.start("-o", "ro,noatime,x-systemd.automount", MEMORY_VDIS="vm.raw")
    unmounted.fails("Read-only file system", "touch", "new.raw")
    unmounted.ok("cat", "vm.raw")


USER_SCRIPT = """
set -eu
mkdir "$DIR/python" "$DIR/lib" "$DIR/repo" "$DIR/mnt"
mount --bind "$1" "$DIR/python"
mount --bind "$2" "$DIR/lib"
mount --bind "$3" "$DIR/repo"
mknod -m 666 "$DIR/fuse" c 10 229
mount --bind "$DIR/fuse" /dev/fuse
chown 65534:65534 "$DIR" "$DIR/mnt"
export PYTHONHOME="$DIR/python" PYTHONPATH="$DIR/repo:$DIR/repo/tests:$DIR/lib"
export LD_LIBRARY_PATH="$DIR/python/lib"
export MNT="$DIR/mnt" MEMORY_PID="$DIR/pid" PYTHONDONTWRITEBYTECODE=1
exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -eu -c '
cd "$DIR"
start() { "$DIR/python/bin/$1" "$DIR/repo/tests/fakes/memory_mount.py" --log-file log "$MNT"; }
ended() { tail --pid=$(cat pid) -f /dev/null; }
start $1
echo data > mnt/a.raw
cat mnt/a.raw
stat -c %u mnt/a.raw
mkdir mnt/x 2>&1 || true
kill $(cat pid)
ended
mountpoint -q mnt || echo unmounted
start $1
kill -9 $(cat pid)
ended
start $1
fusermount3 -u mnt
ended
echo again
' sh "$4"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="starts as root to become another user")
@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fuse3 missing")
def test_ordinary_user_mounts_through_fusermount3() -> None:
    """In a mount namespace of its own.

    There /dev/fuse may be opened by everybody, as udev has it, and interpreter and sources are
    where another user may look; the machine is left as it is.
    """
    sources = [sys.base_prefix, sysconfig.get_path("purelib"), str(TESTS.parent)]
    interpreter = f"python{sys.version_info.major}.{sys.version_info.minor}"
    namespace = ["unshare", "--mount", "--propagation", "private"]
    # Not tmp_path: other users may not look into pytest's directories.
    with tempfile.TemporaryDirectory() as directory:
        result = subprocess.run(
            [*namespace, "sh", "-c", USER_SCRIPT, "sh", *sources, interpreter],
            env=environment(DIR=directory),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [
        "data",
        "65534",
        "mkdir: cannot create directory 'mnt/x': Operation not permitted",
        "unmounted",
        "again",
    ]
