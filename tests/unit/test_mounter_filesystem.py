# SPDX-License-Identifier: Apache-2.0
"""The mounter's file system as a value, over trees made from tables of contents."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from soci.digest import Digest
from soci.idmap import NO_ID, IdMap
from soci.span import Spans
from soci.toc import TocEntry
from soci.tree import LayerTree, Node
from soci_mounter import numbers
from soci_mounter.filesystem import OPAQUE, USER_OPAQUE, FileSystem, Inherited, Manner
from soci_mounter.state import DIRECTORY, State, line
from support.mounter_layers import item, make, noise

NOON = "2020-01-01T12:00:00Z"
ENTRIES = [
    TocEntry(b"dir/", "dir", 512, 0, mode=0o755, uid=1, gid=2, mod_time=NOON),
    TocEntry(b"dir/file", "reg", 1536, 10, mode=0o6644, uid=3, gid=4, mod_time="2020-01-01T12:00:00.000000001Z"),
    TocEntry(b"dir/old", "reg", 2560, 0, mod_time="1969-12-31T23:59:59Z"),
    TocEntry(b"dir/link", "symlink", 3072, 0, b"file", mode=0o777, mod_time=NOON),
    TocEntry(b"dir/hard", "hardlink", 3584, 0, b"dir/file", mod_time=NOON),
    TocEntry(b"dir/zero", "char", 4096, 0, devmajor=1, devminor=5, mod_time=NOON),
    TocEntry(b"opaque/.wh..wh..opq", "reg", 4608, 0, mod_time=NOON),
    TocEntry(b"opaque/x", "reg", 5120, 0, mod_time=NOON),
    TocEntry(b".wh.gone", "reg", 5632, 0, mod_time=NOON),
    TocEntry(
        b"named",
        "reg",
        6144,
        0,
        mod_time=NOON,
        pax={b"SCHILY.xattr.user.a": b"1", b"SCHILY.xattr.user.b": b"", b"SCHILY.xattr.trusted.t": b"no"},
    ),
]


class Source:
    """A content whose files hold the letters of their mount's name."""

    def open(self, mount: str, node_id: int, node: Node) -> Source:
        self.opened = mount, node_id, node
        return self

    async def read(self, offset: int, length: int) -> bytes:
        return b"0123456789"[offset : offset + length]


@pytest.fixture
def files(tmp_path: Path) -> FileSystem:
    made = FileSystem(tmp_path)
    made.show("one", LayerTree.of(ENTRIES), Source(), {})
    return made


def walk(files: FileSystem, *names: bytes) -> int:
    ino = numbers.ROOT
    for name in names:
        found = files.lookup(ino, name)
        assert found is not None, name
        ino = found.ino
    return ino


def listing(files: FileSystem, ino: int) -> Mapping[bytes, int]:
    handle = files.opendir(ino)
    found = {name: attributes.ino for name, attributes, _ in files.readdir(handle, 0)}
    files.releasedir(handle)
    return found


def code(info: pytest.ExceptionInfo[OSError]) -> int | None:
    return info.value.errno


def test_attributes_are_those_of_the_table_of_contents(files: FileSystem) -> None:
    """Mode with its special bits, owner, size, links and the time to the nanosecond come through."""
    found = files.getattr(walk(files, b"one", b"dir", b"file"))
    assert found.mode == stat.S_IFREG | 0o6644
    assert (found.uid, found.gid, found.size, found.nlink) == (3, 4, 10, 2)
    assert found.mtime_ns == 1_577_880_000_000_000_001
    assert files.getattr(walk(files, b"one", b"dir", b"zero")).rdev == os.makedev(1, 5)


def test_hard_links_are_one_inode(files: FileSystem) -> None:
    """Both names of a linked file have the same number."""
    assert walk(files, b"one", b"dir", b"file") == walk(files, b"one", b"dir", b"hard")


def test_times_before_1970_are_1970(files: FileSystem) -> None:
    """As unpacking by containerd leaves them."""
    assert files.getattr(walk(files, b"one", b"dir", b"old")).mtime_ns == 0


def test_absent_names_are_an_answer(files: FileSystem) -> None:
    """A name that is not there is None and no error, in a layer and in the root; whiteout markers are never there."""
    assert files.lookup(walk(files, b"one"), b"nothing") is None
    assert files.lookup(walk(files, b"one"), b".wh.gone") is None
    assert files.lookup(numbers.ROOT, b"two") is None
    with pytest.raises(OSError) as info:
        files.lookup(walk(files, b"one"), b"x" * 256)
    assert code(info) == errno.ENAMETOOLONG


def test_whiteouts_are_devices_and_opaque_directories_say_so(files: FileSystem) -> None:
    """overlayfs finds a character device 0/0 for a whiteout, and its attribute on an opaque directory only."""
    gone = files.getattr(walk(files, b"one", b"gone"))
    assert (gone.mode, gone.rdev) == (stat.S_IFCHR, 0)
    opaque = walk(files, b"one", b"opaque")
    assert files.getxattr(opaque, OPAQUE) == b"y"
    assert files.listxattr(opaque) == [OPAQUE]
    with pytest.raises(OSError) as info:
        files.getxattr(walk(files, b"one", b"dir"), OPAQUE)
    assert code(info) == errno.ENODATA


