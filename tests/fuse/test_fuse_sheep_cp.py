"""sheep-cp in the mount: clones, and what it does when it cannot make them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fakes.memory_mount import control
from fakes.mount_process import MountProcess

MIB = 1 << 20
OBJECT = 4 * MIB
SHEEP_CP = (sys.executable, "-m", "sheepfs_tools.sheep_cp")


@pytest.fixture
def mount(shared_mount: MountProcess) -> MountProcess:
    return shared_mount


def do(mount: MountProcess, command: str) -> None:
    """Let another host do something."""
    control(mount.path.parent / "control", command)


def taken(mount: MountProcess, name: str) -> set[str]:
    """How data came to a file: `share`, `copy`, `write`."""
    entries = [entry.split() for entry in mount.journal]
    return {e[0] for e in entries if e[1] == name} & {"share", "copy", "write"}


def test_a_fully_written_file_of_4_gib_is_cloned_in_well_under_a_second(
    mount: MountProcess,
) -> None:
    mount.ok("touch", "big.raw")
    do(mount, f"fill big.raw {4 << 30}")
    for how in ("always", "auto"):
        start = time.monotonic()
        mount.ok(*SHEEP_CP, f"--reflink={how}", "big.raw", f"big-{how}.raw")
        # A bound for a busy machine; alone it takes 0.2 s.
        assert time.monotonic() - start < 1
        assert taken(mount, f"big-{how}.raw") == {"share"}
        assert mount.ok("stat", "-c", "%s", f"big-{how}.raw") == f"{4 << 30}\n"
        mount.ok("cmp", "-n", "1000000", "-i", str(3 << 30), "big.raw", f"big-{how}.raw")
        mount.ok("rm", f"big-{how}.raw")
    mount.ok("rm", "big.raw")


def test_clone_of_a_sparse_file_that_starts_with_a_hole(mount: MountProcess) -> None:
    mount.python("""
f = os.open("h1.raw", os.O_RDWR | os.O_CREAT)
os.ftruncate(f, (40 << 20) + 5)
os.pwrite(f, os.urandom(3 << 20), (18 << 20) + 5)
""")
    mount.ok(*SHEEP_CP, "--reflink=always", "h1.raw", "h2.raw")
    mount.ok("cmp", "h1.raw", "h2.raw")
    assert taken(mount, "h2.raw") == {"share"}
    mount.ok("truncate", "-s", "1G", "e1.raw")
    mount.ok(*SHEEP_CP, "--reflink=always", "e1.raw", "e2.raw")
    assert mount.ok("stat", "-c", "%s %b", "e2.raw") == f"{1 << 30} 0\n"


def test_clone_of_a_snapshot_is_writable(mount: MountProcess) -> None:
    (mount.path / "s1.raw").write_bytes(b"then" * MIB)
    do(mount, "snapshot s1.raw daily")
    do(mount, "write s1.raw 0 now!")
    mount.ok(*SHEEP_CP, "--reflink=always", "s1@daily.raw", "s2.raw")
    assert mount.ok("stat", "-c", "%a", "s2.raw") == "644\n"
    assert mount.ok("head", "-c", "8", "s2.raw") == "thenthen"
    mount.ok(*SHEEP_CP, "-p", "s1@daily.raw", "s3.raw")
    assert mount.ok("stat", "-c", "%a", "s3.raw") == "444\n"
    mount.fails("Read-only file system", *SHEEP_CP, "-f", "s2.raw", "s1@daily.raw")
    mount.fails("Invalid argument", *SHEEP_CP, "s2.raw", "s1@new.raw")


def test_always_fails_where_the_cluster_cannot_share(mount: MountProcess) -> None:
    (mount.path / "f1.raw").write_bytes(os.urandom(3 * OBJECT))
    mount.fails("cannot share data", *SHEEP_CP, "--reflink=always", "f1.raw", "alien.raw")
    mount.fails("No such file", "stat", "alien.raw")
    mount.ok(*SHEEP_CP, "f1.raw", "alien.raw")
    mount.ok("cmp", "f1.raw", "alien.raw")
    assert taken(mount, "alien.raw") == {"copy"}
    mount.ok(*SHEEP_CP, "--reflink=never", "f1.raw", "f2.raw")
    assert taken(mount, "f2.raw") == {"write"}
    mount.ok("cmp", "f1.raw", "f2.raw")


def test_an_existing_target_is_replaced_by_a_clone(mount: MountProcess) -> None:
    (mount.path / "x1.raw").write_bytes(os.urandom(OBJECT + 5))
    (mount.path / "x2.raw").write_bytes(os.urandom(3 * OBJECT))
    mount.ok(*SHEEP_CP, "--reflink=always", "x1.raw", "x2.raw")
    mount.ok("cmp", "x1.raw", "x2.raw")


def test_in_and_out_of_the_mount(mount: MountProcess, tmp_path: Path) -> None:
    source = tmp_path / "image"
    source.write_bytes(bytes(OBJECT) + os.urandom(OBJECT) + bytes(777))
    mount.ok(*SHEEP_CP, source, "in.raw")
    assert int(mount.ok("stat", "-c", "%b", "in.raw")) * 512 == OBJECT
    mount.ok(*SHEEP_CP, "in.raw", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    mount.fails("Invalid cross-device link", *SHEEP_CP, "--reflink=always", source, "never.raw")
    mount.fails("No such file", "stat", "never.raw")


def test_attributes_are_kept_if_asked(mount: MountProcess) -> None:
    mount.python("""
open("p1.raw", "w").write("x" * 5000)
os.setxattr("p1.raw", "user.owner", b"ann")
os.chmod("p1.raw", 0o640)
os.utime("p1.raw", (1000000000, 1000000000))
""")
    mount.ok(*SHEEP_CP, "-a", "p1.raw", "p2.raw")
    assert mount.ok("stat", "-c", "%a %Y", "p2.raw") == "640 1000000000\n"
    assert mount.python("print(os.getxattr('p2.raw', 'user.owner'))") == "b'ann'"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_copy_leaves_no_target(
    mount: MountProcess, number: signal.Signals
) -> None:
    if not (mount.path / "slow.raw").exists():
        (mount.path / "slow.raw").write_bytes(b"x" * 10_000)
    process = mount.popen(*SHEEP_CP, "-v", "slow.raw", "target.raw")
    assert process.stdout is not None
    assert "slow.raw" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(8) == 128 + number
    mount.fails("No such file", "stat", "target.raw")


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils missing")
def test_the_disk_of_a_running_machine_is_not_overwritten(mount: MountProcess) -> None:
    (mount.path / "vm.raw").write_bytes(b"\7" * MIB)
    (mount.path / "new.raw").write_bytes(b"\1" * MIB)
    machine = mount.popen("qemu-io", "-f", "raw", "vm.raw")
    assert machine.stdin is not None
    assert machine.stdout is not None
    machine.stdin.write("read -P 7 0 4k\n")
    machine.stdin.flush()
    assert "read 4096/4096" in machine.stdout.readline()
    mount.fails("in use", *SHEEP_CP, "new.raw", "vm.raw")
    mount.fails("in use", *SHEEP_CP, "new.raw", "held.raw")
    # A clone of it can be made: what a power failure would leave.
    mount.ok(*SHEEP_CP, "--reflink=always", "vm.raw", "vm-clone.raw")
    machine.communicate("quit\n", timeout=10)
    assert isinstance(machine, subprocess.Popen)
    mount.ok("qemu-io", "-r", "-f", "raw", "vm.raw", "-c", "read -P 7 0 1M")
    mount.ok(*SHEEP_CP, "new.raw", "vm.raw")
