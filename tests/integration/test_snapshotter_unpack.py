# SPDX-License-Identifier: Apache-2.0
"""Unpacking: the torture image against GNU tar, what overlayfs wants of whiteouts, and layers that mean harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import resource
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidGzip, InvalidTar, LimitExceeded, Mismatch, SociError, Unsupported
from soci.oci import OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD
from soci_dev import image
from soci_dev.tarball import Member, member
from soci_snapshotter import inflated
from soci_snapshotter import unpack as module
from soci_snapshotter.unpack import unpack
from support import tars
from support.images import BEFORE_1970, CAP_NET_BIND, torture_image
from support.treecmp import Seen, differences, look

pytestmark = pytest.mark.root

DIR, SYM, LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def pack(members: Iterable[Member], folder: Path) -> tuple[Path, Digest]:
    """A gzip layer of these members: its blob and its diff_id."""
    layer = image.add_layer(folder, members)
    blob = folder / "blobs" / "sha256" / layer.digest.partition(":")[2]
    return blob, Digest(layer.diff_id)


def put(tar: bytes, tmp_path: Path, *, lower: tuple[Path, ...] = (), diff_id: Digest | None = None) -> Path:
    """Unpack an uncompressed tar into a fresh directory."""
    blob, target = tmp_path / "blob", tmp_path / "inside" / "target"
    tmp_path.mkdir(exist_ok=True)
    blob.write_bytes(tar)
    target.mkdir(parents=True)
    unpack(blob, target, media_type=OCI_LAYER, diff_id=diff_id or sha256_digest(tar), lower=lower)
    return target


def made_of(members: Iterable[Member], tmp_path: Path, *, lower: tuple[Path, ...] = ()) -> Path:
    """Unpack these members into a fresh directory."""
    blob, diff_id = pack(members, tmp_path / "layout")
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    unpack(blob, target, media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=lower)
    return target


def gnu_tar(blob: Path, target: Path) -> set[str]:
    """What GNU tar makes of a layer, whiteouts then turned into overlayfs's; the directories it was not told of."""
    words = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--same-owner",
        "--numeric-owner",
        "--delay-directory-restore",
        "-pxzf",
        str(blob),
    ]
    subprocess.run([*words, "-C", str(target)], check=True, timeout=50)
    with tarfile.open(blob) as archive:
        listed = {os.path.normpath(info.name) for info in archive if info.isdir()}
    for folder in [target, *(path for path in target.rglob("*") if path.is_dir() and not path.is_symlink())]:
        times = folder.stat()
        for path in list(folder.iterdir()):
            if path.name == ".wh..wh..opq":
                path.unlink()
                os.setxattr(folder, "trusted.overlay.opaque", b"y")
            elif path.name.startswith(".wh."):
                path.unlink()
                os.mknod(folder / path.name[4:], stat.S_IFCHR, 0)
        os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    folders = {os.path.relpath(folder, target) for folder, _, _ in os.walk(target)}
    return {"" if name == "." else name for name in folders - listed}


def without_whiteout_times(seen: dict[bytes, Seen]) -> dict[bytes, Seen]:
    """Nobody looks at a whiteout's time."""
    return {
        path: replace(one, mtime_ns=None) if one.type == stat.S_IFCHR and one.rdev == 0 else one
        for path, one in seen.items()
    }