def test_extended_attributes_but_private_ones_are_shown(files: FileSystem) -> None:
    """Empty values stay; names beginning with ``trusted.`` never come from an image."""
    named = walk(files, b"one", b"named")
    assert sorted(files.listxattr(named)) == [b"user.a", b"user.b"]
    assert files.getxattr(named, b"user.b") == b""
    with pytest.raises(OSError) as info:
        files.getxattr(named, b"trusted.t")
    assert code(info) == errno.ENODATA


def test_listings_can_go_on_from_every_cookie(files: FileSystem) -> None:
    """Reading a directory in pieces of one entry gives the same as at once, dots included."""
    directory = walk(files, b"one", b"dir")
    whole = listing(files, directory)
    assert list(whole) == [b".", b"..", b"file", b"hard", b"link", b"old", b"zero"]
    assert whole[b"."] == directory
    assert whole[b".."] == walk(files, b"one")
    handle, cookie, seen = files.opendir(directory), 0, []
    while (entry := next(files.readdir(handle, cookie), None)) is not None:
        seen.append(entry[0])
        cookie = entry[2]
    assert seen == list(whole)


def test_the_root_lists_mounts_while_they_come_and_go(files: FileSystem) -> None:
    """A listing that was begun before a mount vanished neither repeats nor skips another one."""
    tree = LayerTree.of(ENTRIES)
    for name in ("two", "three", "four"):
        files.show(name, tree, Source(), {})
    handle = files.opendir(numbers.ROOT)
    first = list(files.readdir(handle, 0))[:2]
    files.hide("two")
    rest = [name for name, _, _ in files.readdir(handle, first[-1][2])]
    assert [name for name, _, _ in first] + rest == [b"one", b"two", b"three", b"four"]


def test_a_hidden_layer_is_stale_and_its_numbers_are_never_reused(files: FileSystem) -> None:
    """Numbers of an unmounted layer mean nothing, even after the same name is mounted again."""
    old = walk(files, b"one", b"dir")
    files.hide("one")
    files.show("one", LayerTree.of(ENTRIES), Source(), {})
    for question in (files.getattr, files.opendir, files.listxattr, lambda ino: files.lookup(ino, b"file")):
        with pytest.raises(OSError) as info:
            question(old)
        assert code(info) == errno.ESTALE
    assert walk(files, b"one", b"dir") != old


def test_a_name_is_shown_once(files: FileSystem) -> None:
    """Showing a second layer under a name is refused; hiding what is not shown is fine."""
    with pytest.raises(FileExistsError):
        files.show("one", LayerTree.of([]), Source(), {})
    files.hide("nothing")


async def test_files_are_read_through_their_content(files: FileSystem) -> None:
    """An open file reads until it is released."""
    handle = files.open(walk(files, b"one", b"dir", b"file"), os.O_RDONLY)
    assert await files.read(handle, 2, 3) == b"234"
    files.release(handle)
    with pytest.raises(OSError) as info:
        await files.read(handle, 0, 1)
    assert code(info) == errno.EBADF


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_writing_is_refused(files: FileSystem, flags: int) -> None:
    """Opening for writing is EROFS."""
    with pytest.raises(OSError) as info:
        files.open(walk(files, b"one", b"dir", b"file"), flags)
    assert code(info) == errno.EROFS


def test_questions_of_the_wrong_kind_are_refused(files: FileSystem) -> None:
    """A directory is not opened as a file, a file not as a directory, and only a link has a target."""
    with pytest.raises(OSError) as info:
        files.open(walk(files, b"one", b"dir"), os.O_RDONLY)
    assert code(info) == errno.EINVAL
    with pytest.raises(OSError) as info:
        files.opendir(walk(files, b"one", b"dir", b"file"))
    assert code(info) == errno.ENOTDIR
    with pytest.raises(OSError) as info:
        files.readlink(walk(files, b"one", b"dir", b"file"))
    assert code(info) == errno.EINVAL
    assert files.readlink(walk(files, b"one", b"dir", b"link")) == b"file"


def test_implied_directories_show_what_they_inherit(tmp_path: Path) -> None:
    """Attributes and extended attributes from the layers below replace the stand-ins; other nodes keep theirs."""
    tree = LayerTree.of([TocEntry(b"usr/x", "reg", 512, 0, uid=9, mod_time=NOON)])
    usr = tree.lookup(0, b"usr")
    assert usr is not None
    files = FileSystem(tmp_path)
    taken = Inherited(stat.S_IFDIR | 0o1700, 5, 6, 7, {b"user.k": b"v"})
    files.show("one", tree, Source(), {usr: taken})
    found = files.getattr(walk(files, b"one", b"usr"))
    assert (found.mode, found.uid, found.gid, found.mtime_ns) == (stat.S_IFDIR | 0o1700, 5, 6, 7)
    assert files.getxattr(walk(files, b"one", b"usr"), b"user.k") == b"v"
    assert files.getattr(walk(files, b"one", b"usr", b"x")).uid == 9


