# SPDX-License-Identifier: Apache-2.0
"""The file system as a value: what the kernel may ask of the mounted layers, and the answers.

Nothing here knows how questions arrive (`soci_mounter.fuse` does) or where bytes come from (`Content` does). Errors
are `OSError` with the errno of the system call's man page, or one of `soci.errors` from the content.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from soci.idmap import IdMap
from soci.toc_time import NS
from soci.tree import LayerTree, Node
from soci_mounter import numbers
from soci_mounter.state import DIRECTORY, DIRECTORY_MODE, FILE_MODE, State

BLOCK = 4096
OPAQUE = b"trusted.overlay.opaque"
USER_OPAQUE = b"user.overlay.opaque"
"""What marks an opaque directory: the second where overlayfs is mounted with ``userxattr``, as user namespaces need."""
OPAQUE_YES = b"y"
ROOT_MODE = stat.S_IFDIR | 0o711
NAME_MAX = 255
# Unpacking as containerd does it sets times before 1970, and those that 63 bits of nanoseconds cannot hold, to 1970.
LATEST_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells. ``mtime_ns`` stands for all three times: a read-only layer has but one."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Inherited:
    """Attributes that an implied directory takes from the layers below."""

    mode: int  # full st_mode
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manner:
    """How one mount shows its layer: owners as a user namespace has them, and the mark of opaque directories.

    Two mounts of one layer in different manners share everything but their inodes, and with these the kernel's own
    pages: an inode has one owner.
    """

    uids: IdMap | None = None
    gids: IdMap | None = None
    opaque: bytes = OPAQUE


PLAIN = Manner()


class Handle(Protocol):
    """One open file."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly the file's bytes from ``offset``, cut at its end; raises `SociError`."""
        ...


class Content(Protocol):
    """Where a layer's bytes come from."""

    def open(self, mount: str, node_id: int, node: Node) -> Handle:
        """A handle on a regular file of the layer."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One layer as it is shown: its tree, and what this mount adds to it."""

    slot: int
    name: str
    tree: LayerTree
    content: Content
    inherited: Mapping[int, Inherited]
    manner: Manner
    state: State | None  # what its hidden directory has

    def look(self, node: int) -> State | None:
        """What is hidden here, if ``node`` is of that; ENOENT where nothing is hidden. None: it is the tree's."""
        if node < numbers.STATE:
            return None
        if self.state is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self.state


@dataclass(frozen=True, slots=True)
class Said:
    """An open file whose bytes are known."""

    content: bytes

    async def read(self, offset: int, length: int) -> bytes:
        """See `Handle`."""
        return self.content[offset : offset + length]


