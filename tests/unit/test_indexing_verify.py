# SPDX-License-Identifier: Apache-2.0
"""Proving an index: what is right is proven, and each lie is found and named."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.index import IndexEntry, SociIndex, prefetch_entry, ztoc_entry
from soci.oci import DOCKER_MANIFEST, OCI_LAYER, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest
from soci.span import Spans
from soci.toc import TocEntry, Ztoc
from soci.zinfo import HEADER_BYTES, RECORD_BYTES
from soci.ztoc import encode_ztoc, parse_ztoc
from soci_dev import image
from soci_dev.tarball import Member, member
from soci_indexing import proof
from soci_indexing.prefetch import SpanRange, encode_prefetch
from soci_indexing.proof import MAX_DEFECTS
from soci_indexing.stores import LayoutStore
from soci_indexing.verify import Verdict, verify_index
from support import indexed, vectors
from support.images import noise
from support.indexed import Change, Indexed

SYMLINK, DIRECTORY, DEVICE = b"2", b"5", b"3"


def members() -> Iterator[Member]:
    yield member("etc", DIRECTORY, mode=0o755)
    yield member("etc/passwd", content=b"root:x:0:0\n", uid=3, gid=4, mtime_ns=1_600_000_000_123_456_789)
    yield member("etc/link", SYMLINK, linkname="passwd")
    yield member("dev-null", DEVICE, device=(1, 3))
    yield member("caps", content=b"x" * 10, xattrs={"user.a": b"1"})
    for number in range(4):
        yield member(f"data{number}", content=noise(number, 200_000))


def made(tmp_path: Path, change: Change | None = None, *, gzip: bool = True) -> Indexed:
    layer = image.add_layer(tmp_path / "content", members(), gzip=gzip)
    return indexed.indexed(tmp_path, [layer], {0: change} if change else {})


def lines(verdict: Verdict) -> list[str]:
    return [f"{defect.place}: {defect.text}" for defect in verdict.all_defects]


def with_entry(which: bytes, /, **fields: Any) -> Change:
    """The zTOC with a member's fields changed."""

    def change(ztoc: Ztoc) -> Ztoc:
        return replace(ztoc, entries=tuple(replace(e, **fields) if e.name == which else e for e in ztoc.entries))

    return change


@pytest.mark.parametrize("gzip", [True, False])
def test_an_honest_index_is_proven(tmp_path: Path, *, gzip: bool) -> None:
    """Every span, every member and the diff_id of an honest index hold, of gzip and of plain layers."""
    verdict = made(tmp_path, gzip=gzip).verify()
    assert lines(verdict) == []
    assert verdict.proven
    (layer,) = verdict.layers
    assert layer.spans > 3
    assert layer.members == 9
    assert layer.algorithm == ("gzip" if gzip else "uncompressed")


@pytest.mark.parametrize("vector", vectors.vectors(loads=True, mountable=True), ids=vectors.label)
def test_zTOCs_of_another_builder_are_proven(tmp_path: Path, vector: dict[str, Any]) -> None:  # noqa: N802
    """What the format's other builder made of a layer is proven too: only truth counts, not our own bytes."""
    blob, ztoc = vectors.content(str(vector["input"])), vectors.content(str(vector["ztoc"]))
    assert one_layer(tmp_path, blob, ztoc).proven


def one_layer(tmp_path: Path, blob: bytes, ztoc: bytes, media_type: str = "") -> Verdict:
    """The verdict on an image of one layer; nothing is known of its diff_id, and that defect is left out."""
    store = LayoutStore(tmp_path)
    kind = media_type or (OCI_LAYER_GZIP if blob[:2] == b"\x1f\x8b" else OCI_LAYER)
    layer = Descriptor(kind, indexed.put(store, blob), len(blob))
    subject = Descriptor(OCI_MANIFEST, sha256_digest(b"a manifest"), 10)
    manifest = Manifest(OCI_MANIFEST, Descriptor("x/y", indexed.put(store, b"{}"), 2), (layer,))
    entry = IndexEntry(layer.digest, replace(indexed_entry(layer, ztoc, store)))
    index = indexed.put_index(store, SociIndex.v1((entry,), subject))
    verdict = asyncio.run(verify_index(store, subject, manifest, index))
    return replace(verdict, defects=tuple(one for one in verdict.defects if one.place != "config"))


def indexed_entry(layer: Descriptor, ztoc: bytes, store: LayoutStore) -> Descriptor:
    return ztoc_entry(layer, indexed.put(store, ztoc), len(ztoc), 1 << 22).ztoc


