# SPDX-License-Identifier: Apache-2.0
"""A layer of which all is here is compared with what its image promises."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.errors import Mismatch
from soci.inflate import inflate_stream
from soci.span import Spans
from soci.toc import Algorithm
from soci_cache import LayerStore, locks, proof
from soci_cache.proof import COMPLETE, OPEN, REJECTED, UNPROVEN, judge, prove, read_tail, read_whole
from soci_cache.survey import look
from support.mounter_layers import Made, item, make, make_zstd, noise, tar_of

A, B, C = (sha256_digest(text) for text in (b"a", b"b", b"c"))
LONG = Digest("sha512:" + "0" * 128)
LIMIT = 30.0


@pytest.mark.parametrize(
    ("wanted", "found", "tail", "verdict"),
    [
        ((), (), True, UNPROVEN),
        ((A,), (A,), True, COMPLETE),
        ((A,), (A,), False, COMPLETE),
        ((A,), (B,), True, REJECTED),
        ((A,), (B,), False, UNPROVEN),
        ((A, B), (B,), True, COMPLETE),
        ((A, C), (B,), True, REJECTED),
        ((LONG,), (B,), True, UNPROVEN),
        ((A,), (B, LONG), True, REJECTED),
        ((A, LONG), (B, LONG), True, COMPLETE),
    ],
)
def test_judging(wanted: tuple[Digest, ...], found: tuple[Digest, ...], tail: bool, verdict: int) -> None:  # noqa: FBT001
    """One image that is right proves it; who is of another algorithm, or a layer without its tail, refutes nothing."""
    assert judge(wanted, found, tail_known=tail) == verdict


def padded(kind: Algorithm) -> Made:
    """A layer whose tar ends in padding, which the zTOC does not count."""
    items = [item("a", noise(300_000))]
    tar = tar_of(items)
    assert len(tar) % 10240 == 0
    if kind == "zstd":
        return make_zstd(items)
    blob = tar if kind == "uncompressed" else gzip.compress(tar, 6, mtime=0)
    builder = ZtocBuilder(kind, 64 << 10)
    builder.feed(blob)
    built = builder.finish()
    return Made(blob, tar, built.ztoc_bytes, built.ztoc, sha256_digest(blob), sha256_digest(built.ztoc_bytes))


@pytest.fixture(scope="module")
def made() -> Made:
    return padded("gzip")


@pytest.fixture
def cache(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "cache")


def diff_id(made: Made) -> Digest:
    return sha256_digest(made.tar)


def bring(cache: LayerStore, made: Made, said: Digest | None, *, tail: bool = True) -> Path:
    """Prepare and fill all of it, as a fetcher does."""
    cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes, said).close()
    with cache.write(made.layer, made.ztoc_digest) as writer:
        spans = Spans.of(made.ztoc)
        last = spans.count - 1
        for span in range(writer.spans.count):
            start, end = spans.compressed(span)
            pieces = inflate_stream(made.ztoc, spans, span, (made.blob[start:end],), tail=tail and span == last)
            writer.fill_pieces(span, pieces, tail=tail)
        assert writer.full()
        return writer.directory


def verdict(place: Path) -> int:
    found = look(place)
    assert found is not None
    return found.verdict


@pytest.mark.parametrize("kind", ["gzip", "uncompressed", "zstd"])
def test_a_layer_that_is_what_it_should_be(cache: LayerStore, kind: Algorithm) -> None:
    """With the tar's padding, which no span holds; it is durable, said once, and survives a look after a boot."""
    made = padded(kind)
    spans = Spans.of(made.ztoc)
    place = bring(cache, made, diff_id(made))
    assert read_tail(place) == made.tar[made.ztoc.uncompressed_size :]
    assert verdict(place) == OPEN
    assert prove(place, spans) == COMPLETE
    assert verdict(place) == COMPLETE
    assert prove(place, spans) is None
    (place / "spans").write_bytes(b"")  # as after another boot: from the journal
    cache.read(made.layer, made.ztoc_digest).close()
    assert verdict(place) == COMPLETE