def test_statfs_is_that_of_the_cache(files: FileSystem, tmp_path: Path) -> None:
    """The numbers are those of the file system that holds the cache."""
    assert files.statfs().f_blocks == os.statvfs(tmp_path).f_blocks


def test_a_manner_changes_owners_and_the_opaque_mark(tmp_path: Path) -> None:
    """Owners of members and inherited ones go through the maps, and one mark of opaque directories is shown, not both."""
    files = FileSystem(tmp_path)
    tree = LayerTree.of(ENTRIES)
    root = {0: Inherited(stat.S_IFDIR | 0o755, 2, 9, 0)}
    manner = Manner(IdMap.of([(0, 1000, 4)]), IdMap.of([(2, 50, 3)]), USER_OPAQUE)
    files.show("plain", tree, Source(), root)
    files.show("mapped", tree, Source(), root, manner)

    def owners(*names: bytes) -> tuple[int, int]:
        found = files.getattr(walk(files, *names))
        return found.uid, found.gid

    assert owners(b"plain") == (2, 9)
    assert owners(b"mapped") == (1002, NO_ID)
    assert owners(b"mapped", b"dir") == (1001, 50)
    assert owners(b"mapped", b"dir", b"file") == (1003, 52)
    assert owners(b"plain", b"dir", b"file") == (3, 4)
    for name, mark, other in ((b"plain", OPAQUE, USER_OPAQUE), (b"mapped", USER_OPAQUE, OPAQUE)):
        ino = walk(files, name, b"opaque")
        assert files.listxattr(ino) == [mark]
        assert files.getxattr(ino, mark) == b"y"
        with pytest.raises(OSError) as info:
            files.getxattr(ino, other)
        assert code(info) == errno.ENODATA


async def test_the_hidden_directory(tmp_path: Path) -> None:
    """Found by its name and in no listing; one file, root's, made anew at each opening; nothing else is in it."""
    files, content = FileSystem(tmp_path), [b"one", b"two and"]
    digest = Digest("sha256:" + "a" * 64)
    members = [*ENTRIES, TocEntry(b".soci-snapshotter", "reg", 9728, 3, mod_time=NOON)]
    files.show("one", LayerTree.of(members), Source(), {}, state=State(digest, lambda: content[0]))
    hidden = files.lookup(walk(files, b"one"), DIRECTORY)
    assert hidden is not None
    assert (hidden.mode, hidden.uid, hidden.gid) == (stat.S_IFDIR | 0o500, 0, 0)
    name = f"{digest}.json".encode()
    assert [entry[0] for entry in files.readdir(files.opendir(hidden.ino), 0)] == [b".", b"..", name]
    assert files.lookup(hidden.ino, b"other") is None
    file = files.lookup(hidden.ino, name)
    assert file is not None
    assert (file.mode, file.size, files.getattr(file.ino).size) == (stat.S_IFREG | 0o400, 3, 3)
    handle = files.open(file.ino, os.O_RDONLY)
    content.pop(0)
    assert await files.read(handle, 0, 100) == b"one"
    assert await files.read(files.open(file.ino, os.O_RDONLY), 4, 2) == b"an"
    for ino in (hidden.ino, file.ino):
        assert files.listxattr(ino) == []
        with pytest.raises(OSError, match="No data"):
            files.getxattr(ino, b"user.a")
        with pytest.raises(OSError, match="Invalid"):
            files.readlink(ino)
    with pytest.raises(OSError, match="Invalid"):
        files.open(hidden.ino, os.O_RDONLY)
    with pytest.raises(OSError, match="Not a directory"):
        files.opendir(file.ino)


def test_without_a_state_nothing_is_hidden(files: FileSystem) -> None:
    """The name is free, and its numbers mean nothing."""
    root = walk(files, b"one")
    assert files.lookup(root, DIRECTORY) is None
    for node in (numbers.STATE, numbers.STATE_FILE):
        with pytest.raises(OSError, match="Stale"):
            files.getattr(numbers.inode(numbers.split(root)[0], node))


def test_what_the_state_says() -> None:
    """The reference's keys, how the layer is shown, and the last failure where there was one."""
    made = make([item("a", noise(300_000))])
    spans = Spans.of(made.ztoc)
    said = json.loads(line(made.layer, spans, lambda span: span == 0, "mount_mode is fuse", ""))
    size = spans.compressed(0)[1] - spans.compressed(0)[0]
    assert said == {
        "digest": made.layer, "size": len(made.blob), "fetchedSize": size,
        "fetchedPercent": round(100 * size / len(made.blob), 1), "mode": "fuse", "why": "mount_mode is fuse",
    }  # fmt: skip
    whole = json.loads(line(made.layer, spans, lambda _: True, "", "gone"))
    assert len(made.blob) - whole["fetchedSize"] < 20  # gzip's own header is in no span
    assert (whole["fetchedPercent"], whole["error"]) == (100.0, "gone")