LIES: list[tuple[bytes, dict[str, Any], str]] = [
    (b"etc/passwd", {"name": b"etc/shadow"}, "path etc/passwd: name is 'etc/passwd', the table of contents says 'etc/shadow'"),
    (b"etc/passwd", {"size": 10}, "path etc/passwd: size is 11, the table of contents says 10"),
    (b"etc/passwd", {"mode": 0o4755}, "path etc/passwd: mode is 0o644, the table of contents says 0o4755"),
    (b"etc/passwd", {"uid": 0}, "path etc/passwd: owner is 3, the table of contents says 0"),
    (b"etc/passwd", {"gid": 0}, "path etc/passwd: group is 4, the table of contents says 0"),
    (b"etc/passwd", {"uname": b"x"}, "path etc/passwd: owner's name is '', the table of contents says 'x'"),
    (b"etc/passwd", {"gname": b"x"}, "path etc/passwd: group's name is '', the table of contents says 'x'"),
    (b"etc/link", {"linkname": b"shadow"}, "path etc/link: link target is 'passwd', the table of contents says 'shadow'"),
    (b"etc/link", {"type": "hardlink"}, "path etc/link: type is symlink, the table of contents says hardlink"),
    (b"dev-null", {"devminor": 5}, "path dev-null: device minor is 3, the table of contents says 5"),
    (b"dev-null", {"devmajor": 5}, "path dev-null: device major is 1, the table of contents says 5"),
    (
        b"etc/passwd",
        {"mod_time": "2020-09-13T12:26:40Z"},
        "path etc/passwd: mtime is 2020-09-13T12:26:40.123456789Z, the table of contents says 2020-09-13T12:26:40Z",
    ),
    (b"caps", {"pax": {b"SCHILY.xattr.user.a": b"2"}}, "path caps: xattr user.a is '1', the table of contents says '2'"),
    (b"caps", {"pax": {}}, "path caps: xattr user.a is '1', the table of contents says absent"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "expected"), LIES, ids=[next(iter(lie[1])) for lie in LIES])
def test_each_lie_of_a_table_of_contents_is_named(
    tmp_path: Path, name: bytes, fields: dict[str, Any], expected: str
) -> None:
    """A zTOC whose spans are right and whose table lies about one field: the path, the truth and the lie are told."""
    verdict = made(tmp_path, with_entry(name, **fields)).verify()
    assert not verdict.proven
    assert expected in lines(verdict)


def test_a_time_in_another_zone_is_the_same_time(tmp_path: Path) -> None:
    """Builders that write local times are right too."""
    change = with_entry(b"etc/passwd", mod_time="2020-09-13T14:26:40.123456789+02:00")
    assert made(tmp_path, change).verify().proven


def test_a_member_that_is_missing_invented_or_elsewhere_is_named(tmp_path: Path) -> None:
    """Members only in the table, only in the tar, and those whose data is said to be at another place."""

    def change(ztoc: Ztoc) -> Ztoc:
        kept = [entry for entry in ztoc.entries if entry.name != b"etc/link"]
        kept = [replace(e, offset=e.offset - 512, size=9) if e.name == b"caps" else e for e in kept]
        first = TocEntry(b"invented\n", "dir", 0, 0)
        return replace(ztoc, entries=(first, *kept))

    found = lines(made(tmp_path, change).verify())
    assert "path etc/link: is in the tar, not in the table of contents" in found
    assert "path invented\\n: is in the table of contents (at 0), not in the tar" in found
    assert any(line.startswith("path caps: offset is ") for line in found)
    assert "path caps: size is 10, the table of contents says 9" in found


def test_a_wrong_span_digest_is_named(tmp_path: Path) -> None:
    """A span whose bytes are others than the zTOC says."""

    def change(ztoc: Ztoc) -> Ztoc:
        digests = list(ztoc.span_digests)
        digests[2] = sha256_digest(b"else")
        return replace(ztoc, span_digests=tuple(digests))

    assert lines(made(tmp_path, change).verify()) == [
        f"span 2: its bytes have another digest than {sha256_digest(b'else')}"
    ]


