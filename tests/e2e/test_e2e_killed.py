"""Families of VDIs while mounts, tools and daemons are killed: what was flushed is there.

A file of the mount is a VDI; names are changed by `sheepctl`. What was written and not flushed
when the mount was killed may be there or not; each byte is one that was written to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
import trio

from e2e.cluster import Mounted
from e2e.families import seed_of
from e2e.soak import always_or_at_full_length
from e2e.test_e2e_families import check_clean
from sheepfs.connecting import connect
from sheepfs.core.errors import HeldElsewhereError
from sheepfs.core.geometry import OBJECT_SIZE
from sheepfs.core.names import snapshot_file
from sheepfs.holding.abandoned import abandoned
from sheepfs.holding.holding import TOOL
from sheepfs_tools.local.processes import wait_for

MAX_VDIS = 8
MAX_SIZE = OBJECT_SIZE + 200_001
DEADLINE_S = 30.0


@dataclass
class Disk:
    """A VDI: what it holds, what it held at the last flush, what was written since."""

    content: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""
    since: list[tuple[int, int, int]] = field(default_factory=list)
    sizes: set[int] = field(default_factory=lambda: {0})
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def settle(self) -> None:
        """All that was written is durable now."""
        self.flushed = bytes(self.content)
        self.since.clear()
        self.sizes = {len(self.content)}


class Killing:
    """Random operations on a mounted cluster, some of them cut short by SIGKILL."""

    def __init__(self, mounted: Mounted, seed: int) -> None:
        self.mounted = mounted
        self.random = Random(seed)
        self.disks: dict[str, Disk] = {}
        self.fds: dict[str, int] = {}
        self.history: list[str] = []
        self._number = 0
        self.operations: tuple[tuple[int, Callable[[], None]], ...] = (
            (4, self.create),
            (40, self.write),
            (15, self.read),
            (10, self.flush),
            (6, self.close),
            (5, self.snapshot),
            (6, self.read_snapshot),
            (4, self.clone),
            (2, self.rollback),
            (3, self.delete_snapshot),
            (2, self.delete),
            (3, self.kill_tool),
            (2, self.kill_mount),
            (1, self.kill_daemon),
        )

    def run(self, count: int) -> None:
        """Do `count` operations; a difference is an AssertionError that tells the last ones."""
        weights = [weight for weight, _ in self.operations]
        for number in range(count):
            (_, operation), *_ = self.random.choices(self.operations, weights)
            try:
                operation()
            except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                recent = "\n".join(self.history[-25:])
                raise AssertionError(f"step {number}: {error!r} after\n{recent}") from error
        self.close_all()

    # -- helpers ------------------------------------------------------------------------------

    def _tool(self, *arguments: str) -> str:
        done = self.mounted.cluster.sheepctl(*arguments, check=False)
        assert done.returncode == 0, f"sheepctl {arguments}: {done.stderr}"
        return done.stdout

    def _name(self) -> str | None:
        return self.random.choice(list(self.disks)) if self.disks else None

    def _with_snapshots(self) -> str | None:
        names = [name for name, disk in self.disks.items() if disk.snapshots]
        return self.random.choice(names) if names else None

    def _new(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"

    def _fd(self, name: str) -> int:
        if name not in self.fds:
            path = self.mounted.path / name
            wait_for(path.exists, DEADLINE_S, f"{name} to appear")
            self.fds[name] = os.open(path, os.O_RDWR)
        return self.fds[name]

    def _close(self, name: str) -> None:
        if name in self.fds:
            os.close(self.fds.pop(name))
            self.disks[name].settle()

    def close_all(self) -> None:
        """Flush and let everything go."""
        for name in list(self.fds):
            self._close(name)

    def _content(self, file: str) -> bytes:
        path = self.mounted.path / file
        wait_for(path.exists, DEADLINE_S, f"{file} to appear")
        return path.read_bytes()

    def _same(self, found: bytes, expected: bytes, what: str) -> None:
        assert len(found) == len(expected), f"{what}: {len(found)} bytes, not {len(expected)}"
        if found != expected:
            bad = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            again = (self.mounted.path / what).read_bytes()
            check = self.mounted.cluster.sheepctl("vdi", "check", what, "--deep", check=False)
            raise AssertionError(
                f"{what}: byte {bad:#x} is {found[bad]}, not {expected[bad]};"
                f" read again it is {again[bad]}; {check.stdout[-2000:]}{check.stderr[-500:]}"
            )

    # -- data ---------------------------------------------------------------------------------

    def create(self) -> None:
        """Make an empty VDI."""
        if len(self.disks) < MAX_VDIS:
            name = self._new("k") + ".raw"
            self.history.append(f"create {name}")
            (self.mounted.path / name).touch()
            self.disks[name] = Disk()

    def write(self) -> None:
        """Fill a range with one byte."""
        if name := self._name():
            disk = self.disks[name]
            start = self.random.choice((0, 4096, OBJECT_SIZE, self.random.randrange(MAX_SIZE)))
            span = self.random.choice((1, 4096, 12_000, 65_536))
            end = min(start + span, MAX_SIZE)
            fill = self.random.randrange(1, 256)
            self.history.append(f"write {name} {start:#x}..{end:#x} {fill}")
            os.pwrite(self._fd(name), bytes([fill]) * (end - start), start)
            disk.content.extend(bytes(max(0, end - len(disk.content))))
            disk.content[start:end] = bytes([fill]) * (end - start)
            disk.since.append((start, end, fill))
            disk.sizes.add(len(disk.content))

    def read(self) -> None:
        """Compare a whole VDI."""
        if name := self._name():
            self.history.append(f"read {name}")
            self._same(self._content(name), bytes(self.disks[name].content), name)

    def flush(self) -> None:
        """Make durable."""
        if name := self._name():
            self.history.append(f"flush {name}")
            os.fsync(self._fd(name))
            self.disks[name].settle()

    def close(self) -> None:
        """Flush and let go."""
        if self.fds:
            name = self.random.choice(list(self.fds))
            self.history.append(f"close {name}")
            self._close(name)

    # -- names --------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """Keep a VDI as it is."""
        name = self._name()
        if name and len(self.disks[name].snapshots) < 4:
            tag = self._new("s")
            self.history.append(f"snapshot {name} {tag}")
            self._tool("vdi", "snapshot", name, "--tag", tag)
            self.disks[name].snapshots[tag] = bytes(self.disks[name].content)
            self.disks[name].settle()

    def read_snapshot(self) -> None:
        """Compare a whole snapshot."""
        if name := self._with_snapshots():
            tag, content = self.random.choice(list(self.disks[name].snapshots.items()))
            self.history.append(f"read {name}@{tag}")
            file = snapshot_file(name, tag)
            self._same(self._content(file), content, file)

    def clone(self) -> None:
        """Make a VDI of a snapshot, or of a VDI that may be in use."""
        name = self._name()
        if not name or len(self.disks) >= MAX_VDIS:
            return
        disk = self.disks[name]
        source, content = name, bytes(disk.content)
        if disk.snapshots and self.random.random() < 0.5:
            tag, content = self.random.choice(list(disk.snapshots.items()))
            source = snapshot_file(name, tag)
        else:
            disk.settle()
        new = self._new("c") + ".raw"
        self.history.append(f"clone {source} {new}")
        self._tool("vdi", "clone", source, new)
        made = Disk(bytearray(content))
        made.settle()
        self.disks[new] = made

    def rollback(self) -> None:
        """Make a VDI as one of its snapshots is."""
        if name := self._with_snapshots():
            self._close(name)
            tag, content = self.random.choice(list(self.disks[name].snapshots.items()))
            self.history.append(f"rollback {name} {tag}")
            self._free(name)
            self._tool("vdi", "rollback", name, tag)
            self.disks[name].content[:] = content
            self.disks[name].settle()

    def _free(self, name: str) -> None:
        """Wait until nobody holds the VDI: a mount lets go of a closed file a little later."""

        def is_free() -> bool:
            return json.loads(self._tool("vdi", "info", name, "--json"))["held_by"] is None

        wait_for(is_free, DEADLINE_S, f"{name} to be free")

    def delete_snapshot(self) -> None:
        """Delete any snapshot."""
        if name := self._with_snapshots():
            tag = self.random.choice(list(self.disks[name].snapshots))
            self.history.append(f"delete {name}@{tag}")
            self._tool("snapshot", "delete", f"{name}@{tag}", "--now")
            del self.disks[name].snapshots[tag]

    def delete(self) -> None:
        """Delete a VDI without snapshots."""
        name = self._name()
        if name and not self.disks[name].snapshots:
            self.history.append(f"delete {name}")
            self._close(name)
            self._free(name)
            self._tool("vdi", "delete", name, "--now")
            del self.disks[name]

    # -- kills --------------------------------------------------------------------------------

    def kill_tool(self) -> None:
        """Kill sheepctl in the middle: it has happened or not, and nothing else has."""
        name = self._name()
        if not name:
            return
        disk = self.disks[name]
        what = self.random.choice(("snapshot", "clone", "rollback"))
        new = self._new("x")
        arguments = {
            "snapshot": ["vdi", "snapshot", name, "--tag", new],
            "clone": ["vdi", "clone", name, new + ".raw"],
            "rollback": ["vdi", "rollback", name, next(iter(disk.snapshots), "none")],
        }[what]
        if what == "rollback":
            if not disk.snapshots:
                return
            self._close(name)
            self._free(name)
        self.history.append(f"kill sheepctl {' '.join(arguments)}")
        tool = subprocess.Popen(
            [
                *(sys.executable, "-m", "sheepfs_tools.sheepctl"),
                *self.mounted.cluster.options,
                *arguments,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            tool.wait(self.random.uniform(0.15, 0.6))
        except subprocess.TimeoutExpired:
            tool.kill()
            tool.wait()
        # A holder that was asked may still be at it; its lease tells when nobody asks any more.
        self._wait_no_requests()
        self._wait_no_tool(name)
        if what == "snapshot":
            names = json.loads(self._tool("snapshot", "list", name, "--json"))
            if any(item["tag"] == new for item in names):
                disk.snapshots[new] = bytes(disk.content)
        elif what == "clone":
            names = json.loads(self._tool("vdi", "list", "--json"))
            if any(item["name"] == new + ".raw" for item in names):
                self.disks[new + ".raw"] = Disk(bytearray(disk.content))
                self.disks[new + ".raw"].settle()
        else:
            self._free(name)
            found = self._content(name)
            before, after = bytes(disk.content), next(iter(disk.snapshots.values()))
            assert found in (before, after), "neither rolled back nor as it was"
            disk.content[:] = found
            disk.settle()

    def _wait_no_tool(self, name: str) -> None:
        """A killed tool holds the VDI until its lease ends."""

        def is_free() -> bool:
            holder = json.loads(self._tool("vdi", "info", name, "--json"))["held_by"]
            return holder is None or not holder.endswith(TOOL)

        wait_for(is_free, DEADLINE_S, f"{name} to be free of tools")

    def _wait_no_requests(self) -> None:
        async def requests() -> int:
            cluster = self.mounted.cluster
            async with connect(cluster.etcd_address, cluster.cluster, "waiting") as here:
                found, _ = await here.store.list(here.keys.requests)
                return len(found)

        wait_for(lambda: trio.run(requests) == 0, DEADLINE_S, "requests to be gone")

    def kill_mount(self) -> None:
        """Kill the mount: what was flushed is there, and what is read then stays."""
        self.history.append("kill the mount")
        self.mounted.cluster.mounts[self.mounted.path].kill()
        for fd in self.fds.values():
            # It is closed all the same; what close(2) would have flushed is lost.
            with suppress(OSError):
                os.close(fd)
        open_names, self.fds = list(self.fds), {}
        self.mounted.cluster.mount(self.mounted.path)
        for name in self.disks:
            # What the dead mount held, be it to read only, is free when its lease has ended.
            self._free(name)
        for name in open_names:
            disk = self.disks[name]
            found = self._content(name)
            assert len(found) in disk.sizes, f"{name} has {len(found)} bytes"
            self._may_be(name, disk, found)
            disk.content[:] = found
            self.history.append(f"  {name} has {len(found)} bytes now")
            self._same(self._content(name), found, name)
            disk.settle()

    def _may_be(self, name: str, disk: Disk, found: bytes) -> None:
        """Each byte is the flushed one, or one that was written there since."""
        edges = {0, len(found), *(edge for s, e, _ in disk.since for edge in (s, e))}
        borders = sorted(edge for edge in edges if edge <= len(found))
        flushed = disk.flushed + bytes(len(found))
        for start, end in pairwise(borders):
            fills = {fill for s, e, fill in disk.since if s <= start and end <= e}
            bad = [i for i in range(start, end) if found[i] != flushed[i] and found[i] not in fills]
            assert not bad, f"{name}: byte {bad[0]:#x} is {found[bad[0]]}, {fills=}"

    def kill_daemon(self) -> None:
        """Kill a storage daemon and start it again."""
        number = self.random.randint(1, self.mounted.cluster.node_count)
        self.history.append(f"kill node {number}")
        self.mounted.cluster.nodes[number].kill()
        wait_for(lambda: self.mounted.status().get("verdict") != "ok", DEADLINE_S, "a verdict")
        for _ in range(3):
            self.write()
        self.mounted.cluster.start_node(number)
        self.mounted.wait_healthy()


@pytest.mark.parametrize("number", always_or_at_full_length([0], range(1, 5)))
def test_what_was_flushed_outlives_kills_of_mounts_tools_and_daemons(
    mounted: Mounted, number: int, soak: bool
) -> None:
    # Nodes are killed and started by the minute: nobody is to be held out for that.
    mounted.cluster.sheepctl("node", "patience", "--longest", "0")
    killing = Killing(mounted, seed_of(number))
    killing.run(2_000 if soak else 80)
    cluster = mounted.cluster

    async def clean_up() -> None:
        async with connect(cluster.etcd_address, cluster.cluster, "killed") as here:
            # A VDI that nobody opened since its holder was killed is levelled by a mount.
            with trio.fail_after(DEADLINE_S):
                while await abandoned(here):
                    await trio.sleep(0.1)
                for vdi in [item.id for item in await here.list() if not item.read_only]:
                    while await here.holding.is_held(vdi):
                        await trio.sleep(0.1)
            await check_clean(here)
            for item in await here.list():
                if item.read_only:
                    await here.delete(item.name)
            for item in await here.list():
                while not item.read_only:
                    try:
                        await here.delete(item.name)
                        break
                    except HeldElsewhereError:
                        # The mount lets a closed file go a little later.
                        await trio.sleep(0.1)
            await here.catalog.purge()
            findings = await check_clean(here)
            assert findings.own_bytes == 0

    for name, disk in killing.disks.items():
        killing._same(killing._content(name), bytes(disk.content), name)
        for tag, content in disk.snapshots.items():
            file = snapshot_file(name, tag)
            killing._same(killing._content(file), content, file)
    trio.run(clean_up)
