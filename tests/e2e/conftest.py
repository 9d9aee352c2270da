"""Clusters for the end-to-end tests: real etcd, real daemons, a real mount.

`SHEEPFS_SOAK=1` runs the tests at the lengths that the project promises; without it they are cut
to fit into `tools/test`. Logs of a failed test are shown with its report and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.cluster import Mounted, missing_for_mount
from e2e.soak import SOAK
from sheepfs_tools.local.cluster import LocalCluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory is end-to-end, and comes last: the fast tests fail first."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.e2e)
    items[:] = [item for item in items if item not in ours] + ours


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Put the ends of the programs' logs into the report of a failed test."""
    report = yield
    if report is not None and report.failed:
        fixtures = getattr(item, "funcargs", {}).values()
        mounted = (getattr(fixture, "mounted", fixture) for fixture in fixtures)
        found = next((one for one in mounted if isinstance(one, Mounted)), None)
        cluster: LocalCluster | None = found.cluster if found else None
        for process in cluster.processes() if cluster else ():
            report.sections.append((f"log of {process.name}", process.last_words(60)))
    return report


@pytest.fixture(scope="session")
def soak() -> bool:
    """Whether to run at full length."""
    return SOAK


@pytest.fixture(scope="module")
def new_cluster(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], Mounted]]:
    """Give a function that starts another mounted cluster of three nodes."""
    if reason := missing_for_mount():
        pytest.skip(reason)
    started: list[Mounted] = []

    def new() -> Mounted:
        directory = tmp_path_factory.mktemp("cluster")
        mounted = Mounted(LocalCluster(directory / "data"), directory / "mnt")
        started.append(mounted)
        mounted.start()
        return mounted

    yield new
    for mounted in started:
        mounted.cluster.destroy()


@pytest.fixture(scope="module")
def shared_cluster(new_cluster: Callable[[], Mounted]) -> Mounted:
    """One cluster for all tests of a module; each test uses VDIs of its own."""
    return new_cluster()


@pytest.fixture
def mounted(shared_cluster: Mounted) -> Mounted:
    """The module's cluster, with everything running that an earlier test may have killed."""
    shared_cluster.start()
    return shared_cluster
