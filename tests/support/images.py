# SPDX-License-Identifier: Apache-2.0
"""Images for tests: `busybox_image`, small and runnable; `torture_image`, with everything a layer can hold.

Both are image layouts made from tar members alone, so that they hold what no file system here would let us make,
and the same on every machine. The torture image's layers and what each is for:

0  the base: busybox, odd modes, links of all kinds, devices, names, times, a file capability
1  many small files, a large file, nested directories
2  whiteouts, an opaque directory, file over directory and directory over file, hard links to earlier members
3  directories that are only implied, over a lower one with odd modes; more hard links across directories
4  whiteouts of what lower layers restored, an empty layer otherwise
"""

from __future__ import annotations

import hashlib
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from soci_dev import image, tarball
from soci_dev.folders import cache_folder, locked
from soci_dev.tarball import OPAQUE, WHITEOUT, Member, member
from soci_dev.tools import find

SMALL_FILES = 3000
LARGE_FILE_BYTES = 40 * 1024 * 1024
SECOND = 1_000_000_000
CAP_NET_BIND = bytes.fromhex("0100000200040000000000000000000000000000")
"""security.capability, revision 2, effective, permitted CAP_NET_BIND_SERVICE (capabilities(7))."""

LONG = "long-" + "x" * 180
"""Beyond the 100 bytes of a ustar name: a PAX record."""

BEFORE_1970 = "names/before-1970"
"""containerd's unpack brings its time up to 1970; a faithful reader of the tar does not."""

_DIR, _SYM, _LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def busybox_image(folder: Path | None = None) -> image.Image:
    """One gzip layer: static busybox, ``/bin/sh``, and ``/hello`` which prints ``hello`` and a checksum of a file."""
    return _cached("busybox", folder, lambda layout: [image.add_layer(layout, _busybox(), created_by="busybox")])


def torture_image(folder: Path | None = None) -> image.Image:
    """Five gzip layers; see the module's description."""
    return _cached(
        "torture",
        folder,
        lambda layout: [image.add_layer(layout, make(), created_by=make.__name__.lstrip("_")) for make in _TORTURE],
    )


def implied_directories() -> set[str]:
    """Directories of the torture image that the topmost layer which touches them does not list.

    Their times are nobody's: containerd's unpack leaves the time of the unpack.
    """
    implied: set[str] = set()
    for make in _TORTURE:
        listed, touched = set(), set()
        for info, _ in make():
            path = Path(info.name)
            touched |= {str(parent) for parent in path.parents if str(parent) != "."}
            if info.isdir():
                listed.add(str(path))
        implied = (implied | touched) - listed
    return implied


def _cached(name: str, folder: Path | None, make: Callable[[Path], list[image.Layer]]) -> image.Image:
    home = folder or cache_folder() / "images" / f"{name}-{_recipe()}"
    with locked(home.with_suffix(".lock")):
        found = image.read_image(home)
        if found is None:
            image.write_image(home, make(home), cmd=["/bin/sh", "/hello"])
            found = image.read_image(home)
    assert found is not None
    return found


