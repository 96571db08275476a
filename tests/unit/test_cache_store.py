# SPDX-License-Identifier: Apache-2.0
"""The span cache's folders: made whole, opened only when true, mended after crashes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidDigest, InvalidZtoc, LimitExceeded, Mismatch, NotFound, SociError, Unavailable
from soci_cache import LayerStore, store
from soci_cache.presence import HEADER, boot_id, new_map
from support.mounter_layers import Made, item, make, noise

OTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def made() -> Made:
    """A layer of several spans."""
    found = make([item("a", noise(400_000)), item("b", noise(200_000, 2))])
    assert len(found.ztoc.span_digests) >= 6
    return found


@pytest.fixture
def cache(tmp_path: Path) -> LayerStore:
    """An empty cache."""
    return LayerStore(tmp_path / "cache")


def prepare(cache: LayerStore, made: Made) -> Path:
    with cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes) as reader:
        return reader.directory


def fill(cache: LayerStore, made: Made, *spans: int) -> None:
    with cache.write(made.layer, made.ztoc_digest) as writer:
        for span in spans:
            start, end = writer.spans.uncompressed(span)
            writer.fill(span, made.tar[start:end])


def present(cache: LayerStore, made: Made) -> list[int]:
    """The spans that are here, each of which must have its bytes."""
    with cache.read(made.layer, made.ztoc_digest) as reader:
        here = [span for span in range(reader.spans.count) if reader.present(span)]
        for span in here:
            start, end = reader.spans.uncompressed(span)
            assert reader.pread(end - start, start) == made.tar[start:end], f"span {span} is marked, but not here"
        assert reader.present_count() == len(here)
        return here


def reboot(monkeypatch: pytest.MonkeyPatch, boot: str = OTHER_BOOT) -> None:
    monkeypatch.setattr(store, "boot_id", lambda: boot)


def test_fill_and_read(cache: LayerStore, made: Made) -> None:
    """What was filled is here with its bytes, what was not is missing, and the file is sparse and as long as the tar."""
    place = prepare(cache, made)
    assert place == cache.directory(made.layer, made.ztoc_digest)
    assert present(cache, made) == []
    fill(cache, made, 1, 4)
    assert present(cache, made) == [1, 4]
    with cache.write(made.layer, made.ztoc_digest) as writer:
        assert writer.missing(range(6)) == [0, 2, 3, 5]
        assert writer.present(4)
    status = (place / "layer.tar").stat()
    assert status.st_size == made.ztoc.uncompressed_size
    assert status.st_blocks * 512 < status.st_size
    assert (place.parents[2] / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert place.parent.stat().st_mode & 0o77 == 0


def test_preparing_again_keeps_what_is_here(cache: LayerStore, made: Made) -> None:
    """With or without the zTOC's bytes."""
    prepare(cache, made)
    fill(cache, made, 0)
    prepare(cache, made)
    cache.prepare(made.layer, made.ztoc_digest, None).close()
    assert present(cache, made) == [0]


def test_what_is_not_here_is_not_found(cache: LayerStore, made: Made) -> None:
    """Neither for reading, nor for writing, nor for preparing without bytes; and nothing is left by the asking."""
    for use in (cache.read, cache.write, lambda layer, ztoc: cache.prepare(layer, ztoc, None)):
        with pytest.raises(NotFound):
            use(made.layer, made.ztoc_digest)
    assert not cache._layers.exists()


@pytest.mark.parametrize("text", ["sha256:../../../etc", "sha256:", "", "md5:" + "1" * 32, "sha256:" + "1" * 64 + "/x"])
def test_what_is_no_digest_is_no_path(cache: LayerStore, made: Made, text: str) -> None:
    """A text that is no digest never becomes a folder."""
    for key in ((Digest(text), made.ztoc_digest), (made.layer, Digest(text))):
        with pytest.raises(InvalidDigest):
            cache.prepare(*key, made.ztoc_bytes)


