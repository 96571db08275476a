# SPDX-License-Identifier: Apache-2.0
"""LayerTree: what holds for every layer, and for every layer that a real file system can take."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from soci.errors import InvalidZtoc
from soci.toc import TocEntry
from soci.tree import ROOT, LayerTree
from support.trees import at, entry, paths

component = st.sampled_from(
    [b"a", b"b", b"c", b"..", b".", b"", b".wh.a", b".wh.b", b".wh..wh..opq", b".wh..", b"\xff"]
)
name = st.lists(component, min_size=1, max_size=5).map(b"/".join)
members = st.lists(
    st.builds(
        entry,
        name,
        st.sampled_from(["reg", "reg", "dir", "dir", "hardlink", "hardlink", "symlink", "char", "fifo"]),
        to=name.map(lambda n: n or b"x"),
        mode=st.integers(-(2**40), 2**40),
        size=st.integers(0, 10),
    ),
    max_size=14,
)


def sound(tree: LayerTree) -> None:
    """What must hold for every tree."""
    seen: dict[int, int] = {}
    subdirectories = dict.fromkeys((i for i in range(len(tree)) if tree.is_directory(i)), 0)
    for node in range(len(tree)):
        children = tree.children(node)
        assert tree.is_directory(node) or not children
        names = [n for n, _ in children]
        assert names == sorted(set(names))
        for child_name, child in children:
            assert child_name not in (b"", b".", b"..")
            assert b"/" not in child_name
            assert not child_name.startswith(b".wh.")
            assert tree.lookup(node, child_name) == child
            seen[child] = seen.get(child, 0) + 1
            if tree.is_directory(child):
                assert tree.parent(child) == node
                subdirectories[node] += 1
    assert set(seen) == set(range(1, len(tree)))  # every node is reachable, and the root is nobody's child
    for node in range(len(tree)):
        expected = 2 + subdirectories[node] if node in subdirectories else seen[node]
        assert tree.node(node).nlink == expected
        assert tree.find(tree.path(node)) == node
    assert all(seen[node] == 1 for node in subdirectories if node != ROOT)


@settings(max_examples=400, deadline=None)
@given(members)
def test_every_tree_is_sound(entries: list[TocEntry]) -> None:
    """Any members make a sound tree or InvalidZtoc: no way out of the root, one parent a directory, true link counts."""
    try:
        tree = LayerTree.of(entries)
    except InvalidZtoc:
        return
    sound(tree)


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            entry,
            st.binary(max_size=12),
            st.sampled_from(["reg", "dir", "hardlink"]),
            to=st.binary(max_size=4),
            time=st.text(max_size=8),
        ),
        max_size=6,
    )
)
def test_arbitrary_bytes_raise_nothing_else(entries: list[TocEntry]) -> None:
    """Whatever the names, links and times are, the outcome is a sound tree or InvalidZtoc."""
    try:
        tree = LayerTree.of(entries)
    except InvalidZtoc:
        return
    sound(tree)


plain = st.sampled_from([b"a", b"b", b"c", b".", b"..", b"d"])
plain_name = st.lists(plain, min_size=1, max_size=3).map(b"/".join)
unpackable = st.lists(
    st.builds(
        entry,
        plain_name,
        st.sampled_from(["reg", "reg", "dir", "dir", "hardlink", "hardlink", "symlink", "fifo"]),
        to=plain_name,
        mode=st.sampled_from([0o755, 0o700]),
    ),
    min_size=1,
    max_size=12,
)


def inside(root: Path, path: bytes) -> Path:
    return root / os.fsdecode(os.path.normpath(b"/" + path).lstrip(b"/"))


def through_link(root: Path, path: Path) -> bool:
    return any(p.is_symlink() for p in path.parents if root in p.parents)


def unpack(root: Path, number: int, member: TocEntry) -> None:
    """Unpack one member below ``root`` with plain system calls, as an unpacker does; OSError if it cannot be.

    A regular file's content is the number of its member.
    """
    path, target = inside(root, member.name), inside(root, member.linkname)
    if through_link(root, path) or (path == root and member.type != "dir"):
        raise OSError
    path.parent.mkdir(parents=True, exist_ok=True)
    is_directory = path.is_dir() and not path.is_symlink()
    if os.path.lexists(path) and not (member.type == "dir" and is_directory):
        shutil.rmtree(path) if is_directory else path.unlink()
    match member.type:
        case "dir":
            path.mkdir(exist_ok=True)
        case "reg":
            path.write_text(str(number))
        case "symlink":
            path.symlink_to(os.fsdecode(member.linkname))
        case "fifo":
            os.mkfifo(path)
        case "hardlink":
            if through_link(root, target):
                raise OSError
            os.link(target, path, follow_symlinks=False)
    if member.type not in ("symlink", "hardlink"):
        path.chmod(member.mode)


def unpacks(root: Path, entries: list[TocEntry]) -> bool:
    try:
        for number, member in enumerate(entries):
            unpack(root, number, member)
    except OSError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(unpackable)
def test_the_tree_is_what_unpacking_makes(entries: list[TocEntry]) -> None:
    """The tree and the kernel agree on what is refused and, name by name, on type, mode, links, target and content."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        unpacked = unpacks(root, entries)
        numbered = [TocEntry(e.name, e.type, n * 512, len(str(n)), e.linkname, e.mode) for n, e in enumerate(entries)]
        try:
            tree = LayerTree.of(numbered)
        except InvalidZtoc:
            assert not unpacked
            return
        assert unpacked
        found = [os.fsencode(p.relative_to(root)) for p in root.rglob("*")]
        assert sorted(found) == sorted(paths(tree))
        for path in found:
            real, node = (root / os.fsdecode(path)).lstat(), at(tree, path)
            assert stat.S_IFMT(node.mode) == stat.S_IFMT(real.st_mode)
            if stat.S_ISDIR(real.st_mode):
                continue  # link counts of directories depend on the file system
            assert node.nlink == real.st_nlink
            assert node.size == real.st_size
            if stat.S_ISLNK(real.st_mode):
                assert node.target == os.readlink(os.fsencode(root) + b"/" + path)  # noqa: PTH115 - a Path would clean it
            elif stat.S_ISREG(real.st_mode):
                assert node.mode == real.st_mode
                assert node.data_offset == int((root / os.fsdecode(path)).read_text()) * 512
