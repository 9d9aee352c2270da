"""A daemon is killed and comes back, again and again, while fio writes and verifies."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from e2e.cluster import Mounted, object_bytes
from sheepfs_tools.processes import wait_for

LONGEST_STALL_S = 2.0


def fio_argv(path: Path, block: str, runtime_s: float, size: str = "192M") -> list[str]:
    """Random writes that carry their checksums, all verified at the end."""
    return [
        *("fio", f"--name=verify{block}", f"--filename={path}", f"--size={size}", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=8", "--rw=randwrite", f"--bs={block}"),
        *(
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--do_verify=1",
            "--verify_backlog=4096",
        ),
        *("--time_based", f"--runtime={runtime_s:g}s", "--output-format=json"),
    ]


def assert_fio_was_well(process: subprocess.Popen[str], timeout_s: float) -> None:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output[-3000:]
    job = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0
    worst_s = max(job[side]["clat_ns"]["max"] for side in ("read", "write")) / 1e9
    assert worst_s < LONGEST_STALL_S, f"longest stall {worst_s:.2f} s"


@pytest.mark.parametrize("block", ["4k", "64k"])
def test_fio_sees_no_error_and_no_long_stall_while_a_daemon_is_killed_and_restarted(
    mounted: Mounted, block: str, soak: bool
) -> None:
    mounted.cluster.sheepctl("node", "patience", "--longest", "0")
    kills = 10 if soak else 2
    # On a machine that is busy with other things recovery yields to fio: half a minute for each.
    runtime_s = 300.0 if soak else 45.0
    name = f"load{block}"
    path = mounted.create(name, "256M")
    fio = subprocess.Popen(
        fio_argv(path, block, runtime_s),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: path.stat().st_blocks > 0, 10, "fio to write")
        for turn in range(kills):
            number = turn % mounted.cluster.node_count + 1
            mounted.cluster.nodes[number].kill()
            wait_for(lambda: mounted.status()["verdict"] != "ok", 10, f"node {number} to be missed")
            mounted.cluster.start_node(number)
            mounted.wait_healthy()
        assert fio.poll() is None, "fio was done before the last kill"
        assert_fio_was_well(fio, runtime_s * 3 + 120)
    finally:
        fio.kill()
        fio.wait()
        if fio.stdout is not None:
            fio.stdout.close()
    mounted.assert_replicas_agree(name)


def test_object_files_of_all_nodes_are_equal_byte_for_byte_after_a_flush(mounted: Mounted) -> None:
    path = mounted.create("equal", "64M")
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=24", "conv=fsync,notrunc"],
        check=True,
        capture_output=True,
    )
    mounted.assert_replicas_agree("equal")
    differing = [
        oid
        for oid, files in mounted.object_files().items()
        if len({object_bytes(file) for file in files}) > 1
    ]
    assert differing == []
