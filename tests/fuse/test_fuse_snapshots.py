"""Snapshots, extended attributes and changes by other hosts in the mount, with the real kernel."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from fakes.memory_mount import control
from fakes.mount_process import MountProcess

needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils missing")


@pytest.fixture
def mount(shared_mount: MountProcess) -> MountProcess:
    return shared_mount


def do(mount: MountProcess, command: str) -> None:
    """Let another host do something."""
    control(mount.path.parent / "control", command)


def snapshot(mount: MountProcess, name: str, content: bytes = b"then" * 2000) -> str:
    """Make a VDI with a snapshot `t` and change the VDI; give the snapshot's file name."""
    (mount.path / f"{name}.raw").write_bytes(content)
    do(mount, f"snapshot {name}.raw t")
    do(mount, f"write {name}.raw 0 now!")
    return f"{name}@t.raw"


def test_snapshot_is_a_read_only_file(mount: MountProcess) -> None:
    kept = snapshot(mount, "ro")
    assert mount.ok("cat", kept) == "then" * 2000
    assert mount.ok("head", "-c", "8", "ro.raw") == "now!then"
    assert kept in mount.ok("ls").split()
    assert mount.ok("stat", "-c", "%A %s", kept) == "-r--r--r-- 8000\n"
    mount.fails("Read-only file system", "sh", "-c", f"echo x > {kept}")
    mount.fails("Read-only file system", "sh", "-c", f"echo x >> {kept}")
    mount.fails("Read-only file system", "truncate", "-s", "5", kept)
    mount.fails("Read-only file system", "chmod", "u+w", kept)
    mount.fails("Read-only file system", "touch", kept)
    mount.fails("Read-only file system", "fallocate", "-p", "-l", "4096", kept)
    mount.ok("chmod", "400", kept)
    assert (
        mount.python(f"""
for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
    try: os.open({kept!r}, flags)
    except OSError as e: print(errno.errorcode[e.errno])
try: os.truncate({kept!r}, 0)
except OSError as e: print(errno.errorcode[e.errno])
""").split()
        == ["EROFS"] * 4
    )
    assert mount.ok("cat", kept) == "then" * 2000
    assert not [e for e in mount.journal if e.startswith("attach ro@t.raw")]


def test_snapshot_is_read_once_and_then_cached(mount: MountProcess) -> None:
    kept = snapshot(mount, "cached", b"x" * (1 << 20))
    mount.ok("md5sum", kept)
    # mincore(2): the pages are still there in the next open.
    assert (
        mount.python(f"""
import ctypes
f = os.open({kept!r}, os.O_RDONLY)
m = mmap.mmap(f, 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
pages = (ctypes.c_ubyte * 256)()
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1 << 20), pages)
print(sum(page & 1 for page in pages))
""")
        == "256"
    )
    mount.ok("dd", f"if={kept}", "of=/dev/null", "bs=64k", "iflag=direct")


def test_snapshot_is_removed_and_renamed(mount: MountProcess) -> None:
    kept = snapshot(mount, "rm")
    mount.fails("Operation not permitted", "mv", kept, "plain.raw")
    mount.fails("Operation not permitted", "mv", kept, "ro2@t.raw")
    mount.fails("Operation not permitted", "mv", "rm.raw", "rm@x.raw")
    mount.ok("mv", kept, "rm@weekly.raw")
    assert mount.ok("cat", "rm@weekly.raw") == "then" * 2000
    mount.fails("busy", "sh", "-c", "exec 9<rm@weekly.raw; rm -f rm@weekly.raw")
    do(mount, "protect rm@weekly.raw")
    mount.fails("Operation not permitted", "rm", "-f", "rm@weekly.raw")
    assert snapshot(mount, "rm") == kept
    mount.ok("rm", "-f", kept)
    mount.ok("mv", "rm.raw", "renamed.raw")
    assert mount.ok("cat", "renamed@weekly.raw") == "then" * 2000
    mount.ok("rm", "renamed.raw")
    mount.fails("File exists", "touch", "renamed.raw")