class FileSystem:
    """All shown layers. Every method is a question of the kernel but `show` and `hide`."""

    def __init__(self, cache: Path) -> None:
        """``cache`` is any path of the file system that holds the span cache: `statfs` tells of that one."""
        self._cache = cache
        self._slots = numbers.Slots()
        self._shown: dict[int, Shown] = {}  # by slot, hence in the order of showing
        self._names: dict[bytes, int] = {}
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, tuple[Shown, int, Sequence[tuple[bytes, int]]]] = {}
        self._next_handle = itertools.count(1)

    # --- what is shown ---

    def show(  # noqa: PLR0913, PLR0917  all that a mount is
        self,
        name: str,
        tree: LayerTree,
        content: Content,
        inherited: Mapping[int, Inherited],
        manner: Manner = PLAIN,
        state: State | None = None,
    ) -> int:
        """Add a directory to the root and return its slot. The name must not be shown already."""
        key = os.fsencode(name)
        if key in self._names:
            raise FileExistsError(errno.EEXIST, f"mount {name!r} is shown already")
        slot = self._slots.take()
        self._shown[slot] = Shown(slot, name, tree, content, dict(inherited), manner, state)
        self._names[key] = slot
        return slot

    def hide(self, name: str) -> None:
        """Take the directory away; open files of it fail from now on. A name that is not shown is no error."""
        slot = self._names.pop(os.fsencode(name), 0)
        self._shown.pop(slot, None)

    # --- names and attributes ---

    def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """The entry ``name`` of a directory; None where there is none (an answer that may be cached)."""
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if parent == numbers.ROOT:
            slot = self._names.get(name)
            return None if slot is None else self._attributes(self._shown[slot], 0)
        shown, node_id = self._find(parent)
        child: int | None
        if hidden := shown.look(node_id):
            child = numbers.STATE_FILE if (node_id, name) == (numbers.STATE, hidden.name) else None
        elif (node_id, name) == (0, DIRECTORY) and shown.state:
            child = numbers.STATE
        else:
            child = shown.tree.lookup(node_id, name)
        return None if child is None else self._attributes(shown, child)

    def getattr(self, ino: int) -> Attributes:
        """Attributes by inode number; ESTALE where its layer is gone."""
        if ino == numbers.ROOT:
            return Attributes(ino, ROOT_MODE, 2 + len(self._shown), 0, 0, 0, 0, 0)
        return self._attributes(*self._find(ino))

    def opendir(self, ino: int) -> int:
        """Open a directory and return a handle number."""
        number = next(self._next_handle)
        if ino != numbers.ROOT:
            shown, node_id = self._find(ino)
            children: Sequence[tuple[bytes, int]]
            hidden = shown.look(node_id)
            if hidden and node_id == numbers.STATE:
                children = [(hidden.name, numbers.STATE_FILE)]
            elif not hidden and shown.tree.is_directory(node_id):
                # The tree makes a fresh list a call, and a large directory is read in many.
                children = shown.tree.children(node_id)
            else:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._listings[number] = shown, node_id, children
        return number

    def readdir(self, handle: int, cookie: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """``(name, attributes, next cookie)`` of an open directory's entries after ``cookie`` (0: from the start).

        In a layer a cookie is a position in the sorted list, which never changes. In the root it is a slot, so
        that a listing is right while layers come and go.
        """
        if handle not in self._listings:
            for slot in [slot for slot in self._shown if slot > cookie]:
                shown = self._shown[slot]
                yield os.fsencode(shown.name), self._attributes(shown, 0), slot
            return
        shown, node_id, children = self._listings[handle]
        if cookie < 1:
            yield b".", self._attributes(shown, node_id), 1
        if cookie < 2:
            yield b"..", self._parent(shown, node_id), 2
        for position in range(max(cookie - 2, 0), len(children)):
            name, child = children[position]
            yield name, self._attributes(shown, child), position + 3

    def releasedir(self, handle: int) -> None:
        """Close a directory."""
        self._listings.pop(handle, None)

    def readlink(self, ino: int) -> bytes:
        """A symbolic link's target, verbatim."""
        shown, node_id = self._find(ino)
        if shown.look(node_id) or not stat.S_ISLNK((node := shown.tree.node(node_id)).mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return node.target

    # --- extended attributes ---

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """One extended attribute; ENODATA where it is not set."""
        shown, node_id = self._find(ino) if ino != numbers.ROOT else (None, 0)
        if shown and not shown.look(node_id):
            if name == shown.manner.opaque:
                if shown.tree.node(node_id).opaque:
                    return OPAQUE_YES
            elif (value := self._xattrs(shown, node_id).get(name)) is not None:
                return value
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def listxattr(self, ino: int) -> list[bytes]:
        """The names of all extended attributes."""
        if ino == numbers.ROOT:
            return []
        shown, node_id = self._find(ino)
        if shown.look(node_id):
            return []
        opaque = [shown.manner.opaque] if shown.tree.node(node_id).opaque else []
        return [*opaque, *self._xattrs(shown, node_id)]

    # --- content ---

    def open(self, ino: int, flags: int) -> int:
        """Open a regular file for reading and return a handle number."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        shown, node_id = self._find(ino)
        number = next(self._next_handle)
        if (hidden := shown.look(node_id)) and node_id == numbers.STATE_FILE:
            self._handles[number] = Said(hidden.content())
            return number
        if hidden or not stat.S_ISREG((node := shown.tree.node(node_id)).mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._handles[number] = shown.content.open(shown.name, node_id, node)
        return number

    async def read(self, handle: int, offset: int, length: int) -> bytes:
        """The file's bytes at ``offset``, at most ``length``, fewer only at its end."""
        opened = self._handles.get(handle)
        if opened is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return await opened.read(offset, length)

    def release(self, handle: int) -> None:
        """Close a handle."""
        self._handles.pop(handle, None)

    def statfs(self) -> os.statvfs_result:
        """The numbers of the file system that holds the cache (overlayfs refuses a lower layer without any)."""
        return os.statvfs(self._cache)

    # --- within ---

    def _find(self, ino: int) -> tuple[Shown, int]:
        slot, node_id = numbers.split(ino)
        shown = self._shown.get(slot)
        if shown is None or len(shown.tree) <= node_id < numbers.STATE:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return shown, node_id

    def _parent(self, shown: Shown, node_id: int) -> Attributes:
        if node_id == 0:
            return self.getattr(numbers.ROOT)
        return self._attributes(shown, 0 if shown.look(node_id) else shown.tree.parent(node_id))

    @staticmethod
    def _xattrs(shown: Shown, node_id: int) -> Mapping[bytes, bytes]:
        inherited = shown.inherited.get(node_id)
        return shown.tree.node(node_id).xattrs if inherited is None else inherited.xattrs

    @staticmethod
    def _attributes(shown: Shown, node_id: int) -> Attributes:
        ino = numbers.inode(shown.slot, node_id)
        if hidden := shown.look(node_id):
            if node_id == numbers.STATE:
                return Attributes(ino, DIRECTORY_MODE, 2, 0, 0, 0, 0, 0)
            return Attributes(ino, FILE_MODE, 1, 0, 0, 0, len(hidden.content()), 0)
        columns = shown.tree.columns  # not a `Node`: a listing would make one an entry
        inherited = shown.inherited.get(node_id)
        if inherited is not None:
            mode, uid, gid, mtime_ns = inherited.mode, inherited.uid, inherited.gid, inherited.mtime_ns
        else:
            mode, uid, gid = columns.mode[node_id], columns.uid[node_id], columns.gid[node_id]
            mtime_ns = columns.mtime_s[node_id] * NS + columns.mtime_ns[node_id]
        if not 0 <= mtime_ns <= LATEST_NS:
            mtime_ns = 0
        if stat.S_ISLNK(mode):
            mode |= 0o777  # Linux knows no other mode of a link, whatever its tar says
        manner = shown.manner
        if manner.uids is not None:
            uid = manner.uids.host(uid)
        if manner.gids is not None:
            gid = manner.gids.host(gid)
        nlink, size = columns.nlink[node_id], columns.size[node_id]
        return Attributes(ino, mode, nlink, uid, gid, columns.rdev.get(node_id, 0), size, mtime_ns)
