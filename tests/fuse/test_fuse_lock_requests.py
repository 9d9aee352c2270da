"""Byte-range locks between programs, as QEMU takes them, with the real kernel."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from fakes.mount_process import MountProcess

LOCK = """
def lock(f, kind, start=0, length=0, wait=False):
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    request = struct.pack("hhqqi4x", kind, 0, start, length, 0)
    try:
        fcntl.fcntl(f, command, request)
        return "locked"
    except OSError as e:
        return errno.errorcode[e.errno]
def test(f, kind, start=0, length=0):
    request = struct.pack("hhqqi4x", kind, 0, start, length, 0)
    return struct.unpack("hhqqi4x", fcntl.fcntl(f, fcntl.F_OFD_GETLK, request))[0]
R, W, U = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
def opened(name):
    return os.open(name, os.O_RDWR | os.O_CREAT)
"""
HOLDER = (
    LOCK
    + """
f = opened(sys.stdin.readline().strip())
print(lock(f, W, 0, 100))
sys.stdin.readline()
"""
)


@pytest.fixture
def mount(shared_mount: MountProcess) -> MountProcess:
    return shared_mount


def holder(mount: MountProcess, name: str) -> subprocess.Popen[str]:
    """A process that holds an exclusive lock on the first 100 bytes until it gets a line."""
    process = mount.spawn(HOLDER)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "locked\n"
    return process


def test_open_files_lock_each_other_out(mount: MountProcess) -> None:
    assert mount.python(LOCK + """
a, b = opened("ofd.raw"), opened("ofd.raw")
print(lock(a, R, 100, 1), lock(b, R, 100, 1), lock(b, W, 100, 1), lock(b, W, 101, 1))
print(test(b, W, 100, 1) == R, test(a, R, 101, 1) == W, test(a, W, 500, 1) == U)
print(lock(a, U, 100, 1), lock(b, W, 100, 1), lock(a, R, 100, 1))
""").splitlines() == [
        "locked locked EAGAIN locked",
        "True True True",
        "locked locked EAGAIN",
    ]  # fmt: skip


def test_posix_locks_of_two_processes(mount: MountProcess) -> None:
    assert mount.python("""
f = open("posix.raw", "w")
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
if os.fork() == 0:
    try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
    except OSError as e: print(errno.errorcode[e.errno], flush=True)
    f.close()  # ends no lock of the parent's
    os._exit(0)
