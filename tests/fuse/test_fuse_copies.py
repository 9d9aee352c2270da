"""cp and copy_file_range(2) within the mount, with the real kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from fakes.memory_mount import control
from fakes.mount_process import MountProcess

MIB = 1 << 20
OBJECT = 4 * MIB


@pytest.fixture
def mount(shared_mount: MountProcess) -> MountProcess:
    return shared_mount


@pytest.fixture(params=["0", "1"], ids=["64-bit", "32-bit"])
def any_mount(
    request: pytest.FixtureRequest, unmounted: MountProcess, monkeypatch: pytest.MonkeyPatch
) -> MountProcess:
    """A mount whose kernel speaks the new or only the old form of the request."""
    unmounted.start(
        MEMORY_OLD_COPY=request.param, MEMORY_CONTROL=str(unmounted.path.parent / "control")
    )
    return unmounted


def do(mount: MountProcess, command: str) -> None:
    """Let another host do something."""
    control(mount.path.parent / "control", command)


def shared(mount: MountProcess, name: str) -> list[tuple[str, int, int]]:
    """What was shared with or copied to a file: (how, offset, length)."""
    entries = [entry.split() for entry in mount.journal]
    return [
        (e[0], int(e[2]), int(e[3])) for e in entries if e[0] in ("share", "copy") and e[1] == name
    ]


def test_cp_of_a_full_file_shares_all_of_it(any_mount: MountProcess) -> None:
    mount = any_mount
    (mount.path / "whole1.raw").write_bytes(os.urandom(2 * OBJECT + 777))
    mount.ok("cp", "whole1.raw", "whole2.raw")
    assert shared(mount, "whole2.raw") == [("share", 0, 2 * OBJECT + 777)]
    mount.ok("cmp", "whole1.raw", "whole2.raw")


def test_a_full_file_above_4_gib_is_shared_in_a_moment(any_mount: MountProcess) -> None:
    mount = any_mount
    size = (9 << 30) + 5 * MIB
    mount.ok("touch", "big1.raw")
    do(mount, f"fill big1.raw {size}")
    start = time.monotonic()
    mount.ok("cp", "big1.raw", "big2.raw")
    assert time.monotonic() - start < 2
    pieces = shared(mount, "big2.raw")
    assert sum(length for _, _, length in pieces) == size
    assert all(how == "share" and offset % OBJECT == 0 for how, offset, _ in pieces)
    mount.ok("cmp", "-n", "9000000", "-i", str(8 << 30), "big1.raw", "big2.raw")


def test_sparse_copy_within_the_mount_is_equal_and_sparse(mount: MountProcess) -> None:
    mount.python("""
f = os.open("sp1.raw", os.O_RDWR | os.O_CREAT)
os.ftruncate(f, 100 << 20)
os.pwrite(f, os.urandom(5 << 20), (30 << 20) + 5)
""")
    mount.ok("cp", "sp1.raw", "sp2.raw")
    mount.ok("cmp", "sp1.raw", "sp2.raw")
    assert int(mount.ok("stat", "-c", "%b", "sp2.raw")) * 512 <= 6 * MIB


def test_size_and_blocks_are_new_at_once(mount: MountProcess) -> None:
    assert mount.python("""
open("s1.raw", "wb").write(b"x" * 100000)
a = os.open("s1.raw", os.O_RDONLY)
b = os.open("s2.raw", os.O_RDWR | os.O_CREAT)
print(os.fstat(b).st_size, os.stat("s2.raw").st_size)
print(os.copy_file_range(a, b, 1 << 30, 0, 5000))
print(os.fstat(b).st_size, os.stat("s2.raw").st_size, os.stat("s2.raw").st_blocks > 0)
print(os.pread(b, 9, 103000) == b"x" * 9, os.lseek(b, 0, os.SEEK_END))
""").split() == ["0", "0", "100000", "105000", "105000", "True", "True", "105000"]


def test_odd_offsets_and_another_range_of_the_same_file(mount: MountProcess) -> None:
    assert mount.python("""
data = os.urandom(6 << 20)
f = os.open("o.raw", os.O_RDWR | os.O_CREAT)
os.pwrite(f, data, 0)
done = 0
while done < 3000001:
    done += os.copy_file_range(f, f, 3000001 - done, 77 + done, (8 << 20) + 5 + done)