def test_a_layer_with_holes_is_not_judged(cache: LayerStore, made: Made) -> None:
    """Nor is one being stopped; nothing is left of the try."""
    place = bring(cache, made, diff_id(made))
    spans = Spans.of(made.ztoc)
    assert prove(place, spans, lambda: True) is None
    with cache.write(made.layer, made.ztoc_digest) as writer:
        writer._presence.clear(1)
    assert prove(place, spans) is None
    assert read_whole(place) is None
    assert verdict(place) == OPEN


def test_a_layer_that_is_another_is_served_no_more(cache: LayerStore, made: Made) -> None:
    """Neither to who has it open, nor to who opens it, in this boot or the next; the error says the way out."""
    place = bring(cache, made, B)
    reader = cache.read(made.layer, made.ztoc_digest)
    assert reader.pread(10, 0)
    assert prove(place, Spans.of(made.ztoc)) == REJECTED
    for use in (
        lambda: reader.pread(10, 0),
        lambda: reader.get(10, 0, range(1)),
        lambda: cache.read(made.layer, made.ztoc_digest),
        lambda: cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes, B),
        lambda: cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes),
    ):
        with pytest.raises(Mismatch, match=f"{made.ztoc_digest}.*soci cache gc"):
            use()
    reader.close()
    with cache.write(made.layer, made.ztoc_digest) as writer:
        writer._presence.clear(1)
        start, end = writer.spans.uncompressed(1)
        with pytest.raises(Mismatch):
            writer.fill(1, made.tar[start:end])
    (place / "spans").write_bytes(b"")
    with pytest.raises(Mismatch):
        cache.read(made.layer, made.ztoc_digest)
    assert verdict(place) == REJECTED


def test_a_false_word_takes_nothing_from_a_true_one(cache: LayerStore, made: Made) -> None:
    """Of two images one is right: the layer is proven, and the other image does not get it from then on."""
    place = bring(cache, made, B)
    cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)).close()
    assert prove(place, Spans.of(made.ztoc)) == COMPLETE
    cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)).close()
    with pytest.raises(Mismatch):
        cache.prepare(made.layer, made.ztoc_digest, None, B)
    cache.read(made.layer, made.ztoc_digest).close()


def test_an_honest_image_that_comes_later_gets_the_layer(cache: LayerStore, made: Made) -> None:
    """It was rejected for another image's false word; the bytes are what this one promises."""
    place = bring(cache, made, B)
    assert prove(place, Spans.of(made.ztoc)) == REJECTED
    with cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)) as reader:
        assert reader.pread(10, 0) == made.tar[:10]
    assert verdict(place) == COMPLETE


def test_nobody_said_what_it_should_be(cache: LayerStore, made: Made) -> None:
    """It is whole, and unproven; once an image says it, it is proven without being fetched."""
    place = bring(cache, made, None)
    spans = Spans.of(made.ztoc)
    assert prove(place, spans) == UNPROVEN
    cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)).close()
    assert verdict(place) == OPEN
    assert prove(place, spans) == COMPLETE


@pytest.mark.parametrize("damage", [None, b"x" * 40], ids=["not kept", "damaged"])
def test_a_layer_without_its_tail_is_unproven(cache: LayerStore, made: Made, damage: bytes | None) -> None:
    """It was filled by an earlier release, or the disk lost it: the digest of less says nothing against the layer."""
    place = bring(cache, made, diff_id(made), tail=damage is not None)
    if damage:
        (place / "tail").write_bytes(damage)
    assert read_tail(place) is None
    assert prove(place, Spans.of(made.ztoc)) == UNPROVEN
    cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)).close()
    assert verdict(place) == UNPROVEN


def test_a_disk_that_lies_is_no_false_index(cache: LayerStore, made: Made) -> None:
    """Bytes that are not those that were filled go, to be fetched again; then the layer is proven."""
    place = bring(cache, made, diff_id(made))
    spans = Spans.of(made.ztoc)
    start, end = spans.uncompressed(2)
    with (place / "layer.tar").open("r+b") as tar:
        tar.seek(start + 100)
        tar.write(b"flipped")
    assert prove(place, spans) is None
    with cache.write(made.layer, made.ztoc_digest) as writer:
        assert writer.missing(range(spans.count)) == [2]
        writer.fill(2, made.tar[start:end])
    assert prove(place, spans) == COMPLETE