def _recipe() -> str:
    """A hash of the code that makes the images: a change of it makes them anew."""
    sources = (Path(__file__), Path(image.__file__), Path(tarball.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def noise(seed: int, count: int) -> bytes:
    """Random and compressible: gzip makes about half of it, with matches at many distances."""
    source = random.Random(seed)
    words = [source.randbytes(source.randrange(3, 40)) for _ in range(2000)]
    out = bytearray()
    while len(out) < count:
        out += source.choice(words)
        if source.random() < 0.3:
            out += source.randbytes(source.randrange(1, 24))
    return bytes(out[:count])


def _busybox() -> Iterator[Member]:
    yield member("bin", _DIR, mode=0o755)
    yield member("bin/busybox", content=find("busybox").read_bytes(), mode=0o755)
    yield member("bin/sh", _SYM, linkname="busybox", mode=0o777)
    for name in ("dev", "etc", "proc", "sys"):
        yield member(name, _DIR, mode=0o755)
    yield member("etc/passwd", content=b"root:x:0:0:root:/:/bin/sh\n")
    yield member("hello", content=b"echo hello\n/bin/busybox sha256sum /etc/passwd\n", mode=0o755)
    yield member("tmp", _DIR, mode=0o1777)


def _torture_base() -> Iterator[Member]:
    yield from _busybox()
    yield member("modes", _DIR, mode=0o2751, uid=11, gid=12, mtime_ns=1_500_000_000 * SECOND + 123_456_789)
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755), ("sticky", 0o1644), ("none", 0), ("all", 0o7777)):
        yield member(f"modes/{name}", content=name.encode(), mode=mode, uid=1000, gid=1001, mtime_ns=SECOND)
    yield member("modes/owner", content=b"big ids", uid=2_500_000, gid=3_000_000)
    yield member("modes/sub", _DIR, mode=0o1700, uid=5, gid=6, mtime_ns=77 * SECOND + 5)
    yield member("modes/sub/deep", _DIR, mode=0o510, uid=7, gid=8, mtime_ns=78 * SECOND)
    yield member("modes/sub/deep/file", content=b"deep")
    yield member("caps", _DIR, mode=0o755, xattrs={"user.note": b"on a directory"})
    yield member(
        "caps/bind", content=b"#!/bin/sh\n", mode=0o755, xattrs={"security.capability": CAP_NET_BIND, "user.a": b"1"}
    )
    yield member("caps/empty-value", xattrs={"user.empty": b""})
    yield member("links", _DIR, mode=0o755)
    yield member("links/target", content=b"one inode, several names", mtime_ns=9 * SECOND + 9)
    # A hard link's header repeats its target's: containerd's unpack lets the last header win.
    yield member("links/hard", _LINK, linkname="links/target", mtime_ns=9 * SECOND + 9)
    yield member("links/absolute", _SYM, linkname="/links/target")
    yield member("links/relative", _SYM, linkname="../links/./target", mtime_ns=4 * SECOND + 250_000_000)
    yield member("links/dangling", _SYM, linkname="nowhere/at/all")
    yield member("links/loop", _SYM, linkname="loop")
    yield member("links/long", _SYM, linkname="t/" * 120)
    yield member("links/to-directory", _SYM, linkname="../modes/sub")
    yield member("elsewhere", _DIR, mode=0o700)
    yield member("elsewhere/hard", _LINK, linkname="links/target", mtime_ns=9 * SECOND + 9)
    yield member("nodes", _DIR, mode=0o755)
    yield member("nodes/null", tarfile.CHRTYPE, device=(1, 3), mode=0o666)
    yield member("nodes/disk", tarfile.BLKTYPE, device=(259, 300), mode=0o640, gid=6)
    yield member("nodes/fifo", tarfile.FIFOTYPE, mode=0o622)
    yield from _names()
    for name in ("replaced-by-directory", "removed-file", "restored"):
        yield member(name, content=name.encode())
    for name in ("replaced-by-file", "removed-directory", "opaque", "half-removed"):
        yield member(name, _DIR, mode=0o750, uid=3, mtime_ns=33 * SECOND)
        yield member(f"{name}/lower", content=b"from layer 0", mtime_ns=34 * SECOND)
        yield member(f"{name}/kept", content=b"kept from layer 0")
        yield member(f"{name}/sub", _DIR, mode=0o711)
        yield member(f"{name}/sub/lower", content=b"also from layer 0")


def _names() -> Iterator[Member]:
    yield member("names", _DIR, mode=0o755)
    yield member("names/empty-file", mtime_ns=1)
    yield member("names/empty-directory", _DIR, mode=0o700)
    yield member(f"names/{LONG}", content=b"a long name")
    yield member(f"names/{LONG}-d/{LONG}/leaf", content=b"long, and its directories are implied")
    for name in (
        "größe-ñandú-日本語",
        "white space",
        "tab\tand\nnewline",
        "quote'\"\\",
        "-dash",
        ".hidden",
        "..dots",
        "~",
    ):
        yield member(f"names/{name}", content=name.encode())
    yield member(BEFORE_1970, content=b"old", mtime_ns=-86_400 * SECOND)
    yield member("names/after-2038", content=b"late", mtime_ns=4_000_000_000 * SECOND + 1)
    yield member("./names/./dotted", content=b"its name has dots in it")


