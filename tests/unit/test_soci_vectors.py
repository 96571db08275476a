# SPDX-License-Identifier: Apache-2.0
"""Golden zTOCs: we build the same bytes, read the same contents and refuse the same layers as another builder."""

from __future__ import annotations

import gzip
import hashlib
from typing import Any

import pytest

from soci.build import Built, ZtocBuilder
from soci.digest import sha256_digest
from soci.errors import InvalidGzip, InvalidTar, InvalidZtoc, SociError, Unsupported
from soci.inflate import check_gzip_header, inflate_span, inflate_tail
from soci.span import Spans
from soci.zinfo import RECORD_BYTES, WINDOW_BYTES, parse_tar_zinfo, parse_zinfo
from soci.ztoc import Ztoc, encode_ztoc, parse_ztoc
from support.vectors import content, label, manifest, vectors

every = pytest.mark.parametrize("vector", vectors(), ids=label)
loadable = pytest.mark.parametrize("vector", vectors(loads=True), ids=label)
mountable = pytest.mark.parametrize("vector", [v for v in vectors(loads=True) if v.get("mountable", True)], ids=label)


def build(blob: bytes, algorithm: Any, span_size: int = 1 << 22, step: int = 1 << 16, *, compat: bool = True) -> Built:
    builder = ZtocBuilder(algorithm, span_size, compat=compat)
    for start in range(0, len(blob), step):
        builder.feed(blob[start : start + step])
    return builder.finish()


def read_through_spans(ztoc: Ztoc, blob: bytes) -> bytes:
    """The whole tar, span by span, with its padding."""
    spans = Spans.of(ztoc)
    pieces = []
    for i in range(spans.count):
        start, end = spans.compressed(i)
        assert sha256_digest(blob[start:end]) == spans.digest(i)
        pieces.append(inflate_span(ztoc, spans, i, blob[start:end]))
    start, end = spans.compressed(spans.count - 1)
    return b"".join([*pieces, inflate_tail(ztoc, spans, blob[start:end])])


@every
@pytest.mark.parametrize("step", [1 << 30, 1 << 14, 999])
def test_built_bytes_are_the_golden_ones(vector: dict[str, Any], step: int) -> None:
    """A layer's zTOC is the golden one, byte for byte, however the blob is cut for feeding."""
    blob = content(vector["input"])
    built = build(blob, vector["algorithm"], vector["span_size"], step)
    assert built.ztoc_bytes == content(vector["ztoc"])
    assert sha256_digest(built.ztoc_bytes) == vector["ztoc_digest"]
    assert (built.layer, built.layer_size) == (vector["input_digest"], len(blob))
    tar = gzip.decompress(blob) if vector["algorithm"] == "gzip" else blob
    assert built.diff_id == sha256_digest(tar)


@pytest.mark.parametrize("vector", [v for v in vectors() if len(content(v["input"])) < 10_000], ids=label)
def test_feeding_single_bytes_changes_nothing(vector: dict[str, Any]) -> None:
    """Fed one byte at a time, a layer still gives the golden zTOC."""
    built = build(content(vector["input"]), vector["algorithm"], vector["span_size"], 1)
    assert built.ztoc_bytes == content(vector["ztoc"])


@loadable
def test_reading_a_golden_ztoc(vector: dict[str, Any]) -> None:
    """A golden zTOC parses to what its manifest says, and encodes to itself again."""
    data = content(vector["ztoc"])
    ztoc = parse_ztoc(data, strict_version=True)
    assert encode_ztoc(ztoc) == data
    assert ztoc == build(content(vector["input"]), vector["algorithm"], vector["span_size"]).ztoc
    assert (ztoc.version, ztoc.build_tool) == ("0.9", manifest()["build_tool_identifier"])
    assert (ztoc.compressed_size, ztoc.uncompressed_size) == (
        vector["compressed_archive_size"],
        vector["uncompressed_archive_size"],
    )
    assert (ztoc.algorithm, ztoc.max_span_id, len(ztoc.entries)) == (
        vector["algorithm"],
        vector["max_span_id"],
        vector["entries"],
    )
    assert list(ztoc.span_digests) == vector["span_digests"]


@pytest.mark.parametrize("vector", vectors(loads=False), ids=label)
def test_overlapping_members_are_refused(vector: dict[str, Any]) -> None:
    """A zTOC whose members overlap builds as elsewhere, but does not load."""
    with pytest.raises(InvalidZtoc, match="overlaps"):
        parse_ztoc(content(vector["ztoc"]))


@pytest.mark.parametrize("vector", vectors(algorithm="gzip"), ids=label)
def test_golden_checkpoints(vector: dict[str, Any]) -> None:
    """Checkpoints read from the blob are the golden ones, windows included, and give the blob back."""
    blob = parse_ztoc(content(vector["ztoc"])).checkpoints
    found = parse_zinfo(blob)
    assert (found.version, found.span_size, found.encode()) == (2, vector["span_size"], blob)
    said = [
        {
            "comp_off": found.in_offset(i),
            "uncomp_off": found.out_offset(i),
            "bits": found.bits(i),
            "window_sha256": hashlib.sha256(found.window(i)).hexdigest(),
        }
        for i in range(found.count)
    ]
    assert said == vector["checkpoints"]