@pytest.mark.parametrize("number", range(5))
def test_like_gnu_tar(number: int, tmp_path: Path) -> None:
    """Types, owners, modes, times, xattrs, capabilities, devices, links and contents are what GNU tar makes."""
    torture = torture_image()
    layer = torture.layers[number]
    blob = torture.folder / "blobs/sha256" / layer["digest"].partition(":")[2]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    unlisted = gnu_tar(blob, theirs)
    diff_id = sha256_digest(gzip.decompress(blob.read_bytes()))
    size, entries = unpack(blob, ours, media_type=layer["mediaType"], diff_id=diff_id, lower=[])
    old = os.fsencode(BEFORE_1970)
    timeless = frozenset(unlisted)
    mine, other = (without_whiteout_times(look(top, timeless=timeless)) for top in (ours, theirs))
    if old in mine:  # brought up to 1970, as containerd does
        assert mine[old].mtime_ns == 0
        mine[old] = replace(mine[old], mtime_ns=other[old].mtime_ns)
    assert differences(mine, other) == []
    with tarfile.open(blob) as archive:
        infos = archive.getmembers()
    assert entries == len(infos)
    assert size == sum(info.size for info in infos if info.isreg() and not Path(info.name).name.startswith(".wh."))


def test_setuid_and_capability_survive_the_owner(tmp_path: Path) -> None:
    """A change of owner clears both, so they are set after it."""
    xattrs = {"security.capability": CAP_NET_BIND}
    target = made_of([member("x", content=b"x", mode=0o4755, uid=1000, gid=1000, xattrs=xattrs)], tmp_path)
    found = (target / "x").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o4755, 1000)
    assert os.getxattr(target / "x", "security.capability") == CAP_NET_BIND


def test_the_root_directory(tmp_path: Path) -> None:
    """The layer's entry for the root sets the root's attributes."""
    target = made_of([member("./", DIR, mode=0o711, uid=3, gid=4, mtime_ns=5), member("f")], tmp_path)
    found = target.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns) == (0o711, 3, 4, 5)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_implied_directories(tmp_path: Path, umask: int) -> None:
    """They take owner, mode, xattrs and time of the nearest lower layer that shows them; else 0755 of root."""
    near, far = tmp_path / "near", tmp_path / "far"
    for lower, mode, uid in ((near, 0o750, 7), (far, 0o705, 8)):
        (lower / "a/b").mkdir(parents=True)
        (lower / "a/b").chmod(mode)
        os.chown(lower / "a/b", uid, uid)
    (far / "c").mkdir(mode=0o700)
    os.setxattr(near / "a/b", "user.x", b"1")
    os.setxattr(near / "a/b", "trusted.overlay.opaque", b"y")
    os.utime(near / "a/b", ns=(1, 12345))
    before = os.umask(umask)
    try:
        target = made_of([member("a/b/f"), member("c/f"), member("new/f")], tmp_path, lower=(near, far))
    finally:
        os.umask(before)
    found = (target / "a/b").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime_ns) == (0o750, 7, 12345)
    assert os.listxattr(target / "a/b") == ["user.x"]
    assert stat.S_IMODE((target / "c").stat().st_mode) == 0o700
    assert stat.S_IMODE((target / "new").stat().st_mode) == 0o755


@pytest.mark.parametrize("hidden", ["whiteout", "opaque", "symlink", "file"])
def test_hidden_lower_directories_are_not_looked_at(tmp_path: Path, hidden: str) -> None:
    """What a nearer layer hides says nothing of an implied directory, and no symlink of an image is followed."""
    near, far, host = tmp_path / "near", tmp_path / "far", tmp_path / "host"
    for top in (far, host):
        (top / "a").mkdir(parents=True)
        (top / "a").chmod(0o700)
    near.mkdir()
    if hidden == "whiteout":
        os.mknod(near / "a", stat.S_IFCHR, 0)
    elif hidden == "opaque":
        os.setxattr(near, "trusted.overlay.opaque", b"y")
    elif hidden == "symlink":
        (near / "a").symlink_to(host / "a")
    else:
        (near / "a").touch()
    target = made_of([member("a/f")], tmp_path, lower=(near, far))
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o755