def test_a_checkpoint_with_another_window_is_named(tmp_path: Path) -> None:
    """All digests hold, but the span would inflate to other bytes than the layer's: containers would read those."""

    def change(ztoc: Ztoc) -> Ztoc:
        blob = bytearray(ztoc.checkpoints)
        at = HEADER_BYTES + 2 * RECORD_BYTES
        blob[at - 32_768 : at] = bytes(32_768)
        return replace(ztoc, checkpoints=bytes(blob))

    (line,) = lines(made(tmp_path, change).verify())
    assert line == "span 1: inflates from its checkpoint to other bytes than the layer has there"


def test_the_zTOC_of_another_layer_is_refused(tmp_path: Path) -> None:  # noqa: N802
    """An honest zTOC for another layer: its size, its spans and its members are not this layer's."""
    other = image.add_layer(tmp_path / "content", [member("other", content=noise(9, 300_000))])
    foreign = indexed.zip_ztoc(image.write_image(tmp_path / "content", [other]), 0)
    found = lines(made(tmp_path, lambda _: foreign).verify())
    assert any("zTOC: is for a layer of" in line for line in found)
    assert any(line.startswith("span 0: ") for line in found)
    assert any(line.startswith("path ") for line in found)


def test_the_index_of_another_image_is_refused(tmp_path: Path) -> None:
    """A right index, for the wrong image."""
    first = made(tmp_path)
    other = image.add_layer(tmp_path / "content", [member("other", content=b"other")])
    second = indexed.indexed(tmp_path, [other])
    found = lines(second.verify(first.index))
    assert f"index: is for manifest {first.subject.digest}, the image's is {second.subject.digest}" in found
    assert f"index: names layer {first.entries[0].layer}, which the image does not have" in found


def test_what_the_index_says_of_its_subject_and_layers_is_checked(tmp_path: Path) -> None:
    """Media types and sizes of subject and layers, two zTOCs for one layer, and blobs for no layer."""
    it = made(tmp_path)
    (entry,) = it.entries
    annotations = dict(entry.ztoc.annotations) | {"com.amazon.soci.image-layer-mediaType": OCI_LAYER}
    wrong = IndexEntry(entry.layer, replace(entry.ztoc, annotations=annotations))
    other = IndexEntry(entry.layer, replace(entry.ztoc, digest=sha256_digest(b"gone")))
    nameless = IndexEntry(entry.layer, replace(entry.ztoc, annotations={}))
    subject = replace(it.subject, media_type=DOCKER_MANIFEST, size=1)
    found = lines(it.verify(indexed.put_index(it.store, SociIndex.v1((nameless, other, wrong), subject))))
    assert found == [
        f"index: says that its subject is {DOCKER_MANIFEST} of 1 bytes; it is {OCI_MANIFEST} of {it.subject.size}",
        f"index: blob 0, {entry.ztoc.digest}, does not say which layer it is for",
        f"index: has two zTOCs for it, {other.ztoc.digest} and {entry.ztoc.digest}",
        f"index: says that it is {OCI_LAYER}, the manifest {OCI_LAYER_GZIP}",
    ]


def test_a_layer_without_zTOC_is_no_defect(tmp_path: Path) -> None:  # noqa: N802
    """Small layers are left out of an index on purpose."""
    layers = [image.add_layer(tmp_path / "content", [member(name, content=b"x")]) for name in ("a", "b")]
    it = indexed.indexed(tmp_path, layers)
    verdict = it.verify(indexed.put_index(it.store, SociIndex.v1(it.entries[1:], it.subject)))
    assert verdict.proven
    assert [layer.ztoc is None for layer in verdict.layers] == [True, False]


def test_a_zTOC_that_is_absent_damaged_or_hostile_is_a_defect(tmp_path: Path) -> None:  # noqa: N802
    """No zTOC there, one of another size, and one that is no zTOC: each is told, and the other layers are looked at."""
    layers = [
        image.add_layer(tmp_path / "content", [member(name, content=name.encode())]) for name in ("a", "b", "c", "d")
    ]
    it = indexed.indexed(tmp_path, layers)
    gone = replace(it.entries[0].ztoc, digest=sha256_digest(b"gone"))
    longer = replace(it.entries[1].ztoc, size=it.entries[1].ztoc.size + 1)
    junk = replace(it.entries[2].ztoc, digest=indexed.put(it.store, b"junk" * 9), size=36)
    entries = [replace(e, ztoc=d) for e, d in zip(it.entries, (gone, longer, junk), strict=False)]
    verdict = it.verify(indexed.put_index(it.store, SociIndex.v1((*entries, it.entries[3]), it.subject)))
    texts = [[defect.text for defect in layer.defects] for layer in verdict.layers]
    assert texts[0] == [f"{gone.digest} is not there"]
    assert texts[1] == [f"{longer.digest} has {longer.size - 1} bytes, the index says {longer.size}"]
    assert texts[2][0].startswith("zTOC: ")
    assert texts[3] == []


