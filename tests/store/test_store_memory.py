"""What the superblock and the catalog remember of the cluster's past."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_helpers import open_store, put
from xxhash import xxh3_64_hexdigest

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import DiskError, NoSpaceError
from sheepfs.core.geometry import data_object, make_layer, map_object
from storaged.store.objects import ObjectStore


@given(st.lists(st.integers(0, (1 << 63) - 1), max_size=8), st.none() | st.integers(1, 1 << 31))
def test_the_highest_epoch_is_kept(epochs: list[int], node: int | None) -> None:
    disk = FaultyDisk()
    store = open_store(disk)
    assert store.epoch == 0
    if node is not None:
        store.set_node_id(node)
    for number, epoch in enumerate(epochs, 1):
        store.set_epoch(epoch)
        assert store.epoch == max(epochs[:number])
    identity = store.uuid
    disk.power_cut(random.Random(0))
    again = open_store(disk)
    assert (again.uuid, again.node_id) == (identity, node)
    assert again.epoch == max(epochs, default=0)
    again.close()


def test_a_superblock_without_an_epoch_is_one_of_no_epoch(tmp_path: Path) -> None:
    store = ObjectStore.open(tmp_path, create=True)
    store.set_epoch(7)
    store.close()
    path = tmp_path / "sheepfs.json"
    fields = json.loads(path.read_text())
    assert fields.pop("epoch") == 7
    del fields["check"]
    fields["check"] = xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
    path.write_text(json.dumps(fields))
    store = ObjectStore.open(tmp_path)
    assert store.epoch == 0
    store.set_epoch(9)
    store.close()
    assert json.loads(path.read_text())["epoch"] == 9


def test_a_full_disk_keeps_the_former_epoch() -> None:
    disk = FaultyDisk()
    store = open_store(disk)
    store.set_epoch(7)
    disk.faults["pwrite"] = errno.ENOSPC
    with pytest.raises(NoSpaceError):
        store.set_epoch(8)
    disk.faults.clear()
    assert store.epoch == 7
    store.set_epoch(9)
    disk.faults["fdatasync"] = errno.EIO
    with pytest.raises(DiskError):
        store.set_epoch(10)


def test_the_last_layer_is_that_of_the_newest_object(tmp_path: Path) -> None:
    store = ObjectStore.open(tmp_path, create=True)
    assert store.last_layer == 0
    for serial in (9, 4, 12, 5):
        put(store, data_object(make_layer(serial, 63, 3), 5), 0, b"x", create=True)
    put(store, map_object(make_layer(8, 1, 3), 0), 0, b"x", create=True)
    assert store.last_layer == 12
    store.close()
    store = ObjectStore.open(tmp_path)
    assert store.last_layer == 12
    store.close()
