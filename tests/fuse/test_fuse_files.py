"""What programs do with files of the mount, with the real kernel on a cluster in memory."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from fakes.mount_process import MountProcess

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils missing")


@pytest.fixture
def mount(shared_mount: MountProcess) -> MountProcess:
    return shared_mount


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "random"
    path.write_bytes(os.urandom((5 << 20) + 777))
    return path


def since(mount: MountProcess, mark: int, name: str) -> list[str]:
    """What happened to one file since the journal had `mark` entries, without its name."""
    entries = [entry.split() for entry in mount.journal[mark:]]
    return [" ".join([e[0], *e[2:]]) for e in entries if e[1] == name]


def test_cp_in_within_and_out_keeps_every_byte(mount: MountProcess, random_file: Path) -> None:
    mount.ok("cp", random_file, "cp.raw")
    mount.ok("cp", "cp.raw", "cp2.raw")
    mount.ok("cmp", "cp2.raw", random_file)


def test_cp_of_a_sparse_file_stays_sparse(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "10M", "sparse.raw")
    mount.ok("dd", "if=/dev/urandom", "of=sparse.raw", "bs=64k", "count=1", "seek=50",
             "conv=notrunc")  # fmt: skip
    mount.ok("cp", "--sparse=always", "sparse.raw", "sparse2.raw")
    mount.ok("cmp", "sparse.raw", "sparse2.raw")
    assert int(mount.ok("stat", "-c", "%b", "sparse2.raw")) * 512 <= 128 << 10
    assert mount.ok("du", "-k", "sparse2.raw").split()[0] == "64"


@pytest.mark.parametrize("flags", ["", "direct", "sync", "direct,sync", "dsync"])
def test_dd_writes_and_reads_back(mount: MountProcess, random_file: Path, flags: str) -> None:
    oflag = [f"oflag={flags}"] if flags else []
    iflag = ["iflag=direct"] if "direct" in flags else []
    mount.ok("dd", f"if={random_file}", "of=dd.raw", "bs=256k", "count=20", *oflag)
    mount.ok("dd", "if=dd.raw", f"of={random_file}.out", "bs=1M", *iflag)
    mount.ok("cmp", "-n", str(20 * 256 << 10), random_file, f"{random_file}.out")


@pytest.mark.parametrize("flags", ["O_SYNC", "O_DSYNC", "O_SYNC|os.O_DIRECT"])
def test_synchronous_write_is_flushed_before_it_returns(mount: MountProcess, flags: str) -> None:
    name = f"osync{flags.replace('|os.', '')}.raw"
    entries = mount.python(f"""
f = os.open({name!r}, os.O_RDWR | os.O_CREAT | os.{flags})
m = mmap.mmap(-1, 4096)
os.writev(f, [m])
print([line for line in open({str(mount.journal_file)!r}).read().splitlines() if {name!r} in line])
""")
    assert entries == str([f"attach {name}", f"write {name} 0 4096", f"flush {name}"])


def test_rwf_dsync_is_flushed_and_a_plain_write_is_not(mount: MountProcess) -> None:
    entries = mount.python(f"""
f = os.open("rwf.raw", os.O_RDWR | os.O_CREAT)
os.pwritev(f, [b"x" * 10], 0)
os.pwritev(f, [b"x" * 10], 0, os.RWF_DSYNC)
print([line for line in open({str(mount.journal_file)!r}).read().splitlines() if "rwf.raw" in line])
""")
    assert entries == str(
        ["attach rwf.raw", "write rwf.raw 0 10", "write rwf.raw 0 10", "flush rwf.raw"]
    )


def test_fsync_and_close_flush_and_the_last_close_detaches(mount: MountProcess) -> None:
    mark = len(mount.journal)
    mount.ok("dd", "if=/dev/zero", "of=sync.raw", "bs=4k", "count=1", "conv=fsync,notrunc")
    mount.ok("rm", "sync.raw")
    fsync, close = "flush", "flush"
    assert since(mount, mark, "sync.raw") == ["attach", "write 0 4096", fsync, close, "detach"]


def test_truncate_grows_and_shrinks(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "3G", "size.raw")
    assert mount.ok("stat", "-c", "%s %b", "size.raw") == "3221225472 0\n"
    mount.ok("truncate", "-s", "5", "size.raw")
    assert mount.ok("stat", "-c", "%s", "size.raw") == "5\n"


def test_opening_with_truncation_empties(mount: MountProcess) -> None:
    mount.ok("sh", "-c", "echo long text > trunc.raw; echo x > trunc.raw")
    assert mount.ok("cat", "trunc.raw") == "x\n"


def test_appending_writes_go_to_the_end(mount: MountProcess) -> None:
    mount.ok("sh", "-c", "echo one > append.raw; echo two >> append.raw")
    assert mount.ok("cat", "append.raw") == "one\ntwo\n"


def test_seek_finds_data_and_holes(mount: MountProcess) -> None:
    assert (
        mount.python("""
