# SPDX-License-Identifier: Apache-2.0
"""Writing zTOCs: the fast writer gives the stock builder's bytes, whatever the values."""

from __future__ import annotations

from typing import Any

import flatbuffers
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.ztoc_encode
from soci.entries import Entries
from soci.toc import TocEntry, Ztoc
from soci.zinfo import TarZinfo, encode_tar_zinfo
from soci.ztoc_encode import encode_ztoc
from support import ztoc_oracle

texts = st.binary(max_size=9)
numbers = st.sampled_from([0, 0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
owners = st.sampled_from([0, 1, 2**32 - 1])
strange = st.builds(
    TocEntry, texts, st.sampled_from(["reg", "dir", "hardlink", "symlink", "char", "block", "fifo"]), numbers, numbers,
    texts, numbers, owners, owners, texts, texts, st.text("019TZ:", max_size=21), numbers, numbers,
    st.just({}) | st.dictionaries(texts, texts, max_size=4),
)  # fmt: skip
ztocs = st.builds(
    Ztoc, st.text(max_size=5), st.text(max_size=9), numbers, numbers, st.lists(strange, max_size=5).map(tuple),
    st.sampled_from(["gzip", "uncompressed", "zstd"]), st.integers(-1, 3),
    st.lists(st.text("a1", max_size=8), max_size=3).map(tuple), st.binary(max_size=9),
)  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(ztocs)
def test_the_bytes_are_the_stock_builders(ztoc: Ztoc) -> None:
    """Any values, zeros and lengths give the bytes that FlatBuffers' own builder writes in the format's order."""
    assert encode_ztoc(ztoc) == ztoc_oracle.encode_ztoc(ztoc)


@settings(deadline=None, max_examples=100)
@given(ztocs)
def test_columns_write_the_same_bytes(ztoc: Ztoc) -> None:
    """Members in columns and members as a tuple give the same bytes."""
    columns: Any = Entries.of(ztoc.entries)
    assert columns == ztoc.entries
    assert encode_ztoc(Ztoc(**{name: getattr(ztoc, name) for name in Ztoc.__slots__} | {"entries": columns})) == (
        encode_ztoc(ztoc)
    )


alike = st.dictionaries(st.sampled_from([b"a", b"bb", b"ccc"]), st.sampled_from([b"", b"x", b"y", b"zz"]))


@settings(deadline=None, max_examples=200)
@given(st.lists(alike, max_size=12))
def test_records_that_are_alike(pax: list[dict[bytes, bytes]]) -> None:
    """Records whose keys and lengths came before, in whatever order, give the stock builder's bytes too."""
    entries = tuple(TocEntry(b"n" * i, "reg", i, 0, pax=records) for i, records in enumerate(pax))
    ztoc = Ztoc("0.9", "tool", 1, 2, entries, "gzip", 0, (), b"")
    assert encode_ztoc(ztoc) == ztoc_oracle.encode_ztoc(ztoc)


def test_batches_do_not_show(monkeypatch: Any) -> None:
    """Where one batch of members ends and the next begins leaves no trace in the bytes."""
    entries = tuple(TocEntry(b"n" * i, "reg", i * 1024, i % 2, mode=i % 3, pax={b"k" * i: b"v"}) for i in range(1, 40))
    ztoc = Ztoc("0.9", "tool", 1, 2, entries, "gzip", 0, (), b"x")
    whole = encode_ztoc(ztoc)
    monkeypatch.setattr(soci.ztoc_encode, "BATCH", 3)
    monkeypatch.setattr(soci.ztoc_encode, "MAX_WORDS", 1)
    assert encode_ztoc(ztoc) == whole == ztoc_oracle.encode_ztoc(ztoc)


@given(st.integers(0, 2), st.integers(1, 2**63 - 1), st.integers(0, 1) | st.integers(0, 2**63 - 1))
def test_a_plain_tars_checkpoints_are_the_stock_builders(version: int, span_size: int, size: int) -> None:
    """The checkpoints of a plain tar are written as FlatBuffers' own builder does it, too."""
    builder = flatbuffers.Builder(0)
    builder.StartObject(3)
    builder.PrependInt32Slot(0, version, 0)
    builder.PrependInt64Slot(1, span_size, 0)
    builder.PrependInt64Slot(2, size, 0)
    builder.Finish(builder.EndObject())
    assert encode_tar_zinfo(TarZinfo(span_size, size, version)) == bytes(builder.Output())
