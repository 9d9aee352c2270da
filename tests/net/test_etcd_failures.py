"""etcd that is missing, silent, restarted or one of several; forks and the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fakes.etcd_process import EtcdProcess, free_ports
from sheepfs.core.errors import UnreachableError, UsageError
from sheepfs.core.kv import Put, Transaction
from sheepfs.net.etcd import Etcd, LeaseKeeper, Store, parse_endpoints

WAIT_S = 15.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    """An etcd that the test may pause and stop."""
    process = EtcdProcess(tmp_path)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


async def put(store: Store, key: str) -> int | None:
    return await store.commit(Transaction([], [Put(key, b"")]))


async def until_put(store: Store, key: str) -> None:
    with trio.fail_after(WAIT_S):
        while True:
            try:
                await put(store, key)
            except UnreachableError:
                await trio.sleep(0.05)
            else:
                return


async def drain(hints: trio.MemoryReceiveChannel[None]) -> None:
    while True:
        with trio.move_on_after(0.2) as quiet:
            await hints.receive()
        if quiet.cancelled_caught:
            return


def test_endpoints_are_parsed() -> None:
    assert parse_endpoints("a:1, b:2379,[::1]:3") == [("a", 1), ("b", 2379), ("[::1]", 3)]


@pytest.mark.parametrize("text", ["", "host", ":2379", "host:", "host:x", "host:99999", "a:1,,b:2"])
def test_bad_endpoints_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_endpoints(text)


async def test_missing_etcd_fails_within_the_deadline_and_says_what_to_do(nobody: str) -> None:
    async with Etcd(nobody, deadline_s=2) as etcd:
        for call in (etcd.get("a"), etcd.list("a"), put(etcd, "a"), etcd.grant(5), etcd.revoke(5)):
            with trio.fail_after(3), pytest.raises(UnreachableError) as caught:
                await call
            assert nobody in str(caught.value)
            assert "Check that etcd runs" in str(caught.value)
            assert "may have been made" not in str(caught.value)


async def test_silent_etcd_fails_within_the_deadline(own_etcd: EtcdProcess) -> None:
    async with Etcd(own_etcd.endpoint, deadline_s=1) as etcd:
        await put(etcd, "a")
        own_etcd.pause()
        with trio.fail_after(2), pytest.raises(UnreachableError, match="may have been made"):
            await put(etcd, "a")
        with trio.fail_after(2), pytest.raises(UnreachableError):
            await etcd.get("a")
        with trio.fail_after(2), pytest.raises(UnreachableError):
            await etcd.keep_alive(1)
        own_etcd.resume()
        await until_put(etcd, "b")


async def test_read_after_a_restart_of_etcd_succeeds_at_once(own_etcd: EtcdProcess) -> None:
    async with Etcd(own_etcd.endpoint) as etcd:
        revision = await put(etcd, "a")
        own_etcd.stop()
        own_etcd.start()
        found = await etcd.get("a")
        assert found is not None
        assert found.mod_revision == revision


async def test_calls_fail_over_to_a_member_that_is_there(
    nobody: str, etcd_process: EtcdProcess
) -> None:
    async with Etcd(f"{nobody},{etcd_process.endpoint}", deadline_s=3) as etcd:
        with trio.fail_after(2):
            assert await put(etcd, "/failover/a") is not None
            assert await etcd.get("/failover/a") is not None
            assert await etcd.keep_alive(await etcd.grant(5))
            async with etcd.watch("/failover/", poll_s=3600) as hints:
                await hints.receive()
                await drain(hints)
                await put(etcd, "/failover/b")
                await hints.receive()


async def test_watch_survives_a_restart_of_etcd(own_etcd: EtcdProcess) -> None:
    async with Etcd(own_etcd.endpoint, deadline_s=2) as etcd:
        with trio.fail_after(WAIT_S):
            async with etcd.watch("a", poll_s=3600) as hints:
                await drain(hints)
                own_etcd.stop()
                own_etcd.start()
                await hints.receive()
                await drain(hints)
                await until_put(etcd, "a")
                await hints.receive()


async def test_watch_of_a_missing_etcd_hints_and_waits(nobody: str, tmp_path: Path) -> None:
    async with Etcd(nobody, deadline_s=1) as etcd, etcd.watch("a", poll_s=0.05) as hints:
        with trio.fail_after(WAIT_S):
            for _ in range(3):
                await hints.receive()


async def test_keeper_outlasts_a_short_outage_and_notices_a_long_one(
    own_etcd: EtcdProcess,
) -> None:
    async with Etcd(own_etcd.endpoint, deadline_s=1) as etcd, trio.open_nursery() as nursery:
        keeper = LeaseKeeper(etcd, ttl_s=3)
        await nursery.start(keeper.run)
        own_etcd.pause()
        with trio.fail_after(WAIT_S):
            while keeper.is_certain:
                await trio.sleep(0.05)
        # Our clock says that it may be over, but only etcd decides.
        assert not keeper.lost.is_set()
        own_etcd.resume()
        with trio.fail_after(WAIT_S):
            while not keeper.is_certain and not keeper.lost.is_set():
                await trio.sleep(0.05)
        await etcd.revoke(keeper.lease)
        with trio.fail_after(WAIT_S):
            await keeper.lost.wait()


async def test_keeper_waits_for_an_etcd_that_comes_later(tmp_path: Path) -> None:
    process = EtcdProcess(tmp_path)
    async with Etcd(process.endpoint, deadline_s=1) as etcd, trio.open_nursery() as nursery:
        keeper = LeaseKeeper(etcd, ttl_s=3)
        nursery.start_soon(keeper.run)
        with trio.move_on_after(0.5):
            await keeper.lost.wait()
        assert keeper.lease == 0
        await trio.to_thread.run_sync(process.start)
        try:
            with trio.fail_after(WAIT_S):
                while not keeper.lease:
                    await trio.sleep(0.02)
            await keeper.revoke()
        finally:
            process.stop()


async def test_cancelled_call_returns_at_once(own_etcd: EtcdProcess) -> None:
    async with Etcd(own_etcd.endpoint, deadline_s=4) as etcd:
        await put(etcd, "a")
        own_etcd.pause()
        started = time.monotonic()
        with trio.move_on_after(0.1):
            await etcd.get("a")
        assert time.monotonic() - started < 1
        own_etcd.resume()


async def test_closed_client_refuses_calls(etcd_process: EtcdProcess) -> None:
    etcd = Etcd(etcd_process.endpoint)
    await etcd.get("a")
    await etcd.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await etcd.get("a")


async def test_closed_watches_leave_no_thread_behind(etcd_process: EtcdProcess) -> None:
    async with Etcd(etcd_process.endpoint) as etcd:
        for _ in range(10):
            async with etcd.watch("/threads/", poll_s=3600) as hints:
                await drain(hints)
        with trio.fail_after(WAIT_S):
            while grpc_threads := [
                thread.name for thread in threading.enumerate() if "consume" in thread.name
            ]:
                await trio.sleep(0.05)
        assert grpc_threads == []


def run_python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args],
        env=environment, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip


def test_import_warns_of_nothing_and_leaves_the_environment_alone() -> None:
    result = run_python(
        "import os; before = dict(os.environ); import sheepfs.net.etcd;"
        "assert dict(os.environ) == before"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_process_ends_while_calls_and_watches_are_under_way(own_etcd: EtcdProcess) -> None:
    program = """