def test_a_wrong_ztoc_is_refused(cache: LayerStore, made: Made) -> None:
    """Bytes that are not of the digest, or no zTOC, make no folder."""
    with pytest.raises(Mismatch):
        cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes[:-1])
    with pytest.raises(InvalidZtoc):
        cache.prepare(made.layer, sha256_digest(b"no ztoc"), b"no ztoc")
    assert not cache._layers.exists()


def test_two_ztocs_of_one_layer_are_two_folders(cache: LayerStore, made: Made) -> None:
    """An image is never shown through another index's table."""
    other = make([item("a", noise(400_000)), item("b", noise(200_000, 2))], span_size=1 << 20)
    assert other.layer == made.layer
    prepare(cache, made)
    fill(cache, made, 0, 1)
    assert prepare(cache, other) != prepare(cache, made)
    assert present(cache, other) == []


@pytest.mark.parametrize("damage", [b"", b"x", None], ids=["empty", "flipped", "gone"])
def test_a_damaged_ztoc_is_fetched_again(cache: LayerStore, made: Made, damage: bytes | None) -> None:
    """It is as if it were not here; brought anew it serves with what is filled already."""
    place = prepare(cache, made)
    fill(cache, made, 2)
    if damage is None:
        (place / "ztoc").unlink()
    else:
        (place / "ztoc").write_bytes(damage + made.ztoc_bytes[1:] if damage else b"")
    for use in (cache.read, cache.write, lambda layer, ztoc: cache.prepare(layer, ztoc, None)):
        with pytest.raises(NotFound):
            use(made.layer, made.ztoc_digest)
    with pytest.raises(Mismatch):
        cache.prepare(made.layer, made.ztoc_digest, b"neither")
    prepare(cache, made)
    assert present(cache, made) == [2]


@pytest.mark.parametrize("damage", ["empty", "gone", "other count", "zeros"])
def test_a_damaged_map_is_made_from_the_journal(cache: LayerStore, made: Made, damage: str) -> None:
    """The journal and the bytes decide what is here."""
    place = prepare(cache, made)
    fill(cache, made, 0, 3)
    spans = place / "spans"
    if damage == "gone":
        spans.unlink()
    else:
        spans.write_bytes({"empty": b"", "zeros": bytes(200), "other count": new_map(3, boot_id())}[damage])
    assert present(cache, made) == [0, 3]


def test_a_lost_tar_is_all_absent(cache: LayerStore, made: Made) -> None:
    """Marks without the file they speak of count for nothing."""
    place = prepare(cache, made)
    fill(cache, made, 0, 3)
    (place / "layer.tar").unlink()
    assert present(cache, made) == []
    assert (place / "layer.tar").stat().st_size == made.ztoc.uncompressed_size


@pytest.mark.parametrize("how", ["prepare", "read", "write"])
def test_after_another_boot_only_proven_spans_count(
    cache: LayerStore, made: Made, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Of spans that a crash left marked, those count whose bytes are the journal's; whoever opens first checks."""
    place = prepare(cache, made)
    fill(cache, made, 0, 1, 2, 3, 4)
    with cache.read(made.layer, made.ztoc_digest) as reader:
        starts = [reader.spans.uncompressed(span)[0] for span in range(6)]
    with (place / "layer.tar").open("r+b") as tar:
        tar.seek(starts[1] + 5)  # span 1's bytes did not reach the disk
        tar.write(bytes(100))
    journal = (place / "journal").read_bytes()
    (place / "journal").write_bytes(journal[:80] + journal[90:])  # span 2's record was torn
    content = bytearray((place / "spans").read_bytes())
    content[HEADER + 5] = 1  # marked, though it was never filled
    content[HEADER + 4] = 0  # filled, though the mark did not reach the disk
    (place / "spans").write_bytes(content)
    reboot(monkeypatch)
    getattr(cache, how)(made.layer, made.ztoc_digest, *([None] if how == "prepare" else [])).close()
    assert present(cache, made) == [0, 3, 4]
    fill(cache, made, 1, 2)
    assert present(cache, made) == [0, 1, 2, 3, 4]
    reboot(monkeypatch, "11111111-0000-4000-8000-000000000000")
    assert present(cache, made) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 1, 100_000])
