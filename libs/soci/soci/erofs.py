# SPDX-License-Identifier: Apache-2.0
"""An EROFS image of a layer's metadata, made from its tree: the kernel then serves names and attributes itself.

The image has no file content. Its blocks have 512 bytes, as tar's have, and its one extra device is the layer's
uncompressed tar: each regular file lies there in one piece. Mount it with ``device=<layer.tar>`` (Linux 6.12 or later
mounts files without a loop device). Format: Documentation/filesystems/erofs.rst of Linux, and its erofs_fs.h.

    0      two empty blocks
    1024   superblock (128 bytes), then the one device slot (128 bytes)
    next   inodes, in slots of 512, 256, 128 and 64 bytes: what is in a slot never crosses a block
    ...    inodes with extended attributes, one after the other
    ...    directories and link targets that found no place behind their inode
    then   the address of the tar: the device begins where the image's own blocks end

Equal trees give equal bytes.
"""

from __future__ import annotations

import os
import stat
import struct
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from soci.errors import InvalidZtoc, LimitExceeded
from soci.idmap import IdMap
from soci.tree import ROOT, LayerTree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

BLOCK: Final = 512
"""Bytes of a block: tar's, and the least that EROFS knows."""
IMAGE_MAX: Final = 1 << 30
"""Bytes of an image. Two million files need a seventh of it."""
OPAQUE: Final = b"trusted.overlay.opaque"
"""The attribute by which overlayfs knows an opaque directory."""

