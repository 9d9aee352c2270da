"""A daemon is killed and comes back, again and again, while fio writes and verifies."""

from __future__ import annotations

import subprocess

import pytest

from e2e.cluster import Mounted, object_bytes
from e2e.load import longest_wait_s, verifying
from e2e.soak import always_or_at_full_length
from sheepfs_tools.local.processes import wait_for

LONGEST_STALL_S = 2.0


@pytest.mark.parametrize("block", always_or_at_full_length(["4k"], ["64k"]))
def test_fio_sees_no_error_and_no_long_stall_while_a_daemon_is_killed_and_restarted(
    mounted: Mounted, block: str, soak: bool
) -> None:
    mounted.cluster.sheepctl("node", "patience", "--longest", "0")
    # Recovery yields to fio: each return takes a while, in blocks of 64k up to half a minute.
    kills, runtime_s = (10, 300.0) if soak else (1, 25.0)
    name = f"load{block}"
    path = mounted.create(name, "256M")
    with verifying(path, block, runtime_s) as fio:
        for turn in range(kills):
            number = turn % mounted.cluster.node_count + 1
            mounted.cluster.nodes[number].kill()
            wait_for(lambda: mounted.status()["verdict"] != "ok", 10, f"node {number} to be missed")
            mounted.cluster.start_node(number)
            mounted.wait_healthy()
        assert fio.poll() is None, "fio was done before the last kill"
        assert longest_wait_s(fio, runtime_s * 3 + 120) < LONGEST_STALL_S
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
