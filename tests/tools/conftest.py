"""sheepctl for tests of its commands."""

from __future__ import annotations

import pytest

from fakes.etcd import FakeEtcd, FakeServer
from fakes.sheepctl_bench import Bench
from sheepfs_tools.sheepctl import session


@pytest.fixture
def sheepctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    server = FakeServer()
    monkeypatch.setattr(session, "Etcd", lambda _endpoint: FakeEtcd(server))
    return Bench(server, capsys.readouterr)
