# SPDX-License-Identifier: Apache-2.0
"""Which bytes of an answer are whose."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci.digest import Digest
from soci.span import Spans
from soci_fetcher.runs import cut
from support.images import noise
from support.mounter_layers import Made, everything, item, make


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of many spans, some of which share a byte with their neighbour."""
    made = make([*everything(), item("text", noise(5, 2_000_000))], span_size=1 << 16)
    spans = Spans.of(made.ztoc)
    assert sum(spans.compressed(i)[1] > spans.compressed(i + 1)[0] for i in range(spans.count - 1)) > 5
    return made


@st.composite
def geometry(draw: st.DrawFn) -> Spans:
    """Spans of any sizes, neighbours sharing a byte or not, as a gzip layer's do."""
    sizes = draw(st.lists(st.integers(2, 100), min_size=1, max_size=30))
    shared = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    starts: list[int] = []
    ends: list[int] = []
    at = 10
    for size, share in zip(sizes, shared, strict=True):
        starts.append(at - (1 if share and ends else 0))
        at += size
        ends.append(at)
    outs = list(range(len(sizes)))
    return Spans(at, len(sizes), (Digest("sha256:" + "0" * 64),) * len(sizes), starts, ends, outs, None)


@settings(deadline=None)
@given(st.data(), geometry())
def test_cut_gives_each_span_its_bytes(data: st.DataObject, spans: Spans) -> None:
    """Of the run's one answer; a byte that two spans share is in both pieces."""
    blob = data.draw(st.binary(min_size=spans.compressed_size, max_size=spans.compressed_size))
    first = data.draw(st.integers(0, spans.count - 1))
    run = range(first, data.draw(st.integers(first, spans.count - 1)) + 1)
    answer = blob[spans.compressed(run.start)[0] : spans.compressed(run.stop - 1)[1]]
    pieces = list(cut(run, spans, answer))
    assert [span for span, _ in pieces] == list(run)
    for span, piece in pieces:
        start, end = spans.compressed(span)
        assert bytes(piece) == blob[start:end]


def test_a_real_layer_is_cut_at_its_digests(made: Made) -> None:
    """Every piece of every run has the digest that the zTOC promises."""
    spans = Spans.of(made.ztoc)
    seen = 0
    for run in (range(i, min(i + 3, spans.count)) for i in range(1, spans.count, 4)):
        answer = made.blob[spans.compressed(run.start)[0] : spans.compressed(run.stop - 1)[1]]
        for span, piece in cut(run, spans, answer):
            assert "sha256:" + hashlib.sha256(piece).hexdigest() == spans.digest(span)
            seen += 1
    assert seen == sum(1 for i in range(spans.count) if i % 4)
