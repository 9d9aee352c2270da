"""The blocking end of a watch: one gRPC stream in a worker thread, from connect to failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import trio

OpenStream = Callable[[Iterator[Any]], Any]
"""Connect and open the stream that sends these requests. Raises grpc.RpcError, ValueError."""


class WatchStream:
    """One watch on one etcd member. Build it in trio; `run` blocks in a thread.

    Args:
        request: What asks etcd for the watch.
        hint: Called in trio once the watch stands and at each change.
    """

    def __init__(self, open_stream: OpenStream, request: Any, hint: Callable[[], None]) -> None:
        self.was_created = False
        self.failure = "the stream ended"
        self._open_stream = open_stream
        self._request = request
        self._hint = hint
        self._trio = trio.lowlevel.current_trio_token()
        self._stopped = threading.Event()
        self._call: Any = None

    def run(self) -> None:
        """Give hints until the stream breaks (`failure` says why) or `stop` is called."""
        try:
            self._call = self._open_stream(self._requests())
            if self._stopped.is_set():  # stop() ran before there was a call to cancel
                self._call.cancel()
            for reply in self._call:
                if reply.canceled:
                    self.failure = reply.cancel_reason or "etcd cancelled the watch"
                    return
                self.was_created = True
                self._trio.run_sync_soon(self._hint, idempotent=True)
        except grpc.RpcError as error:
            self.failure = reason_of(error)
        except ValueError as error:  # grpc: the channel was closed
            self.failure = str(error)
        except trio.RunFinishedError:
            return
        finally:
            self.stop()

    def stop(self) -> None:
        """End the stream and its threads; from any thread, any number of times."""
        self._stopped.set()
        if self._call is not None:
            self._call.cancel()

    def _requests(self) -> Iterator[Any]:
        """Requests of the stream; it stays open, since etcd ends a watch at our half-close."""
        yield self._request
        self._stopped.wait()


def reason_of(error: grpc.RpcError) -> str:
    """Give what gRPC says about a failure, for a message."""
    return error.details() or str(error.code())
