"""Errors out of nurseries as themselves.

A nursery wraps what its tasks raise in an ExceptionGroup; where the tasks are an implementation
detail (a connection's reader and writer), callers should see the plain error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the first error of a group that comes out of the block, instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