def _torture_bulk() -> Iterator[Member]:
    yield member("bulk", _DIR, mode=0o755)
    source = random.Random(7)
    for number in range(SMALL_FILES):
        if number % 100 == 0:
            yield member(f"bulk/{number // 100:02}", _DIR, mode=0o755, mtime_ns=number * SECOND)
        size = source.randrange(0, 2000)
        content = (f"{number} " * (size // 5 + 1)).encode()[:size]
        yield member(f"bulk/{number // 100:02}/{number:04}", content=content, mtime_ns=number * SECOND + number)
    yield member("large", content=noise(1, LARGE_FILE_BYTES), mtime_ns=55 * SECOND)
    yield member("zeros", content=bytes(6 * 1024 * 1024))
    for end in (511, 512, 513):  # around the tar's block size
        yield member(f"edge-{end}", content=noise(end, end))
    yield member("/".join(f"d{level}" for level in range(20)) + "/leaf", content=b"twenty levels down")


def _torture_changes() -> Iterator[Member]:
    yield member(WHITEOUT + "removed-file")
    yield member(WHITEOUT + "removed-directory")
    yield member(WHITEOUT + "restored")
    yield member(WHITEOUT + "never-was")
    yield member("opaque", _DIR, mode=0o705, uid=9, mtime_ns=99 * SECOND)
    yield member(f"opaque/{OPAQUE}")
    yield member("opaque/upper", content=b"from layer 2")
    yield member("half-removed", _DIR, mode=0o751)
    yield member(f"half-removed/{WHITEOUT}lower")
    yield member("half-removed/upper", content=b"from layer 2")
    yield member("replaced-by-directory", _DIR, mode=0o755)
    yield member("replaced-by-directory/inside", content=b"a directory now")
    yield member("replaced-by-file", content=b"a file now", mode=0o600)
    yield member("changed", _DIR, mode=0o755)
    yield member("changed/first", content=b"two names, one layer")
    yield member("changed/second", _LINK, linkname="changed/first")
    yield member("other", _DIR, mode=0o755)
    yield member("other/third", _LINK, linkname="changed/first")
    yield member("modes/setuid", content=b"no longer setuid", mode=0o755, mtime_ns=2 * SECOND)
    yield member("caps/bind", content=b"#!/bin/sh\nno capability any more\n", mode=0o755)
    yield member("links/dangling", content=b"a file where a symlink was")


def _torture_implied() -> Iterator[Member]:
    # modes/sub/deep is not listed here: its odd mode and owner must come from layer 0.
    yield member("modes/sub/deep/from-above", content=b"its directories are only implied")
    yield member("caps/more/implied/file", content=b"new directories, not listed either")
    yield member("bulk/00/0000", content=b"changed above")
    yield member(f"bulk/01/{WHITEOUT}0100")
    yield member("restored", content=b"back again", mode=0o640)
    yield member("twice", content=b"first")
    yield member("twice", content=b"the later member of one name counts", mode=0o755)
    yield member("linked/a", content=b"listed after its directory was implied")
    yield member("linked", _DIR, mode=0o711, uid=21, gid=22, mtime_ns=5 * SECOND)
    yield member("linked-too/b", _LINK, linkname="linked/a")


def _torture_last() -> Iterator[Member]:
    yield member(f"replaced-by-directory/{WHITEOUT}inside")
    yield member(f"opaque/{WHITEOUT}upper")
    yield member("last", content=b"the last layer")


_TORTURE = (_torture_base, _torture_bulk, _torture_changes, _torture_implied, _torture_last)
