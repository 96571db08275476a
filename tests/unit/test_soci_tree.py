# SPDX-License-Identifier: Apache-2.0
"""LayerTree: what a kernel is shown of a layer."""

from __future__ import annotations

import os
import stat
import tracemalloc

import pytest

from soci import tree_draft
from soci.errors import InvalidZtoc
from soci.toc import TocEntry
from soci.tree import ROOT, LayerTree, Node
from support.trees import at, entry, paths


def test_a_file_has_its_entrys_attributes() -> None:
    """Every attribute of a regular file comes from its entry, with the type bits of the entry's type."""
    tree = LayerTree.of(
        [entry(b"f", offset=1024, size=7, mode=0o104755, uid=5, gid=2**31, time="1970-01-01T00:00:01.5Z")]
    )
    node = at(tree, b"f")
    assert node == Node(
        mode=stat.S_IFREG | 0o4755,
        uid=5,
        gid=2**31,
        size=7,
        mtime_ns=1_500_000_000,
        rdev=0,
        nlink=1,
        data_offset=1024,
        target=b"",
        xattrs={},
        implied=False,
        opaque=False,
        first_name=b"f",
    )


def test_contradicting_type_bits_in_the_mode_are_ignored() -> None:
    """A mode field that claims another file type does not change what the entry is."""
    tree = LayerTree.of([entry(b"f", mode=stat.S_IFDIR | 0o600), entry(b"p", "fifo", mode=-1)])
    assert at(tree, b"f").mode == stat.S_IFREG | 0o600
    assert at(tree, b"p").mode == stat.S_IFIFO | 0o7777


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"./a/", b"a"),
        (b"/a", b"a"),
        (b"a//b", b"a/b"),
        (b"../../a", b"a"),
        (b"x/../a", b"a"),
        (b"a/./b/..", b"a"),
        (b"...", b"..."),
        (b"\xff\n", b"\xff\n"),
    ],
)
def test_names_are_cleaned_lexically(name: bytes, path: bytes) -> None:
    """A name means its place below the layer's root, however it is spelled, and nothing else comes into being."""
    tree = LayerTree.of([entry(name, "dir")])
    assert paths(tree)[-1] == path
    assert len(paths(tree)) == path.count(b"/") + 1


def test_the_root_entry_sets_the_roots_attributes() -> None:
    """An entry `./` describes the root itself and makes no child."""
    tree = LayerTree.of([entry(b"./", "dir", mode=0o700, uid=3)])
    root = tree.node(ROOT)
    assert (root.mode, root.uid, root.nlink, root.implied) == (stat.S_IFDIR | 0o700, 3, 2, False)
    assert len(tree) == 1
    assert tree.implied() == []


def test_the_root_cannot_be_a_file() -> None:
    """A member that would replace the root by something else is refused."""
    for name in (b"/", b"a/..", b""):
        with pytest.raises(InvalidZtoc, match="root directory"):
            LayerTree.of([entry(name)])


def test_missing_parents_are_implied() -> None:
    """Parents that no member lists are root's, 0755, of 1970, and listed as implied with the root."""
    tree = LayerTree.of([entry(b"a/b/f")])
    node = at(tree, b"a/b")
    assert (node.mode, node.uid, node.gid, node.mtime_ns, node.implied) == (stat.S_IFDIR | 0o755, 0, 0, 0, True)
    assert [tree.path(i) for i in tree.implied()] == [b"", b"a", b"a/b"]
    assert not at(tree, b"a/b/f").implied


def test_a_later_entry_lists_an_implied_directory() -> None:
    """A directory that is implied first and listed later is not implied, and keeps its children."""
    tree = LayerTree.of([entry(b"a/f"), entry(b"a", "dir", mode=0o711)])
    assert (at(tree, b"a").mode, at(tree, b"a").implied) == (stat.S_IFDIR | 0o711, False)
    assert paths(tree) == [b"a", b"a/f"]


def test_a_directory_named_again_is_fully_overwritten() -> None:
    """The later entry's zero values count too; the children stay; the parent's links are not counted twice."""
    pax = {b"SCHILY.xattr.user.a": b"1"}
    tree = LayerTree.of(
        [entry(b"d", "dir", uid=5, mode=0o777, pax=pax), entry(b"d/f"), entry(b"d/", "dir", uid=0, mode=0)]
    )
    node = at(tree, b"d")
    assert (node.uid, node.mode, node.xattrs) == (0, stat.S_IFDIR, {})
    assert paths(tree) == [b"d", b"d/f"]
    assert tree.node(ROOT).nlink == 3


