"""Commands that change records: what they do, print, and how they end."""

from __future__ import annotations

import pytest
import trio

from fakes.etcd import FakeEtcd
from fakes.sheepctl_bench import Bench
from fakes.snapshot_taker import KEYS, take_snapshot
from sheepfs.core.clustermap import ClusterMap, Node, NodeState, PlacementGroup
from sheepfs.core.metadata import LockRecord
from sheepfs.net.catalog import Catalog


def snapshot(sheepctl: Bench, vdi_name: str, tag: str) -> int:
    """Take a snapshot, whatever that takes of a mount; give its id."""

    async def take() -> int:
        etcd = FakeEtcd(sheepctl.server)
        return (await take_snapshot(Catalog(etcd, KEYS), etcd, vdi_name, tag)).id

    return trio.run(take)


@pytest.fixture
def vm1(sheepctl: Bench) -> int:
    """A VDI with two snapshots; gives its id."""
    made = sheepctl.good("vdi create vm1 1G --json").json
    snapshot(sheepctl, "vm1.raw", "daily")
    snapshot(sheepctl, "vm1.raw", "weekly")
    return int(made["id"])


def names(sheepctl: Bench, area: str) -> list[str]:
    return sheepctl.good(f"{area} list --names").out.split()


def test_deleted_vdi_comes_back_from_the_trash(sheepctl: Bench) -> None:
    number = sheepctl.good("vdi create vm1 1G --json").json["id"]
    assert f"sheepctl trash restore {number}" in sheepctl.good("vdi delete vm1").out
    assert names(sheepctl, "vdi") == []
    (item,) = sheepctl.good("trash list --json").json
    assert (item["id"], item["name"], item["kind"]) == (number, "vm1.raw", "vdi")
    assert item["until"] == item["deleted"] + 3600
    assert "vm1.raw" in sheepctl.good("trash list").out
    assert sheepctl.good("trash list --ids").out == f"{number}\n"
    assert sheepctl.good(f"trash restore {number} --name web").out == "web.raw is back\n"
    assert names(sheepctl, "vdi") == ["web.raw"]
    assert sheepctl.good("trash list").out == "The trash is empty\n"


def test_vdi_deleted_at_once_is_not_in_the_trash(sheepctl: Bench) -> None:
    sheepctl.good("vdi create vm1 1G")
    deleted = sheepctl.good("vdi delete vm1 --now --json").json
    assert deleted["kept_s"] == 0
    assert sheepctl.good("trash list --json").json == []


def test_nothing_is_deleted_when_one_name_is_wrong(sheepctl: Bench, vm1: int) -> None:
    assert "vm2" in sheepctl.bad(1, "vdi delete vm1 vm2")
    assert "vm1@no" in sheepctl.bad(1, "snapshot delete vm1@daily vm1@no")
    assert names(sheepctl, "vdi") == ["vm1.raw"]
    assert names(sheepctl, "snapshot") == ["vm1@daily.raw", "vm1@weekly.raw"]


def test_held_vdi_is_not_deleted(sheepctl: Bench, vm1: int) -> None:
    sheepctl.put(KEYS.lock(vm1), LockRecord(vm1, 1, "host1:1:/mnt").encode())
    assert "host1:1:/mnt" in sheepctl.bad(1, "vdi delete vm1")


def test_snapshots_of_a_deleted_vdi_stay_and_keep_its_name(sheepctl: Bench, vm1: int) -> None:
    assert "2 snapshots of it stay" in sheepctl.good("vdi delete vm1").out
    assert "VDI deleted" in sheepctl.good("snapshot list vm1").out
    assert sheepctl.good("snapshot list --json").json[0]["vdi_deleted"] is True
    assert "sheepctl snapshot list vm1.raw" in sheepctl.bad(1, "vdi create vm1 1G")
    assert "(deleted)" in sheepctl.good("snapshot info vm1@daily").out
    sheepctl.good("snapshot delete vm1@daily vm1@weekly --now")
    sheepctl.good("vdi create vm1 1G")