def test_overlayfs_agrees(tmp_path: Path) -> None:
    """The unpacked layers, mounted over one another, hide what the whiteouts and the opaque directory hide."""
    torture = torture_image()
    tops: list[Path] = []
    for number in (0, 2):
        top = tmp_path / str(number)
        top.mkdir()
        blob = torture.folder / "blobs/sha256" / torture.layers[number]["digest"].partition(":")[2]
        diff_id = sha256_digest(gzip.decompress(blob.read_bytes()))
        unpack(blob, top, media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=tops)
        tops.insert(0, top)
    shown = tmp_path / "shown"
    shown.mkdir()
    options = "lowerdir=" + ":".join(map(str, tops))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, shown], check=True, timeout=20)
    try:
        assert not (shown / "removed-file").exists()
        assert not (shown / "removed-directory").exists()
        assert [path.name for path in (shown / "opaque").iterdir()] == ["upper"]
        assert sorted(path.name for path in (shown / "half-removed").iterdir()) == ["kept", "sub", "upper"]
        assert (shown / "replaced-by-file").is_file()
        assert [path.name for path in (shown / "replaced-by-directory").iterdir()] == ["inside"]
        assert (shown / "modes/none").exists()
    finally:
        subprocess.run(["umount", shown], check=True, timeout=20)


def test_whiteouts_beside_real_entries(tmp_path: Path) -> None:
    """A whiteout does not hide what the same layer brings, before it or behind it; aufs's own files are nothing."""
    target = made_of(
        [
            member("a", content=b"a"),
            member(".wh.a"),
            member(".wh.b"),
            member("b", content=b"b"),
            member(".wh.d"),
            member("d", DIR, mode=0o755),
            member(".wh..wh.plnk", DIR),
            member(".wh..wh.aufs"),
            member(".wh.."),
            member(".wh."),
        ],
        tmp_path,
    )
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "d"]
    assert (target / "a").read_bytes() + (target / "b").read_bytes() == b"ab"
    assert (target / "d").is_dir()


def test_the_later_member_counts(tmp_path: Path) -> None:
    """Each type over each other type; a directory over a directory keeps its children."""
    kinds: dict[str, Callable[[str], list[Member]]] = {
        "file": lambda name: [member(name, content=b"x")],
        "dir": lambda name: [member(name, DIR, mode=0o755), member(f"{name}/child")],
        "link": lambda name: [member(name, SYM, linkname="/etc")],
        "fifo": lambda name: [member(name, tarfile.FIFOTYPE)],
    }
    members: list[Member] = []
    for first, earlier in kinds.items():
        for second, later in kinds.items():
            members += earlier(f"{first}-{second}") + later(f"{first}-{second}")
    target = made_of(members, tmp_path)
    checks: dict[str, Callable[[Path], bool]] = {
        "file": lambda path: path.is_file() and not path.is_symlink(),
        "dir": lambda path: path.is_dir() and not path.is_symlink() and (path / "child").exists(),
        "link": Path.is_symlink,
        "fifo": Path.is_fifo,
    }
    for first in kinds:
        for second, check in checks.items():
            assert check(target / f"{first}-{second}"), (first, second)


def test_a_directory_that_comes_back(tmp_path: Path) -> None:
    """After a file stood in its place it is another directory: empty, and the one that later members go to."""
    target = made_of(
        [
            member("d", DIR, mode=0o755),
            member("d/e/f"),
            member("d", content=b"x"),
            member("d", DIR, mode=0o700),
            member("d/e/g"),
        ],
        tmp_path,
    )
    assert [path.name for path in (target / "d/e").iterdir()] == ["g"]
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o700


