"""Being a daemon: into the background when the mount works, logs, and systemd's readiness.

The fork comes before trio and etcd's threads start, for neither survives one.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
import syslog
from collections.abc import Iterator

from sheepfs.core.errors import SheepError, UsageError
from sheepfs.logs import TextFormatter, log_to
from sheepfs.service import notify

log = logging.getLogger(__name__)

_PRIORITIES = (
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
    (logging.NOTSET, syslog.LOG_DEBUG),
)
EXIT_FAILED, EXIT_USAGE = 1, 2


class SyslogHandler(logging.Handler):
    """Logs with syslog(3), which unlike logging's own handler does not mind a missing /dev/log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record."""
        try:
            priority = next(p for level, p in _PRIORITIES if record.levelno >= level)
            syslog.syslog(priority, self.format(record))
        except Exception:
            self.handleError(record)


def log_to_file(path: str, log_format: str, level: str) -> None:
    """Log to a file, which logrotate may move away. Raises OSError if it cannot be opened."""
    log_to(logging.handlers.WatchedFileHandler(path), log_format, level, TextFormatter())


def log_to_syslog(log_format: str, level: str) -> None:
    """Log to syslog or the journal, which know the time and how urgent it is."""
    syslog.openlog("sheepfs", syslog.LOG_PID, syslog.LOG_DAEMON)
    log_to(SyslogHandler(), log_format, level, TextFormatter(stamped=False, level=False))


def notify_systemd() -> None:
    """Tell systemd that the service is ready, if it asked for that (sd_notify(3))."""
    notify(f"READY=1\nMAINPID={os.getpid()}")


class Child:
    """The background process; its parent waits until it is ready or says why not."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Let the parent end with success, and leave the terminal."""
        notify_systemd()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        self._tell(b"\0")

    def failed(self, error: BaseException) -> None:
        """Let the parent end with an error; once ready, log it."""
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        if self._pipe >= 0:
            self._tell(bytes([code]) + str(error).encode(errors="replace"))
        elif isinstance(error, SheepError | OSError):
            log.error("%s", error)
        else:
            log.critical("the mount has failed", exc_info=error)

    def _tell(self, message: bytes) -> None:
        pipe, self._pipe = self._pipe, -1
        # The parent may have been killed meanwhile: nobody to tell, and the mount works.
        with contextlib.suppress(BrokenPipeError):
            os.write(pipe, message)
        os.close(pipe)


@contextlib.contextmanager
def daemonized(log_file: str | None, log_format: str, level: str) -> Iterator[Child]:
    """Fork: the body runs in the background process, the parent exits once that is ready.

    Raises:
        SystemExit: in the parent, with the status that the child gave.
        OSError: the log file cannot be opened.
    """
    if log_file:
        log_to_file(log_file, log_format, level)
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(theirs)
        raise SystemExit(_wait_for(pid, ours))
    os.close(ours)
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    child = Child(theirs)
    code = 0
    try:
        if not log_file:
            log_to_syslog(log_format, level)
        yield child
    except BaseException as error:
        code = EXIT_FAILED
        child.failed(error)
    finally:
        # Not sys.exit: what the parent has on its stack is not ours to unwind.
        logging.shutdown()
        os._exit(code)


def _wait_for(pid: int, pipe: int) -> int:
    """Wait for the child's word; give the exit status."""
    try:
        with open(pipe, "rb") as reader:
            message = reader.read()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        return EXIT_FAILED
    if not message:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(f"sheepfs: ended before the mount was ready (status {code})", file=sys.stderr)
        return EXIT_FAILED
    if message[0]:
        print(f"sheepfs: {message[1:].decode(errors='replace')}", file=sys.stderr)
    return message[0]