@pytest.mark.parametrize("name", ["vm1@daily", "vm1.raw@daily", "vm1@daily.raw"])
def test_snapshot_has_three_names(sheepctl: Bench, vm1: int, name: str) -> None:
    told = sheepctl.good(f"snapshot info {name} --json").json
    assert (told["name"], told["vdi"], told["tag"]) == ("vm1@daily.raw", "vm1.raw", "daily")
    assert "vm1@daily.raw" in sheepctl.good(f"snapshot info {name}").out
    sheepctl.good(f"snapshot delete {name}")
    assert names(sheepctl, "snapshot") == ["vm1@weekly.raw"]


def test_snapshots_are_listed_for_one_vdi_or_all(sheepctl: Bench, vm1: int) -> None:
    sheepctl.good("vdi create other 1G")
    assert "vm1@daily.raw" in sheepctl.good("snapshot list").out
    assert "No snapshots yet" in sheepctl.good("snapshot list other").out
    assert sheepctl.good("snapshot list other --json").json == []
    assert len(sheepctl.good("snapshot list vm1 --json").json) == 2
    assert "no.raw" in sheepctl.bad(1, "snapshot list no")


def test_snapshot_is_renamed(sheepctl: Bench, vm1: int) -> None:
    assert "vm1@monday.raw now" in sheepctl.good("snapshot rename vm1@daily monday").out
    assert "exists" in sheepctl.bad(1, "snapshot rename vm1@monday weekly")
    assert "tag" in sheepctl.bad(2, "snapshot rename vm1@monday a@b")
    assert names(sheepctl, "snapshot") == ["vm1@monday.raw", "vm1@weekly.raw"]


def test_protected_snapshot_stays(sheepctl: Bench, vm1: int) -> None:
    assert sheepctl.good("snapshot protect vm1@daily --json").json == {
        "protected": ["vm1@daily.raw"]
    }
    assert "yes" in sheepctl.good("snapshot list").out
    assert "sheepctl snapshot unprotect" in sheepctl.bad(1, "snapshot delete vm1@daily --now")
    sheepctl.good("snapshot unprotect vm1@daily")
    sheepctl.good("snapshot delete vm1@daily")


def test_tree_shows_snapshots_in_order(sheepctl: Bench, vm1: int) -> None:
    sheepctl.good("vdi create alone 1G")
    lines = [line.split("  2")[0] for line in sheepctl.good("snapshot tree").out.splitlines()]
    assert [line.split("  VDI")[0].rstrip() for line in lines] == [
        "vm1@daily.raw",
        "└─ vm1@weekly.raw",
        "   └─ vm1.raw",
    ]
    assert sheepctl.good("snapshot tree alone --json").json[0]["name"] == "alone.raw"
    assert sheepctl.good("snapshot tree vm1 --json").json[0]["children"][0]["kind"] == "snapshot"


def test_tree_of_nothing_says_what_to_do(sheepctl: Bench) -> None:
    assert "sheepctl vdi snapshot" in sheepctl.good("snapshot tree").out


def test_snapshot_comes_back_under_another_tag(sheepctl: Bench, vm1: int) -> None:
    number = sheepctl.good("snapshot delete vm1@daily --json").json["deleted"][0]["id"]
    snapshot(sheepctl, "vm1.raw", "daily")
    assert "--name" in sheepctl.bad(1, f"trash restore {number}")
    assert "VDI@TAG" in sheepctl.bad(2, f"trash restore {number} --name older")
    restored = sheepctl.good(f"trash restore {number} --name vm1@older --json").json
    assert restored == {"id": number, "name": "vm1@older.raw"}