os.wait()
g = open("posix.raw", "w")
g.close()  # POSIX: any close ends all of the process's locks on the file
if os.fork() == 0:
    f2 = open("posix.raw", "w")
    fcntl.lockf(f2, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
    print("locked", flush=True)
    os._exit(0)
os.wait()
""").split() == ["EAGAIN", "locked"]


def test_a_waiting_lock_is_given_when_the_holder_unlocks(mount: MountProcess) -> None:
    first = holder(mount, "wait.raw")
    waiter = mount.spawn(LOCK + "print(lock(opened('wait.raw'), W, 50, 1, wait=True))")
    assert mount.python(LOCK + "print(lock(opened('wait.raw'), W, 50, 1))") == "EAGAIN"
    assert waiter.poll() is None
    first.communicate("\n", timeout=10)
    assert waiter.communicate(timeout=10)[0] == "locked\n"


def test_locks_end_with_a_killed_process(mount: MountProcess) -> None:
    first = holder(mount, "killed.raw")
    waiter = mount.spawn(LOCK + "print(lock(opened('killed.raw'), W, 0, 1, wait=True))")
    first.kill()
    first.communicate(timeout=10)
    assert waiter.communicate(timeout=10)[0] == "locked\n"


def test_a_waiting_lock_is_interrupted_by_a_signal(mount: MountProcess) -> None:
    first = holder(mount, "interrupt.raw")
    assert mount.python(LOCK + """
def handler(number, frame): raise SystemExit("interrupted")
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try: lock(opened("interrupt.raw"), W, 0, 1, wait=True)
except SystemExit as e: print(e)
""") == "interrupted"  # fmt: skip
    first.communicate("\n", timeout=10)
    assert mount.python(LOCK + "print(lock(opened('interrupt.raw'), W, 0, 1))") == "locked"


def test_a_killed_waiter_leaves_no_lock(mount: MountProcess) -> None:
    first = holder(mount, "gone.raw")
    waiter = mount.spawn(LOCK + "print('go')\nlock(opened('gone.raw'), W, 0, 1, wait=True)")
    assert waiter.stdout is not None
    waiter.stdout.readline()
    waiter.kill()
    waiter.communicate(timeout=10)
    first.communicate("\n", timeout=10)
    assert mount.python(LOCK + "print(lock(opened('gone.raw'), W, 0, 1))") == "locked"


def test_locking_attaches_and_the_last_unlock_detaches_before_it_returns(
    mount: MountProcess,
) -> None:
    seen = mount.python(LOCK + f"""
journal = lambda: [e.split()[0] for e in open({str(mount.journal_file)!r}) if "migrate.raw" in e]
f = opened("migrate.raw")
print(journal())
lock(f, R, 100, 1); lock(f, R, 201, 1)
os.write(f, b"x")
print(journal())
lock(f, U, 201, 1)
print(journal())
lock(f, U, 100, 1)
print(journal())
os.write(f, b"x")
print(journal())
""").splitlines()  # fmt: skip
    held = ["attach", "write"]
    gone = [*held, "flush", "detach"]
    assert seen == [str(s) for s in ([], held, held, gone, [*gone, *held])]


def test_an_unlock_waits_for_the_detach_that_a_close_has_begun(mount: MountProcess) -> None:
    """QEMU lets go like this: it opens the file anew, closes the handle with the locks, unlocks."""
    seen = mount.python(LOCK + f"""
journal = lambda: [e.split()[0] for e in open({str(mount.journal_file)!r}) if "slow_m.raw" in e]
for turn in range(20):
    f = opened("slow_m.raw")
    lock(f, R, 100, 1)
    other = opened("slow_m.raw")
    os.write(f, b"x")
    os.close(f)
    lock(other, U, 100, 1)
    print(journal()[-1])
    os.close(other)
""").split()  # fmt: skip
    assert set(seen) == {"detach"}


def test_locks_on_a_file_held_elsewhere_fail_at_once(mount: MountProcess) -> None:
    assert mount.python(LOCK + """
f = opened("held.raw")
print(lock(f, W, 0, 10), lock(f, R, 0, 10), test(f, W, 0, 10) == W)
print(lock(f, R, 101, 1), test(f, W, 201, 1) == R, test(f, W, 200, 1) == U)
print(lock(os.open("held.raw", os.O_RDONLY), R, 0, 10))
""").split() == ["EAGAIN", "EAGAIN", "True", "locked", "True", "True", "locked"]  # fmt: skip


QEMU = "qemu-system-x86_64"
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}")


def qemu(name: str) -> list[str]:
    """A virtual machine that never runs, with a disk."""
    drive = f"file={name},format=raw,if=virtio,cache=none"
    return [QEMU, "-S", "-accel", "tcg", "-display", "none", "-monitor", "stdio", "-drive", drive]


@needs_qemu
def test_second_qemu_gets_qemus_own_message(mount: MountProcess) -> None:
    mount.ok("truncate", "-s", "1M", "qlock.raw")
    first = mount.popen(*qemu("qlock.raw"))
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write("info block\n")
    first.stdin.flush()
    # Answered when the disk is open; the banner comes before that.
    while "qlock.raw" not in (line := first.stdout.readline()) or "file" in line:
        assert line
    mount.fails('Failed to get "write" lock', *qemu("qlock.raw"))
    mount.ok("qemu-img", "info", "-U", "qlock.raw")
    first.communicate("quit\n", timeout=10)
    mount.ok("qemu-io", "-f", "raw", "qlock.raw", "-c", "write 0 4k")


@needs_qemu
def test_qemu_on_another_host_gets_the_same_message(mount: MountProcess) -> None:
    mount.fails('Failed to get "write" lock', *qemu("held.raw"))
    mount.ok("qemu-io", "-r", "-f", "raw", "held.raw", "-c", "read 0 4k")


def test_reading_process_can_be_killed_while_the_cluster_stalls(mount: MountProcess) -> None:
    reader = mount.spawn("f = open('stall.raw', 'rb', 0); print('go'); f.read(10)")
    assert reader.stdout is not None
    assert reader.stdout.readline() == "go\n"
    reader.kill()
    # The mount gives up on an interrupted request after 10 s.
    reader.communicate(timeout=20)