HOSTILE: dict[str, bytes] = {
    "dots": tars.header(b"../../escape", size=3) + tars.padded(b"bad"),
    "dots-inside": tars.header(b"a/../../../escape", size=3) + tars.padded(b"bad"),
    "absolute": tars.header(b"/escape", size=3) + tars.padded(b"bad"),
    "symlink-then-below": tars.header(b"s", b"2", linkname=b"/OUTSIDE") + tars.header(b"s/escape"),
    "symlink-up-then-below": tars.header(b"s", b"2", linkname=b"../..") + tars.header(b"s/escape"),
    "symlink-then-file": tars.header(b"s", b"2", linkname=b"/OUTSIDE/kept") + tars.header(b"s", size=3) + tars.padded(b"x"),
    "symlink-then-directory": tars.header(b"s", b"2", linkname=b"/OUTSIDE") + tars.header(b"s", b"5") + tars.header(b"s/f"),
    "symlink-then-whiteout": tars.header(b"s", b"2", linkname=b"/OUTSIDE") + tars.header(b"s/.wh.kept"),
    "symlink-then-opaque": tars.header(b"s", b"2", linkname=b"/OUTSIDE") + tars.header(b"s/.wh..wh..opq"),
    "symlink-chmod": tars.header(b"s", b"2", linkname=b"/OUTSIDE/kept", mode=b"0007777\0"),
    "link-outside": tars.header(b"h", b"1", linkname=b"../../OUTSIDE/kept"),
    "link-absolute": tars.header(b"h", b"1", linkname=b"/etc/passwd"),
    "link-through-symlink": tars.header(b"s", b"2", linkname=b"/OUTSIDE") + tars.header(b"h", b"1", linkname=b"s/kept"),
    "link-to-symlink": tars.header(b"s", b"2", linkname=b"/OUTSIDE/kept") + tars.header(b"h", b"1", linkname=b"s"),
    "link-to-symlink-then-write": tars.header(b"s", b"2", linkname=b"/OUTSIDE/kept")
    + tars.header(b"h", b"1", linkname=b"s")
    + tars.header(b"h", size=3)
    + tars.padded(b"bad"),
    "link-to-directory": tars.header(b"d", b"5") + tars.header(b"h", b"1", linkname=b"d"),
    "link-to-root": tars.header(b"h", b"1", linkname=b"/"),
    "link-to-itself": tars.header(b"h", b"1", linkname=b"h"),
    "whiteout-dots": tars.header(b"a/.wh...") + tars.header(b".wh...") + tars.header(b"a/.wh."),
    "root-as-file": tars.header(b".", size=3) + tars.padded(b"bad"),
    "root-as-link": tars.header(b"/", b"2", linkname=b"/OUTSIDE") + tars.header(b"escape"),
    "below-a-file": tars.header(b"f") + tars.header(b"f/g"),
    "below-a-device": tars.header(b"f", b"3") + tars.header(b"f/g"),
    "huge-size": tars.header(b"f", size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7),
    "large-owner": tars.header(b"f", uid=b"\x80\0\0\xff\xff\xff\xff\xff"),
    "long-name": tars.extension(b"L", b"n" * 300 + b"\0") + tars.header(b"x"),
    "long-path": tars.extension(b"L", b"n/" * 3000 + b"\0") + tars.header(b"x"),
    "zero-in-name": tars.pax(path=b"a\0b") + tars.header(b"x"),
    "bad-xattr": tars.pax(SCHILY_xattr_nonsense=b"1") + tars.header(b"x"),
    "huge-xattr": tars.pax(SCHILY_xattr_user_big=b"1" * 70_000) + tars.header(b"x"),
    "overlay-xattr": tars.pax(SCHILY_xattr_trusted_overlay_redirect=b"/OUTSIDE") + tars.header(b"d", b"5"),
    "device-number": tars.header(b"f", b"3", at_329=b"7777777\0", at_337=b"7777777\0"),
    "no-end": tars.header(b"f", size=3),
    "half-a-header": tars.header(b"f")[:300],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(name: str, tmp_path: Path) -> None:
    """Nothing outside the target is touched, whatever the tar says, and nothing but our own errors comes of it."""
    outside = Path(tempfile.mkdtemp(prefix="o-"))  # short: a link target has 100 bytes
    try:
        (outside / "kept").write_bytes(b"precious")
        passwd = Path("/etc/passwd")
        before = look(outside), {path.name for path in tmp_path.iterdir()}, passwd.stat(), passwd.read_bytes()
        tar = _with_outside(HOSTILE[name], os.fsencode(outside))
        with suppress(SociError):
            put(tar + (b"" if name in {"no-end", "half-a-header"} else tars.END), tmp_path)
        left = {path.name for path in tmp_path.iterdir()} - {"blob", "inside"}
        assert (look(outside), left, passwd.stat().st_mtime_ns) == (before[0], before[1], before[2].st_mtime_ns)
        assert (passwd.read_bytes(), passwd.stat().st_nlink) == (before[3], before[2].st_nlink)
    finally:
        shutil.rmtree(outside)
    assert [entry.name for entry in (tmp_path / "inside").iterdir()] == ["target"]
    assert not Path("/escape").exists()
    for found in (tmp_path / "inside/target").rglob("*"):
        assert os.listxattr(found, follow_symlinks=False) in ([], ["user.big"])


def _with_outside(tar: bytes, path: bytes) -> bytes:
    """Each header's link target /OUTSIDE, replaced, with the sum made right."""
    blocks = []
    for at in range(0, len(tar), tars.BLOCK):
        block = bytearray(tar[at : at + tars.BLOCK])
        if b"/OUTSIDE" in block[157:257]:
            target = bytes(block[157:257]).rstrip(b"\0").replace(b"/OUTSIDE", path)
            assert len(target) <= 100
            block[157:257] = target.ljust(100, b"\0")
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
        blocks.append(bytes(block))
    return b"".join(blocks)


def test_random_damage(tmp_path: Path) -> None:
    """A layer with any byte changed is unpacked or refused, and never anything else."""
    blob, _ = pack([member("d", DIR), member("d/f", content=b"x" * 700), member("l", LINK, linkname="d/f")], tmp_path)
    good = gzip.decompress(blob.read_bytes())
    source = random.Random(3)
    for attempt in range(200):
        damaged = bytearray(good)
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(2048)] = source.randrange(256)
        place = tmp_path / f"attempt-{attempt}"
        place.mkdir()
        with suppress(SociError):
            put(bytes(damaged), place)
        assert {path.name for path in place.iterdir()} == {"blob", "inside"}
        assert [path.name for path in (place / "inside").iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda data: data[: len(data) // 2], InvalidGzip),
        (lambda data: data[:-4], InvalidGzip),
        (lambda data: b"", InvalidGzip),
        (lambda data: data + b"garbage behind it", InvalidGzip),
        (lambda data: data[:40] + bytes([data[40] ^ 255]) + data[41:], SociError),
        (lambda data: data[:-6] + bytes(6), InvalidGzip),
        (lambda data: gzip.compress(b"no tar" * 200), InvalidTar),
    ],
)
def test_damaged_gzip(spoil: object, error: type[SociError], tmp_path: Path) -> None:
    """Truncated, followed by garbage, or changed: refused."""
    blob, diff_id = pack([member("f", content=random.Random(1).randbytes(50_000))], tmp_path / "layout")
    broken = tmp_path / "broken"
    broken.write_bytes(spoil(blob.read_bytes()))  # type: ignore[operator]
    (tmp_path / "target").mkdir()
    with pytest.raises(error):
        unpack(broken, tmp_path / "target", media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=[])


