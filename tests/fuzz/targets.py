# SPDX-License-Identifier: Apache-2.0
"""The parsers that are fuzzed: where their inputs start from, how often CI runs each, and what is done with one."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from soci.build import ZtocBuilder
from soci.entries import Entries
from soci.errors import SociError
from soci.index import encode_index, parse_index
from soci.inflate import inflate_span, inflate_stream, inflate_tail
from soci.oci import Manifest, choose_platform, encode_manifest, parse_config, parse_manifest, parse_platform
from soci.reference import parse_reference
from soci.span import Spans
from soci.tar import TarWalker, iter_members
from soci.toc import Algorithm, Ztoc
from soci.tree import LayerTree
from soci.zinfo import encode_tar_zinfo, parse_tar_zinfo, parse_zinfo
from soci.zstd import encode_zstd_points, parse_zstd_points
from soci.ztoc import encode_ztoc, parse_ztoc
from soci_indexing.prefetch import encode_prefetch, parse_prefetch
from soci_registry.failure import TryError, final_error
from soci_registry.http1 import Chunks, framing_of, parse_head, request_head
from soci_registry.ranges import Heads, skip_for
from soci_registry.targets import lifetime
from soci_registry.urls import redirect_target

HERE = Path(__file__).parent
VECTORS = HERE.parent / "vectors"


@dataclass(frozen=True)
class Target:
    """One parser. ``run`` may raise `SociError` and nothing else."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], object]
    runs: int  # in CI


def vectors(pattern: str, limit: int = 40_000) -> list[bytes]:
    """The golden files of a name that are not too large to be worth mutating."""
    return [data for path in sorted(VECTORS.glob(pattern)) if len(data := path.read_bytes()) <= limit]


def corpus(name: str) -> list[bytes]:
    """The seeds in this folder."""
    return [path.read_bytes() for path in sorted((HERE / "corpus" / name).iterdir())]


def checkpoints(algorithm: str) -> list[bytes]:
    """The checkpoints of the golden zTOCs."""
    found = []
    for data in vectors("*.ztoc", 110_000):
        try:
            ztoc = parse_ztoc(data)
        except SociError:
            continue
        if ztoc.algorithm == algorithm:
            found.append(ztoc.checkpoints)
    return found


def ztoc(data: bytes) -> None:
    """Read it, mount it, write it again."""
    found = parse_ztoc(data)
    try:
        tree = LayerTree.of(found.entries)
        for node in range(min(len(tree), 50)):
            tree.node(node)
            tree.path(node)
    except SociError:
        pass
    encode_ztoc(found)
    assert Entries.of(list(found.entries)) == found.entries
    Spans.of(found)


def zinfo(data: bytes) -> None:
    """Read the checkpoints of a gzip layer."""
    found = parse_zinfo(data)
    assert found.encode() == data


def tar_zinfo(data: bytes) -> None:
    """Read the checkpoints of a plain tar."""
    encode_tar_zinfo(parse_tar_zinfo(data))


def zstd_points(data: bytes) -> None:
    """Read the checkpoints of a zstd layer."""
    assert encode_zstd_points(parse_zstd_points(data)) == data


def tar(data: bytes) -> None:
    """Walk it both ways."""
    errors = []
    walker = TarWalker(compat=True)
    try:
        walker.feed(data)
        walker.finish()
    except SociError as error:
        errors.append(error)
    for member in iter_members(io.BytesIO(data).read):
        for _ in member.chunks():
            pass
    if errors:
        raise errors[0]


def builder(algorithm: Algorithm) -> Callable[[bytes], None]:
    """Index a blob, and read back through the spans what was indexed."""

    def run(data: bytes) -> None:
        made = ZtocBuilder(algorithm, 1000)
        made.feed(data)
        built = made.finish()
        parse_ztoc(built.ztoc_bytes)
        spans = Spans.of(built.ztoc)
        for i in range(spans.count):
            inflate_span(built.ztoc, spans, i, data[slice(*spans.compressed(i))])

    return run


@cache
def gzip_layer() -> tuple[Ztoc, Spans]:
    """A layer of several spans, with its zTOC."""
    found = parse_ztoc((VECTORS / "spans.span40000.ztoc").read_bytes())
    return found, Spans.of(found)


def spans_of_gzip() -> list[bytes]:
    """The compressed bytes of a layer's spans."""
    blob, (_, spans) = (VECTORS / "spans.tar.gz").read_bytes(), gzip_layer()
    return [bytes([i]) + blob[slice(*spans.compressed(i))] for i in range(spans.count)]


def gzip_span(data: bytes) -> None:
    """Inflate a span whose bytes are not what the zTOC was made of; the first byte says which span."""
    found, spans = gzip_layer()
    i = (data[0] if data else 0) % spans.count
    start, end = spans.compressed(i)
    source = data[1 : 1 + end - start].ljust(end - start, b"\0")
    content = b""
    try:
        content = inflate_span(found, spans, i, source)
    finally:
        inflate_tail(
            found, spans, (b"\0" * (spans.ends[-1] - spans.starts[-1]) + source)[-(spans.ends[-1] - spans.starts[-1]) :]
        )
    assert len(content) == spans.uncompressed(i)[1] - spans.uncompressed(i)[0]


