"""`sheepctl metadata accept`: what it says, asks and refuses."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pytest
import trio

from fakes.etcd import FakeEtcd
from fakes.sheepctl_bench import CLUSTER, Bench, Done
from fakes.snapshot_taker import KEYS
from sheepfs.core.clustermap import ClusterMap, Node, NodeState
from sheepfs.core.geometry import data_object, make_layer
from sheepfs.core.kv import Put, Transaction
from sheepfs.core.metadata import AliveRecord, ClusterConfig, FencingRecord
from sheepfs.core.metadata_export import EPOCH_GAP, ID_GAPS
from storaged.store.objects import ObjectStore


@pytest.fixture(autouse=True)
def one_node(sheepctl: Bench) -> None:
    """Nobody listens at it."""
    node = Node(1, NodeState.ACTIVE, "127.0.0.1:1", 5, "z", 9.0)
    sheepctl.put(KEYS.map, ClusterMap(7, CLUSTER, {1: node}).encoded)
    sheepctl.put(KEYS.counter("layer"), b"40")


def accept(sheepctl: Bench, *words: str | Path) -> Done:
    return sheepctl("metadata accept", *map(str, words))


def is_accepted(sheepctl: Bench) -> bool:
    return KEYS.fencing in sheepctl.server.keys


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A data directory that has seen more."""
    store = ObjectStore.open(tmp_path / "disk", cluster=CLUSTER, create=True)
    oid = data_object(make_layer(41, 1, 3), 0)
    store.mark([oid])
    store.write(oid, 0, b"x", 1, create=True, pool=3, pg=0)
    store.set_token(9, 500)
    store.set_epoch(8)
    store.close()
    return tmp_path / "disk"


class Terminal:
    """Somebody who can be asked."""

    def isatty(self) -> bool:
        return True


def test_without_an_answer_nothing_is_accepted(sheepctl: Bench) -> None:
    done = accept(sheepctl)
    assert done.code == 2
    assert "as of its revision 4: 0 VDIs, epoch 7" in done.out
    assert "have no name any\nmore" in done.out
    assert "With --data DIR" in done.out
    assert "add --yes" in done.err
    assert accept(sheepctl, "--json") == (
        2,
        "",
        "sheepctl: nothing was accepted: with --json, add --yes\n",
    )
    assert not is_accepted(sheepctl)


@pytest.mark.parametrize("answer", ["yes", "y", ""])
def test_only_yes_is_yes(sheepctl: Bench, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda prompt: answer)
    done = accept(sheepctl)
    assert (done.code, is_accepted(sheepctl)) == ((0, True) if answer == "yes" else (1, False))
    assert ("start all mounts anew" in done.out) == is_accepted(sheepctl)


def test_accepted_numbers_go_on_far_beyond(sheepctl: Bench) -> None:
    done = accept(sheepctl, "--yes", "--json")
    assert json.loads(done.out) == {
        "cluster": CLUSTER,
        "name": "test",
        "revision": 4,
        "epoch": 7 + EPOCH_GAP,
        "reasons": [],
    }
    keys = sheepctl.server.keys
    assert keys[KEYS.counter("layer")].value == b"%d" % (40 + ID_GAPS["layer"])
    assert ClusterMap.decode(keys[KEYS.map].value).epoch == 7 + EPOCH_GAP
    assert FencingRecord.decode(keys[KEYS.fencing].value).base > 500


def test_what_directories_know_of_is_told(sheepctl: Bench, disk: Path) -> None:
    done = accept(sheepctl, "--data", disk)
    assert "VDIs were attached later (id 9)" in done.out
    assert "VDIs or snapshots were made later" in done.out
    assert "the cluster map changed later, up to epoch 8" in done.out
    assert "Rescue that first" in done.out
    assert not is_accepted(sheepctl)
    told = json.loads(accept(sheepctl, "--data", disk, "--yes", "--json").out)
    assert len(told["reasons"]) == 3
    assert "of nothing that etcd does not" in accept(sheepctl, "--data", disk).out


def test_a_directory_of_another_cluster_is_refused(sheepctl: Bench, disk: Path) -> None:
    sheepctl.put(KEYS.config, ClusterConfig("cd" * 16).encode())
    sheepctl.put(KEYS.map, ClusterMap(7, "cd" * 16).encoded)
    done = accept(sheepctl, "--data", disk, "--yes")
    assert done.code == 2
    assert f"is of cluster {CLUSTER}" in done.err
    assert not is_accepted(sheepctl)


def test_a_daemon_that_runs_has_to_be_stopped(sheepctl: Bench) -> None:
    alive = AliveRecord(1, 5, "127.0.0.1:1", "z", 1.0)

    async def announce() -> None:
        etcd = FakeEtcd(sheepctl.server)
        lease = await etcd.grant(1 << 60)  # Each run of trio has a clock of its own.
        await etcd.commit(Transaction([], [Put(KEYS.alive_node(1), alive.encode(), lease)]))

    trio.run(announce)
    done = accept(sheepctl, "--yes")
    assert done.code == 2
    assert "run (node 1): stop all of them" in done.err
    assert not is_accepted(sheepctl)
