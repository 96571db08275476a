# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PTH115, PTH118, PTH123, PTH208 -- names are bytes here, and need not be text
"""EROFS images of layers: what the kernel shows of them, and what the format's own tools say."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from soci.erofs import Attributes, Showing, build_erofs
from soci.errors import InvalidZtoc, LimitExceeded
from soci.toc import TocEntry
from soci.tree import ROOT, LayerTree
from soci_dev.tools import find
from support.mounter_layers import CAPABILITY, everything, item, make, unpack
from support.treecmp import differences, look
from support.trees import entry

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif("erofs" not in Path("/proc/filesystems").read_text("ascii"), reason="needs a kernel with EROFS"),
]

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _DETACH = 1, 2
ALIGNED = 4096
"""What Debian's tools can read of an image: blocks as large as a page."""


@contextmanager
def mounted(folder: Path, image: bytes, tar: bytes) -> Iterator[Path]:
    """The image and the tar as files, mounted by the kernel without a loop device."""
    meta, device, top = folder / "meta.erofs", folder / "layer.tar", folder / "top"
    meta.write_bytes(image)
    device.write_bytes(tar)
    top.mkdir(exist_ok=True)
    done = _LIBC.mount(bytes(meta), bytes(top), b"erofs", ctypes.c_ulong(_READ_ONLY), b"device=" + bytes(device))
    if done != 0:
        raise OSError(ctypes.get_errno(), f"mount of {meta}")
    try:
        yield top
    finally:
        assert _LIBC.umount2(bytes(top), _DETACH) == 0


def test_the_kernel_shows_what_unpacking_would(tmp_path: Path) -> None:
    """Names, modes, owners, sizes, times, links, devices, attributes and bytes equal those of the unpacked tar."""
    made = make(everything())
    tree = LayerTree.of(made.ztoc.entries)
    want = look(unpack(made.tar, tmp_path / "unpacked"))
    implied = {tree.path(node): node for node in tree.implied()}
    below = {node: Attributes(0o751, 3, 4, 1_234_567_890_123_456_789) for node in implied.values()}
    with mounted(tmp_path, build_erofs(tree, len(made.tar), Showing(implied=below)), made.tar) as top:
        got = look(top)
    assert differences({path: one for path, one in got.items() if path not in implied},
                       {path: one for path, one in want.items() if path not in implied}) == []  # fmt: skip
    assert {(got[path].mode, got[path].uid, got[path].gid, got[path].mtime_ns) for path in implied} == {
        (0o751, 3, 4, 1_234_567_890_123_456_789)
    }