def zstd_span(data: bytes) -> None:
    """Decompress a span by a zTOC that knows its length, and of its content what the tar had."""
    points = checkpoints_of_one_zstd_span()
    lying = replace(points, compressed_size=len(data), uncompressed_size=1024)
    b"".join(inflate_stream(lying, Spans.of(lying), 0, [data[:7], data[7:]], tail=True))


@cache
def checkpoints_of_one_zstd_span() -> Ztoc:
    """The zTOC of a zstd layer of one span."""
    made = ZtocBuilder("zstd")
    made.feed(corpus("zstd")[1])
    return made.finish().ztoc


def manifest(data: bytes) -> None:
    """Read it, choose from it, write it."""
    found = parse_manifest(data)
    encode_manifest(found)
    if not isinstance(found, Manifest):
        choose_platform(found, parse_platform("linux/amd64"))


def soci_index(data: bytes) -> None:
    """Read it, write it."""
    found = parse_index(data)
    for entry in found.layers:
        _ = entry.span_size, entry.disable_xattrs
    encode_index(found)


def reference(data: bytes) -> None:
    """Read it, and what it was read as."""
    found = parse_reference(data.decode("utf-8", "surrogateescape"))
    assert str(parse_reference(str(found))) == str(found)


def raw_deflate() -> list[bytes]:
    """Gzip files of tars, small ones and ones whose blocks are of every kind."""
    tars = vectors("*.tar", 12_000)
    made = [gzip.compress(data, level, mtime=0) for data in tars for level in (0, 1, 9)]
    fixed = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_FIXED)
    return [*vectors("*.tar.gz", 2000), *made, fixed.compress(tars[0]) + fixed.flush()]


HTTP_HEADS = [
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/1000\r\nContent-Length: 100\r\nVia: a\r\nVia: b",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\nContent-Type: text/plain",
    b"HTTP/1.0 307 Go\r\nLocation: https://store/x?X-Amz-Expires=60&se=2030-01-01T00:00:00Z\r\nContent-Length: 0",
]
HTTP_CHUNKS = [b"5\r\nabcde\r\n1f;x=y\r\n" + b"z" * 31 + b"\r\n0\r\nA: b\r\n\r\n", b"0\r\n\r\n", b"1\r\na\r\n" * 9]


@contextmanager
def one_try() -> Iterator[None]:
    """A failed try as callers see it."""
    try:
        yield
    except TryError as error:
        raise final_error(error, "fuzz", 1) from error


def http_head(data: bytes) -> None:
    """An answer's head, all that is decided by it, and what was made of it sent back."""
    with one_try():
        head = parse_head(data)
        framing_of(head)
        get = head.fields.get
        heads = Heads(head.status, get("content-range"), get("content-length"), get("content-type"))
        if location := head.fields.get("location"):
            target = redirect_target("https://reg/x", location)
            lifetime(target, 0.0)
            request_head("GET", target, {"Range": "bytes=0-99"})
        skip_for(heads, 0, 100, 1000)


def http_chunks(data: bytes) -> None:
    """A chunked body whole, and byte by byte: never more than came, and the same."""
    with one_try():
        whole = b"".join(map(bytes, Chunks().feed(memoryview(data))))
    assert len(whole) <= len(data)
    coding = Chunks()
    pieces = (coding.feed(memoryview(data)[at : at + 1]) for at in range(len(data)))
    assert b"".join(bytes(piece) for found in pieces for piece in found) == whole


TARGETS: dict[str, Target] = {
    "ztoc": Target(lambda: vectors("*.ztoc"), ztoc, 30_000),
    "zinfo": Target(lambda: checkpoints("gzip"), zinfo, 100_000),
    "tar-zinfo": Target(lambda: checkpoints("uncompressed"), tar_zinfo, 100_000),
    "zstd-points": Target(lambda: [checkpoints_of_one_zstd_span().checkpoints], zstd_points, 100_000),
    "tar": Target(lambda: vectors("*.tar", 22_000), tar, 50_000),
    "gzip": Target(raw_deflate, builder("gzip"), 15_000),
    "zstd": Target(lambda: corpus("zstd"), builder("zstd"), 40_000),
    "plain": Target(lambda: vectors("*.tar", 22_000), builder("uncompressed"), 12_000),
    "gzip-span": Target(spans_of_gzip, gzip_span, 40_000),
    "zstd-span": Target(lambda: corpus("zstd"), zstd_span, 40_000),
    "manifest": Target(lambda: corpus("manifest"), manifest, 100_000),
    "config": Target(lambda: corpus("config"), parse_config, 100_000),
    "soci-index": Target(lambda: corpus("soci-index"), soci_index, 100_000),
    "reference": Target(lambda: corpus("reference"), reference, 100_000),
    "http-head": Target(lambda: HTTP_HEADS, http_head, 40_000),
    "http-chunks": Target(lambda: HTTP_CHUNKS, http_chunks, 40_000),
    "prefetch": Target(lambda: corpus("prefetch"), lambda data: encode_prefetch(parse_prefetch(data)), 100_000),
}