def test_cp_makes_a_clone_of_a_snapshot(mount: MountProcess) -> None:
    kept = snapshot(mount, "cl", b"then" * (2 << 20))
    mount.ok("cp", "--no-preserve=mode", kept, "clone.raw")
    assert [e for e in mount.journal if e.startswith("share clone.raw")]
    mount.ok("cmp", kept, "clone.raw")
    mount.ok("sh", "-c", "echo new | dd of=clone.raw conv=notrunc")
    assert mount.ok("head", "-c", "8", kept) == "thenthen"
    mount.fails("Read-only file system", "cp", "clone.raw", kept)


@needs_qemu
def test_qemu_reads_snapshots_and_uses_them_as_backing_files(mount: MountProcess) -> None:
    kept = snapshot(mount, "q", b"\7" * (1 << 20))
    for _ in range(2):
        mount.ok("qemu-io", "-r", "-f", "raw", kept, "-c", "read -P 7 4k 4k")
    # `snapshot=on`: writes go to a temporary file.
    mount.ok("qemu-io", "-s", "-f", "raw", kept, "-c", "write -P 9 4k 4k", "-c", "read -P 9 4k 4k")
    backing = mount.path.parent / "overlay.qcow2"
    mount.ok("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", mount.path / kept,
             backing)  # fmt: skip
    mount.ok("qemu-io", "-f", "qcow2", backing, "-c", "write -P 9 4k 4k", "-c", "read -P 7 8k 4k")
    mount.ok("qemu-io", "-r", "-f", "raw", kept, "-c", "read -P 7 4k 4k")
    mount.fails("Read-only file system", "qemu-io", "-f", "raw", kept, "-c", "write 0 4k")
    assert not [e for e in mount.journal if e.startswith("attach q@t.raw")]


@needs_qemu
def test_two_programs_hold_qemus_locks_on_one_snapshot(mount: MountProcess) -> None:
    kept = snapshot(mount, "two", b"\7" * (1 << 20))
    command = ("qemu-io", "-r", "-f", "raw", kept)
    first = mount.popen(*command)
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write("read -P 7 0 4k\n")
    first.stdin.flush()
    assert "read 4096/4096" in first.stdout.readline()
    assert "read 4096/4096" in mount.ok(*command, "-c", "read -P 7 0 4k")
    first.communicate("quit\n", timeout=10)


def test_a_lock_that_says_i_write_fails_on_a_snapshot(mount: MountProcess) -> None:
    kept = snapshot(mount, "lk")
    assert mount.python(f"""
f = os.open({kept!r}, os.O_RDONLY)
for start in (100, 203, 101, 103):
    request = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, start, 1, 0)
    try:
        fcntl.fcntl(f, fcntl.F_OFD_SETLK, request)
        print("locked")
    except OSError as e:
        print(errno.errorcode[e.errno])
""").split() == ["locked", "locked", "EROFS", "EROFS"]


# -- changes by another host ------------------------------------------------------------------


def test_size_changed_by_another_host_is_seen_at_once(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "1M", "grow.raw")
    path = mount.path / "grow.raw"
    for size in (2 << 20, 3 << 20, 1 << 20):
        before = path.stat().st_size
        start = time.monotonic()
        do(mount, f"resize grow.raw {size}")
        assert path.stat().st_size == size != before
        # Else this would not show anything: the kernel forgets by itself after a second.
        assert time.monotonic() - start < 0.9
    with path.open("rb") as file:
        do(mount, "write grow.raw 4000000 tail")
        assert file.seek(0, 2) == 4000004
        file.seek(4000000)
        assert file.read() == b"tail"


def test_changes_of_a_file_that_the_kernel_does_not_know_do_no_harm(mount: MountProcess) -> None:
    mount.ok("touch", "unknown.raw")
    mount.ok("sh", "-c", "echo 2 > /proc/sys/vm/drop_caches || true")
    for size in range(50):
        do(mount, f"resize unknown.raw {size}")
    assert mount.ok("stat", "-c", "%s", "unknown.raw") == "49\n"
    assert "refused a reply" not in mount.log


