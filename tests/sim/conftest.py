"""The seeds run beside all other tests: these wait more than they work."""

from __future__ import annotations

import pytest

from sim.running import Seeds

NAME = "test_no_seed_finds_a_violation"
_seeds: list[Seeds] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the seeds, and ask what they found when all other tests are done."""
    last = [item for item in items if item.name == NAME]
    if last and not config.option.collectonly:
        items[:] = [item for item in items if item.name != NAME] + last
        _seeds.append(Seeds())


@pytest.fixture
def seeds() -> Seeds:
    """The run of all seeds, under way since the beginning."""
    return _seeds[0]


def pytest_sessionfinish() -> None:
    """End it with the tests, should they end before it."""
    while _seeds:
        _seeds.pop().end()
