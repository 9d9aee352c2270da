"""The mount against an oracle in memory: random operations of any alignment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Mounted
from e2e.oracle import Oracle
from e2e.soak import always_or_at_full_length


def operations(soak: bool) -> int:
    return 20_000 if soak else 1_500


@pytest.fixture
def local_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "oracle.raw"
    path.touch()
    yield path
    path.unlink()


@pytest.mark.parametrize("seed", always_or_at_full_length([1], [2, 3, 4, 5]))
def test_random_operations_on_the_mount_do_what_they_do_in_memory(
    mounted: Mounted, seed: int, soak: bool
) -> None:
    name = f"oracle{seed}"
    oracle = Oracle(mounted.create(name, "1M"), seed)
    oracle.run(operations(soak))
    oracle.close()
    mounted.assert_replicas_agree(name)


def test_random_direct_operations_on_the_mount_do_what_they_do_in_memory(
    mounted: Mounted, soak: bool
) -> None:
    oracle = Oracle(mounted.create("direct", "1M"), 6, direct=True)
    oracle.run(operations(soak))
    oracle.close()
    mounted.assert_replicas_agree("direct")


def test_the_oracle_agrees_with_a_local_file_system(local_file: Path) -> None:
    oracle = Oracle(local_file, 7)
    oracle.run(1_000)
    oracle.close()
