"""Replies to the kernel, written straight to the device."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from sheepfs.core.wire import Buffer
from sheepfs.fuse import protocol
from sheepfs.fuse.handles import code_of

log = logging.getLogger(__name__)


class Replies:
    """Sends replies; a request that must wait is answered from a task.

    Args:
        device: file descriptor of /dev/fuse.
        nursery: for the tasks.
    """

    def __init__(self, device: int, nursery: trio.Nursery) -> None:
        self.device = device
        self._nursery = nursery

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Write a reply to the kernel; False if the request is gone (interrupted, unmounted)."""
        try:
            os.writev(self.device, parts)
        except OSError as error:
            self.refused(error)
            return False
        return True

    def refused(self, error: OSError) -> None:
        """Tell a reply that came too late, which is normal, from one that was wrong."""
        # ENOENT: interrupted meanwhile, or a file that the kernel does not know. The others: the
        # mount is gone.
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EPERM):
            # A reply that the kernel refuses leaves a program hanging: that must be seen.
            log.error("the kernel refused a reply: %s", error)

    def fail(self, unique: int, code: int) -> bool:
        """Reply with errno `code`, or with success and nothing else if it is 0."""
        return self.send((protocol.encode_error(unique, code),))

    def changed(self, vdi: int) -> None:
        """Let the kernel forget a file's size and other attributes. Never waits.

        Written to the device and not through libfuse, whose socket a burst of these could fill.
        """
        self.send((protocol.encode_changed(vdi),))

    def finish(self, unique: int, code: int) -> None:
        """Reply with errno `code`; a `Done` callback once bound to the request's number."""
        self.fail(unique, code)

    def start(self, unique: int, work: Callable[[bytes], Awaitable[bytes]], raw: bytes) -> None:
        """Answer with the payload that `work(raw)` gives, or the errno it raises."""
        self._nursery.start_soon(self._answer, unique, work, raw)

    async def _answer(
        self, unique: int, work: Callable[[bytes], Awaitable[bytes]], raw: bytes
    ) -> None:
        try:
            payload = await work(raw)
        except OSError as error:
            self.fail(unique, error.errno or errno.EIO)
        except Exception as error:
            self.fail(unique, code_of(error, "request"))
        else:
            self.send((protocol.encode_reply(unique, payload),))