def test_a_wrong_diff_id_is_a_defect(tmp_path: Path) -> None:
    """The config's diff_id is what a layer that came whole is proved by."""
    layer = image.add_layer(tmp_path / "content", members())
    wrong = sha256_digest(b"wrong")
    found = lines(indexed.indexed(tmp_path, [replace(layer, diff_id=wrong)]).verify())
    assert found == [f"layer: its tar has another digest than the config's diff_id {wrong}"]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_layer_with_other_bytes_is_a_defect(tmp_path: Path, damage: str) -> None:
    """A store that gives other bytes than the digest promises: the verdict says so, and where."""
    it = made(tmp_path)
    path = it.store.path(Digest(it.image.layers[0]["digest"]))
    blob = bytearray(path.read_bytes())
    match damage:
        case "flip":
            blob[len(blob) // 2] ^= 1
        case "cut":
            del blob[-10_000:]
        case "longer":
            blob += bytes(100)
    path.write_bytes(blob)
    found = lines(it.verify())
    assert any(line.startswith("layer: ") for line in found)
    if damage != "longer":
        assert any(line.startswith("span ") for line in found)


def test_what_is_no_index_is_a_defect(tmp_path: Path) -> None:
    """A manifest of another kind, or nonsense, is told as a defect of the index."""
    it = made(tmp_path)
    for digest in (it.subject.digest, indexed.put(it.store, b"nonsense")):
        verdict = it.verify(digest)
        assert verdict.version == 0
        assert [defect.place for defect in verdict.all_defects] == ["index"]


def test_a_claim_that_there_are_no_xattrs_is_checked(tmp_path: Path) -> None:
    """By that claim a mount would answer no question for extended attributes."""
    it = made(tmp_path)
    (entry,) = it.entries
    annotations = dict(entry.ztoc.annotations) | {"com.amazon.soci.disable-xattrs": "true"}
    lying = IndexEntry(entry.layer, replace(entry.ztoc, annotations=annotations))
    found = lines(it.verify(indexed.put_index(it.store, SociIndex.v1((lying,), it.subject))))
    assert found == ["path caps: has an extended attribute, the index says that none has"]


def test_prefetch_lists_are_checked(tmp_path: Path) -> None:
    """A list must parse and stay within its layer's spans."""
    it = made(tmp_path)
    (entry,) = it.entries
    spans = it.verify().layers[0].spans
    good, bad = (encode_prefetch([SpanRange(0, last)]) for last in (spans, spans + 1))
    lists = [prefetch_entry(entry.layer, indexed.put(it.store, one), len(one)) for one in (good, bad, b"[]")]
    index = SociIndex(1, it.entries, it.subject, prefetch=tuple(lists))
    found = lines(it.verify(indexed.put_index(it.store, index)))
    assert len(found) == 2
    assert found[0].endswith(f"goes up to span {spans + 1} of layer {entry.layer}, which has {spans}")


def test_each_layer_is_read_once(tmp_path: Path) -> None:
    """Also where an image has one layer twice: a layer may be many gigabytes, from a registry far away."""

    class Counting(LayoutStore):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.streamed: list[Digest] = []

        def stream(self, digest: Digest) -> AsyncGenerator[bytes, None]:
            self.streamed.append(digest)
            return super().stream(digest)

    layer = image.add_layer(tmp_path / "content", members())
    it = indexed.indexed(tmp_path, [layer, layer])
    store = Counting(tmp_path)
    verdict = asyncio.run(verify_index(store, it.subject, it.manifest, it.index))
    assert verdict.proven
    assert store.streamed == [layer.digest]


def test_many_defects_are_counted_and_not_all_kept(tmp_path: Path) -> None:
    """A table that is wrong throughout does not fill the memory with words."""
    count = MAX_DEFECTS + 50
    layer = image.add_layer(tmp_path / "content", [member(f"f{number:05}") for number in range(count)])
    it = indexed.indexed(
        tmp_path, [layer], {0: lambda ztoc: replace(ztoc, entries=tuple(replace(e, uid=9) for e in ztoc.entries))}
    )
    (verdict,) = it.verify().layers
    assert len(verdict.defects) == MAX_DEFECTS
    assert verdict.more == 50


def test_a_bomb_is_left_behind_with_little_memory(tmp_path: Path) -> None:
    """A layer that inflates far beyond what its zTOC says ends the proof of that layer soon."""
    honest = image.add_layer(tmp_path / "content", [member("f", content=b"x" * 1000)])
    built = image.write_image(tmp_path / "content", [honest])
    ztoc = indexed.zip_ztoc(built, 0)
    bomb = gzip.compress(gzip.decompress(indexed.layer_blob(built, 0)) + bytes(64 << 20), mtime=0)
    lying = replace(ztoc, compressed_size=len(bomb))
    tracemalloc.start()
    try:
        verdict = one_layer(tmp_path / "other", bomb, encode_ztoc(lying))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert any("bytes of tar behind byte" in line for line in lines(verdict))
    assert peak < 32 << 20


def test_a_layer_whose_bytes_are_no_tar_is_a_defect(tmp_path: Path) -> None:
    """A zTOC can be made up for any bytes; what no tar reader takes is told."""
    junk = gzip.compress(b"no tar at all" * 1000, mtime=0)
    layer = image.add_layer(tmp_path / "content", members())
    ztoc = indexed.zip_ztoc(image.write_image(tmp_path / "content", [layer]), 0)
    found = lines(one_layer(tmp_path / "other", junk, encode_ztoc(ztoc)))
    assert any("is no tar that can be read" in line for line in found)


def test_the_fixture_has_spans_that_begin_inside_a_byte(tmp_path: Path) -> None:
    """So that the tests above go through the shared byte of two spans."""
    ztoc = indexed.zip_ztoc(made(tmp_path).image, 0)
    spans = Spans.of(parse_ztoc(encode_ztoc(ztoc)))
    assert spans.checkpoints is not None
    assert any(spans.checkpoints.bits(i) for i in range(spans.count))


@pytest.mark.parametrize("frame_bytes", [0, 50_000])
def test_zstd_layers_are_proven(tmp_path: Path, frame_bytes: int) -> None:
    """A layer of one frame, and one of many with a skippable frame behind."""
    layer = image.add_layer(tmp_path / "content", members(), compression="zstd", frame_bytes=frame_bytes)
    verdict = indexed.indexed(tmp_path, [layer]).verify()
    assert lines(verdict) == []
    assert verdict.layers[0].algorithm == "zstd"
    assert (verdict.layers[0].spans > 3) == bool(frame_bytes)


def test_lies_about_zstd_layers_are_named(tmp_path: Path) -> None:
    """Table and spans alike."""

    def change(ztoc: Ztoc) -> Ztoc:
        entries = tuple(replace(e, uid=9) if e.name == b"caps" else e for e in ztoc.entries)
        return replace(ztoc, entries=entries, span_digests=(sha256_digest(b""), *ztoc.span_digests[1:]))

    layer = image.add_layer(tmp_path / "content", members(), compression="zstd", frame_bytes=50_000)
    found = lines(indexed.indexed(tmp_path, [layer], {0: change}).verify())
    assert found == [
        f"span 0: its bytes have another digest than {sha256_digest(b'')}",
        "path caps: owner is 0, the table of contents says 9",
    ]


def test_a_span_too_large_for_memory_waits_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a zstd layer of one frame is one span, however large."""
    monkeypatch.setattr(proof, "SPOOL_BYTES", 1000)
    monkeypatch.setattr(proof, "READ_BYTES", 1000)
    layer = image.add_layer(tmp_path / "content", members(), compression="zstd")
    assert indexed.indexed(tmp_path, [layer]).verify().proven


def test_a_byte_that_two_spans_share_may_end_a_chunk(tmp_path: Path) -> None:
    """Where the blob comes cut exactly behind it, the later span still has it: chunks change nothing."""
    it = made(tmp_path)
    blob, ztoc = indexed.layer_blob(it.image, 0), indexed.zip_ztoc(it.image, 0)
    spans = Spans.of(ztoc)
    shared = [spans.compressed(i)[1] for i in range(spans.count) if i + 1 < spans.count]
    assert any(spans.compressed(i + 1)[0] == end - 1 for i, end in enumerate(shared))
    defects = proof.Defects(None)
    proving = proof.LayerProof(it.manifest.layers[0], ztoc, spans, None, defects)
    for start, end in pairwise([0, *shared, len(blob)]):
        proving.feed(blob[start:end])
    proving.finish()
    proving.close()
    assert defects.found == []