def test_what_a_layer_hides_is_shown_to_overlayfs(tmp_path: Path) -> None:
    """Over a lower directory, whiteouts and opaque directories of the image hide what they name."""
    header = {"SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape")}
    made = make([item(".wh.gone"), item("dir/.wh..wh..opq"), item("dir/new", b"new"), item("ping", pax_headers=header)])
    tree = LayerTree.of(made.ztoc.entries)
    lower = tmp_path / "lower"
    for name in ("gone", "stays", "dir/old"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_bytes(b"lower")
    with mounted(tmp_path, build_erofs(tree, len(made.tar)), made.tar) as top:
        assert os.getxattr(top / "dir", "trusted.overlay.opaque") == b"y"
        assert os.getxattr(top / "ping", "security.capability") == CAPABILITY
        both = tmp_path / "both"
        both.mkdir()
        options = f"lowerdir={top}:{lower}".encode()
        assert _LIBC.mount(b"overlay", bytes(both), b"overlay", ctypes.c_ulong(_READ_ONLY), options) == 0
        try:
            assert sorted(os.listdir(both)) == ["dir", "ping", "stays"]
            assert os.listdir(both / "dir") == ["new"]
        finally:
            _LIBC.umount2(bytes(both), _DETACH)


def wild(seed: int) -> list[TocEntry]:
    """Members in hundreds: names of any bytes and lengths, deep and wide directories, links, attributes."""
    chance = random.Random(seed)
    directories = [b""]
    members: list[TocEntry] = []
    offset = ALIGNED
    for number in range(chance.choice((1, 40, 900))):
        parent = chance.choice(directories[-5:])
        raw = bytes(chance.choice(b"-+.abcXYZ\xff\x80~") for _ in range(chance.choice((1, 3, 17, 90, 240))))
        name = parent + b"%d" % number + raw
        kind = chance.choice(("reg", "reg", "reg", "dir", "symlink", "hardlink", "fifo", "char"))
        attributes = {b"SCHILY.xattr.user.%d" % one: bytes(chance.choice((0, 5, 700))) for one in range(3)}
        made = entry(name, uid=chance.choice((0, 1, 2**32 - 2)), offset=offset, time="2020-01-01T00:00:00.5Z")
        if kind == "dir":
            made = replace(made, type="dir", mode=0o1755)
            directories.append(name + b"/")
        elif kind == "symlink":
            made = replace(made, type="symlink", linkname=b"t" * chance.choice((1, 64, 65, 192, 448, 449, 4000)))
        elif kind == "hardlink" and (files := [one for one in members if one.type == "reg"]):
            made = replace(made, type="hardlink", linkname=chance.choice(files).name)
        elif kind in {"fifo", "char"}:
            made = replace(made, type="fifo" if kind == "fifo" else "char", devmajor=5, devminor=300)
        else:
            made = replace(made, size=chance.choice((0, 1, ALIGNED, 10_000)))
            offset += -(-made.size // ALIGNED) * ALIGNED
        if made.type in {"reg", "dir"} and chance.random() < 0.1:
            made = replace(made, pax=attributes)
        members.append(made)
    return members


@pytest.mark.parametrize("seed", range(12))
def test_the_formats_own_tools_find_nothing_wrong(tmp_path: Path, seed: int) -> None:
    """``fsck.erofs`` passes images of wild trees, ``dump.erofs`` counts their inodes, and the kernel lists them all."""
    tree = LayerTree.of(wild(seed))
    end = max(one.offset + one.size for one in wild(seed))
    tar = random.Random(seed).randbytes(-(-end // ALIGNED) * ALIGNED)
    image = build_erofs(tree, len(tar), block=ALIGNED)
    assert image == build_erofs(tree, len(tar), block=ALIGNED)
    with mounted(tmp_path, image, tar) as top:
        device = f"--device={tmp_path / 'layer.tar'}"
        subprocess.run([str(find("fsck.erofs")), device, str(tmp_path / "meta.erofs")], check=True, capture_output=True)
        dump = [str(find("dump.erofs")), "-s", device, str(tmp_path / "meta.erofs")]
        told = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        assert f"inode count: {len(tree)}" in " ".join(told.split())
        seen = {os.path.join(folder, name)[len(os.fsencode(top)) + 1:]
                for folder, folders, names in os.walk(os.fsencode(top)) for name in folders + names}  # fmt: skip
        for path in seen:
            node = tree.find(path)
            assert node is not None
            _alike(os.fsencode(top) + b"/" + path, tree, node, tar)
        assert len(seen) == sum(len(tree.children(node)) for node in range(len(tree)) if tree.is_directory(node))


def _alike(path: bytes, tree: LayerTree, number: int, tar: bytes) -> None:
    node, seen = tree.node(number), os.lstat(path)
    assert (seen.st_uid, seen.st_nlink, seen.st_mtime_ns) == (node.uid, node.nlink, node.mtime_ns)
    assert {key.encode(): os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)} == dict(node.xattrs)  # fmt: skip
    if node.target:
        assert os.readlink(path) == node.target
    elif node.size:
        with open(path, "rb") as file:
            assert file.read() == tar[node.data_offset : node.data_offset + node.size]


@pytest.mark.parametrize(
    ("member", "error"),
    [
        (entry(b"crooked", offset=513, size=1), InvalidZtoc),
        (entry(b"beyond", offset=1024, size=1), InvalidZtoc),
        (entry(b"huge", offset=512, size=2**63 - 1), InvalidZtoc),
        (entry(b"loud", offset=512, pax={b"SCHILY.xattr.user.x": bytes(65_536)}), LimitExceeded),
    ],
)
def test_what_the_format_cannot_say_is_refused(member: TocEntry, error: type[Exception]) -> None:
    """A file outside the tar or its blocks, an attribute without room: an error, no image."""
    with pytest.raises(error):
        build_erofs(LayerTree.of([member]), 1024)


def test_an_attribute_on_the_root_and_a_space_that_erofs_lacks(tmp_path: Path) -> None:
    """The root keeps its attributes (its place has but 16 bits); names of other spaces are left out."""
    pax = {b"SCHILY.xattr.user.a": b"1", b"SCHILY.xattr.odd.b": b"2"}
    members = [entry(b"./", "dir", pax=pax), *(entry(b"%d" % number) for number in range(30_000))]
    tree = LayerTree.of(members)
    with mounted(tmp_path, build_erofs(tree, 1024), bytes(1024)) as top:
        assert os.listxattr(top) == ["user.a"]
        assert len(os.listdir(top)) == len(tree.children(ROOT))