def test_a_file_replaces_a_directory_with_all_below() -> None:
    """A later non-directory takes the place of a directory and everything in it, and the node count forgets them."""
    tree = LayerTree.of([entry(b"d/x/y"), entry(b"d", offset=2048, size=1)])
    assert paths(tree) == [b"d"]
    assert at(tree, b"d").data_offset == 2048
    assert len(tree) == 2
    assert tree.node(ROOT).nlink == 2


def test_a_directory_replaces_a_file() -> None:
    """A later directory takes the place of a file and may get children."""
    tree = LayerTree.of([entry(b"d"), entry(b"d", "dir"), entry(b"d/f")])
    assert paths(tree) == [b"d", b"d/f"]


def test_a_replaced_directory_comes_back_empty() -> None:
    """A directory that was replaced and is listed again has neither its old children nor its opaque mark."""
    tree = LayerTree.of([entry(b"d/x"), entry(b"d/.wh..wh..opq"), entry(b"d"), entry(b"d", "dir")])
    assert paths(tree) == [b"d"]
    assert not at(tree, b"d").opaque


def test_hard_links_share_a_node() -> None:
    """All names of a file lead to one node, which counts them and keeps the first member's attributes and name."""
    tree = LayerTree.of(
        [
            entry(b"./a", offset=1024, size=9),
            entry(b"d/b", "hardlink", to=b"/a", size=9, mode=0o777),
            entry(b"c", "hardlink", to=b"d/../d/b"),
        ]
    )
    assert tree.find(b"a") == tree.find(b"d/b") == tree.find(b"c")
    node = at(tree, b"c")
    assert (node.nlink, node.size, node.data_offset, node.first_name) == (3, 9, 1024, b"./a")
    assert node.mode == stat.S_IFREG | 0o644


def test_a_replaced_name_no_longer_counts_as_a_link() -> None:
    """Replacing a hard link, or a directory that holds one, lowers the count of the file that stays."""
    links = [entry(b"a", offset=1024, size=9), entry(b"d/b", "hardlink", to=b"a"), entry(b"c", "hardlink", to=b"a")]
    tree = LayerTree.of([*links, entry(b"a", "symlink", to=b"x"), entry(b"d", "fifo")])
    assert (at(tree, b"c").nlink, at(tree, b"c").data_offset) == (1, 1024)
    assert at(tree, b"a").nlink == 1


def test_a_hard_link_to_a_symbolic_link_shares_it() -> None:
    """link(2) does not follow, so the name is another of the symbolic link itself."""
    tree = LayerTree.of([entry(b"s", "symlink", to=b"/no/where"), entry(b"h", "hardlink", to=b"s")])
    assert (at(tree, b"h").target, at(tree, b"h").nlink, at(tree, b"h").size) == (b"/no/where", 2, 9)


@pytest.mark.parametrize(
    "entries",
    [
        [entry(b"h", "hardlink", to=b"later"), entry(b"later")],
        [entry(b"h", "hardlink", to=b"missing")],
        [entry(b"h", "hardlink", to=b"h")],
        [entry(b"f"), entry(b"f", "hardlink", to=b"f")],
        [entry(b"d/f"), entry(b"d", "hardlink", to=b"d/f")],
        [entry(b"d", "dir"), entry(b"h", "hardlink", to=b"d")],
        [entry(b"h", "hardlink", to=b"")],
        [entry(b"h", "hardlink", to=b"../..")],
        [entry(b".wh.x"), entry(b"h", "hardlink", to=b".wh.x")],
        [entry(b".wh.x"), entry(b"h", "hardlink", to=b"x")],
        [entry(b"s", "symlink", to=b"d"), entry(b"d/f"), entry(b"h", "hardlink", to=b"s/f")],
    ],
)
def test_hard_links_that_unpacking_would_refuse(entries: list[TocEntry]) -> None:
    """A target that is not there before the link, or is a directory, costs the layer its lazy loading."""
    with pytest.raises(InvalidZtoc, match="hard link"):
        LayerTree.of(entries)


def test_members_below_something_else_than_a_directory_are_refused() -> None:
    """Neither a file nor a symbolic link can have members below it."""
    for kind in ("reg", "symlink", "fifo"):
        with pytest.raises(InvalidZtoc, match="not a directory"):
            LayerTree.of([entry(b"x", kind, to=b"y"), entry(b"x/f")])


def test_a_whiteout_is_a_device_of_the_name_it_hides() -> None:
    """`.wh.X` appears as a character device 0/0 called X, root's, without permissions, with the marker's time."""
    tree = LayerTree.of([entry(b"d/.wh.gone", size=5, uid=7, mode=0o777, time="1970-01-01T00:00:09Z")])
    assert paths(tree) == [b"d", b"d/gone"]
    node = at(tree, b"d/gone")
    assert (node.mode, node.rdev, node.uid, node.size, node.nlink) == (stat.S_IFCHR, 0, 0, 0, 1)
    assert (node.mtime_ns, node.first_name, node.data_offset) == (9 * 10**9, b"d/.wh.gone", 0)


