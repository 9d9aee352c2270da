"""What `tools/bench recovery` refuses before it fills a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheepfs_tools.benchmarks import recovery


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "1P"], "free, and 4"),
        (["--size", "1P", "--idle"], "free, and 3.6 PiB are needed: give --directory"),
        (["--directory", "nowhere"], "nowhere is no directory"),
    ],
)
def test_a_disk_that_is_too_small_is_refused(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SystemExit) as end:
        recovery.main()
    assert end.value.code == 2
    assert told in capsys.readouterr().err
