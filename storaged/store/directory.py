"""A data directory, open: its parts, whose it is, and how it starts and stops.

Always holds:
- One process at a time has it open, and only one that names the right cluster.
- Before anything of it may change, the index of the last clean stop is gone (startup.py).
- What the dirty log named at start stays in it until it is resolved.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Self

from sheepfs.core.errors import NoSpaceError, UsageError, WrongClusterError
from sheepfs.core.geometry import serial_of
from storaged.store import startup, superblock
from storaged.store.catalog import Catalog
from storaged.store.checker import Checker
from storaged.store.dirtylog import DirtyLog
from storaged.store.disk import Disk, FileDisk, Health, disk_error, read_file, replace_file
from storaged.store.entry import SUSPECT
from storaged.store.files import OpenFiles, default_limit
from storaged.store.flush import FlushTracker
from storaged.store.format import cluster_hash
from storaged.store.level import Leveller
from storaged.store.maker import Maker
from storaged.store.parts import Parts
from storaged.store.reader import Reader
from storaged.store.sharing import Sharing
from storaged.store.space import SpaceGuard
from storaged.store.superblock import Superblock
from storaged.store.tokens import TokenLog
from storaged.store.writer import Writer

log = logging.getLogger(__name__)


class DataDirectory:
    """One data directory, open; `ObjectStore` adds what is done with its objects."""

    was_clean: bool
    """The last stop was clean (or the store is new)."""

    def __init__(
        self, disk: Disk, block: Superblock, reserve_bytes: int | None, max_open: int
    ) -> None:
        """Wire the parts together; use `open`."""
        self._disk = disk
        self._superblock = block
        self._health = Health()
        cluster = cluster_hash(block.cluster)
        self._catalog = Catalog(self._health)
        self._files = OpenFiles(disk, self._health, cluster, max_open, self._catalog.remove)
        self._marks = DirtyLog(disk, self._health)
        self._tokens = TokenLog(disk, self._health)
        self._space = SpaceGuard(disk, reserve_bytes)
        self._reader = Reader(disk, self._health, self._catalog, self._files)
        self._tracker = FlushTracker(disk, self._health, self._marks, self._files)
        parts = Parts(
            disk,
            self._health,
            self._catalog,
            self._files,
            self._reader,
            self._tracker,
            self._marks,
            self._space,
        )
        self._checker = Checker(parts)
        self._sharing = Sharing(parts)
        self._writer = Writer(parts, self._sharing)
        self._maker = Maker(parts, self._sharing, self._writer)
        self._leveller = Leveller(parts, self._sharing, self._maker.make, self._writer.delete)
        self._lock_fd = -1
        self._quarantined = 0

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        cluster: str = "",
        node_uuid: str = "",
        create: bool = False,
        disk: Disk | None = None,
        reserve_bytes: int | None = None,
        max_open: int | None = None,
    ) -> Self:
        """Open a data directory. Blocks, after an unclean stop for one read per object.

        Args:
            path: the directory; with `create` it is made, and made a store, if need be.
            cluster: id of the cluster it must belong to; "" takes any.
            node_uuid: uuid the node must have (a new one gets); "" takes any (makes one up).
            disk: how to reach the directory; None uses the real file system.
            reserve_bytes: space that only logs, deletes and discards may use; None: 5 % of the
                disk, at most 1 GiB.
            max_open: object files kept open; None: 1,024, or less if the process may open few.

        Raises:
            WrongClusterError: it is another's, no store, or of a newer format.
            UsageError: another process has it open.
            CorruptError: superblock or tokens are damaged; make the directory anew.
            DiskError, NoSpaceError: the file system refused.
        """
        try:
            if disk is None:
                if create:
                    path.mkdir(parents=True, exist_ok=True, mode=0o700)
                disk = FileDisk(path)
            try:
                lock_fd = _lock(disk, path, create)
            except BlockingIOError as error:
                raise UsageError(
                    f"{path} is in use by another daemon, or being looked at offline"
                ) from error
            try:
                block = superblock.read(disk)
                made = block is None
                if block is None:
                    superblock.check_vacant(disk)
                    block = superblock.fresh(cluster, node_uuid)
                _check_identity(block, cluster, node_uuid)
                superblock.make_directories(disk)
                store = cls(disk, block, reserve_bytes, max_open or default_limit())
                store._load(made)
            except BaseException:
                disk.close(lock_fd)
                raise
        except OSError as error:
            raise disk_error(error, str(path)) from error
        store._lock_fd = lock_fd
        return store

    @staticmethod
    def cluster_of(path: Path, disk: Disk | None = None) -> str:
        """Give the id of the cluster that a directory belongs to; "" if it is not there or new.

        Raises WrongClusterError, CorruptError, DiskError as `open` does.
        """
        try:
            block = superblock.read(disk or FileDisk(path))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise disk_error(error, str(path)) from error
        return "" if block is None else block.cluster

    def _load(self, made: bool) -> None:
        """Find out what there is (OSError, CorruptError)."""
        startup.remove_leftovers(self._disk)
        if made:
            self._marks.reset(())
            self._tokens.create()
            superblock.write(self._disk, self._superblock)
            self.was_clean = True
            return
        self._tokens.load()
        marked, damaged = self._marks.load()
        entries = startup.take_index(self._disk)
        self.was_clean = entries is not None
        if entries is None:
            # A killed process leaves names and data in memory that nothing would sync any more.
            self._disk.syncfs()
            cluster = cluster_hash(self._superblock.cluster)
            entries = startup.scan(self._disk, cluster, None if damaged else marked)
        if damaged:
            log.error("dirty.log is damaged: every object is compared with its peers")
        for entry in entries:
            if damaged or entry.oid in marked:
                entry.state = SUSPECT
            self._catalog.add(entry)
        self._marks.reset(e.oid for e in entries if e.state == SUSPECT)
        self._quarantined = len(self._disk.listdir("quarantine"))

    @property
    def node_id(self) -> int | None:
        """The id that the cluster gave this node; None before it did."""
        return self._superblock.node

    @property
    def uuid(self) -> str:
        """What makes this data directory one of a kind."""
        return self._superblock.uuid

    @property
    def cluster(self) -> str:
        """Id of the cluster the directory belongs to."""
        return self._superblock.cluster

    @property
    def epoch(self) -> int:
        """The highest epoch that the directory was served in, as it was written down."""
        return self._superblock.epoch

    @property
    def last_layer(self) -> int:
        """The highest serial of a layer that there was an object of since the start; 0: none."""
        return serial_of(self._catalog.last_layer)

    def set_node_id(self, node_id: int) -> None:
        """Keep the node's id durably. Blocks. Raises UsageError (it has another), DiskError."""
        self._health.check()
        if self.node_id not in (None, node_id):
            raise UsageError(f"the data directory is node {self.node_id}, not {node_id}")
        block = dataclasses.replace(self._superblock, node=node_id)
        try:
            superblock.write(self._disk, block)
        except OSError as error:
            raise disk_error(error, superblock.NAME) from error
        self._superblock = block

    def set_epoch(self, epoch: int) -> None:
        """Raise the epoch that is written down, durably; a lower one changes nothing. Blocks.

        Raises:
            NoSpaceError: nothing changed.
            DiskError: the disk failed; the store is out of use.
        """
        self._health.check()
        if epoch <= self.epoch:
            return
        block = dataclasses.replace(self._superblock, epoch=epoch)
        try:
            superblock.write(self._disk, block)
        except OSError as error:
            refused = disk_error(error, superblock.NAME)
            if isinstance(refused, NoSpaceError):
                raise refused from error
            raise self._health.fail(error, superblock.NAME) from error
        self._superblock = block

    def tokens(self) -> dict[int, int]:
        """Give the highest token kept for each VDI."""
        return self._tokens.all()

    def set_token(self, vdi: int, token: int) -> None:
        """Raise a VDI's token durably; a lower one changes nothing. Blocks.

        Raises NoSpaceError, DiskError.
        """
        self._tokens.set(vdi, token)

    def note(self, name: str) -> bytes:
        """Give the last note of a name; empty if there is none. Blocks. Raises DiskError."""
        try:
            return read_file(self._disk, name)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise disk_error(error, name) from error

    def write_note(self, name: str, data: bytes) -> None:
        """Replace a small file beside the objects durably. Blocks.

        Raises:
            NoSpaceError: the former one is still there.
            DiskError: the disk failed; the store is out of use.
        """
        self._health.check()
        try:
            replace_file(self._disk, name, data)
        except OSError as error:
            refused = disk_error(error, name)
            if isinstance(refused, NoSpaceError):
                raise refused from error
            raise self._health.fail(error, name) from error

    def close(self, clean: bool = True) -> None:
        """Close the store. Blocks.

        Args:
            clean: flush all and write the index for a fast start; False leaves the directory
                as a killed process would.

        Raises:
            DiskError: the flush failed; the store is closed all the same, uncleanly.
        """
        try:
            if clean:
                self._stop_cleanly()
        except OSError as error:
            raise self._health.fail(error, "close") from error
        finally:
            self._files.close()
            self._marks.close()
            self._tokens.close()
            if self._lock_fd >= 0:
                self._disk.close(self._lock_fd)
                self._lock_fd = -1

    def _stop_cleanly(self) -> None:
        self._health.check()
        job = self._tracker.begin(None)
        while job is not None:
            job.run()
            job = self._tracker.end(job)
        entries = self._catalog.everything()
        self._marks.reset(e.oid for e in entries if e.state == SUSPECT)
        startup.write_index(self._disk, entries)


def _lock(disk: Disk, path: Path, create: bool) -> int:
    """Take the directory's lock; refuse to leave a lock file in a directory of somebody else."""
    if superblock.NAME not in disk.listdir(""):
        if not create:
            raise WrongClusterError(f"{path} is no data directory of sheepfs")
        superblock.check_vacant(disk)
    return disk.lock(superblock.LOCK)


def _check_identity(block: Superblock, cluster: str, node_uuid: str) -> None:
    if cluster and block.cluster != cluster:
        raise WrongClusterError(
            f"the data directory belongs to cluster {block.cluster or '(none)'}, not {cluster}"
        )
    if node_uuid and block.uuid != node_uuid:
        raise WrongClusterError(f"the data directory is node {block.uuid}, not {node_uuid}")