@pytest.mark.parametrize("whiteout_first", [True, False])
def test_a_real_entry_hides_the_whiteout_beside_it(*, whiteout_first: bool) -> None:
    """Whiteouts are of lower layers, so an entry of the same layer is shown whatever their order."""
    both = [entry(b".wh.f"), entry(b"f", size=3)]
    tree = LayerTree.of(both if whiteout_first else both[::-1])
    assert paths(tree) == [b"f"]
    assert at(tree, b"f").size == 3


@pytest.mark.parametrize("whiteout_first", [True, False])
def test_a_directory_beside_its_whiteout_is_not_opaque(*, whiteout_first: bool) -> None:
    """The directory takes the whiteout's place, as when containerd unpacks the layer over an overlay."""
    both = [entry(b"a/.wh.d"), entry(b"a/d/f")]
    tree = LayerTree.of(both if whiteout_first else both[::-1])
    assert not at(tree, b"a/d").opaque
    assert paths(tree) == [b"a", b"a/d", b"a/d/f"]


def test_the_opaque_marker_sets_a_flag_and_is_hidden() -> None:
    """`.wh..wh..opq` makes its directory opaque, also the root and also before the directory is listed."""
    tree = LayerTree.of([entry(b".wh..wh..opq"), entry(b"d/.wh..wh..opq"), entry(b"d", "dir"), entry(b"e", "dir")])
    assert paths(tree) == [b"d", b"e"]
    assert [at(tree, path).opaque for path in (b"", b"d", b"e")] == [True, True, False]


@pytest.mark.parametrize(
    "name",
    [
        b".wh.",
        b".wh..",
        b".wh...",
        b".wh..wh.",
        b".wh..wh.plnk",
        b".wh..wh.plnk/1.2",
        b".wh..wh.aufs",
        b".wh.x/f",
        b"d/.wh..wh.x",
    ],
)
def test_no_name_begins_with_the_whiteout_prefix(name: bytes) -> None:
    """Markers that hide nothing nameable, and everything below any marker, are not shown at all."""
    tree = LayerTree.of([entry(b"d", "dir"), entry(name)])
    assert paths(tree) == [b"d"]
    assert tree.lookup(ROOT, name) is None


def test_lookup_and_children_agree() -> None:
    """Children come bytewise sorted; each is found by lookup, and nothing else is."""
    tree = LayerTree.of([entry(name) for name in (b"b", b"a", b"\xff", b"B", b"a.b", b"d/x")])
    assert [name for name, _ in tree.children(ROOT)] == [b"B", b"a", b"a.b", b"b", b"d", b"\xff"]
    assert all(tree.lookup(ROOT, name) == node for name, node in tree.children(ROOT))
    for absent in (b"", b"x", b".", b"..", b"\xff\xff", b"A"):
        assert tree.lookup(ROOT, absent) is None
    file = tree.find(b"a")
    assert file is not None
    assert tree.lookup(file, b"b") is None
    assert tree.children(file) == []


def test_devices() -> None:
    """Devices have their numbers; other members none, whatever their header says."""
    tree = LayerTree.of(
        [entry(b"c", "char", dev=(5, 300)), entry(b"b", "block", dev=(259, 1)), entry(b"f", dev=(9, 9))]
    )
    assert (at(tree, b"c").mode, at(tree, b"c").rdev) == (stat.S_IFCHR | 0o644, os.makedev(5, 300))
    assert (at(tree, b"b").mode, at(tree, b"b").rdev) == (stat.S_IFBLK | 0o644, os.makedev(259, 1))
    assert at(tree, b"f").rdev == 0


def test_size_and_offset_are_those_of_regular_files_only() -> None:
    """A size on a member without data is no size of a file."""
    tree = LayerTree.of(
        [entry(b"d", "dir", size=9), entry(b"p", "fifo", size=9), entry(b"s", "symlink", size=9, to=b"ab")]
    )
    assert [(at(tree, p).size, at(tree, p).data_offset) for p in (b"d", b"p", b"s")] == [(0, 0), (0, 0), (2, 0)]


def test_owner_minus_one_is_root() -> None:
    """chown(2) leaves the owner for 2**32 - 1, which leaves whoever unpacks."""
    node = at(LayerTree.of([entry(b"f", uid=2**32 - 1, gid=2**32 - 2)]), b"f")
    assert (node.uid, node.gid) == (0, 2**32 - 2)


