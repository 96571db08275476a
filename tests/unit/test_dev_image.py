# SPDX-License-Identifier: Apache-2.0
"""soci_dev.image and soci_dev.tarball: layers hold what the tree held, and are the same each time."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import zstandard

from soci_dev import image
from soci_dev.tarball import member, members_of
from support import images


def read(layer: image.Layer, folder: Path) -> list[tarfile.TarInfo]:
    blob = (folder / "blobs/sha256" / layer.digest.removeprefix("sha256:")).read_bytes()
    tar = gzip.decompress(blob)
    assert f"sha256:{hashlib.sha256(tar).hexdigest()}" == layer.diff_id
    assert len(blob) == layer.size
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getmembers()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "sub/file").write_bytes(b"content")
    os.utime(root / "sub/file", ns=(0, 1_234_567_890_123_456_789))
    os.link(root / "sub/file", root / "sub/second")
    (root / "link").symlink_to("sub/file")
    os.mkfifo(root / "pipe")
    (root / "sub/file").chmod(0o4711)
    return root


def test_tree_round_trip(tree: Path, tmp_path: Path) -> None:
    """Modes, links, fifos and nanoseconds arrive in the layer; a later name of one inode is a hard link."""
    found = {entry.name: entry for entry in read(image.add_tree(tmp_path / "layout", tree), tmp_path / "layout")}
    assert list(found) == ["link", "pipe", "sub", "sub/file", "sub/second"]
    assert found["sub/file"].mode == 0o4711
    assert found["sub/file"].pax_headers["mtime"] == "1234567890.123456789"
    assert (found["sub/second"].type, found["sub/second"].linkname) == (tarfile.LNKTYPE, "sub/file")
    assert (found["link"].type, found["link"].linkname) == (tarfile.SYMTYPE, "sub/file")
    assert found["pipe"].isfifo()


def test_same_tree_same_digest(tree: Path, tmp_path: Path) -> None:
    """Building twice gives the same blob."""
    assert image.add_tree(tmp_path / "a", tree) == image.add_tree(tmp_path / "b", tree)


@pytest.mark.root
def test_overlay_upper_becomes_whiteouts(tmp_path: Path) -> None:
    """An upper directory's char device 0/0 and opaque mark become the whiteout files of layers."""
    upper = tmp_path / "upper"
    (upper / "opaque").mkdir(parents=True)
    os.mknod(upper / "gone", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.mknod(upper / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "opaque", "user.kept", b"yes")
    found = {info.name: info for info, _ in members_of(upper, overlay=True)}
    assert list(found) == [".wh.gone", "null", "opaque", "opaque/.wh..wh..opq"]
    assert (found["null"].devmajor, found["null"].devminor) == (1, 3)
    assert [key for key in found["opaque"].pax_headers if key != "mtime"] == ["SCHILY.xattr.user.kept"]


def test_layout_is_read_back(tmp_path: Path) -> None:
    """A finished layout gives the same image; an unfinished one none."""
    layout = tmp_path / "layout"
    assert image.read_image(layout) is None
    layer = image.add_layer(layout, [member("a", content=b"a")])
    assert image.read_image(layout) is None
    written = image.write_image(layout, [layer], cmd=["/a"])
    assert image.read_image(layout) == written
    assert written.size == layer.size


def test_uncompressed_layer(tmp_path: Path) -> None:
    """Without gzip the blob is the tar: digest and diff_id agree, and the media type says so."""
    layer = image.add_layer(tmp_path, [member("a", content=b"a")], gzip=False)
    assert layer.digest == layer.diff_id
    assert layer.media_type == image.LAYER_TAR


def test_torture_image_holds_what_it_says(tmp_path: Path) -> None:
    """Five gzip layers with every kind of member, capabilities, long and non-ASCII names, duplicates, whiteouts."""
    built = images.torture_image(tmp_path / "layout")
    assert len(built.layers) == 5
    members = [info for make in images._TORTURE for info, _ in make()]
    kinds = {info.type for info in members}
    assert kinds == {b"0", b"1", b"2", b"3", b"4", b"5", b"6"}
    assert sum(info.isreg() for info in members) > images.SMALL_FILES
    assert any("security.capability" in key for info in members for key in info.pax_headers)
    assert images.LARGE_FILE_BYTES in {info.size for info in members}


def test_implied_directories() -> None:
    """A directory listed below and only implied above counts, one that the upper layer lists does not."""
    implied = images.implied_directories()
    assert {"modes/sub/deep", "caps/more/implied", "linked-too", "modes"} <= implied
    assert not {"linked", "names", "half-removed"} & implied


@pytest.mark.parametrize("frame_bytes", [0, 5000])
def test_zstd_layers(frame_bytes: int, tmp_path: Path) -> None:
    """One frame, or one for every so many bytes of the tar and a skippable one behind; the same tar comes out."""
    members = [member(f"f{number}", content=images.noise(number, 8000)) for number in range(3)]
    layer = image.add_layer(tmp_path, members, compression="zstd", frame_bytes=frame_bytes)
    blob = (tmp_path / "blobs/sha256" / layer.digest.removeprefix("sha256:")).read_bytes()
    frames: list[bytes] = []
    left = blob
    while left:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(left))
        assert frame.eof
        left = frame.unused_data
    tar = b"".join(frames)
    assert f"sha256:{hashlib.sha256(tar).hexdigest()}" == layer.diff_id
    assert layer.media_type == image.LAYER_ZSTD
    sizes = [len(frame) for frame in frames]
    assert sizes == [len(tar)] if not frame_bytes else {*sizes[:-2]} == {frame_bytes} and sizes[-1] == 0