print(os.pread(f, 3000001, (8 << 20) + 5) == data[77:77 + 3000001])
print(os.pread(f, 6 << 20, 0) == data, os.fstat(f).st_size)
""").split() == ["True", "True", str(8 * MIB + 5 + 3000001)]


def test_errors_are_those_of_the_man_page(mount: MountProcess) -> None:
    assert mount.python("""
def say(*arguments):
    try: print(os.copy_file_range(*arguments))
    except OSError as e: print(errno.errorcode[e.errno])
open("e1.raw", "wb").write(b"x" * 100000)
r = os.open("e1.raw", os.O_RDONLY)
rw = os.open("e1.raw", os.O_RDWR)
w = os.open("e2.raw", os.O_WRONLY | os.O_CREAT)
append = os.open("e2.raw", os.O_WRONLY | os.O_APPEND)
say(r, r, 10, 0, 50)        # the target is not open for writing
say(w, rw, 10, 0, 0)        # the source is not open for reading
say(r, append, 10, 0, 0)
say(rw, rw, 100, 0, 99)     # overlap
say(r, w, 10, 0, 1 << 51)   # beyond the largest VDI
say(r, w, 10, 100000, 0)    # the end
say(r, os.open("held.raw", os.O_RDWR), 10, 0, 0)
try: fcntl.ioctl(w, 0x40049409, r)  # FICLONE
except OSError as e: print(errno.errorcode[e.errno])
""").split() == ["EBADF", "EBADF", "EBADF", "EINVAL", "EFBIG", "0", "EBUSY", "ENOTSUP"]


def test_copy_to_another_file_system_still_works(mount: MountProcess, tmp_path: Path) -> None:
    (mount.path / "x.raw").write_bytes(b"x" * 100_000)
    mount.ok("cp", "x.raw", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x" * 100_000


def test_a_copy_that_makes_no_progress_is_killed_at_once(mount: MountProcess) -> None:
    (mount.path / "slow.raw").write_bytes(b"x" * 10_000)
    process = mount.spawn("""
a = os.open("slow.raw", os.O_RDONLY)
b = os.open("slow-copy.raw", os.O_RDWR | os.O_CREAT)
print("copying")
os.copy_file_range(a, b, 10000, 0, 0)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"
    time.sleep(0.2)
    assert (mount.path / "slow-copy.raw").stat().st_size == 0
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    # What was done of it shows at once.
    assert (mount.path / "slow-copy.raw").stat().st_size == 10_000
    assert time.monotonic() - start < 0.9
    mount.ok("rm", "slow-copy.raw")


def test_the_mount_ends_while_a_copy_is_stuck(unmounted: MountProcess) -> None:
    unmounted.start(MEMORY_VDIS="slow.raw")
    process = unmounted.spawn("""
a = os.open("slow.raw", os.O_RDONLY)
b = os.open("copy.raw", os.O_RDWR | os.O_CREAT)
print("copying")
os.copy_file_range(a, b, 10000, 0, 0)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n"
    time.sleep(0.2)
    assert unmounted.stop() == 0
    assert process.wait(5) != 0


def test_copies_in_both_directions_and_within_one_file_at_once(mount: MountProcess) -> None:
    for name in ("p.raw", "q.raw"):
        (mount.path / name).write_bytes(os.urandom(5 * MIB))
    code = """
a, b = (os.open(name, os.O_RDWR) for name in sys.argv[1:])
for turn in range(100):
    os.copy_file_range(a, b, 70000, turn * 1000, 2000000 + turn * 1000)
"""
    pairs = (("p.raw", "q.raw"), ("q.raw", "p.raw"), ("p.raw", "p.raw"))
    running = [mount.spawn(f"sys.argv = ['', {a!r}, {b!r}]\n" + code) for a, b in pairs]
    with contextlib.ExitStack() as stack:
        for process in running:
            stack.callback(process.kill)
        assert [process.wait(20) for process in running] == [0, 0, 0]


def test_nothing_is_flushed_by_a_copy(mount: MountProcess) -> None:
    entries = mount.python(f"""
open("f1.raw", "wb").write(b"x" * 5000)
a = os.open("f1.raw", os.O_RDWR)
b = os.open("f2.raw", os.O_RDWR | os.O_CREAT)
os.pwrite(a, b"y", 0)
os.copy_file_range(a, b, 5000, 0, 0)
print(open({str(mount.journal_file)!r}).read())
""").splitlines()
    assert entries[-4:] == [
        "attach f1.raw",
        "write f1.raw 0 1",
        "attach f2.raw",
        "share f2.raw 0 5000",
    ]
