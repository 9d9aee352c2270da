"""Whether tests run at the lengths that the project promises, or cut to fit into `tools/test`."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

SOAK = os.environ.get("SHEEPFS_SOAK") == "1"
only_at_full_length = pytest.mark.skipif(not SOAK, reason="only with SHEEPFS_SOAK=1")


def always_or_at_full_length(always: Iterable[object], more: Iterable[object]) -> list[object]:
    """Give the values to parametrize with; `more` are skipped in a run that is cut."""
    return [*always, *(pytest.param(value, marks=only_at_full_length) for value in more)]