def test_bytes_that_go_meanwhile_make_no_verdict(
    cache: LayerStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was digested under a mark that changed is not believed, whatever came of it."""
    place = bring(cache, made, B)
    digests = proof._digests

    def evicted(*words: object) -> object:
        with cache.write(made.layer, made.ztoc_digest) as writer:
            writer._presence.evicting()
        return digests(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "_digests", evicted)
    assert prove(place, Spans.of(made.ztoc)) is None
    assert verdict(place) == OPEN


def test_one_process_proves(cache: LayerStore, made: Made, tmp_path: Path) -> None:
    """Of several that try at the same time one says the verdict, the others say nothing."""
    place = bring(cache, made, diff_id(made))
    with (place / "ztoc").open("rb") as other:
        assert locks.lock_alone(other.fileno())
        assert prove(place, Spans.of(made.ztoc)) is None
    script = (
        "import sys; from pathlib import Path; from soci.span import Spans; from soci.ztoc import parse_ztoc\n"
        "from soci_cache.proof import prove\n"
        "place = Path(sys.argv[1]); spans = Spans.of(parse_ztoc((place / 'ztoc').read_bytes()))\n"
        "print('ready', flush=True); sys.stdin.read(1); print(prove(place, spans))\n"
    )
    words = [sys.executable, "-c", script, str(place)]
    children = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for one in children:
        assert one.stdout is not None
        assert one.stdout.readline() == b"ready\n"
    said = [one.communicate(b"x", timeout=LIMIT)[0].strip() for one in children]
    assert sorted(said) == [b"1", b"None", b"None"]


def test_an_index_that_lies_within_its_digests(cache: LayerStore, made: Made) -> None:
    """Its checkpoints carry another window: each span has its digest, inflates to its size, and is other bytes."""
    words = [noise(5, number).hex().encode() for number in range(200)]
    content = make([item("a", b" ".join(words[at % 199 * at % 200] for at in range(60_000)))], span_size=64 << 10)
    last = Spans.of(content.ztoc).count - 1
    out, _ = Spans.of(content.ztoc).uncompressed(last)
    window = content.tar[out - 32768 : out]
    assert content.ztoc.checkpoints.count(window) == 1
    zinfo = content.ztoc.checkpoints.replace(window, window.upper())
    forged = replace(content.ztoc, checkpoints=zinfo)
    spans = Spans.of(forged)
    start, end = spans.compressed(last)
    pieces = b"".join(inflate_stream(forged, spans, last, (content.blob[start:end],)))
    assert pieces != content.tar[spans.uncompressed(last)[0] : spans.uncompressed(last)[1]]
    lying = replace(content, ztoc=forged)
    found = bring(cache, lying, sha256_digest(content.tar))
    assert prove(found, spans) == REJECTED


@pytest.mark.parametrize("name", ["diff_ids", "whole", "tail"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{}", b'{"verdict": [], "digests": 7}', b"x" * 100_000])
def test_damaged_files_say_nothing(cache: LayerStore, made: Made, name: str, damage: bytes) -> None:
    """They are as if they were not there: nothing is proven by them, and nothing fails."""
    place = bring(cache, made, diff_id(made))
    (place / name).write_bytes(damage)
    cache.prepare(made.layer, made.ztoc_digest, None, diff_id(made)).close()
    assert prove(place, Spans.of(made.ztoc)) == (UNPROVEN if name == "tail" else COMPLETE)


def test_no_more_words_are_kept_than_the_limit(cache: LayerStore, made: Made) -> None:
    """Images that say other things each cannot fill the disk."""
    place = bring(cache, made, diff_id(made))
    for number in range(proof.MOST_DIFF_IDS + 5):
        cache.prepare(made.layer, made.ztoc_digest, None, sha256_digest(bytes([number]))).close()
    assert len(proof.read_diff_ids(place)) == proof.MOST_DIFF_IDS
    assert prove(place, Spans.of(made.ztoc)) == COMPLETE
