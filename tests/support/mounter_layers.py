# SPDX-License-Identifier: Apache-2.0
"""Layers in a span cache for the mounter's tests, and a fetcher that fills them from the blob at hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.inflate import inflate_span
from soci.toc import Ztoc
from soci_cache import LayerStore
from soci_cache.proof import COMPLETE, keep_tail, prove

SPAN_SIZE = 64 << 10
Item = tuple[tarfile.TarInfo, bytes]


def item(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> Item:
    """One member; ``fields`` are attributes of `tarfile.TarInfo`."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(content), 0o644, 1_600_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(items: Iterable[Item]) -> bytes:
    """A PAX tar of the members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for info, content in items:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def noise(count: int, seed: int = 1) -> bytes:
    """Bytes that do not compress to nothing, the same each time."""
    return random.Random(seed).randbytes(count)


@dataclass(frozen=True, slots=True)
class Made:
    """A layer: its blob, its tar and its table of contents."""

    blob: bytes
    tar: bytes
    ztoc_bytes: bytes
    ztoc: Ztoc
    layer: Digest
    ztoc_digest: Digest

    def put(self, cache: Path) -> None:
        """Prepare the layer in a cache, all spans absent."""
        LayerStore(cache).prepare(self.layer, self.ztoc_digest, self.ztoc_bytes).close()

    def fill(self, cache: Path, spans: Iterable[int]) -> None:
        """Do what a fetcher does for these spans."""
        with LayerStore(cache).write(self.layer, self.ztoc_digest) as writer:
            for span in spans:
                start, end = writer.spans.compressed(span)
                writer.fill(span, inflate_span(self.ztoc, writer.spans, span, self.blob[start:end]))

    def complete(self, cache: Path) -> Path:
        """Have all of the layer here, and its diff_id proven, as fetcher and keeper do; the layer's folder."""
        store, diff_id = LayerStore(cache), Digest("sha256:" + hashlib.sha256(self.tar).hexdigest())
        place = store.directory(self.layer, self.ztoc_digest)
        with store.prepare(self.layer, self.ztoc_digest, self.ztoc_bytes, diff_id) as reader:
            self.fill(cache, range(reader.spans.count))
            keep_tail(place, self.tar[reader.spans.uncompressed_size :])
            assert prove(place, reader.spans) == COMPLETE
        return place


def make(items: Sequence[Item], span_size: int = SPAN_SIZE) -> Made:
    """A gzip layer of the members."""
    tar = tar_of(items)
    blob = gzip.compress(tar, 6, mtime=0)
    builder = ZtocBuilder("gzip", span_size)
    builder.feed(blob)
    built = builder.finish()
    assert built.diff_id == "sha256:" + hashlib.sha256(tar).hexdigest()
    return Made(blob, tar, built.ztoc_bytes, built.ztoc, sha256_digest(blob), sha256_digest(built.ztoc_bytes))


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def everything() -> list[Item]:
    """Members of every kind that a mount must show, several spans' worth."""
    directory = {"kind": tarfile.DIRTYPE}
    return [
        item("bin/", mode=0o755, **directory),
        item("bin/tool", noise(300_000), mode=0o4755, uid=7, gid=8),
        item("bin/tool-again", kind=tarfile.LNKTYPE, linkname="bin/tool", mode=0o4755, uid=7, gid=8),
        item("bin/short", kind=tarfile.SYMTYPE, linkname="tool"),
        item("bin/far", kind=tarfile.SYMTYPE, linkname="../" * 30 + "etc/x"),
        item("etc/", mode=0o1777, uid=1000, gid=1001, **directory),
        item("etc/empty", mode=0o000),
        item("etc/late", b"late", pax_headers={"mtime": "1700000000.123456789"}),
        item("etc/attributes", b"a", pax_headers={"SCHILY.xattr.user.colour": "blue", "SCHILY.xattr.user.empty": ""}),
        item("etc/name-" + "y" * 200, b"long name"),
        item("etc/grün", b"utf-8"),
        item("dev/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        item("dev/disk", kind=tarfile.BLKTYPE, devmajor=259, devminor=70_000, mode=0o660),
        item("dev/pipe", kind=tarfile.FIFOTYPE, mode=0o600),
        item("deep/er/and/deeper/file", b"implied directories"),
        item("many/", mode=0o755, **directory),
        *(item(f"many/{i:04}", f"{i}\n".encode() * 20, mtime=1_500_000_000 + i) for i in range(700)),
        item("big", noise(1_500_000, 2)),
    ]


def make_zstd(items: Sequence[Item], span_size: int = SPAN_SIZE, *, frame_bytes: int = 0) -> Made:
    """A zstd layer of the members: one frame, or one for every ``frame_bytes`` of the tar."""
    tar = tar_of(items)
    step = frame_bytes or len(tar)
    blob = b"".join(zstandard.ZstdCompressor().compress(tar[at : at + step]) for at in range(0, len(tar), step))
    builder = ZtocBuilder("zstd", span_size)
    builder.feed(blob)
    built = builder.finish()
    return Made(blob, tar, built.ztoc_bytes, built.ztoc, sha256_digest(blob), sha256_digest(built.ztoc_bytes))


def unpack(tar: bytes, to: Path) -> Path:
    """The tree that unpacking makes, with attributes and exact times."""
    to.mkdir()
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = archive.getmembers()
        for member in members:
            archive.extract(member, to, filter="fully_trusted")
        for member in members:
            path = to / member.name
            for key, value in member.pax_headers.items():
                if key.startswith("SCHILY.xattr."):
                    raw = value.encode("utf-8", "surrogateescape")
                    os.setxattr(path, key.removeprefix("SCHILY.xattr."), raw, follow_symlinks=False)
        for member in reversed(members):
            seconds, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
            ns = int(seconds) * 10**9 + int((fraction or "0").ljust(9, "0"))
            os.utime(to / member.name, ns=(ns, ns), follow_symlinks=False)
    return to
