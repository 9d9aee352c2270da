"""Fixtures that tests of several layers use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from fakes.etcd import FakeEtcd
from fakes.etcd_process import EtcdProcess


@pytest.fixture
def fake_etcd() -> FakeEtcd:
    """A client of an etcd in memory; `fake_etcd.server.client()` gives others."""
    return FakeEtcd()


@pytest.fixture(scope="session")
def etcd_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """One real etcd for the whole run: tests keep to keys of their own and leave it running."""
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    process = EtcdProcess(tmp_path_factory.mktemp("etcd"))
    process.start()
    yield process
    process.stop()