def test_a_tar_cut_short_by_a_crash(cache: LayerStore, made: Made, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """After another boot the file has its length again, and spans behind the cut are absent."""
    place = prepare(cache, made)
    fill(cache, made, 0, 1, 5)
    os.truncate(place / "layer.tar", keep)
    reboot(monkeypatch)
    assert present(cache, made) == ([0] if keep > 65_536 * 1.2 else [])
    assert (place / "layer.tar").stat().st_size == made.ztoc.uncompressed_size


def test_a_short_file_is_no_wrong_byte(cache: LayerStore, made: Made) -> None:
    """A read that finds the file cut short is `Mismatch`, not fewer bytes; a closed reader is an error of ours."""
    place = prepare(cache, made)
    fill(cache, made, 5)
    reader = cache.read(made.layer, made.ztoc_digest)
    os.truncate(place / "layer.tar", 10)
    with pytest.raises(Mismatch):
        reader.pread(100, 0)
    reader.close()
    reader.close()
    with pytest.raises(SociError):
        reader.pread(1, 0)


def test_a_file_cut_short_is_mended(cache: LayerStore, made: Made) -> None:
    """Who opens the layer next finds the spans behind the cut absent."""
    place = prepare(cache, made)
    fill(cache, made, 0, 5)
    os.truncate(place / "layer.tar", 200_000)
    assert present(cache, made) == [0]
    assert (place / "layer.tar").stat().st_size == made.ztoc.uncompressed_size


@pytest.mark.parametrize("change", [1, -1])
def test_bytes_of_another_length_are_refused(cache: LayerStore, made: Made, change: int) -> None:
    """They would run into the next span or leave a hole."""
    prepare(cache, made)
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(1)
        with pytest.raises(Mismatch):
            writer.fill(1, made.tar[start : end + change])
    assert present(cache, made) == []


def test_pieces_are_one_span(cache: LayerStore, made: Made) -> None:
    """A span that comes in pieces, however cut, is marked when all of it is there, and survives like any other."""
    prepare(cache, made)
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(1)
        writer.fill_pieces(1, (made.tar[at : min(at + 1000, end)] for at in range(start, end, 1000)))
    assert present(cache, made) == [1]


@pytest.mark.parametrize("change", [-1, 1])
def test_pieces_of_another_length_are_refused(cache: LayerStore, made: Made, change: int) -> None:
    """One byte too few or too many in all pieces: no mark, and nothing is written beyond the span."""
    prepare(cache, made)
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(1)
        with pytest.raises(Mismatch, match="span 1"):
            writer.fill_pieces(1, (made.tar[start : start + 10], made.tar[start + 10 : end + change]))
    assert present(cache, made) == []
    assert (cache.directory(made.layer, made.ztoc_digest) / "layer.tar").read_bytes()[end:].strip(b"\0") == b""


def test_pieces_that_end_in_an_error_leave_no_mark(cache: LayerStore, made: Made) -> None:
    """Whatever they raise goes through."""
    prepare(cache, made)

    def pieces() -> Iterator[bytes]:
        yield made.tar[:10]
        raise InvalidZtoc("no more")

    with cache.write(made.layer, made.ztoc_digest) as writer, pytest.raises(InvalidZtoc):
        writer.fill_pieces(0, pieces())
    assert present(cache, made) == []


@pytest.mark.parametrize(
    ("function", "number", "error"),
    [
        ("pwrite", errno.ENOSPC, LimitExceeded),
        ("pwrite", errno.EDQUOT, LimitExceeded),
        ("pwrite", errno.EIO, SociError),
        ("write", errno.ENOSPC, LimitExceeded),
    ],
)
def test_a_disk_that_refuses(
    cache: LayerStore,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    error: type[SociError],
) -> None:
    """Whichever write fails, the span stays absent, and a later fill is fine."""
    prepare(cache, made)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            with pytest.raises(error) as caught:
                writer.fill(1, made.tar[start:end])
        assert type(caught.value) is error
        assert not writer.present(1)
        writer.fill(1, made.tar[start:end])
    assert present(cache, made) == [1]


def test_a_cache_that_cannot_be_made(tmp_path: Path, made: Made) -> None:
    """A file where the folder should be is `Unavailable`, with its path."""
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(Unavailable, match="cache"):
        LayerStore(tmp_path / "cache").prepare(made.layer, made.ztoc_digest, made.ztoc_bytes)


def test_a_writer_knows_when_its_files_are_gone(cache: LayerStore, made: Made) -> None:
    """After the folder was deleted, or made anew, what it fills would be seen by nobody."""
    place = prepare(cache, made)
    with cache.write(made.layer, made.ztoc_digest) as writer:
        assert writer.current()
        place.rename(place.with_name("gone"))
        assert not writer.current()
        prepare(cache, made)
        assert not writer.current()


def test_half_made_folders_are_removed(cache: LayerStore, made: Made) -> None:
    """What a killed process left goes after a while; what another is making now stays."""
    parent = cache.directory(made.layer, made.ztoc_digest).parent
    for name, age in ((".new-old", store.DRAFT_STALE + 60), (".new-now", 0)):
        (parent / name).mkdir(parents=True)
        (parent / name / "ztoc").write_bytes(b"x")
        now = (parent / name).stat().st_mtime
        os.utime(parent / name, (now - age, now - age))
    prepare(cache, made)
    assert sorted(path.name for path in parent.iterdir() if path.name.startswith(".")) == [".new-now"]


def test_opening_leaves_no_descriptors(cache: LayerStore, made: Made) -> None:
    """Neither success nor failure to open keeps files open."""
    place = prepare(cache, made)
    before = len(list(Path("/proc/self/fd").iterdir()))
    present(cache, made)
    (place / "journal").unlink()
    (place / "journal").mkdir()
    for _ in range(3):
        with pytest.raises(SociError):
            cache.write(made.layer, made.ztoc_digest)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_reader_of_a_map_that_was_replaced_believes_it_no_more(cache: LayerStore, made: Made) -> None:
    """What is taken away later is a hole for it too: it finds everything absent, and no byte is wrong."""
    place = prepare(cache, made)
    fill(cache, made, 0, 1, 2)
    key = made.layer, made.ztoc_digest
    with cache.read(*key) as reader, cache.write(*key) as writer:
        content = bytearray((place / "spans").read_bytes())
        with (place / "spans").open("r+b") as file:
            file.seek(12)
            file.write((3).to_bytes(4, "little"))  # damage: another count
        assert len(content) > HEADER + 3
        assert present(cache, made) == [0, 1, 2]
        assert reader.missing(range(3)) == [0, 1, 2]
        assert reader.get(10, 0, range(1)) is None
        start, end = writer.spans.uncompressed(3)
        with pytest.raises(Unavailable, match="opened again"):
            writer.fill(3, made.tar[start:end])
        assert not writer.current()
        writer._presence.mark(0)  # by one that was at it just then
        with pytest.raises(Unavailable, match="opened again"):
            reader.get(10, 0, range(1))


def test_after_another_boot_what_is_not_here_takes_no_room(
    cache: LayerStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a span that was being filled when the machine went down are given back."""
    place = prepare(cache, made)
    fill(cache, made, 1, 2)
    with cache.read(made.layer, made.ztoc_digest) as reader:
        start, end = reader.spans.uncompressed(4)
    before = (place / "layer.tar").stat().st_blocks
    with (place / "layer.tar").open("r+b") as tar:
        tar.seek(start)
        tar.write(b"x" * (end - start - 100))
    assert (place / "layer.tar").stat().st_blocks > before
    reboot(monkeypatch)
    assert present(cache, made) == [1, 2]
    assert (place / "layer.tar").stat().st_blocks <= before + 16
