"""Copy virtual disks (or any files), sharing their data where possible: the program `sheep-cp`.

It speaks like cp(1). What differs: holes stay holes always, copies are on stable storage when it
returns, nothing half-made is left behind, and a target that a program has locked, as QEMU locks
the disk of a running machine on any host, is not overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from sheepfs.core.names import split_name
from sheepfs_tools.transfer import file_copy

_PRESERVE = ("mode", "ownership", "timestamps", "links", "context", "xattr", "all")
_BY_DEFAULT = "mode,ownership,timestamps"
_UNLINK_TRIES = 20
_UNLINK_PAUSE_S = 0.1
_REPLACEABLE = frozenset({errno.EACCES, errno.EPERM, errno.ETXTBSY})
"""Why opening a target may fail for -f to remove it first. A snapshot (EROFS) is not removed."""


class CopyError(Exception):
    """The text says what cannot be copied and why."""


class Terminated(BaseException):
    """A signal ends the program; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def quote(name: str) -> str:
    """Quote a file name in a message as cp does."""
    if "'" in name and not any(c in name for c in '"$`\\'):
        return f'"{name}"'
    return "'" + name.replace("'", "'\\''") + "'"


def _why(error: OSError) -> str:
    return error.strerror or str(error)


class Copier:
    """Copies files one by one, as the command line says."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._made: set[tuple[int, int]] = set()
        """Device and inode of what was made or overwritten in this run."""
        self.incomplete = False
        """Attributes of a copy could not be kept."""

    def copy(self, source: str, target: str) -> None:
        """Copy `source` to the file `target`, unless an option says to skip it.

        Raises:
            CopyError: it cannot be done.
        """
        try:
            status = os.stat(source)
        except OSError as error:
            raise CopyError(f"cannot stat {quote(source)}: {_why(error)}") from error
        if stat.S_ISDIR(status.st_mode):
            raise CopyError(f"-r not specified; omitting directory {quote(source)}")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise CopyError(f"{quote(source)} is neither a file nor a disk")
        try:
            old: os.stat_result | None = os.stat(target)
        except FileNotFoundError:
            old = None
        except OSError as error:
            raise CopyError(f"cannot stat {quote(target)}: {_why(error)}") from error
        if old is None or self._may_overwrite(source, status, target, old):
            try:
                source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CopyError(
                    f"cannot open {quote(source)} for reading: {_why(error)}"
                ) from error
            try:
                self._copy_open(source, source_fd, target, exists=old is not None)
            finally:
                os.close(source_fd)

    def _may_overwrite(
        self, source: str, status: os.stat_result, target: str, old: os.stat_result
    ) -> bool:
        if os.path.samestat(status, old):
            raise CopyError(f"{quote(source)} and {quote(target)} are the same file")
        if stat.S_ISDIR(old.st_mode):
            raise CopyError(f"cannot overwrite directory {quote(target)} with non-directory")
        if not stat.S_ISREG(old.st_mode):
            raise CopyError(f"{quote(target)} is no regular file")
        if (old.st_dev, old.st_ino) in self._made:
            raise CopyError(f"will not overwrite just-created {quote(target)} with {quote(source)}")
        options = self._options
        if options.no_clobber or (options.update and old.st_mtime_ns >= status.st_mtime_ns):
            return False
        if options.interactive:
            print(f"sheep-cp: overwrite {quote(target)}? ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        return True

    def _copy_open(self, source: str, source_fd: int, target: str, *, exists: bool) -> None:
        status = os.fstat(source_fd)
        try:
            size = os.lseek(source_fd, 0, os.SEEK_END)
        except OSError as error:
            raise CopyError(f"cannot find the end of {quote(source)}: {_why(error)}") from error
        target_fd, created = self._open_target(target, self._mode(source_fd, status), exists)
        finished = False
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, target_fd)
                if not created:
                    _lock(target, target_fd)
                if self._options.verbose:
                    print(f"{quote(source)} -> {quote(target)}", flush=True)
                options = self._options
                title = os.path.basename(target)
                file_copy.fill(source_fd, target_fd, size, options.reflink, title, options.quiet)
                self._preserve(source_fd, status, target_fd, target)
                os.fsync(target_fd)
                made = os.fstat(target_fd)
                self._made.add((made.st_dev, made.st_ino))
            finished = True
        except file_copy.CloneError as error:
            raise CopyError(
                f"failed to clone {quote(target)} from {quote(source)}: {_why(error)}"
            ) from error
        except file_copy.ReadError as error:
            raise CopyError(f"error reading {quote(source)}: {_why(error)}") from error
        except OSError as error:
            raise CopyError(f"error writing {quote(target)}: {_why(error)}") from error
        finally:
            if created and not finished:
                _remove(target)

    def _mode(self, source_fd: int, status: os.stat_result) -> int:
        """Give the mode of a new file, from which the umask is taken as always."""
        if not stat.S_ISREG(status.st_mode):
            return 0o644
        mode = stat.S_IMODE(status.st_mode) & 0o777
        name = os.path.basename(os.readlink(f"/proc/self/fd/{source_fd}"))
        if split_name(name)[1] and file_copy.is_on_sheepfs(source_fd):
            # A snapshot has no write bits; what is made of one is to be used.
            mode |= stat.S_IWUSR
        return mode

    def _open_target(self, target: str, mode: int, exists: bool) -> tuple[int, bool]:
        """Open or make the target; tell whether it was made."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        if exists:
            try:
                return os.open(target, flags), False
            except OSError as error:
                if not self._options.force or error.errno not in _REPLACEABLE:
                    raise CopyError(
                        f"cannot create regular file {quote(target)}: {_why(error)}"
                    ) from error
            try:
                os.unlink(target)
            except OSError as error:
                raise CopyError(f"cannot remove {quote(target)}: {_why(error)}") from error
        try:
            if target.endswith("/"):
                # A missing directory: open(2) would say that it is one.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return os.open(target, flags | os.O_CREAT | os.O_EXCL, mode), True
        except OSError as error:
            raise CopyError(f"cannot create regular file {quote(target)}: {_why(error)}") from error

    def _preserve(
        self, source_fd: int, status: os.stat_result, target_fd: int, target: str
    ) -> None:
        wanted = set(self._options.preserve)
        everything = "all" in wanted

        def keep(what: str) -> bool:
            return everything or what in wanted

        try:
            if keep("ownership"):
                # As with cp, others than root cannot give files away, and need not.
                with contextlib.suppress(PermissionError):
                    os.fchown(target_fd, status.st_uid, status.st_gid)
            if keep("mode") and stat.S_ISREG(status.st_mode):
                os.fchmod(target_fd, stat.S_IMODE(status.st_mode))
            if keep("xattr"):
                _copy_attributes(source_fd, target_fd, must="xattr" in wanted)
            if keep("timestamps"):
                os.utime(target_fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        except OSError as error:
            # The data is worth keeping all the same.
            print(
                f"sheep-cp: preserving attributes of {quote(target)}: {_why(error)}",
                file=sys.stderr,
            )
            self.incomplete = True


def _copy_attributes(source_fd: int, target_fd: int, *, must: bool) -> None:
    try:
        for name in os.listxattr(source_fd):
            if name.startswith("user."):
                os.setxattr(target_fd, name, os.getxattr(source_fd, name))
    except OSError as error:
        if must or error.errno != errno.EOPNOTSUPP:
            raise


def _lock(target: str, fd: int) -> None:
    """Make sure that no program, such as a virtual machine, has the target locked."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise CopyError(f"{quote(target)} is in use: a program has locked it") from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _remove(target: str) -> None:
    """Remove a target that was not finished, also from a mount that has yet to see it closed."""
    for _ in range(_UNLINK_TRIES):
        try:
            os.unlink(target)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                print(f"sheep-cp: cannot remove {quote(target)}: {_why(error)}", file=sys.stderr)
                return
            time.sleep(_UNLINK_PAUSE_S)
        else:
            return


# -- command line -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"sheep-cp: {message}", file=sys.stderr)
        print("Try 'sheep-cp --help' for more information.", file=sys.stderr)
        raise SystemExit(1)


def _preserve_list(text: str) -> list[str]:
    parts = text.split(",")
    for part in parts:
        if part not in _PRESERVE:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(_PRESERVE)}")
    return parts


def parser() -> argparse.ArgumentParser:
    """Give the command line."""
    result = _Parser(
        prog="sheep-cp",
        usage="sheep-cp [OPTION]... SOURCE... TARGET\n"
        "       sheep-cp [OPTION]... -t DIRECTORY SOURCE...",
        description="Copy virtual disks, or any files. Within a sheepfs mount the copy shares its"
        " data with the source and is made at once, whatever its size; elsewhere data is copied"
        " and holes stay holes. Copies are on stable storage when the program returns.",
        epilog="examples: sheep-cp ~/debian-12.raw /mnt/vdis/vm2.raw;"
        " sheep-cp --reflink=always vm1@daily.raw vm3.raw",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("files", nargs="*", metavar="FILE", help="files or block devices, and the target")
    add("-a", "--archive", action="store_true", help="same as --preserve=all")
    add("-f", "--force", action="store_true", help="remove a target that cannot be opened")
    add("-i", "--interactive", action="store_true", help="ask before overwriting")
    add("-n", "--no-clobber", action="store_true", help="skip existing targets")
    add("-p", action="store_true", help=f"same as --preserve={_BY_DEFAULT}")
    add(
        "--preserve", type=_preserve_list, default=[], metavar="LIST",
        help=f"keep these attributes ({_BY_DEFAULT} without LIST): {', '.join(_PRESERVE)}",
    )  # fmt: skip
    add("-q", "--quiet", action="store_true", help="no progress bar")
    add(
        "--reflink", choices=("auto", "always", "never"), default="auto",
        help="share data with the source: auto, where possible; always (also without a value),"
        " or fail; never, copy the bytes",
    )  # fmt: skip
    add("--sparse", choices=("auto", "always"), help="nothing to choose: holes stay holes always")
    add("-t", "--target-directory", metavar="DIRECTORY", help="copy all files into DIRECTORY")
    add("-T", "--no-target-directory", action="store_true", help="take TARGET for a file")
    add("-u", "--update", action="store_true", help="copy only what is newer than its target")
    add("-v", "--verbose", action="store_true", help="say what is done")
    return result


_ALONE = {"--reflink": "--reflink=always", "--preserve": f"--preserve={_BY_DEFAULT}"}
"""Options that take a value with `=` alone, and what they mean without."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises SystemExit with status 1, as cp."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = [_ALONE.get(a, a) for a in arguments[:end]]
    options = parser().parse_args([*given, *arguments[end:]])
    if options.archive:
        options.preserve = [*options.preserve, "all"]
    if options.p:
        options.preserve = [*options.preserve, *_BY_DEFAULT.split(",")]
    return options


def targets(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Pair each source with its target file. Raises CopyError, or SystemExit for wrong usage."""
    files: list[str] = options.files
    usage = parser().error
    if not files:
        usage("missing file operand")
    directory: str | None = options.target_directory
    if directory is not None:
        if options.no_target_directory:
            raise CopyError("cannot combine --target-directory (-t) and --no-target-directory (-T)")
        _check_directory(directory, f"target directory {quote(directory)}")
        sources = files
    else:
        *sources, last = files
        if not sources:
            usage(f"missing destination file operand after {quote(last)}")
        if options.no_target_directory:
            if len(sources) > 1:
                usage(f"extra operand {quote(last)}")
            return [(sources[0], last)]
        if len(sources) == 1 and not os.path.isdir(last):
            return [(sources[0], last)]
        _check_directory(last, f"target {quote(last)}")
        directory = last
    return [(s, os.path.join(directory, os.path.basename(s.rstrip("/")))) for s in sources]


def _check_directory(path: str, what: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise CopyError(f"{what}: {os.strerror(errno.ENOTDIR)}")
    except OSError as error:
        raise CopyError(f"{what}: {_why(error)}") from error


def _terminate(number: int, _frame: object) -> NoReturn:
    raise Terminated(number)


def main() -> int:
    """Entry point. Exit codes: 0 all copied (or skipped as told), 1 failed, 128 + signal."""
    options = parse(sys.argv[1:])
    before = {number: signal.signal(number, _terminate)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # fmt: skip
    code = 0
    try:
        copier = Copier(options)
        for source, target in targets(options):
            try:
                copier.copy(source, target)
            except CopyError as error:
                print(f"sheep-cp: {error}", file=sys.stderr)
                code = 1
        code = code or int(copier.incomplete)
    except CopyError as error:
        print(f"sheep-cp: {error}", file=sys.stderr)
        code = 1
    except Terminated as error:
        print("\nsheep-cp: interrupted", file=sys.stderr)
        code = 128 + error.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


if __name__ == "__main__":
    sys.exit(main())