_MAGIC: Final = 0xE0F5E1E2
_DEVICE_TABLE: Final = 0x8  # feature_incompat
_SUPER: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_SUPER_AT: Final = 1024
_DEVICE: Final = struct.Struct("<64sII56x")
_INODES_AT: Final = 1536  # and not at 0: readdir(3) leaves out an entry whose inode has the number 0
_NID: Final = 32
_INODE: Final = 64  # the extended form: the compact one has no time
_SLOTS: Final = (512, 256, 128, 64)
_PLAIN, _INLINE = 0, 2
_EXTENDED: Final = 1
_DIRENT: Final = struct.Struct("<QHBB")
_TYPES: Final = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip
_XATTR_HEADER: Final = 12
_XATTR_ENTRY: Final = struct.Struct("<BBH")
# Longest first: "" closes the list, for the kernel serves no other names.
_PREFIXES: Final = (
    (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"security.", 6), (b"trusted.", 4),
    (b"user.", 1),
)  # fmt: skip
_XATTR_VALUE_MAX: Final = 65_535
_XATTR_UNITS_MAX: Final = 65_535  # of four bytes: what an inode's attributes may take


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is shown of a directory that the layer only implies, taken from the layers below."""

    mode: int  # permission bits; the type is a directory's
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Showing:
    """How a layer is shown beside what its tree says."""

    implied: Mapping[int, Attributes] = field(default_factory=dict)
    """Attributes of nodes of `LayerTree.implied`."""
    opaque: bytes = OPAQUE
    """The attribute of opaque directories: an overlayfs with ``userxattr`` knows its twin of ``user.``."""
    uids: IdMap | None = None
    gids: IdMap | None = None
    """Owners as a user namespace has them."""


def build_erofs(tree: LayerTree, tar_size: int, showing: Showing = Showing(), *, block: int = BLOCK) -> bytes:
    """The image of ``tree``; files lie in whole blocks of a tar of ``tar_size`` bytes; the kernel reads no others.

    ``block`` is a power of two from 512 to 4,096: larger ones only for a tar whose files lie so. Raises `InvalidZtoc`
    where a file does not lie in whole blocks inside the tar, as no tar's does, and `LimitExceeded` for what the format
    has no room for: such a layer needs another way.
    """
    import numpy as np  # noqa: PLC0415  (see `soci.flat_bulk`)

    nodes = _Nodes.of(tree, showing)
    _check(nodes, tar_size, block)
    area = _place(nodes, block)
    blocks, end = _data_blocks(area, block)
    tar_blocks = -(-tar_size // block)
    if end * block > IMAGE_MAX or end + tar_blocks >= 1 << 32:
        raise LimitExceeded(f"an EROFS image of {end * block} bytes for a tar of {tar_size}: too large")
    image = bytearray(end * block)
    _SUPER.pack_into(
        image, _SUPER_AT,
        _MAGIC, 0, 0, block.bit_length() - 1, 0, int(area.nids[ROOT]), len(tree), 0, 0, end, 0, 0,
        b"", b"", _DEVICE_TABLE, 0, 1, (_SUPER_AT + _SUPER.size) // _DEVICE.size, 0, 0, 0, 0,
    )  # fmt: skip
    _DEVICE.pack_into(image, _SUPER_AT + _SUPER.size, b"", tar_blocks, end)
    where = nodes.data_offset // block + end  # of regular files
    kept = (nodes.kind == stat.S_IFREG) & (nodes.size > 0)
    value = np.where(kept, where, np.where(nodes.devices, nodes.rdev, blocks))
    _write_inodes(image, nodes, area, value)
    for node, content in _contents(nodes, area, block):
        at = int(area.nids[node]) * _NID + _INODE if area.inline[node] else int(blocks[node]) * block
        image[at : at + len(content)] = content
    return bytes(image)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Columns of all nodes; ``size`` of directories and links is not known before they are placed."""

    tree: LayerTree
    mode: Numbers
    kind: Numbers
    uid: Numbers
    gid: Numbers
    nlink: Numbers
    size: Numbers
    data_offset: Numbers
    seconds: Numbers
    nanoseconds: Numbers
    rdev: Numbers
    devices: NDArray[np.bool_]
    xattrs: Mapping[int, bytes]  # the attributes as they follow the inode

    @classmethod
    def of(cls, tree: LayerTree, showing: Showing) -> _Nodes:
        import numpy as np  # noqa: PLC0415

        columns = tree.columns

        def column(values: Any, kind: str) -> Numbers:
            return np.frombuffer(values, kind).astype(np.int64) if len(values) else np.zeros(0, np.int64)

        mode, uid, gid = (column(values, "I") for values in (columns.mode, columns.uid, columns.gid))
        seconds, nanoseconds = column(columns.mtime_s, "q"), column(columns.mtime_ns, "I")
        for node, one in showing.implied.items():
            mode[node], uid[node], gid[node] = stat.S_IFDIR | (one.mode & 0o7777), one.uid, one.gid
            seconds[node], nanoseconds[node] = divmod(max(0, one.mtime_ns), 10**9)
        uid, gid = _mapped(uid, showing.uids), _mapped(gid, showing.gids)
        rdev = np.zeros(len(tree), np.int64)
        for node, number in columns.rdev.items():
            major, minor = os.major(number), os.minor(number)
            rdev[node] = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
        kind = mode & 0o170000
        mode[kind == stat.S_IFLNK] |= 0o777  # Linux knows no other mode of a link, whatever its tar says
        found = {**columns.xattrs, **{node: one.xattrs for node, one in showing.implied.items()}}
        for node in columns.opaque:
            found[node] = {**found.get(node, {}), showing.opaque: b"y"}
        return cls(
            tree, mode, kind, uid, gid, column(columns.nlink, "I"), column(columns.size, "q"),
            column(columns.data_offset, "q"), seconds, nanoseconds, rdev,
            (kind == stat.S_IFCHR) | (kind == stat.S_IFBLK),
            {node: encoded for node, own in sorted(found.items()) if (encoded := _xattrs(own))},
        )  # fmt: skip


def _mapped(ids: Numbers, owners: IdMap | None) -> Numbers:
    if owners is None:
        return ids
    import numpy as np  # noqa: PLC0415

    known, places = np.unique(ids, return_inverse=True)
    mapped: Numbers = np.array([owners.host(one) for one in known.tolist()], np.int64)[places]
    return mapped