def test_extended_attributes_but_never_overlayfs_own() -> None:
    """SCHILY.xattr. records count, empty values too; those that steer overlayfs are an image's to give to nobody."""
    pax = {
        b"path": b"f",
        b"LIBARCHIVE.xattr.user.z": b"eA==",
        b"SCHILY.xattr.user.empty": b"",
        b"SCHILY.xattr.security.capability": b"\x01\0\0\x02",
        b"SCHILY.xattr.trusted.other": b"t",
        b"SCHILY.xattr.trusted.overlay.opaque": b"y",
        b"SCHILY.xattr.trusted.overlay.redirect": b"/etc",
        b"SCHILY.xattr.user.overlay.metacopy": b"",
    }
    node = at(LayerTree.of([entry(b"f", pax=pax)]), b"f")
    assert node.xattrs == {b"user.empty": b"", b"security.capability": b"\x01\0\0\x02"}


@pytest.mark.parametrize(
    "bad",
    [
        entry(b"a\0b"),
        entry(b"a" * 256),
        entry(b"/".join([b"a" * 255] * 17)),
        entry(b"a/" * 1025),
        entry(b"d/.wh.\0"),
        entry(b"s", "symlink", to=b""),
        entry(b"s", "symlink", to=b"a\0b"),
        entry(b"s", "symlink", to=b"a" * 4096),
        entry(b"c", "char", dev=(-1, 0)),
        entry(b"c", "block", dev=(0, 2**20)),
        entry(b"f", size=-1),
        entry(b"f", offset=-1),
        entry(b"f", offset=2**62, size=2**62),
        entry(b"f", uid=2**32),
        entry(b"f", gid=-1),
        entry(b"f", "socket"),  # type: ignore[arg-type]
        entry(b"f", pax={b"SCHILY.xattr.": b"x"}),
        entry(b"f", pax={b"SCHILY.xattr.user.\0": b"x"}),
        entry(b"f", pax={b"SCHILY.xattr.user." + b"a" * 251: b"x"}),
        entry(b"f", pax={b"SCHILY.xattr.user.a": bytes(65_537)}),
    ],
)
def test_what_no_file_system_could_hold_is_refused(bad: TocEntry) -> None:
    """Such a member fails the layer with InvalidZtoc, in a message of bounded length."""
    with pytest.raises(InvalidZtoc) as caught:
        LayerTree.of([bad])
    assert len(str(caught.value)) < 600


def test_the_longest_names_that_fit() -> None:
    """The limits themselves are allowed."""
    long = b"/".join([b"a" * 255] * 16)
    tree = LayerTree.of([entry(long), entry(b"b/" * 1023 + b"c"), entry(b"./" * 5000 + b"d")])
    assert len(long) == tree_draft.MAX_PATH
    assert tree.find(long) is not None
    assert tree.find(b"b/" * 1023 + b"c") is not None
    assert tree.find(b"d") is not None


def test_the_number_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Implied parents, whiteouts and replaced nodes count, so few bytes cannot make many nodes."""
    monkeypatch.setattr(tree_draft, "MAX_NODES", 10)
    assert len(LayerTree.of([entry(b"a/b/c/d/e/f/g/h/i")])) == 10
    for crowd in ([b"a/b/c/d/e/f/g/h/i/j"], [b".wh.x"] * 10, [b"f"] * 10):
        with pytest.raises(InvalidZtoc, match="more than 10 files"):
            LayerTree.of([entry(name) for name in crowd])


def test_a_large_layer_takes_little_memory() -> None:
    """Ten thousand files take about a hundred bytes each beside their names, for many layers are mounted at once."""
    entries = [entry(b"usr/lib/d%d/file-%d" % (i // 50, i), time="2024-05-06T07:08:09Z") for i in range(10_000)]
    tracemalloc.start()
    try:
        tree = LayerTree.of(entries)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tree) == 10_000 + 200 + 3
    assert kept < 200 * len(tree)


def test_a_directory_that_was_replaced_is_forgotten() -> None:
    """Once a file has taken a directory's place nothing can go into it, and a later directory there starts empty."""
    before = [entry(b"a/b/f"), entry(b"a/b/g"), entry(b"a/b")]
    with pytest.raises(InvalidZtoc, match="not a directory"):
        LayerTree.of([*before, entry(b"a/b/h")])
    tree = LayerTree.of([*before, entry(b"a/b/", "dir"), entry(b"a/b/h")])
    directory = tree.find(b"a/b")
    assert directory is not None
    assert [name for name, _ in tree.children(directory)] == [b"h"]