def test_trash_is_named_by_id_or_by_name(sheepctl: Bench) -> None:
    ids = []
    for _ in range(2):
        ids.append(sheepctl.good("vdi create vm1 1G --json").json["id"])
        sheepctl.good("vdi delete vm1")
    assert f"({ids[0]}, {ids[1]})" in sheepctl.bad(2, "trash restore vm1")
    sheepctl.good(f"trash restore {ids[0]}")
    assert "exists" in sheepctl.bad(1, "trash restore vm1")
    sheepctl.good("trash restore vm1 --name vm2")
    assert names(sheepctl, "vdi") == ["vm1.raw", "vm2.raw"]
    assert "sheepctl trash list" in sheepctl.bad(1, "trash restore vm1")


def test_purge_wants_to_be_told_what(sheepctl: Bench, vm1: int) -> None:
    assert "--all" in sheepctl.bad(2, "trash purge")
    assert "--all" in sheepctl.bad(2, "trash purge 3 --all")
    sheepctl.good("snapshot delete vm1@daily vm1@weekly")
    assert "vm1@daily.raw" in sheepctl.good("trash purge vm1@daily").out
    (gone,) = sheepctl.good("trash purge --all --json").json["purged"]
    assert gone["name"] == "vm1@weekly.raw"
    assert sheepctl.good("trash purge --all").out == "The trash is empty\n"
    sheepctl.bad(1, "trash purge 99")


def test_texts_are_kept_with_vdis_and_snapshots(sheepctl: Bench, vm1: int) -> None:
    sheepctl.good("vdi set vm1 owner=anna", "note=a = b")
    assert sheepctl.good("vdi get vm1").out == "note=a = b\nowner=anna\n"
    assert sheepctl.good("vdi get vm1 owner").out == "anna\n"
    assert sheepctl.good("vdi get vm1 --json").json == {"note": "a = b", "owner": "anna"}
    sheepctl.good("vdi set vm1 owner= ticket=7 --json")
    assert sheepctl.good("vdi get vm1 --json").json == {"note": "a = b", "ticket": "7"}
    assert "owner" in sheepctl.bad(1, "vdi get vm1 owner")
    sheepctl.good("vdi set vm1@daily a=1")
    assert sheepctl.good("vdi get vm1@daily.raw a --json").json == "1"
    assert "user.a" in sheepctl.good("snapshot info vm1@daily").out
    assert "user.note" in sheepctl.good("vdi info vm1").out


def test_texts_that_do_not_fit_change_nothing(sheepctl: Bench, vm1: int) -> None:
    assert "KEY=VALUE" in sheepctl.bad(2, "vdi set vm1 a=1 nonsense")
    assert "4096" in sheepctl.bad(2, "vdi set vm1 a=1 b=" + "x" * 5000)
    assert sheepctl.good("vdi get vm1").out == ""


def test_snapshot_where_a_vdi_is_wanted_and_the_other_way_round(sheepctl: Bench, vm1: int) -> None:
    assert "is a snapshot" in sheepctl.bad(2, "vdi delete vm1@daily")
    assert "VDI@TAG" in sheepctl.bad(2, "snapshot delete vm1")
    assert "VDI@TAG" in sheepctl.bad(2, "snapshot protect vm1")


def test_info_of_a_vdi_tells_its_snapshots(sheepctl: Bench, vm1: int) -> None:
    assert sheepctl.good("vdi info vm1 --json").json["snapshots"] == ["daily", "weekly"]
    assert "daily, weekly" in sheepctl.good("vdi info vm1").out


def test_renamed_vdi_takes_its_snapshots_along(sheepctl: Bench, vm1: int) -> None:
    sheepctl.good("vdi rename vm1 web")
    assert names(sheepctl, "snapshot") == ["web@daily.raw", "web@weekly.raw"]


def test_limits_of_recovery_are_set_one_by_one_and_shown(sheepctl: Bench) -> None:
    assert sheepctl.good("cluster recovery --json").json == {
        "setting": {"parallel": 4, "bandwidth": 0, "paused": False, "out_after_s": 600.0},
        "recovery": None,
        "nodes": [],
    }
    sheepctl.good("cluster recovery --bandwidth 100M --parallel 8")
    shown = sheepctl.good("cluster recovery --out-after 1.5h --pause").out
    for part in ("8 objects at once", "100 MiB/s", "yes", "1 h 30 min"):
        assert part in shown
    setting = sheepctl.good("cluster recovery --resume --bandwidth unlimited --json").json
    assert setting == {"parallel": 8, "bandwidth": 0, "paused": False, "out_after_s": 5400.0}
    assert "nothing is to be recovered" in sheepctl.good("cluster recovery --watch").out