# -- extended attributes ----------------------------------------------------------------------


def test_user_attributes_are_kept(mount: MountProcess) -> None:
    assert mount.python("""
open("x.raw", "w").close()
os.setxattr("x.raw", "user.owner", b"ann")
os.setxattr("x.raw", "user.bytes", bytes(range(256)))
print(os.getxattr("x.raw", "user.owner"), os.getxattr("x.raw", "user.bytes") == bytes(range(256)))
os.setxattr("x.raw", "user.owner", b"")
print(sorted(os.listxattr("x.raw")), os.getxattr("x.raw", "user.owner"))
os.rename("x.raw", "x2.raw")
os.removexattr("x2.raw", "user.bytes")
print(os.listxattr("x2.raw"), os.listxattr("."))
""").splitlines() == [
        "b'ann' True",
        "['user.bytes', 'user.owner'] b''",
        "['user.owner'] []",
    ]


def test_errors_of_extended_attributes(mount: MountProcess) -> None:
    assert mount.python("""
def say(call, *arguments):
    try: call(*arguments)
    except OSError as e: print(errno.errorcode[e.errno])
f = "xe.raw"
open(f, "w").close()
say(os.getxattr, f, "user.x")
say(os.removexattr, f, "user.x")
say(os.setxattr, f, "user.x", b"1", os.XATTR_REPLACE)
os.setxattr(f, "user.x", b"1", os.XATTR_CREATE)
say(os.setxattr, f, "user.x", b"1", os.XATTR_CREATE)
os.setxattr(f, "user.x", b"2", os.XATTR_REPLACE)
say(os.setxattr, f, "user.y", b"1" * 5000)
os.setxattr(f, "user.y", b"1" * 3000)
say(os.setxattr, f, "user.z", b"1" * 3000)
say(os.setxattr, f, "trusted.x", b"1")
say(os.setxattr, f, "security.x", b"1")
say(os.getxattr, f, "security.capability")
say(os.setxattr, f, "sheepfs.family", b"1")
say(os.setxattr, ".", "user.x", b"1")
""").split() == [
        "ENODATA", "ENODATA", "ENODATA", "EEXIST", "E2BIG", "ENOSPC", "ENOTSUP", "ENOTSUP",
        "ENOTSUP", "ENOTSUP", "ENOTSUP",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("setfattr") is None, reason="package attr missing")
def test_setfattr_and_getfattr(mount: MountProcess) -> None:
    mount.ok("touch", "fattr.raw")
    mount.ok("setfattr", "-n", "user.owner", "-v", "ann", "fattr.raw")
    assert 'user.owner="ann"' in mount.ok("getfattr", "-d", "fattr.raw")


def test_cp_keeps_extended_attributes_if_asked(mount: MountProcess) -> None:
    mount.python("open('k.raw', 'w').write('x'); os.setxattr('k.raw', 'user.a', b'1')")
    mount.ok("cp", "--preserve=xattr", "k.raw", "k2.raw")
    assert mount.python("print(os.listxattr('k2.raw'))") == "['user.a']"


def test_family_tells_what_shares_data(mount: MountProcess) -> None:
    snapshot(mount, "fam")
    mount.ok("cp", "fam.raw", "fam2.raw")
    mount.ok("touch", "fam3.raw")
    families = mount.python("""
for name in ("fam.raw", "fam@t.raw", "fam2.raw", "fam3.raw"):
    print(os.getxattr(name, "sheepfs.family").decode(), os.listxattr(name))
""").splitlines()
    assert families[0] == families[1] == families[2] != families[3]
    assert families[0].endswith(" []")


def test_a_signal_to_a_reader_of_a_snapshot_is_harmless(mount: MountProcess) -> None:
    kept = snapshot(mount, "sig", b"z" * (8 << 20))
    process = mount.popen("sh", "-c", f"while :; do cat {kept}; done >/dev/null")
    time.sleep(0.3)
    process.kill()
    assert process.wait(5) == -9
    assert isinstance(process, subprocess.Popen)
    assert mount.ok("wc", "-c", kept).split()[0] == str(8 << 20)