f = os.open("seek.raw", os.O_RDWR | os.O_CREAT)
os.ftruncate(f, 1 << 20)
os.pwrite(f, b"x" * 4096, 65536)
def seek(offset, whence):
    try: return os.lseek(f, offset, whence)
    except OSError as e: return errno.errorcode[e.errno]
D, H = os.SEEK_DATA, os.SEEK_HOLE
print(seek(0, D), seek(0, H), seek(65536, H), seek(70000, D), seek(1 << 20, D), seek(1 << 20, H))
""")
        == "65536 0 69632 ENXIO ENXIO ENXIO"
    )


def test_fallocate_punches_zeroes_and_grows(mount: MountProcess) -> None:
    mount.python("open('fall.raw', 'wb').write(b'x' * 100000)")
    mount.ok("fallocate", "--punch-hole", "-o", "10000", "-l", "20000", "fall.raw")
    mount.ok("fallocate", "--zero-range", "-o", "90000", "-l", "20000", "fall.raw")
    assert mount.ok("stat", "-c", "%s", "fall.raw") == "110000\n"
    mount.ok("fallocate", "--zero-range", "--keep-size", "-o", "100000", "-l", "20000", "fall.raw")
    assert mount.ok("stat", "-c", "%s", "fall.raw") == "110000\n"
    mount.ok("fallocate", "-l", "200000", "fall.raw")
    mount.ok("fallocate", "--keep-size", "-l", "300000", "fall.raw")
    assert mount.ok("stat", "-c", "%s", "fall.raw") == "200000\n"
    mount.fails("not supported", "fallocate", "--collapse-range", "-l", "4096", "fall.raw")
    assert (
        mount.python("""
data = open("fall.raw", "rb").read()
want = b"x" * 10000 + bytes(20000) + b"x" * 60000 + bytes(110000)
print(data == want)
""")
        == "True"
    )


def test_mmap_reads_private_and_shared(mount: MountProcess) -> None:
    assert mount.python("""
f = os.open("mmap.raw", os.O_RDWR | os.O_CREAT)
os.write(f, b"abcd" * 4096)
for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
    print(mmap.mmap(f, 16384, kind, mmap.PROT_READ)[8190:8194].decode())
""").split() == ["cdab", "cdab"]


def test_size_beyond_the_largest_vdi_is_too_big(mount: MountProcess) -> None:
    mount.fails("File too large", "truncate", "-s", "2P", "big.raw")
    assert (
        mount.python("""
f = os.open("big.raw", os.O_RDWR | os.O_CREAT)
try: os.pwrite(f, b"x", 1 << 51)
except OSError as e: print(errno.errorcode[e.errno])
""")
        == "EFBIG"
    )


def test_chmod_chown_and_touch_are_kept(mount: MountProcess) -> None:
    mount.ok("touch", "-d", "2001-02-03 04:05:06 UTC", "attrs.raw")
    mount.ok("chmod", "640", "attrs.raw")
    expected = "640 981173106"
    assert mount.ok("stat", "-c", "%a %Y", "attrs.raw").strip() == expected
    if mount.ok("id", "-u").strip() == "0":
        mount.ok("chown", "12:34", "attrs.raw")
        assert mount.ok("stat", "-c", "%u:%g", "attrs.raw") == "12:34\n"


def test_directories_links_and_devices_are_refused(mount: MountProcess) -> None:
    mount.ok("touch", "plain.raw")
    mount.fails("not permitted", "mkdir", "directory")
    mount.fails("not permitted", "ln", "-s", "plain.raw", "link")
    mount.fails("not permitted", "ln", "plain.raw", "link")
    mount.fails("not permitted", "mkfifo", "fifo")
    mount.python("os.mknod('made.raw', 0o100644)")


@pytest.mark.parametrize(
    ("name", "message"),
    [(".hidden", "Invalid argument"), ("a@b", "Invalid"), ("x" * 129, "name too long")],
)
def test_bad_names_are_refused(mount: MountProcess, name: str, message: str) -> None:
    mount.fails(message, "touch", name)


def test_rename_moves_and_replaces(mount: MountProcess) -> None:
    mount.ok("sh", "-c", "echo a > ra.raw; echo b > rb.raw")
    mount.ok("mv", "-n", "ra.raw", "rb.raw")
    assert mount.ok("cat", "ra.raw") == "a\n"
    mount.ok("mv", "ra.raw", "rb.raw")
    assert mount.ok("cat", "rb.raw") == "a\n"
    mount.fails("No such file", "cat", "ra.raw")
    assert mount.python("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
open("rc.raw", "w").close()
for flags in (1, 2):  # RENAME_NOREPLACE, RENAME_EXCHANGE
    libc.renameat2(-100, b"rb.raw", -100, b"rc.raw", flags)
    print(errno.errorcode[ctypes.get_errno()])
""").split() == ["EEXIST", "EINVAL"]


