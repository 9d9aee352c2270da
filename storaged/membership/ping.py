"""Asking a daemon whether a given run of it is still there."""

from __future__ import annotations

import secrets

from sheepfs.core.errors import ProtocolError, SheepError, UnreachableError, WrongClusterError
from sheepfs.net.connection import connect
from sheepfs.net.transport import TCP, Network

_GIVE_UP_S = 30.0
"""The caller's deadline comes first; this only keeps a forgotten call from lasting for ever."""


async def ping(address: str, incarnation: int, cluster: str, network: Network = TCP) -> bool:
    """Tell whether the daemon at `address` (host:port) is the run `incarnation`.

    Returns:
        True if it answers as that run; False if that run is certainly over: nobody listens there,
        or somebody else does.

    Raises:
        UnreachableError: inconclusive (no route, a connection reset twice, no answer in 30 s).
            The network or an overloaded daemon may be why.
    """
    for attempt in range(2):
        try:
            connection, greeting = await connect(
                address,
                cluster,
                f"ping-{secrets.token_hex(8)}",
                timeout_s=_GIVE_UP_S,
                network=network,
            )
        except (ProtocolError, WrongClusterError):
            return False
        except UnreachableError as error:
            if _is_caused_by(error, ConnectionRefusedError):
                return False
            # A daemon that is being killed resets what waits in its backlog, then refuses; one
            # that has too many connections resets too.
            if attempt or not _is_caused_by(error, ConnectionResetError):
                raise
        except SheepError as error:
            raise UnreachableError(f"no answer to a ping: {error}") from error
        else:
            connection.close()
            return bool(greeting["incarnation"] == incarnation)
    raise AssertionError("unreachable: the second attempt returns or raises")


def _is_caused_by(error: BaseException | None, kind: type[OSError]) -> bool:
    """Look for `kind` behind an error (trio groups one for each address that it tried)."""
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            return all(_is_caused_by(inner, kind) for inner in error.exceptions)
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False
