"""fio, writing and verifying what it wrote."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sheepfs_tools.local.processes import wait_for


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


def start_fio(
    path: Path, block: str, runtime_s: float, size: str = "192M", *more: str
) -> subprocess.Popen[str]:
    """Start fio on a file, as `fio_argv` says; it has begun to write on return."""
    process = subprocess.Popen(
        [*fio_argv(path, block, runtime_s, size), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: path.stat().st_blocks > 0, 20, "fio to write")
    except BaseException:
        end_fio(process)
        raise
    return process


def longest_wait_s(fio: subprocess.Popen[str], timeout_s: float) -> float:
    """Wait for fio's end, which must be a good one; give its longest wait for a request."""
    output, _ = fio.communicate(timeout=timeout_s)
    assert fio.returncode == 0, output[-3000:]
    job = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return float(max(job[side]["clat_ns"]["max"] for side in ("read", "write")) / 1e9)


def end_fio(fio: subprocess.Popen[str]) -> None:
    """End fio, if it still runs."""
    fio.kill()
    fio.wait()
    if fio.stdout is not None:
        fio.stdout.close()


@contextmanager
def verifying(path: Path, block: str, runtime_s: float) -> Iterator[subprocess.Popen[str]]:
    """Run fio on a file, as `fio_argv` says; it is ended with the block."""
    fio = start_fio(path, block, runtime_s)
    try:
        yield fio
    finally:
        end_fio(fio)
