"""The export of a cluster's metadata: damaged files are refused, numbers never go back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepfs.core.clustermap import ClusterMap
from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.metadata import (
    ClusterConfig,
    FencingRecord,
    NameRecord,
    NodeRecord,
    SnapshotRecord,
    TrashRecord,
    VdiRecord,
)
from sheepfs.core.metadata_export import Export, imported, named_maps

CLUSTER = "c" * 32
VDI = VdiRecord(7, 1 << 30, 3, 0x1013, 0x413, 0x413, generation=5, maps=1)
OLD = VdiRecord(8, 1 << 30, 3, 0x1213, 0x613, 0x613, generation=9)
KEYS = {
    "config": ClusterConfig(CLUSTER).encode(),
    "map": ClusterMap(40, CLUSTER).encoded,
    "nodes/1": NodeRecord(1, "u" * 32).encode(),
    "counters/node": b"1",
    "counters/vdi": b"9",
    "counters/layer": b"8",
    "vdis/vm1.raw": VDI.encode(),
    "vdi-names/7": NameRecord("vm1.raw").encode(),
    "snapshots/7/daily": SnapshotRecord(9, 7, 1 << 30, 3, 0xC13, 0x413).encode(),
    "trash/8": TrashRecord(8, "old.raw", "", 0x613, 1.0, 2.0, OLD.encode().decode()).encode(),
    "pools/3": b"",
}
EXPORT = Export(CLUSTER, "default", 1e9, 1234, KEYS)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=8), st.binary(max_size=20), max_size=5))
def test_an_export_comes_back_as_it_was_whatever_its_values_are(more: dict[str, bytes]) -> None:
    export = replace(EXPORT, keys=KEYS | {f"settings/{key}": more[key] for key in more})
    back = Export.decode(export.encode())
    assert back == export
    assert back.checksum == export.checksum


def test_an_altered_or_cut_file_is_refused() -> None:
    data = EXPORT.encode()
    for bad in (
        b"",
        b"{}",
        b"[]",
        data[:-20],
        data[: len(data) // 2],
        data.replace(b"1234", b"1235"),
    ):
        with pytest.raises(ProtocolError):
            Export.decode(bad)
    with pytest.raises(ProtocolError, match="altered"):
        Export.decode(data.replace(b"vm1.raw", b"vm2.raw"))
    with pytest.raises(ProtocolError, match="format 2"):
        Export.decode(data.replace(b'"format": 1,', b'"format": 2,'))


@pytest.mark.parametrize(
    "keys",
    [
        {"locks/7": b"x"},
        {"alive/1": b"x"},
        {"importing": b"x"},
        {"": b"x"},
        {"config": ClusterConfig("d" * 32).encode()},
        {"config": b"x"},
        {"map": ClusterMap(40, "d" * 32).encoded},
        {"map": b"x"},
        {"nodes/2": b"x"},
        {"counters/layer": b"-1"},
        {"fencing": b"x"},
    ],
)
def test_keys_that_no_whole_cluster_has_are_refused(keys: dict[str, bytes]) -> None:
    with pytest.raises(ProtocolError):
        Export.decode(replace(EXPORT, keys=KEYS | keys).encode())


def test_an_export_without_its_cluster_is_refused() -> None:
    keys = {key: value for key, value in KEYS.items() if key != "config"}
    with pytest.raises(ProtocolError, match="config"):
        Export.decode(replace(EXPORT, keys=keys).encode())


def test_everything_that_counts_goes_on_far_beyond_the_export() -> None:
    keys = imported(EXPORT)
    for what in ("node", "vdi", "layer"):
        assert int(keys[f"counters/{what}"]) >= int(KEYS[f"counters/{what}"]) + 1000
    assert ClusterMap.decode(keys["map"]).epoch > 40 + 1000
    fencing = FencingRecord.decode(keys["fencing"])
    assert fencing.base > 1234 + (1 << 32)
    assert fencing.generation > OLD.generation + 1000
    same = KEYS.keys() - {"counters/node", "counters/vdi", "counters/layer", "map"}
    assert {key: keys[key] for key in same} == {key: KEYS[key] for key in same}
    assert imported(Export.decode(EXPORT.encode())) == keys


def test_counters_that_were_never_used_go_on_too() -> None:
    fresh = {"config": KEYS["config"]}
    keys = imported(replace(EXPORT, keys=fresh))
    assert all(int(keys[f"counters/{what}"]) >= 1000 for what in ("node", "vdi", "layer"))


def test_a_second_import_goes_beyond_the_first() -> None:
    once = imported(EXPORT)
    twice = imported(replace(EXPORT, revision=10, keys=once))
    before, after = (FencingRecord.decode(keys["fencing"]) for keys in (once, twice))
    assert after.base > before.base + (1 << 32)
    assert after.generation > before.generation
    assert int(twice["counters/layer"]) > int(once["counters/layer"])


def test_numbers_that_run_out_are_an_error_and_do_not_wrap() -> None:
    for keys in (
        {"counters/layer": b"%d" % ((1 << 26) - 2)},
        {"fencing": FencingRecord(1, (1 << 24) - 2).encode()},
    ):
        with pytest.raises(UsageError, match="used up"):
            imported(replace(EXPORT, keys=KEYS | keys))


def test_names_of_vdis_snapshots_and_the_trash_are_found() -> None:
    named = named_maps(replace(EXPORT, keys=KEYS | {"vdis/bad.raw": b"{"}))
    assert [(one.name, one.trashed, one.map) for one in named] == [
        ("vm1.raw", False, 0x413),
        ("vm1@daily.raw", False, 0xC13),
        ("old.raw", True, 0x613),
    ]
    assert json.loads(EXPORT.encode())["keys"]["counters/vdi"] == "9"