@pytest.mark.parametrize("vector", vectors(algorithm="uncompressed", loads=True), ids=label)
def test_golden_tar_zinfo(vector: dict[str, Any]) -> None:
    """A plain layer's checkpoints say its span size and its size."""
    found = parse_tar_zinfo(parse_ztoc(content(vector["ztoc"])).checkpoints)
    assert (found.span_size, found.size, found.version) == (vector["span_size"], len(content(vector["input"])), 2)


@pytest.mark.parametrize("vector", vectors(mountable=False), ids=label)
def test_spans_without_content_are_refused(vector: dict[str, Any]) -> None:
    """An empty block before the first byte makes a zTOC that loads, but cannot be mounted."""
    with pytest.raises(InvalidZtoc, match="not ascending"):
        Spans.of(parse_ztoc(content(vector["ztoc"])))


@mountable
@pytest.mark.parametrize("inflater", ["fast", "zlib"])
def test_every_file_through_its_spans(vector: dict[str, Any], inflater: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Span by span, with either inflater, the tar comes out whole, and every file has its golden content."""
    if inflater == "zlib":
        monkeypatch.setattr("soci.inflate._fast", __import__("zlib"))
    blob, ztoc = content(vector["input"]), parse_ztoc(content(vector["ztoc"]))
    tar = read_through_spans(ztoc, blob)
    assert tar == (gzip.decompress(blob) if vector["algorithm"] == "gzip" else blob)
    if vector["algorithm"] == "gzip":
        check_gzip_header(blob[: Spans.of(ztoc).compressed(0)[0]])
    files = vector["files"] or {}
    by_name = {entry.name.decode("utf-8", "surrogateescape"): entry for entry in reversed(ztoc.entries)}
    for name, digest in files.items():
        entry = by_name[name]
        assert hashlib.sha256(tar[entry.offset : entry.offset + entry.size]).hexdigest() == digest


@mountable
def test_one_file_needs_only_the_spans_that_cover_it(vector: dict[str, Any]) -> None:
    """A file's content comes out of the spans covering it alone."""
    blob, ztoc = content(vector["input"]), parse_ztoc(content(vector["ztoc"]))
    spans = Spans.of(ztoc)
    tar = gzip.decompress(blob) if vector["algorithm"] == "gzip" else blob
    for entry in (e for e in ztoc.entries if e.type == "reg"):
        ids = spans.covering(entry.offset, entry.size)
        if not entry.size:
            assert not ids
            continue
        data = b"".join(inflate_span(ztoc, spans, i, blob[slice(*spans.compressed(i))]) for i in ids)
        start = entry.offset - spans.uncompressed(ids[0])[0]
        assert data[start : start + entry.size] == tar[entry.offset : entry.offset + entry.size]


@pytest.mark.parametrize(
    "vector", [v for v in vectors(algorithm="gzip", mountable=True) if v["checkpoints"][0]["comp_off"] == 10], ids=label
)
def test_version_1_checkpoints(vector: dict[str, Any]) -> None:
    """The older blob, without its first record, serves the same bytes and is given back as it was."""
    blob, ztoc = content(vector["input"]), parse_ztoc(content(vector["ztoc"]))
    old_blob = ztoc.checkpoints[:12] + ztoc.checkpoints[12 + RECORD_BYTES :]
    found = parse_zinfo(old_blob)
    assert (found.version, found.count, found.encode()) == (1, vector["max_span_id"] + 1, old_blob)
    assert list(found.points()) == list(parse_zinfo(ztoc.checkpoints).points())
    assert found.window(0) == bytes(WINDOW_BYTES)
    old = Ztoc(**{name: getattr(ztoc, name) for name in ztoc.__slots__} | {"checkpoints": old_blob})
    assert read_through_spans(old, blob) == gzip.decompress(blob)


@pytest.mark.parametrize("bad", manifest()["rejected_by_builder"], ids=label)
def test_layers_that_nobody_may_index(bad: dict[str, Any]) -> None:
    """A layer that the golden builder refuses is refused, with the error of the stage at fault."""
    error: type[SociError] = InvalidTar if bad["stage"] == "toc" and "zlib" not in bad["name"] else InvalidGzip
    for step in (1 << 16, 100):
        with pytest.raises(error):
            build(content(bad["input"]), bad["algorithm"], step=step)


def test_sparse_layers_are_refused_unless_asked_for() -> None:
    """Without ``compat``, a layer with a sparse member gets no zTOC, because nothing could serve it."""
    with pytest.raises(Unsupported, match="sparse"):
        build(content("sparse-pax10.tar"), "uncompressed", compat=False)