def _check(nodes: _Nodes, tar_size: int, block: int) -> None:
    files = (nodes.kind == stat.S_IFREG) & (nodes.size > 0)
    start, size = nodes.data_offset[files], nodes.size[files]
    wrong = (start % block != 0) | (start < 0) | (size > tar_size) | (start > tar_size - size)
    if wrong.any():
        at = int(wrong.nonzero()[0][0])
        raise InvalidZtoc(f"a file of {int(size[at])} bytes at {int(start[at])} is not in blocks of {tar_size} bytes")


def _xattrs(own: Mapping[bytes, bytes]) -> bytes:
    """The attributes as they follow an inode: a header, and the entries, each rounded up to four bytes.

    Names outside the five spaces that EROFS has are left out, as file systems refuse them.
    """
    entries = bytearray()
    for name, value in sorted(own.items()):
        found = next(((prefix, index) for prefix, index in _PREFIXES if name.startswith(prefix)), None)
        if found is None or (found[1] in {2, 3} and name != found[0]):
            continue
        rest = name[len(found[0]) :]
        if len(value) > _XATTR_VALUE_MAX:
            raise LimitExceeded(f"an extended attribute of {len(value)} bytes has no place in an inode")
        entries += _XATTR_ENTRY.pack(len(rest), found[1], len(value)) + rest + value
        entries += bytes(-len(entries) % 4)
    if not entries:
        return b""
    if len(entries) // 4 + 1 > _XATTR_UNITS_MAX:
        raise LimitExceeded(f"{len(entries)} bytes of extended attributes have no place in an inode")
    return bytes(_XATTR_HEADER) + bytes(entries)


@dataclass(frozen=True, slots=True)
class _Area:
    """Where inodes are: ``nids`` in units of 32 bytes; ``end`` is the byte after the last."""

    nids: Numbers
    inline: NDArray[np.bool_]  # its directory or link target follows the inode
    lengths: Numbers  # bytes of a directory or a link target, else 0
    end: int