def test_a_file_in_use_is_neither_removed_nor_replaced(mount: MountProcess) -> None:
    mount.fails("busy", "sh", "-c", "exec 9>used.raw; rm used.raw")
    mount.fails("busy", "sh", "-c", "exec 9>used.raw; touch other.raw; mv other.raw used.raw")
    assert "deletion of used.raw refused: a program has it open" in mount.log
    for _ in range(20):  # rm comes right behind the close, which the kernel does not wait for
        mount.ok("sh", "-c", "echo data > used.raw; rm used.raw")


def test_file_renamed_while_open_stays_usable(mount: MountProcess) -> None:
    mount.ok("sh", "-c", "exec 9>o1.raw; mv o1.raw o2.raw; echo after >&9")
    assert mount.ok("cat", "o2.raw") == "after\n"


def test_df_shows_the_clusters_space(mount: MountProcess) -> None:
    size, free = mount.ok("df", "--output=size,avail", "-B1", ".").split()[-2:]
    assert (int(size), int(free)) == (100 << 30, 60 << 30)


def test_a_file_held_by_another_mount_is_busy_for_writers(mount: MountProcess) -> None:
    mount.fails("busy", "dd", "if=/dev/zero", "of=held.raw", "bs=4k", "count=1", "conv=notrunc")
    mount.fails("busy", "truncate", "-s", "0", "held.raw")
    mount.fails("busy", "fallocate", "-p", "-l", "4096", "held.raw")
    mount.fails("busy", "rm", "held.raw")
    mount.ok("cmp", "-n", "1000", "held.raw", "/dev/zero")


def test_errors_of_the_cluster_reach_the_program(mount: MountProcess) -> None:
    assert mount.python("""
def say(call):
    try: call()
    except OSError as e: print(errno.errorcode[e.errno])
f = os.open("full.raw", os.O_RDWR)
say(lambda: os.write(f, b"x"))
g = os.open("bad.raw", os.O_RDWR)
say(lambda: os.read(g, 10))
os.write(g, b"x")
say(lambda: os.fsync(g))
say(lambda: os.close(g))
""").split() == ["ENOSPC", "EIO", "EIO", "EIO"]


@needs_qemu
def test_qemu_img_creates_shows_and_converts(mount: MountProcess, random_file: Path) -> None:
    mount.ok("qemu-img", "create", "-f", "raw", "qemu.raw", "64M")
    assert "virtual size: 64 MiB" in mount.ok("qemu-img", "info", "-f", "raw", "qemu.raw")
    mount.ok("qemu-img", "convert", "-f", "raw", "-O", "raw", random_file, "converted.raw")
    mount.ok("cmp", "-n", str(5 << 20), random_file, "converted.raw")
    mount.ok("qemu-img", "resize", "-f", "raw", "qemu.raw", "128M")
    assert "virtual size: 128 MiB" in mount.ok("qemu-img", "info", "-f", "raw", "qemu.raw")


def test_qemu_is_told_to_write_sectors_as_they_are(mount: MountProcess) -> None:
    """Else it reads the rest of the block first, and goes on with garbage if that fails."""
    assert mount.python("""
import fcntl, struct
f = os.open("aligned.raw", os.O_RDWR | os.O_CREAT)
least = struct.unpack("<III", fcntl.ioctl(f, 0x800C581E, bytes(12)))[:2]
try: fcntl.ioctl(f, 0x5401, bytes(60))
except OSError as e: print(*least, errno.errorcode[e.errno])
""").split() == ["512", "512", "ENOTTY"]


@needs_qemu
def test_qemu_writes_sectors_as_they_are(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "1M", "sectors.raw")
    mark = len(mount.journal)
    mount.ok("qemu-io", "-t", "none", "-f", "raw", "sectors.raw", "-c", "write 1k 1k")
    assert "write 1024 1024" in since(mount, mark, "sectors.raw")


@needs_qemu
def test_qemu_discard_and_write_zeroes_give_space_back(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "16M", "discard.raw")
    mount.ok("qemu-io", "-d", "unmap", "-f", "raw", "discard.raw", "-c", "write -P 7 0 8M",
             "-c", "discard 1M 2M", "-c", "write -z -u 4M 1M", "-c", "read -P 7 3M 1M",
             "-c", "read -P 0 1M 2M", "-c", "read -P 0 4M 1M", "-c", "flush")  # fmt: skip
    assert mount.ok("du", "-k", "discard.raw").split()[0] == str(5 << 10)


def test_two_thousand_files_list_in_under_a_second(unmounted: MountProcess) -> None:
    unmounted.start(MEMORY_VDIS="vm*2000")
    start = time.monotonic()
    lines = unmounted.ok("ls", "-l").splitlines()
    duration_s = time.monotonic() - start
    assert len(lines) == 2001
    assert len({line.split()[-1] for line in lines[1:]}) == 2000
    assert duration_s < 1.0
    # Many at once fill the socket to libfuse, whose thread is the mount's own: no deadlock.
    listings = [unmounted.popen("ls", "-l") for _ in range(12)]
    assert {len(ls.communicate(timeout=20)[0].splitlines()) for ls in listings} == {2001}