def test_many_gzip_members(tmp_path: Path) -> None:
    """A stream of thousands of tiny members is one layer."""
    blob, diff_id = pack([member("f", content=b"x" * 30_000)], tmp_path / "layout")
    data = gzip.decompress(blob.read_bytes())
    many = tmp_path / "many"
    many.write_bytes(
        b"".join(gzip.compress(data[at : at + 7]) for at in range(0, len(data), 7)) + gzip.compress(b"") * 3
    )
    (tmp_path / "target").mkdir()
    unpack(many, tmp_path / "target", media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=[])
    assert (tmp_path / "target/f").read_bytes() == b"x" * 30_000


@pytest.mark.parametrize("frame_bytes", [0, 10_000])
def test_zstd(frame_bytes: int, tmp_path: Path) -> None:
    """A layer of one frame or of many, with a skippable one behind, is what the same layer in gzip is."""
    members = [member("d", DIR, mode=0o750), member("d/f", content=random.Random(1).randbytes(50_000), uid=3)]
    layer = image.add_layer(tmp_path, members, compression="zstd", frame_bytes=frame_bytes)
    blob = tmp_path / "blobs" / "sha256" / layer.digest.partition(":")[2]
    target = tmp_path / "target"
    target.mkdir()
    unpack(blob, target, media_type=OCI_LAYER_ZSTD, diff_id=Digest(layer.diff_id), lower=[])
    ours, theirs = (look(one, timeless=frozenset({""})) for one in (target, made_of(members, tmp_path / "gzip")))
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data + b"garbage behind it",
        lambda data: data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
    ],
)
def test_damaged_zstd(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Truncated, followed by garbage, or changed: refused."""
    content = random.Random(1).randbytes(50_000)
    layer = image.add_layer(tmp_path, [member("f", content=content)], compression="zstd", frame_bytes=20_000)
    broken = tmp_path / "broken"
    broken.write_bytes(spoil((tmp_path / "blobs" / "sha256" / layer.digest.partition(":")[2]).read_bytes()))
    (tmp_path / "target").mkdir()
    with pytest.raises(SociError):
        unpack(broken, tmp_path / "target", media_type=OCI_LAYER_ZSTD, diff_id=Digest(layer.diff_id), lower=[])


def test_a_zstd_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten kilobytes that hold two hundred megabytes are refused after some of them."""
    monkeypatch.setattr(inflated, "LAYER_BYTES", 8 << 20)
    blob = tmp_path / "bomb"
    blob.write_bytes(zstandard.compress(tars.header(b"f", size=200 << 20) + bytes(200 << 20)))
    assert blob.stat().st_size < 20_000
    (tmp_path / "target").mkdir()
    with pytest.raises(LimitExceeded):
        unpack(blob, tmp_path / "target", media_type=OCI_LAYER_ZSTD, diff_id=sha256_digest(b""), lower=[])
    assert (tmp_path / "target" / "f").stat().st_size <= 8 << 20


@pytest.mark.parametrize("where", ["file", "behind"])
def test_gzip_bombs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that inflates beyond the limit is refused while little of it was written, in little memory."""
    monkeypatch.setattr(inflated, "LAYER_BYTES", 8 << 20)
    zeros = io.BytesIO()
    with gzip.GzipFile(fileobj=zeros, mode="wb", compresslevel=1) as out:
        out.write(tars.header(b"f", size=200 << 20) if where == "file" else tars.header(b"f") + tars.END)
        for _ in range(200):
            out.write(bytes(1 << 20))
    blob = tmp_path / "bomb"
    blob.write_bytes(zeros.getvalue())
    (tmp_path / "target").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LimitExceeded):
        unpack(blob, tmp_path / "target", media_type=OCI_LAYER_GZIP, diff_id=sha256_digest(b""), lower=[])
    assert (tmp_path / "target/f").stat().st_size <= 8 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large a file is refused before it is begun; so are too many members and too many directory names."""
    with pytest.raises(LimitExceeded):
        put(tars.header(b"f", size=b"\x80\0\0\0\0\0\x01" + b"\0" * 5) + tars.END, tmp_path / "1")
    assert not (tmp_path / "1/inside/target/f").exists()
    tar = b"".join(tars.header(b"d%d" % number, b"5") for number in range(50)) + tars.END
    monkeypatch.setattr(module, "NAMES_BYTES", 100)
    with pytest.raises(LimitExceeded):
        put(tar, tmp_path / "2")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_ENTRIES", 49)
    with pytest.raises(LimitExceeded):
        put(tar, tmp_path / "3")


def test_deep_directories_replaced(tmp_path: Path) -> None:
    """A directory as deep as a path can be is replaced by a file without recursion."""
    deep = b"d/" * 2040
    tar = (
        tars.extension(b"L", deep + b"f\0")
        + tars.header(b"x")
        + tars.header(b"d", size=2)
        + tars.padded(b"ok")
        + tars.END
    )
    assert (put(tar, tmp_path) / "d").read_bytes() == b"ok"


def test_times_beyond_the_clock(tmp_path: Path) -> None:
    """Before 1970 and beyond 64 bits of nanoseconds is 1970, as containerd has it."""
    target = made_of(
        [
            member("old", mtime_ns=-5),
            member("far", mtime_ns=(1 << 63) + 5),
            member("late", mtime_ns=4_000_000_000_000_000_001),
        ],
        tmp_path,
    )
    assert [(target / name).stat().st_mtime_ns for name in ("old", "far", "late")] == [0, 0, 4_000_000_000_000_000_001]


def test_diff_id(tmp_path: Path) -> None:
    """Bytes that are not what the image says are a `Mismatch`, also where only what lies behind the archive differs."""
    tar = tars.header(b"f") + tars.END
    with pytest.raises(Mismatch):
        put(tar + bytes(512), tmp_path / "1", diff_id=sha256_digest(tar))
    put(tar, tmp_path / "2", diff_id=Digest("sha512:" + hashlib.sha512(tar).hexdigest()))
    with pytest.raises(Mismatch):
        put(tar, tmp_path / "3", diff_id=Digest("sha512:" + "0" * 128))


@pytest.mark.parametrize("media_type", [OCI_LAYER_ZSTD + "+encrypted", OCI_LAYER_GZIP + "+encrypted", "text/plain", ""])
def test_unsupported_types(media_type: str, tmp_path: Path) -> None:
    """What cannot be read is said to be so before anything is written."""
    (tmp_path / "target").mkdir()
    with pytest.raises(Unsupported):
        unpack(tmp_path / "nothing", tmp_path / "target", media_type=media_type, diff_id=sha256_digest(b""), lower=[])


def test_places_that_are_not_there(tmp_path: Path) -> None:
    """A missing blob, target or lower directory is an error of ours."""
    blob, diff_id = pack([member("d/f")], tmp_path / "layout")
    (tmp_path / "target").mkdir()
    for one, target, lower in (
        (tmp_path / "no", tmp_path / "target", []),
        (blob, tmp_path / "no", []),
        (blob, tmp_path / "target", [tmp_path / "no"]),
    ):
        with pytest.raises(SociError):
            unpack(one, target, media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=lower)


def test_given_up(tmp_path: Path) -> None:
    """An unpacking that is told to stop ends, in the middle of a large file too."""
    blob, diff_id = pack([member("f", content=bytes(40 << 20))], tmp_path / "layout")
    (tmp_path / "target").mkdir()
    calls = iter([False] * 5)
    with pytest.raises(SociError, match="given up"):
        unpack(
            blob,
            tmp_path / "target",
            media_type=OCI_LAYER_GZIP,
            diff_id=diff_id,
            lower=[],
            stopped=lambda: next(calls, True),
        )
    assert (tmp_path / "target/f").stat().st_size < 10 << 20


def test_no_room(tmp_path: Path) -> None:
    """A full file system is `LimitExceeded`."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True, timeout=20)
    try:
        blob, diff_id = pack([member("f", content=bytes(4 << 20))], tmp_path / "layout")
        (small / "target").mkdir()
        with pytest.raises(LimitExceeded):
            unpack(blob, small / "target", media_type=OCI_LAYER_GZIP, diff_id=diff_id, lower=[])
    finally:
        subprocess.run(["umount", small], check=True, timeout=20)
