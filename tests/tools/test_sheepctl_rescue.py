"""`sheepctl inspect` and `sheepctl rescue` on data directories that were made without a cluster."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sheepfs.core.errors import UsageError
from sheepfs.core.geometry import (
    BLOCK_SIZE,
    OBJECT_SIZE,
    data_object,
    format_oid,
    make_layer,
    map_object,
)
from sheepfs.core.metadata import (
    ClusterConfig,
    FencingRecord,
    NameRecord,
    SnapshotRecord,
    VdiRecord,
)
from sheepfs.core.metadata_export import Export
from sheepfs_tools.sheepctl.__main__ import main
from sheepfs_tools.sheepctl.analysis.export_age import refuse_older
from sheepfs_tools.sheepctl.commands import rescue as sheepctl_rescue
from storaged.store.objects import ObjectStore
from storaged.store.offline import OfflineDirectory
from storaged.store.salvage import Salvage

CLUSTER = "c" * 32
MAP = make_layer(4, 1, 3)
SNAPSHOT_MAP = make_layer(6, 1, 3)
OPEN = make_layer(5, 1, 3)
FROZEN = make_layer(3, 1, 3)
SIZE = 5 * OBJECT_SIZE + 1000
OWNERS = {0: FROZEN, 1: OPEN, 3: FROZEN, 5: OPEN}
CONTENT = {index: bytes([index + 1]) * (3 * BLOCK_SIZE + 10) for index in OWNERS}


def make(path: Path, objects: dict[int, bytes]) -> None:
    store = ObjectStore.open(path, cluster=CLUSTER, create=True)
    store.set_node_id(1)
    for number, (oid, data) in enumerate(objects.items(), 1):
        store.mark([oid])
        store.write(oid, 0, data, (3 << 40) + number, create=True, pool=3, pg=oid % 4)
    store.close()


def page(owners: dict[int, int]) -> bytes:
    entries = array("Q", bytes(BLOCK_SIZE))
    for index, layer in owners.items():
        entries[index] = layer
    return entries.tobytes()


@dataclass
class Place:
    disks: list[Path]
    export: Path
    out: Path
    capsys: pytest.CaptureFixture[str]

    def sheepctl(self, *arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in arguments])
        told = self.capsys.readouterr()
        return code, told.out, told.err

    def json(self, *arguments: str | Path) -> tuple[int, Any]:
        code, out, _ = self.sheepctl(*arguments, "--json")
        return code, json.loads(out)

    def rescue(self, what: str, *more: str | Path) -> tuple[int, Any]:
        return self.json("rescue", what, "--out", self.out, "--force", "--data", *self.disks, *more)

    def files(self, oid: int) -> list[Path]:
        return [f for disk in self.disks for f in disk.glob(f"objects/*/*/{format_oid(oid)}")]

    def lose(self, oid: int) -> None:
        for file in self.files(oid):
            file.unlink()


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    """Two disks with a VDI and a snapshot, each object on both, and an export."""
    snapshot = {index: layer for index, layer in OWNERS.items() if layer == FROZEN}
    objects = {data_object(layer, index): CONTENT[index] for index, layer in OWNERS.items()}
    objects |= {map_object(MAP, 0): page(OWNERS), map_object(SNAPSHOT_MAP, 0): page(snapshot)}
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        make(disk, objects)
    keys = {
        "config": ClusterConfig(CLUSTER).encode(),
        "counters/layer": b"6",
        "vdis/vm1.raw": VdiRecord(7, SIZE, 3, OPEN, MAP, FROZEN, maps=1).encode(),
        "vdi-names/7": NameRecord("vm1.raw").encode(),
        "snapshots/7/daily": SnapshotRecord(
            8, 7, SIZE - 5000, 3, SNAPSHOT_MAP, FROZEN, maps=1
        ).encode(),
    }
    export = tmp_path / "etcd.json"
    export.write_bytes(Export(CLUSTER, "default", 1e9, 9, keys).encode())
    return Place(disks, export, tmp_path / "out.img", capsys)


def image(owners: dict[int, int], size: int) -> bytes:
    data = bytearray(-(-size // OBJECT_SIZE) * OBJECT_SIZE)
    for index in owners:
        data[index * OBJECT_SIZE : index * OBJECT_SIZE + len(CONTENT[index])] = CONTENT[index]
    return bytes(data[:size])


# -- rescue ---------------------------------------------------------------------------------


def test_a_vdi_is_rebuilt_by_its_name_and_a_snapshot_too(place: Place) -> None:
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert (code, report["whole"], report["name"]) == (0, True, "vm1.raw")
    assert place.out.read_bytes() == image(OWNERS, SIZE)
    assert place.out.stat().st_blocks * 512 < OBJECT_SIZE
    code, report = place.rescue("vm1@daily", "--metadata", place.export)
    assert (code, report["name"]) == (0, "vm1@daily.raw")
    assert place.out.read_bytes() == image({0: FROZEN, 3: FROZEN}, SIZE - 5000)


@pytest.mark.parametrize("number", [hex(MAP), str(MAP)])
def test_without_metadata_a_map_is_rebuilt_by_its_number(place: Place, number: str) -> None:
    code, report = place.rescue(number)
    assert (code, report["size"]) == (0, 6 * OBJECT_SIZE)
    assert place.out.read_bytes() == image(OWNERS, 6 * OBJECT_SIZE)


def test_the_list_shows_each_map_with_its_names_and_size(place: Place) -> None:
    code, rows = place.json("rescue", "--list", "--data", *place.disks)
    assert code == 0
    told = [(r["map"], r["names"], r["objects"], r["least_size"], r["size"]) for r in rows]
    assert told == [
        (MAP, [], 4, 6 * OBJECT_SIZE, None),
        (SNAPSHOT_MAP, [], 2, 4 * OBJECT_SIZE, None),
    ]
    _, out, _ = place.sheepctl("rescue", "--list", "--data", *place.disks)
    assert "at least 24 MiB" in out
    arguments: tuple[str | Path, ...] = ("--metadata", place.export, "--data", *place.disks)
    _, out, _ = place.sheepctl("rescue", "--list", *arguments)
    assert "vm1@daily.raw" in out


def test_what_no_directory_has_is_a_hole_and_is_listed(place: Place) -> None:
    place.lose(data_object(FROZEN, 3))
    for file in place.files(data_object(OPEN, 5)):
        with file.open("r+b") as opened:
            opened.write(b"\xee")
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert code == 1
    assert [(r["start"], r["end"]) for r in report["missing"]] == [
        (3 * OBJECT_SIZE, 4 * OBJECT_SIZE),
        (5 * OBJECT_SIZE, SIZE),
    ]
    assert "no copy" in report["missing"][0]["why"]
    assert "damaged" in report["missing"][1]["why"]
    assert place.out.read_bytes() == image({0: FROZEN, 1: OPEN}, SIZE)
    _, out, _ = place.sheepctl(
        "rescue", "vm1", "--metadata", place.export, "--out", place.out, "--force",
        "--data", *place.disks,
    )  # fmt: skip
    assert "MISSING" in out
    assert "holes in the file" in out


def test_one_good_copy_of_each_object_is_enough(place: Place) -> None:
    for number, index in enumerate(OWNERS):
        place.files(data_object(OWNERS[index], index))[number % 2].unlink()
    place.files(map_object(MAP, 0))[0].write_bytes(b"torn")
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert (code, report["missing"], len(report["problems"])) == (0, [], 1)
    assert place.out.read_bytes() == image(OWNERS, SIZE)


def test_a_lost_map_is_told_when_the_metadata_says_that_there_is_one(place: Place) -> None:
    place.lose(map_object(MAP, 0))
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert code == 1
    (lost,) = report["missing"]
    assert (lost["start"], lost["end"]) == (0, SIZE)
    assert "map is lost" in lost["why"]
    code, rows = place.json("rescue", "--list", "--metadata", place.export, "--data", *place.disks)
    assert code == 1
    assert rows[0]["lost"]


def test_a_map_page_that_cannot_be_one_is_never_believed(place: Place) -> None:
    stranger = make_layer(4, 2, 3)
    for disk in place.disks:
        store = ObjectStore.open(disk, cluster=CLUSTER)
        oid = map_object(MAP, 0)
        store.mark([oid])
        store.write(oid, 0, page({1: stranger}), 9 << 40)
        store.close()
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert code == 1
    assert [(r["start"], r["end"]) for r in report["missing"]] == [(0, SIZE)]


def test_data_beyond_the_size_of_an_old_export_is_not_cut_off(place: Place) -> None:
    keys = Export.decode(place.export.read_bytes()).keys
    small = VdiRecord(7, OBJECT_SIZE, 3, OPEN, MAP, FROZEN)
    place.export.write_bytes(
        Export(CLUSTER, "default", 1e9, 9, {**keys, "vdis/vm1.raw": small.encode()}).encode()
    )
    code, report = place.rescue("vm1", "--metadata", place.export)
    assert (code, report["size"]) == (0, 6 * OBJECT_SIZE)
    assert place.out.read_bytes() == image(OWNERS, 6 * OBJECT_SIZE)


def test_a_file_that_exists_is_not_touched_without_force(place: Place) -> None:
    place.out.write_text("precious")
    arguments: tuple[str | Path, ...] = (
        "rescue",
        hex(MAP),
        "--out",
        place.out,
        "--data",
        *place.disks,
    )
    code, _, err = place.sheepctl(*arguments)
    assert (code, place.out.read_text()) == (2, "precious")
    assert "--force" in err


def test_interrupted_it_leaves_nothing_behind_and_what_was_there_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sheepctl_rescue, "write_image", interrupted)
    place.out.write_text("precious")
    before = sorted(place.out.parent.iterdir())
    arguments: tuple[str | Path, ...] = (
        "rescue",
        hex(MAP),
        "--out",
        place.out,
        "--force",
        "--data",
        *place.disks,
    )
    assert place.sheepctl(*arguments)[0] == 130
    assert sorted(place.out.parent.iterdir()) == before
    assert place.out.read_text() == "precious"


def test_the_name_may_stand_behind_the_directories(place: Place) -> None:
    code, _, err = place.sheepctl("rescue", "--data", *place.disks, hex(MAP), "--out", place.out)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("vm1", "--out", "x.img", "--data", "ONE"), 1, "--metadata"),
        (("vm9", "--out", "x.img", "--data", "ONE", "--metadata", "EXPORT"), 1, "vm9"),
        (("0x999", "--out", "x.img", "--data", "ONE"), 1, "0x999"),
        (("0x999", "--data", "ONE"), 2, "--out"),
        (("0x999", "--out", "x.img"), 2, "--data"),
        (("--data", "ONE", "--out", "x.img"), 2, "--list"),
        (("--list", "--data", "/nowhere"), 2, "/nowhere"),
        (("--list", "--data", "ONE", "--metadata", "ONE"), 2, "directory"),
        (("--list", "--data", "ONE", "--metadata", "OBJECT"), 1, "no export"),
    ],
)
def test_bad_requests_get_a_reason(
    place: Place, words: tuple[str, ...], code: int, reason: str
) -> None:
    real = {
        "ONE": place.disks[0],
        "EXPORT": place.export,
        "OBJECT": place.files(map_object(MAP, 0))[0],
    }
    found, _, err = place.sheepctl("rescue", *(real.get(word, word) for word in words))
    assert (found, err.count("\n")) == (code, 1)
    assert reason in err


def test_the_metadata_of_another_cluster_is_refused(place: Place) -> None:
    other = Export("d" * 32, "x", 1e9, 9, {"config": ClusterConfig("d" * 32).encode()})
    place.export.write_bytes(other.encode())
    code, _, err = place.sheepctl(
        "rescue", "--list", "--data", place.disks[0], "--metadata", place.export
    )
    assert code == 2
    assert "of cluster" in err


# -- an export and the data ------------------------------------------------------------------


def refusal(place: Place, **changed: bytes | None) -> str:
    """Compare the directories with an export that differs in these keys; give what is told."""
    keys = dict(Export.decode(place.export.read_bytes()).keys)
    for key, value in changed.items():
        keys.pop(key, None)
        if value is not None:
            keys[key] = value
    export = Export(CLUSTER, "default", 1e9, 9, keys)
    with OfflineDirectory.open(place.disks[0]) as directory:
        try:
            refuse_older(export, Salvage([directory]))
        except UsageError as error:
            return str(error)
    return ""


def test_an_export_is_refused_only_if_it_is_older_than_the_data(place: Place) -> None:
    def vm1(size: int, maps: int) -> bytes:
        return VdiRecord(7, size, 3, OPEN, MAP, FROZEN, maps=maps).encode()

    assert refusal(place) == ""
    assert "were made later" in refusal(place, **{"counters/layer": b"5"})
    assert "for the first time" in refusal(place, **{"vdis/vm1.raw": vm1(SIZE, 0)})
    assert "vm1.raw grew" in refusal(place, **{"vdis/vm1.raw": vm1(5 * OBJECT_SIZE, 1)})
    store = ObjectStore.open(place.disks[0])
    store.set_token(7, 9)
    store.close()
    assert refusal(place) == ""
    store = ObjectStore.open(place.disks[0])
    store.set_token(7, 10)
    store.close()
    assert "attached later (id 7)" in refusal(place)
    assert refusal(place, fencing=FencingRecord(1 << 40, 1).encode()) == ""


def test_import_asks_the_directories_before_it_asks_etcd(place: Place) -> None:
    make_older = ObjectStore.open(place.disks[1])
    make_older.set_token(7, 10)
    make_older.close()
    code, _, err = place.sheepctl(
        "--etcd", "127.0.0.1:1", "metadata", "import", place.export, "--data", *place.disks
    )
    assert code == 2
    assert "older than the data" in err


# -- inspect --------------------------------------------------------------------------------


def test_inspect_counts_the_objects_of_each_layer(place: Place) -> None:
    code, facts = place.json("inspect", place.disks[0])
    assert (code, facts["cluster"], facts["node"], facts["clean"]) == (0, CLUSTER, 1, True)
    assert facts["objects"] == 6
    assert [(one["layer"], one["data"], one["maps"]) for one in facts["layers"]] == [
        (FROZEN, 2, 0),
        (MAP, 0, 1),
        (OPEN, 2, 0),
        (SNAPSHOT_MAP, 0, 1),
    ]
    _, out, _ = place.sheepctl("inspect", place.disks[0])
    assert CLUSTER in out
    assert hex(OPEN) in out


def test_verify_names_each_damaged_block(place: Place) -> None:
    assert place.sheepctl("inspect", place.disks[0], "--verify")[0] == 0
    file = place.files(data_object(OPEN, 1))[0]
    with file.open("r+b") as opened:
        opened.seek(2 * BLOCK_SIZE)
        opened.write(b"\xee")
    assert place.sheepctl("inspect", place.disks[0])[0] == 0
    code, facts = place.json("inspect", place.disks[0], "--verify")
    (damage,) = facts["damaged"]
    assert (code, damage["path"], damage["blocks"]) == (1, str(file), [2])
    code, out, _ = place.sheepctl("inspect", place.disks[0], "--verify")
    assert code == 1
    assert f"{file}: blocks do not match their checksums: 2" in out
    assert place.sheepctl("inspect", place.disks[1], "--verify")[0] == 0


def test_the_list_is_sorted_and_valid_json(place: Place) -> None:
    code, rows = place.json("inspect", place.disks[0], "--list")
    names = [row["object"] for row in rows]
    assert (code, len(names)) == (0, 6)
    assert names == sorted(names)
    _, out, _ = place.sheepctl("inspect", place.disks[0], "--list")
    assert [line.split()[0] for line in out.splitlines()] == names


def test_one_object_is_shown_and_dumped(place: Place, tmp_path: Path) -> None:
    oid = format_oid(data_object(OPEN, 1))
    code, facts = place.json("inspect", place.disks[0], "--object", oid)
    assert (code, facts["files"][0]["index"], facts["lost"]) == (0, 1, [])
    target = tmp_path / "object.bin"
    arguments: tuple[str | Path, ...] = ("inspect", place.disks[0], "--dump", oid, "--out", target)
    assert place.sheepctl(*arguments)[0] == 0
    assert target.read_bytes() == CONTENT[1].ljust(OBJECT_SIZE, b"\0")
    code, _, err = place.sheepctl(*arguments)
    assert code == 2
    assert "--force" in err
    code, _, err = place.sheepctl("inspect", place.disks[0], "--object", "123")
    assert code == 1
    assert "no object" in err
    code, _, err = place.sheepctl("inspect", place.disks[0], "--object", "vm1")
    assert code == 2
    assert "16 hex digits" in err
