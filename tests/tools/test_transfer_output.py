"""What is printed at the end of import, export, backup, restore and diff."""

from __future__ import annotations

import json

import pytest

from sheepfs.layers.image import Change
from sheepfs_tools.transfer.backup import BackedUp
from sheepfs_tools.transfer.images import Differences, Exported, Imported
from sheepfs_tools.transfer.output import Outcome, report
from sheepfs_tools.transfer.restore import Restored

MIB = 1 << 20
DIFFERENCES = Differences(
    "v@a", "v@b", MIB, 2 * MIB, [Change(0, 4096, True), Change(8192, MIB, False)], 4096, 5
)


@pytest.mark.parametrize(
    ("outcome", "wanted"),
    [
        (Imported("v.raw", 2 * MIB, MIB), "Imported v.raw: 2 MiB, 1 MiB of data\n"),
        (
            Exported("v.raw@a", "x.raw", "raw", 2 * MIB, MIB),
            "Exported v.raw@a to x.raw: 2 MiB, 1 MiB of data\n",
        ),
        (
            BackedUp("v.raw@b", "v.raw@a", "file", MIB, 0, 4096),
            "Backed up v.raw@b since v.raw@a to file: 1 MiB of data in 4 KiB\n",
        ),
        (
            Restored("v.raw", "b", "a", MIB, 4096, 0),
            "Restored v.raw on a: 4 KiB of data; it is snapshot b now\n",
        ),
    ],
)
def test_outcomes_are_one_sentence_or_json(
    outcome: Outcome, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report(outcome, False)
    assert capsys.readouterr().out == wanted
    report(outcome, True)
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_differences_are_a_table_and_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    report(DIFFERENCES, False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "4096", "4", "KiB", "data"] in lines
    assert " ".join(lines[-1]) == (
        "From v@a to v@b: 4 KiB of data changed, 5 B became zeros; its size was 1 MiB and is 2 MiB"
    )
    report(DIFFERENCES, True)
    told = json.loads(capsys.readouterr().out)
    assert told["changes"][0] == {"start": 0, "end": 4096, "is_data": True}


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_is_added_to_data_on_standard_output(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report(BackedUp("v.raw@b", "", "-", MIB, 0, 4096), as_json)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "v.raw@b" in captured.err
