# SPDX-License-Identifier: Apache-2.0
"""Compressed spans that a node keeps for others."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import LimitExceeded, Mismatch, NotFound, Unavailable
from soci.span import Spans
from soci_cache import LayerStore, compressed
from soci_cache.compressed import FILE, MAP, CompressedLayer, drop
from soci_cache.presence import HEADER
from support.images import noise
from support.mounter_layers import Made, item, make


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of some spans that share bytes."""
    return make([item("text", noise(5, 600_000))], span_size=1 << 16)


@pytest.fixture
def place(tmp_path: Path, made: Made) -> Path:
    """Its folder in a cache."""
    made.put(tmp_path)
    return LayerStore(tmp_path).directory(made.layer, made.ztoc_digest)


@pytest.fixture
def layer(place: Path, made: Made) -> Iterator[CompressedLayer]:
    """It, open."""
    found = CompressedLayer(place, Spans.of(made.ztoc))
    yield found
    found.close()


def content(layer: CompressedLayer, made: Made, run: range) -> bytes:
    """The compressed bytes of a run."""
    return made.blob[layer.spans.compressed(run.start)[0] : layer.spans.compressed(run[-1])[1]]


def test_what_is_put_is_there(layer: CompressedLayer, made: Made, place: Path) -> None:
    """For all who have it open, and after it was closed; the rest is absent, and takes no room."""
    assert layer.put(range(1, 4), content(layer, made, range(1, 4))) == []
    other = CompressedLayer(place, layer.spans)
    for one in (layer, other):
        assert one.missing(range(5)) == [0, 4]
        extent = one.spans.compressed(1)[0], one.spans.compressed(3)[1]
        assert one.read(*extent) == content(layer, made, range(1, 4))
    other.close()
    other.close()
    assert (place / FILE).stat().st_size == len(made.blob)
    assert (place / FILE).stat().st_blocks * 512 < 4 * (1 << 16) + (1 << 13)


def test_wrong_bytes_are_not_kept(layer: CompressedLayer, made: Made) -> None:
    """Those spans are named, the right ones among them kept."""
    spoiled = bytearray(content(layer, made, range(4)))
    spoiled[layer.spans.compressed(2)[0] + 100 - layer.spans.compressed(0)[0]] ^= 1
    assert layer.put(range(4), bytes(spoiled)) == [2]
    assert layer.missing(range(4)) == [2]
    assert layer.put(range(4, 6), b"") == [4, 5]
    assert layer.put(range(4, 6), content(layer, made, range(4, 6))[:-1]) == [5]
    layer.forget(range(2))
    assert layer.missing(range(5)) == [0, 1, 2]


@pytest.mark.parametrize("damage", ["boot", "cut", "garbage", "gone", "file gone", "count"])
def test_what_cannot_be_trusted_is_dropped(
    place: Path, made: Made, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A map of another boot or a damaged one, or one without its file: both are made anew, empty."""
    spans = Spans.of(made.ztoc)
    first = CompressedLayer(place, spans)
    first.put(range(2), content(first, made, range(2)))
    if damage == "boot":
        monkeypatch.setattr(compressed, "boot_id", lambda: "0" * 36)
    elif damage == "cut":
        os.truncate(place / MAP, HEADER)
    elif damage == "garbage":
        (place / MAP).write_bytes(b"x" * 500)
    elif damage == "count":
        os.truncate(place / MAP, HEADER + spans.count - 1)
    else:
        (place / (MAP if damage == "gone" else FILE)).unlink()
    second = CompressedLayer(place, spans)
    assert second.missing(range(spans.count)) == list(range(spans.count))
    assert second.current()
    assert not first.current()
    first.close()
    second.close()


def test_dropped_files(layer: CompressedLayer, made: Made, place: Path) -> None:
    """Who has them open goes on, and sees that they are not the layer's any more; nothing dropped twice is an error."""
    layer.put(range(2), content(layer, made, range(2)))
    assert layer.current()
    drop(place)
    drop(place)
    assert not layer.current()
    assert layer.read(*layer.spans.compressed(0)) == content(layer, made, range(1))
    assert {file.name for file in place.iterdir()} >= {"layer.tar", "ztoc", "spans", "journal"}
    assert not (place / FILE).exists()


def test_a_file_cut_short(layer: CompressedLayer, made: Made, place: Path) -> None:
    """It is an error, never fewer bytes."""
    layer.put(range(2), content(layer, made, range(2)))
    os.truncate(place / FILE, 100)
    with pytest.raises(Mismatch):
        layer.read(*layer.spans.compressed(0))


def test_no_folder(tmp_path: Path, made: Made) -> None:
    """`NotFound`."""
    with pytest.raises(NotFound):
        CompressedLayer(tmp_path / "none", Spans.of(made.ztoc))


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, LimitExceeded), (errno.EIO, Unavailable)])
def test_a_disk_that_refuses(
    layer: CompressedLayer, made: Made, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    """Its error is one of ours, and the span stays absent."""

    def refuse(*_: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(error):
        layer.put(range(2), content(layer, made, range(2)))
    assert layer.missing(range(2)) == [0, 1]