@pytest.mark.parametrize(
    "line",
    [
        "--parallel 0", "--parallel 65", "--bandwidth 0", "--bandwidth 10K", "--bandwidth fast",
        "--out-after soon", "--out-after 0", "--pause --resume", "--pause --watch",
    ],
)  # fmt: skip
def test_limits_of_recovery_that_make_no_sense_are_refused(sheepctl: Bench, line: str) -> None:
    assert sheepctl.bad(2, f"cluster recovery {line}")
    setting = sheepctl.good("cluster recovery --json").json["setting"]
    assert setting == {"parallel": 4, "bandwidth": 0, "paused": False, "out_after_s": 600.0}


def test_limits_of_recovery_in_etcd_that_no_daemon_could_go_by_are_an_error(
    sheepctl: Bench,
) -> None:
    sheepctl.put(KEYS.setting("recovery"), b'{"format": 2, "parallel": 1000}')
    assert "parallel" in sheepctl.bad(1, "cluster recovery")


def put_node(sheepctl: Bench) -> None:
    """Have one node in the map, at which nobody listens."""
    node = Node(1, NodeState.ACTIVE, "127.0.0.1:1", 5, "z", 1.0)
    group = PlacementGroup(1, (1,))
    sheepctl.put(KEYS.map, ClusterMap(1, "ab" * 16, {1: node}, {3: (group,)}).encoded)


def test_scrub_settings_are_changed_one_by_one_and_shown(sheepctl: Bench) -> None:
    default = {"enabled": True, "rate": 20 << 20, "deep_days": 14.0, "light_days": 1.0}
    assert sheepctl.good("scrub set --json").json == default
    assert KEYS.setting("scrub") not in sheepctl.server.keys
    sheepctl.good("scrub set --rate 50M")
    changed = sheepctl.good("scrub set --deep-days 7 --light-days 0.5 --json").json
    assert changed == {"enabled": True, "rate": 50 << 20, "deep_days": 7.0, "light_days": 0.5}
    assert "is paused" in sheepctl.good("scrub pause").out
    assert sheepctl.good("scrub set --json").json == {**changed, "enabled": False}
    assert "goes on" in sheepctl.good("scrub resume").out


@pytest.mark.parametrize(
    "wrong", ["--rate fast", "--rate 1K", "--deep-days 0", "--deep-days nan", "--light-days daily"]
)
def test_senseless_scrub_settings_are_refused(sheepctl: Bench, wrong: str) -> None:
    assert wrong.split()[0] in sheepctl.bad(2, f"scrub set {wrong}")
    assert KEYS.setting("scrub") not in sheepctl.server.keys


def test_scrubbing_that_is_paused_or_of_no_node_is_not_started(sheepctl: Bench) -> None:
    put_node(sheepctl)
    assert "there is no node 9" in sheepctl.bad(2, "scrub start --node 9")
    sheepctl.good("scrub pause")
    assert "sheepctl scrub resume" in sheepctl.bad(1, "scrub start")


def test_a_node_that_cannot_be_told_to_scrub_is_named(sheepctl: Bench) -> None:
    put_node(sheepctl)
    done = sheepctl("scrub start --deep --json")
    assert (done.code, done.json["started"], done.json["nodes"]) == (1, ["deep"], [])
    assert "127.0.0.1:1" in done.json["failed"]["1"]
    (row,) = sheepctl.good("scrub status --json").json["nodes"]
    assert "127.0.0.1:1" in row["problem"]
    assert "127.0.0.1:1" in sheepctl.good("scrub status").out
