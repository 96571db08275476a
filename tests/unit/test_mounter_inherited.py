# SPDX-License-Identifier: Apache-2.0
"""Attributes of implied directories."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from soci.errors import Unavailable
from soci.toc import TocEntry
from soci.tree import LayerTree
from soci_mounter.filesystem import OPAQUE, USER_OPAQUE, Inherited
from soci_mounter.inherited import inherit

TREE = LayerTree.of([TocEntry(b"a/b/file", "reg", 512, 0, mod_time="2020-01-01T00:00:00Z")])

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def lowers(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("near", "far")]
    for path in made:
        path.mkdir()
    return made


def folder(path: Path, mode: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    os.utime(path, ns=(7, 7))


def find(lowers: list[Path], path: bytes, mark: bytes = OPAQUE) -> Inherited | None:
    node = 0
    for part in path.split(b"/"):
        found = TREE.lookup(node, part)
        assert found is not None
        node = found
    return inherit(TREE, [str(lower) for lower in lowers], mark).get(node)


def test_the_nearest_layer_that_has_the_directory_gives_its_attributes(lowers: list[Path]) -> None:
    """Each implied directory is looked for on its own, from the nearest layer down."""
    near, far = lowers
    folder(near / "a", 0o710)
    folder(far / "a/b", 0o701)
    folder(far / "a", 0o777)
    a, b = find(lowers, b"a"), find(lowers, b"a/b")
    assert a == Inherited(stat.S_IFDIR | 0o710, os.getuid(), os.getgid(), 7, {})
    assert b is not None
    assert b.mode == stat.S_IFDIR | 0o701


def test_no_layer_has_it(lowers: list[Path]) -> None:
    """A directory that nobody below has keeps its stand-in attributes; without layers, so does the root."""
    assert find(lowers, b"a") is None
    assert inherit(TREE, []) == {}


def test_another_file_hides_what_is_below_it(lowers: list[Path]) -> None:
    """A file (or a whiteout, which is one) at the path, or above it, ends the search; a symbolic link is not followed."""
    near, far = lowers
    folder(far / "a/b", 0o700)
    (near / "a").write_bytes(b"")
    assert find(lowers, b"a") is None
    assert find(lowers, b"a/b") is None
    (near / "a").unlink()
    (near / "a").symlink_to(far / "a")
    assert find(lowers, b"a/b") is None


@root_only
def test_an_opaque_directory_hides_what_is_below_it(lowers: list[Path]) -> None:
    """Beneath an opaque directory lower layers do not count; the directory itself does."""
    near, far = lowers
    folder(far / "a/b", 0o700)
    folder(near / "a", 0o711)
    os.setxattr(near / "a", OPAQUE, b"y")
    a = find(lowers, b"a")
    assert a is not None
    assert a.mode == stat.S_IFDIR | 0o711
    assert a.xattrs == {}
    assert find(lowers, b"a/b") is None


def test_the_opaque_mark_of_a_user_namespace(lowers: list[Path]) -> None:
    """Where overlayfs keeps ``user.overlay.*`` that mark hides, the other does not, and neither is inherited."""
    near, far = lowers
    folder(far / "a/b", 0o700)
    folder(near / "a", 0o711)
    os.setxattr(near / "a", USER_OPAQUE, b"y")
    assert find(lowers, b"a/b") is not None
    assert find(lowers, b"a/b", USER_OPAQUE) is None
    for mark in (OPAQUE, USER_OPAQUE):
        found = find(lowers, b"a", mark)
        assert found is not None
        assert found.xattrs == {}


def test_the_root_takes_only_its_owner(lowers: list[Path]) -> None:
    """A snapshot's root directory is 0755 whatever the layers below say."""
    lowers[0].chmod(0o700)
    root = inherit(TREE, [str(lowers[0])])[0]
    assert (root.mode, root.uid) == (stat.S_IFDIR | 0o755, os.getuid())


def test_a_lower_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Guessing would show wrong attributes."""
    with pytest.raises(Unavailable):
        inherit(TREE, [str(tmp_path / "absent")])
