# SPDX-License-Identifier: Apache-2.0
"""Spans: how a layer is cut for fetching, checking and inflating.

Span *i* starts at checkpoint *i* and ends where checkpoint *i+1* starts. `Spans.of` refuses a zTOC whose geometry
contradicts itself, so whoever holds a `Spans` can add and subtract its numbers without fear.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest, parse_digest
from soci.errors import InvalidDigest, InvalidZtoc
from soci.toc import Ztoc
from soci.zinfo import MAX_SPANS, Checkpoints, parse_tar_zinfo, parse_zinfo
from soci.zstd import MAX_ZSTD_RATIO, parse_zstd_points

MAX_SPAN_BYTES: Final = 1 << 30
"""Bytes of one span, compressed or not, that is inflated in memory. A gzip layer or plain tar with a larger one is
not worth loading lazily."""
MAX_STREAMED_SPAN_BYTES: Final = 1 << 40
"""The same for a zstd layer. Many are one frame, hence one span, whatever their size: it is inflated as a stream."""
MAX_GZIP_HEADER_BYTES: Final = 1 << 20
"""Bytes before the first span: the gzip header with its optional fields."""
MAX_DEFLATE_RATIO: Final = 1032
"""Deflate cannot do better: two bits say at most 258 bytes. A span that claims more is no gzip."""


@dataclass(frozen=True, slots=True)
class Spans:
    """The geometry of a layer's spans. Offsets are bytes; ends are exclusive.

    Neighbours of a gzip layer share a compressed byte where a span starts in the middle of one.
    """

    compressed_size: int  # of the layer blob
    uncompressed_size: int  # of the tar, up to and with its end-of-archive blocks
    digests: tuple[Digest, ...]  # of each span's compressed bytes
    starts: Sequence[int]  # compressed
    ends: Sequence[int]  # compressed
    outs: Sequence[int]  # uncompressed starts
    checkpoints: Checkpoints | None  # of a gzip layer

    @classmethod
    def of(cls, ztoc: Ztoc) -> Spans:
        """The spans of ``ztoc``; `InvalidZtoc` where the layer cannot be loaded lazily by it.

        The number of spans must be the same in its three places, every digest must be one, and starts must
        strictly ascend within the layer, as wide as deflate can be. (An empty deflate block before the first byte
        makes two spans that start at 0: such a zTOC is well-formed, but refused here.)
        """
        count = ztoc.max_span_id + 1
        if not 0 <= count <= MAX_SPANS:
            raise InvalidZtoc(f"{count} spans; at most {MAX_SPANS} are allowed")
        if len(ztoc.span_digests) != count:
            raise InvalidZtoc(f"{len(ztoc.span_digests)} span digests for {count} spans")
        if ztoc.compressed_size < 0 or ztoc.uncompressed_size < 0:
            raise InvalidZtoc("negative layer size")
        checkpoints = parse_zinfo(ztoc.checkpoints) if ztoc.algorithm == "gzip" else None
        if checkpoints:
            starts, ends, outs = _gzip(ztoc, checkpoints, count)
        else:
            starts, ends, outs = (_zstd if ztoc.algorithm == "zstd" else _plain)(ztoc, count)
        try:
            digests = tuple(parse_digest(text) for text in ztoc.span_digests)
        except InvalidDigest as error:
            raise InvalidZtoc(f"span digest: {error}") from error
        found = cls(ztoc.compressed_size, ztoc.uncompressed_size, digests, starts, ends, outs, checkpoints)
        found._check(*_LIMITS[ztoc.algorithm])
        return found

    @property
    def count(self) -> int:
        """The number of spans; 0 only for an empty plain layer."""
        return len(self.digests)

    def compressed(self, i: int) -> tuple[int, int]:
        """Start and end of span ``i`` in the layer blob: the bytes to fetch, over which its digest is."""
        self._known(i)
        return self.starts[i], self.ends[i]

    def uncompressed(self, i: int) -> tuple[int, int]:
        """Start and end of span ``i`` in the tar.

        Nothing behind the end-of-archive blocks belongs to the last span. Where that leaves it nothing at all (it
        lies in the tar's padding), it is empty: start equals end.
        """
        self._known(i)
        start = self.outs[i]
        return start, self.outs[i + 1] if i + 1 < self.count else max(start, self.uncompressed_size)

    def covering(self, offset: int, length: int) -> range:
        """Ids of the spans that hold ``length`` bytes of the tar from ``offset``; the last span stands for beyond it.

        Empty where the length is 0. Raises `InvalidZtoc` for a negative offset or length.
        """
        if offset < 0 or length < 0:
            raise InvalidZtoc(f"no {length} bytes at {offset} in a layer")
        if not length or not self.count:
            return range(0)
        return range(self._span_of(offset), self._span_of(offset + length - 1) + 1)

    def digest(self, i: int) -> Digest:
        """The digest of span ``i``'s compressed bytes."""
        self._known(i)
        return self.digests[i]

    def _span_of(self, offset: int) -> int:
        return bisect_right(self.outs, offset) - 1

    def _known(self, i: int) -> None:
        if not 0 <= i < self.count:
            raise InvalidZtoc(f"no span {i}: the layer has {self.count}")

    def _check(self, longest: int, ratio: int) -> None:
        last = self.count - 1
        for i in range(self.count):
            start, end = self.starts[i], self.ends[i]
            out, out_end = self.uncompressed(i)
            if not 0 <= start <= end <= self.compressed_size or (i < last and (start >= end or out >= out_end)):
                raise InvalidZtoc(f"span {i} is [{start}, {end}) to [{out}, {out_end}): not ascending")
            if max(end - start, out_end - out) > longest:
                raise InvalidZtoc(f"span {i} has more than {longest} bytes")
            if out_end - out > (end - start) * ratio:
                raise InvalidZtoc(f"span {i}: {end - start} bytes cannot inflate to {out_end - out}")
        if self.count and self.outs[0] != 0:
            raise InvalidZtoc("the first span does not start at the tar's first byte")


_LIMITS: Final = {
    "gzip": (MAX_SPAN_BYTES, MAX_DEFLATE_RATIO),
    "uncompressed": (MAX_SPAN_BYTES, 1),
    "zstd": (MAX_STREAMED_SPAN_BYTES, MAX_ZSTD_RATIO),
}
_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _gzip(ztoc: Ztoc, found: Checkpoints, count: int) -> _Geometry:
    if found.count != count:
        raise InvalidZtoc(f"{found.count} checkpoints for {count} spans")
    starts, ends, outs = array("q"), array("q"), array("q")
    for into, out, bits in found.points():
        starts.append(into - (1 if bits else 0))
        ends.append(into)
        outs.append(out)
    # Where the next span starts inside a byte, that byte is also this span's last one.
    ends.append(ztoc.compressed_size)
    if starts[0] > MAX_GZIP_HEADER_BYTES:
        raise InvalidZtoc(f"gzip header of {starts[0]} bytes; at most {MAX_GZIP_HEADER_BYTES} are allowed")
    return starts, ends[1:], outs


def _zstd(ztoc: Ztoc, count: int) -> _Geometry:
    found = parse_zstd_points(ztoc.checkpoints)
    if len(found.ins) != count:
        raise InvalidZtoc(f"{len(found.ins)} checkpoints for {count} spans")
    ends = found.ins[1:]
    ends.append(ztoc.compressed_size)
    return found.ins, ends, found.outs


def _plain(ztoc: Ztoc, count: int) -> _Geometry:
    found = parse_tar_zinfo(ztoc.checkpoints)
    if found.size != ztoc.compressed_size:
        raise InvalidZtoc(f"plain tar of {found.size} and of {ztoc.compressed_size} bytes")
    if -(-found.size // found.span_size) != count:
        raise InvalidZtoc(f"{found.size} bytes in spans of {found.span_size} are not {count} spans")
    starts = array("q", (i * found.span_size for i in range(count)))
    ends = array("q", (min((i + 1) * found.span_size, found.size) for i in range(count)))
    return starts, ends, starts