def _place(nodes: _Nodes, block: int) -> _Area:
    """A slot for each inode: the smallest that has room for what follows it, else one of 64 bytes alone.

    The root comes first, for the superblock has 16 bits for its place: so it takes a slot of the largest kind.
    """
    import numpy as np  # noqa: PLC0415

    lengths = np.where(nodes.kind == stat.S_IFLNK, nodes.size, 0)
    for node in np.flatnonzero(nodes.kind == stat.S_IFDIR).tolist():
        lengths[node] = _directory_size(nodes.tree, node, block)
    plain = np.ones(len(lengths), np.bool_)
    plain[list(nodes.xattrs)] = False
    inline = plain & (lengths > 0) & (lengths <= _SLOTS[0] - _INODE)
    need = np.where(inline, lengths, 0) + _INODE
    nids = np.zeros(len(lengths), np.int64)
    end, above = _INODES_AT, _SLOTS[0]
    for slot in _SLOTS:
        smaller = slot // 2 if slot != _SLOTS[-1] else 0
        here = plain & (need <= above) & (need > smaller)
        here[ROOT] = slot == _SLOTS[0] and plain[ROOT]
        count = int(here.sum())
        nids[here] = (end + slot * np.arange(count)) // _NID
        end, above = end + slot * count, smaller
    if not plain[ROOT]:  # before all others
        shift = -(-(_INODE + len(nodes.xattrs[ROOT])) // _SLOTS[0]) * _SLOTS[0]
        nids[plain] += shift // _NID
        nids[ROOT], end = _INODES_AT // _NID, end + shift
    for node, own in nodes.xattrs.items():
        if node != ROOT:
            nids[node] = end // _NID
            end += -(-(_INODE + len(own)) // _NID) * _NID
    return _Area(nids, inline, lengths, end)


def _data_blocks(area: _Area, block: int) -> tuple[Numbers, int]:
    """The first block of what does not follow its inode, 0 for all others; and the block after the last."""
    import numpy as np  # noqa: PLC0415

    outside = (area.lengths > 0) & ~area.inline
    counts = np.where(outside, -(-area.lengths // block), 0)
    ends = -(-area.end // block) + np.cumsum(counts)
    return np.where(outside, ends - counts, 0), int(ends[-1])


def _write_inodes(image: bytearray, nodes: _Nodes, area: _Area, value: Numbers) -> None:
    import numpy as np  # noqa: PLC0415

    inode = np.dtype([
        ("format", "<u2"), ("xattrs", "<u2"), ("mode", "<u2"), ("reserved", "<u2"), ("size", "<u8"), ("value", "<u4"),
        ("ino", "<u4"), ("uid", "<u4"), ("gid", "<u4"), ("seconds", "<u8"), ("nanoseconds", "<u4"), ("nlink", "<u4"),
        ("more", "V16"),
    ])  # fmt: skip
    made = np.zeros(len(nodes.mode), inode)
    made["format"] = _EXTENDED | np.where(area.inline, _INLINE, _PLAIN) << 1
    made["mode"], made["uid"], made["gid"] = nodes.mode, nodes.uid, nodes.gid
    made["size"] = np.where(area.lengths > 0, area.lengths, nodes.size)
    made["value"], made["ino"] = value, np.arange(1, len(made) + 1)
    made["seconds"], made["nanoseconds"], made["nlink"] = nodes.seconds, nodes.nanoseconds, nodes.nlink
    for node, own in nodes.xattrs.items():
        made["xattrs"][node] = (len(own) - _XATTR_HEADER) // 4 + 1
    units = np.frombuffer(image, np.uint8)
    halves = units.reshape(-1, _NID)
    rows = made.view(np.uint8).reshape(-1, 2, _NID)
    halves[area.nids], halves[area.nids + 1] = rows[:, 0], rows[:, 1]
    for node, own in nodes.xattrs.items():
        at = int(area.nids[node]) * _NID + _INODE
        units[at : at + len(own)] = np.frombuffer(own, np.uint8)


def _contents(nodes: _Nodes, area: _Area, block: int) -> Iterator[tuple[int, bytes]]:
    """What each directory and link has."""
    tree, nids = nodes.tree, area.nids.tolist()
    kinds = [_TYPES[kind] for kind in nodes.kind.tolist()]
    for node, kind in enumerate(kinds):
        if kind == _TYPES[stat.S_IFDIR]:
            yield node, _directory(_named(tree, node), nids, kinds, block)
        elif kind == _TYPES[stat.S_IFLNK]:
            yield node, tree.node(node).target


def _named(tree: LayerTree, directory: int) -> list[tuple[bytes, int]]:
    """The directory's names, itself and its parent among them, bytewise."""
    found = list(tree.children(directory))
    insort(found, (b".", directory))
    insort(found, (b"..", tree.parent(directory)))
    return found


def _directory_size(tree: LayerTree, directory: int, block: int) -> int:
    blocks, used = 0, 0
    for name, _ in _named(tree, directory):
        need = _DIRENT.size + len(name)
        if used + need > block:
            blocks, used = blocks + 1, 0
        used += need
    return blocks * block + used


def _directory(named: Sequence[tuple[bytes, int]], nids: list[int], kinds: list[int], block: int) -> bytes:
    """Blocks of entries and, behind them, their names. All blocks but the last are filled up with zeros."""
    made = bytearray()
    here: list[tuple[bytes, int]] = []
    used = 0

    def close() -> None:
        at = _DIRENT.size * len(here)
        for name, node in here:
            made.extend(_DIRENT.pack(nids[node], at, kinds[node], 0))
            at += len(name)
        made.extend(b"".join([name for name, _ in here]))

    for pair in named:
        need = _DIRENT.size + len(pair[0])
        if used + need > block:
            close()
            made.extend(bytes(-len(made) % block))
            here, used = [], 0
        here.append(pair)
        used += need
    close()
    return bytes(made)
