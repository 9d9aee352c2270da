"""The mount's one directory, as pyfuse3 wants it: names, attributes, open, create, rename, delete.

Always holds:
- A file's inode number is its VDI's id, so nothing has to be remembered between requests.
- A file that a program has open through this mount is not deleted, by `rm` or by `mv` over it
  (EBUSY): its space would go at once, and it may be the disk of a running virtual machine.
- Snapshots are files too (`vm1@daily.raw`), read-only, and cached by the kernel for ever.
- Extended attributes are those of `user.*`, kept in etcd, and `sheepfs.family` (see `FAMILY`).
- What an open VDI shows comes from its volume; etcd learns sizes only now and then.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from sheepfs.backend import Attributes, Namespace
from sheepfs.core.errors import UsageError, VdiExistsError, VdiNotFoundError
from sheepfs.core.geometry import MAX_VDI_SIZE, OBJECT_SIZE
from sheepfs.core.names import MAX_ATTRIBUTES_BYTES, MAX_NAME_BYTES
from sheepfs.fuse.handles import Handles, code_of

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
"""How long the kernel believes names and attributes: another host may change them."""
FAMILY = b"sheepfs.family"
"""Extended attribute that is not listed: the number of the family of a VDI or snapshot, decimal.

Copying between files of one family shares data; so a program that has copied the start of a file
into an empty one sees here whether it is sharing (sheep-cp --reflink=always).
"""
_USER = b"user."
STAT_BLOCK = 512
STATFS_BLOCK = 4096

P = ParamSpec("P")
T = TypeVar("T")


def _replies(
    method: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn every error of a handler into the errno that the program sees."""

    @wraps(method)
    async def handler(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except UsageError as error:
            raise pyfuse3.FUSEError(error.errno) from error
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            raise pyfuse3.FUSEError(code_of(error, method.__name__)) from error

    return handler


def _refuse(code: int) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(code)


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _user_attribute(inode: int, name: bytes) -> str:
    """Give the name without `user.`; other kinds of attribute are not supported."""
    if inode == pyfuse3.ROOT_INODE or not name.startswith(_USER):
        raise _refuse(errno.EOPNOTSUPP)
    return _text(name.removeprefix(_USER))


def _name(raw: bytes) -> str:
    if len(raw) > MAX_NAME_BYTES:
        raise _refuse(errno.ENAMETOOLONG)
    return os.fsdecode(raw)


class Directory(pyfuse3.Operations):
    """Handlers of everything that `sheepfs.fuse.requests` does not answer."""

    supports_dot_lookup = False

    def __init__(self, namespace: Namespace, handles: Handles) -> None:
        super().__init__()
        self._namespace = namespace
        self._handles = handles
        self._uid = os.getuid()
        self._gid = os.getgid()
        self._listings: dict[int, Sequence[Attributes]] = {}
        self._listing_numbers = itertools.count(1)

    # -- attributes -----------------------------------------------------------------------------

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        node = self._handles.nodes.get(attributes.id)
        if node is not None:
            attributes = node.volume.attributes()
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = attributes.id
        entry.st_mode = stat.S_IFREG | stat.S_IMODE(attributes.mode)
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_size = attributes.size
        entry.st_blksize = OBJECT_SIZE
        # ls, du and cp take a size above the blocks for a sparse file.
        entry.st_blocks = -(-attributes.allocated // STAT_BLOCK)
        entry.st_mtime_ns = entry.st_atime_ns = int(attributes.modified * 1e9)
        entry.st_ctime_ns = int(max(attributes.changed, attributes.modified) * 1e9)
        entry.entry_timeout = entry.attr_timeout = TIMEOUT_S
        return entry

    def _root(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.st_nlink = 2
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.entry_timeout = entry.attr_timeout = TIMEOUT_S
        return entry

    @_replies
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Attributes by name."""
        return self._entry(await self._namespace.lookup(_name(name)))

    @_replies
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes by inode."""
        if inode == pyfuse3.ROOT_INODE:
            return self._root()
        return self._entry(await self._attributes(inode))

    async def _attributes(self, inode: int) -> Attributes:
        node = self._handles.nodes.get(inode)
        if node is not None:
            return node.volume.attributes()
        return await self._namespace.get(inode)

    @_replies
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Truncate or grow, chmod, chown, touch."""
        if inode == pyfuse3.ROOT_INODE:
            raise _refuse(errno.EPERM)
        if fields.update_size:
            await self._resize(inode, attr.st_size)
        changes = (
            stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_mtime_ns / 1e9 if fields.update_mtime else None,
        )
        if any(change is not None for change in changes):
            return self._entry(await self._namespace.set_attributes(inode, *changes))
        return await self.getattr(inode, ctx)

    async def _resize(self, inode: int, size: int) -> None:
        if size > MAX_VDI_SIZE:
            raise _refuse(errno.EFBIG)
        handle = await self._handles.open(inode, os.O_RDWR)
        try:
            await self._handles.attach(handle.node)
            await handle.node.volume.resize(size)
        finally:
            await self._handles.close(handle)

    @_replies
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Space of the cluster, divided by the number of copies."""
        capacity = await self._namespace.capacity()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = STATFS_BLOCK
        data.f_blocks = capacity.total // STATFS_BLOCK
        data.f_bfree = data.f_bavail = capacity.free // STATFS_BLOCK
        data.f_namemax = MAX_NAME_BYTES
        return data

    # -- extended attributes --------------------------------------------------------------------

    @_replies
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Value of a `user.*` attribute, or the family.

        The kernel would stop asking for `security.capability` if this was ENOSYS, but then for
        `user.*` too. It asks before each copy and change of owner, not for writes (6.18), since
        VDIs are opened with FOPEN_DIRECT_IO.
        """
        if name == FAMILY and inode != pyfuse3.ROOT_INODE:
            family = (await self._attributes(inode)).family
            if family:
                return b"%d" % family
            raise _refuse(pyfuse3.ENOATTR)
        wanted = _user_attribute(inode, name)
        value = (await self._namespace.get_user_attributes(inode)).get(wanted)
        if value is None:
            raise _refuse(pyfuse3.ENOATTR)
        return _raw(value)

    @_replies
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Names of all `user.*` attributes."""
        if inode == pyfuse3.ROOT_INODE:
            return ()
        return [_USER + _raw(name) for name in await self._namespace.get_user_attributes(inode)]

    @_replies
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """Set a `user.*` attribute; pyfuse3 has looked whether it may or must exist."""
        changed = _user_attribute(inode, name)
        if len(value) > MAX_ATTRIBUTES_BYTES:
            raise _refuse(errno.E2BIG)
        others = await self._namespace.get_user_attributes(inode)
        others.pop(changed, None)
        used = sum(len(_raw(part)) for pair in others.items() for part in pair)
        if used + len(_raw(changed)) + len(value) > MAX_ATTRIBUTES_BYTES:
            raise _refuse(errno.ENOSPC)
        await self._namespace.set_user_attribute(inode, changed, _text(value))

    @_replies
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a `user.*` attribute."""
        removed = _user_attribute(inode, name)
        if removed not in await self._namespace.get_user_attributes(inode):
            raise _refuse(pyfuse3.ENOATTR)
        await self._namespace.set_user_attribute(inode, removed, None)

    # -- open and create ------------------------------------------------------------------------

    @_replies
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open for I/O; with O_TRUNC the VDI is attached and emptied.

        A snapshot's pages stay in the kernel's cache, also from one open to the next.
        """
        handle = await self._handles.open(inode, flags)
        if flags & os.O_TRUNC:
            try:
                await self._handles.attach(handle.node)
                await handle.node.volume.resize(0)
            except BaseException:
                self._handles.release(handle.fh)
                raise
        kept = handle.node.volume.read_only
        return pyfuse3.FileInfo(fh=handle.fh, direct_io=not kept, keep_cache=kept)

    @_replies
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make an empty VDI and open it."""
        try:
            made = await self._namespace.create(_name(name), stat.S_IMODE(mode), ctx.uid, ctx.gid)
        except VdiExistsError as exists:
            # Another host made it since the kernel looked.
            if flags & os.O_EXCL:
                raise
            try:
                made = await self._namespace.lookup(_name(name))
            except VdiNotFoundError:
                # The name is kept for the snapshots of a VDI that was deleted.
                raise exists from None
        return await self.open(made.id, flags & ~os.O_EXCL, ctx), self._entry(made)

    @_replies
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make an empty VDI; device files are refused."""
        if not stat.S_ISREG(mode):
            raise _refuse(errno.EPERM)
        return self._entry(
            await self._namespace.create(_name(name), stat.S_IMODE(mode), ctx.uid, ctx.gid)
        )

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: a cluster is one flat directory."""
        raise _refuse(errno.EPERM)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: only VDIs have names."""
        raise _refuse(errno.EPERM)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Refuse: a VDI has one name."""
        raise _refuse(errno.EPERM)

    # -- rename and delete ----------------------------------------------------------------------

    async def _may_go(self, name: str, what: str) -> None:
        """Refuse (EBUSY) to delete a VDI that is open through this mount."""
        vdi = (await self._namespace.lookup(name)).id
        if not self._handles.is_open(vdi):
            await self._handles.wait_closed(vdi)
        if self._handles.is_open(vdi):
            log.warning("%s of %s refused: a program has it open", what, name)
            raise _refuse(errno.EBUSY)

    @_replies
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Delete a VDI that no program has open."""
        await self._may_go(_name(name), "deletion")
        await self._namespace.delete(_name(name))

    @_replies
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename, also while open; two files cannot be exchanged.

        A snapshot's tag is what can be changed of its name.
        """
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise _refuse(errno.EINVAL)
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        if replace:
            try:
                await self._may_go(_name(name_new), "replacement")
            except VdiNotFoundError:
                replace = False
        try:
            await self._namespace.rename(_name(name_old), _name(name_new), replace)
        except UsageError as error:
            if error.errno == errno.EINVAL:
                # mv(1) takes EINVAL for a move of a directory into itself, and says so.
                raise _refuse(errno.EPERM) from error
            raise

    # -- listing --------------------------------------------------------------------------------

    @_replies
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Start a listing."""
        number = next(self._listing_numbers)
        self._listings[number] = ()
        return number

    @_replies
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Give names with attributes; the listing is taken at its start and then stays."""
        if start_id == 0:
            self._listings[fh] = await self._namespace.list()
        listing = self._listings.get(fh, ())
        for position in range(start_id, len(listing)):
            attributes = listing[position]
            name = os.fsencode(attributes.name)
            if not pyfuse3.readdir_reply(token, name, self._entry(attributes), position + 1):
                break

    async def releasedir(self, fh: int) -> None:
        """End a listing."""
        self._listings.pop(fh, None)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: the kernel's references keep nothing alive here."""
