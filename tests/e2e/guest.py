"""A guest for QEMU: Debian's cloud kernel, busybox, and a script that writes or verifies a disk.

`tools/test` unpacks the kernel into .cache/guest-kernel; nothing of it is installed.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
KERNEL_DIRECTORY = REPOSITORY / ".cache" / "guest-kernel"
MODULES = ("virtio_pci", "virtio_blk", "ext4")
PROGRAMS = ("mkfs.ext4", "e2fsck", "sqlite3")
PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
DRIVE = "cache=none,discard=unmap,detect-zeroes=unmap"
OPTIONS = "console=ttyS0 quiet panic=-1 no_timer_check"
"""On a busy machine the emulated timer may tick so late that the kernel thinks it is broken."""
DONE = "GUEST-DONE"
"""Printed on the console when every step succeeded."""

INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
fail() { echo "GUEST-FAILED: $*"; poweroff -f; }
# What row n holds, in SQL: its number, with up to 3,200 zeros before it.
payload="printf('%0*d', 200 + n * 37 % 3000, n)"
# One commit after the other into database $1, in journal mode $1 with `synchronous` $2; each is
# told once it is durable.
commit() {
    i=$(sqlite3 /mnt/$1.db "SELECT n + 1 FROM last") || fail "read $1"
    {
        echo "PRAGMA journal_mode=$1; PRAGMA synchronous=$2; PRAGMA wal_autocheckpoint=30;"
        while :; do
            echo "BEGIN; INSERT INTO rows SELECT n, $payload FROM (SELECT $i AS n);"
            echo "UPDATE last SET n = $i; COMMIT; SELECT 'COMMITTED $1 $i';"
            i=$((i + 1))
        done
    } | sqlite3 -bail /mnt/$1.db
    echo "ENDED $1"
}
test -b /dev/vda || fail "no /dev/vda"
files=$(sed -n 's/.*files=\([0-9]*\).*/\1/p' /proc/cmdline)
case $(cat /proc/cmdline) in
*task=write*)
    mkfs.ext4 -q -F /dev/vda || fail mkfs
    mount -t ext4 /dev/vda /mnt || fail mount
    for i in $(seq ${files:-20}); do
        dd if=/dev/urandom of=/mnt/file$i bs=1M count=10 2>/dev/null || fail "write $i"
    done
    (cd /mnt && md5sum file* >sums) || fail md5sum
    sync || fail sync
    ;;
*task=verify*)
    mount -t ext4 -o ro /dev/vda /mnt || fail mount
    (cd /mnt && test $(wc -l <sums) = ${files:-20} && md5sum -c sums) || fail "checksums differ"
    ;;
*task=format*)
    mkfs.ext4 -q -F /dev/vda || fail mkfs
    mount -t ext4 /dev/vda /mnt || fail mount
    # As on the disk of a system, there is something that stays.
    dd if=/dev/urandom of=/mnt/kept bs=1M count=20 2>/dev/null || fail "write"
    ;;
*task=fill*)
    mount -t ext4 /dev/vda /mnt || fail mount
    megabytes=$(sed -n 's/.*fill=\([0-9]*\).*/\1/p' /proc/cmdline)
    dd if=/dev/urandom of=/mnt/big bs=1M count=$megabytes 2>/dev/null || fail "fill"
    ;;
*task=trim*)
    mount -t ext4 /dev/vda /mnt || fail mount
    rm /mnt/big && sync || fail "delete"
    fstrim -v /mnt || fail fstrim
    ;;
*task=commit*)
    case $(cat /proc/cmdline) in *new*) mkfs.ext4 -q -F /dev/vda || fail mkfs ;; esac
    # A guest that met an error marks its file system; from then on the kernel drops what was
    # deleted and still open, and leaves that to e2fsck, which the start of every system runs.
    case $(cat /proc/cmdline) in *mend*) e2fsck -f -p /dev/vda; test $? -le 1 || fail mend ;; esac
    # The journal is replayed by the kernel; after that there is nothing to mend.
    mount -t ext4 /dev/vda /mnt && umount /mnt || fail "mount to replay"
    e2fsck -f -n /dev/vda || fail e2fsck
    mount -t ext4 -o discard,errors=remount-ro /dev/vda /mnt || fail mount
    for name in wal truncate delete; do
        sqlite3 /mnt/$name.db "CREATE TABLE IF NOT EXISTS rows(n INTEGER PRIMARY KEY, payload);
            CREATE TABLE IF NOT EXISTS last(n);
            INSERT INTO last SELECT 0 WHERE NOT EXISTS (SELECT * FROM last);" || fail "make $name"
        found=$(sqlite3 -separator ' ' /mnt/$name.db "PRAGMA integrity_check;
            SELECT (SELECT n FROM last), count(*), coalesce(max(n), 0),
            count(CASE WHEN payload <> $payload THEN 1 END) FROM rows;") || fail "read $name"
        echo "FOUND $name" $found
    done
    commit wal full &
    commit truncate full &
    commit delete extra &
    wait
    while :; do sleep 60; done
    ;;
esac
umount /mnt || fail umount
e2fsck -f -n /dev/vda || fail e2fsck
sync
echo GUEST-DONE
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """Kernel and initramfs, ready to boot."""

    kernel: Path
    initramfs: Path

    def run(self, disk: Path, task: str, timeout_s: float = 300) -> str:
        """Boot with `disk` as /dev/vda, do a task of `INIT`, and give the console's text.

        What the guest discards is given back to the disk.

        Raises:
            subprocess.TimeoutExpired: the guest neither finished nor failed in time.
        """
        done = subprocess.run(
            self._argv(disk, task),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        return done.stdout.decode(errors="replace")

    def boot(self, disk: Path, task: str, console: Path, *options: str) -> subprocess.Popen[bytes]:
        """Boot with `disk` as /dev/vda, to do a task of `INIT`; the console goes to a file."""
        with console.open("wb") as log:
            return subprocess.Popen(
                [*self._argv(disk, task), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _argv(self, disk: Path, task: str) -> list[str]:
        return [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-m", "512", "-nodefaults"),
            *("-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", f"{OPTIONS} task={task}"),
            *("-drive", f"file={disk},format=raw,if=virtio,{DRIVE}"),
        ]


def control(socket_path: Path, command: str, **arguments: Any) -> Any:
    """Run a command of QEMU's monitor (QMP), on a socket of `-qmp unix:PATH,server=on,wait=off`.

    An argument `max_bandwidth` is QEMU's `max-bandwidth`.

    Raises:
        OSError: QEMU is gone.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(socket_path))
        with connection.makefile("rw") as stream:
            stream.readline()  # The greeting.
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            for execute, given in (("qmp_capabilities", {}), (command, named)):
                stream.write(json.dumps({"execute": execute, "arguments": given}) + "\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline() or "null") or {}):
                    if "event" not in answer:
                        raise ConnectionError(f"QEMU to {execute}: {answer}")
    return answer["return"]


def missing_for_guest() -> str:
    """Say why no guest can be run here; empty when it can."""
    for program in ("qemu-system-x86_64", "cpio", *PROGRAMS):
        if shutil.which(program, path=PATH) is None:
            return f"{program} is not installed"
    return "" if kernel_image() else "no guest kernel: tools/test fetches it"


def kernel_image() -> Path | None:
    """Give the unpacked kernel, or None if tools/test has not fetched it."""
    return next(iter(sorted(KERNEL_DIRECTORY.glob("boot/vmlinuz-*"))), None)


def module_closure(names: Iterable[str]) -> list[Path]:
    """Give module files with what they depend on, dependencies first; built-in ones left out."""
    files = {
        path.name.partition(".")[0].replace("-", "_"): path
        for path in KERNEL_DIRECTORY.rglob("*.ko*")
    }
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in ordered:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", read_module(path))
        for dependency in found[1].decode().split(",") if found else []:
            add(dependency)
        ordered.append(path)

    for name in names:
        add(name)
    return ordered


def read_module(path: Path) -> bytes:
    """Give a module's bytes; Debian 13 compresses them."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    return path.read_bytes()


def libraries(program: str) -> list[Path]:
    """Give the shared libraries that a program of this machine needs, its loader included."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+)", listed)]