import os, signal, sys, trio
from sheepfs.net.etcd import Etcd, LeaseKeeper
async def main():
    etcd = Etcd(sys.argv[1])
    async with trio.open_nursery() as nursery, etcd.watch("a") as hints, etcd.watch("b"):
        await nursery.start(LeaseKeeper(etcd, 3).run)
        await hints.receive()
        await etcd.get("a")
        print("watching", flush=True)
        nursery.start_soon(etcd.get, "a")
        raise SystemExit(3)
trio.run(main)
"""
    started = time.monotonic()
    result = run_python(program, own_etcd.endpoint)
    assert result.stdout == "watching\n"
    assert "SystemExit" in result.stderr
    assert "Fatal" not in result.stderr
    assert time.monotonic() - started < 8


def test_fork_before_the_first_call_is_fine(etcd_process: EtcdProcess) -> None:
    program = """
import os, sys, trio
from sheepfs.core.kv import Put, Transaction
from sheepfs.net.etcd import Etcd
etcd = Etcd(sys.argv[1])
async def main():
    assert await etcd.commit(Transaction([], [Put("/fork/" + str(os.getpid()), b"")]))
    async with etcd.watch("/fork/") as hints:
        await hints.receive()
    await etcd.aclose()
child = os.fork()
trio.run(main)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    result = run_python(program, etcd_process.endpoint)
    assert (result.returncode, result.stderr) == (0, "")