def build_guest(directory: Path) -> Guest:
    """Make the initramfs below `directory`."""
    kernel = kernel_image()
    if kernel is None:
        raise FileNotFoundError(f"no kernel in {KERNEL_DIRECTORY}: run tools/test once")
    root = directory / "root"
    for name in ("bin", "proc", "sys", "dev", "mnt", "modules", "etc"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "mtab").symlink_to("/proc/mounts")
    busybox = shutil.which("busybox") or "/bin/busybox"
    shutil.copy(busybox, root / "bin" / "busybox")
    init = root / "init"
    init.write_text(INIT)
    init.chmod(init.stat().st_mode | stat.S_IXUSR)
    for name in PROGRAMS:
        program = shutil.which(name, path=PATH)
        if program is None:
            raise FileNotFoundError(f"{name} is not installed")
        shutil.copy(program, root / "bin" / name)
        for library in libraries(program):
            place = root / str(library).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    modules = module_closure(MODULES)
    for path in modules:
        (root / "modules" / f"{path.name.partition('.')[0]}.ko").write_bytes(read_module(path))
    order = "\n".join(f"{path.name.partition('.')[0]}.ko" for path in modules)
    (root / "modules" / "order").write_text(order + "\n")
    initramfs = directory / "initramfs.cpio.gz"
    names = "\n".join(str(path.relative_to(root)) for path in [*sorted(root.rglob("*"))])
    packed = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        cwd=root,
        input=names.encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout

    initramfs.write_bytes(gzip.compress(packed, 1))
    shutil.rmtree(root)
    return Guest(kernel, initramfs)
