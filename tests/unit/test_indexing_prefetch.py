# SPDX-License-Identifier: Apache-2.0
"""Prefetch lists: their bytes, their arithmetic, and names as a container sees them."""

from __future__ import annotations

import pytest

from soci.digest import parse_digest, sha256_digest
from soci.errors import InvalidInput, InvalidManifest
from soci.toc import TocEntry, Ztoc
from soci.zinfo import TarZinfo, encode_tar_zinfo
from soci_indexing.prefetch import (
    Finder,
    Hit,
    LayerFiles,
    SpanRange,
    clean,
    collect,
    encode_prefetch,
    merge,
    parse_prefetch,
)

GOLDEN = b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":3},{"start_span":7,"end_span":7}]}'
LOWER, UPPER = parse_digest("sha256:" + "11" * 32), parse_digest("sha256:" + "22" * 32)
SPAN = 1024


def test_the_golden_list() -> None:
    """The bytes are those that others write, and read back to the same ranges."""
    ranges = (SpanRange(0, 3), SpanRange(7, 7))
    assert encode_prefetch(ranges) == GOLDEN
    assert sha256_digest(GOLDEN) == "sha256:ddbec121359e384413f9a370e60ac39e2a4501d9647e391d614fa6d2ec521734"
    assert parse_prefetch(GOLDEN) == ranges


def test_priorities_are_written_where_there_are_any() -> None:
    """A priority is the third member, and 0 is none."""
    content = encode_prefetch([SpanRange(1, 2, 5)])
    assert content == b'{"version":"1.0","prefetch_spans":[{"start_span":1,"end_span":2,"priority":5}]}'
    assert parse_prefetch(content) == (SpanRange(1, 2, 5),)


@pytest.mark.parametrize(
    "ranges", [[], [SpanRange(2, 1)], [SpanRange(-1, 1)], [SpanRange(0, 2**31)]], ids=["empty", "turned", "low", "high"]
)
def test_what_is_not_written(ranges: list[SpanRange]) -> None:
    """An empty list and ranges that are none are refused."""
    with pytest.raises(InvalidInput):
        encode_prefetch(ranges)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b'{"version":"1.1","prefetch_spans":[{"start_span":0,"end_span":3}]}',
        b'{"prefetch_spans":[{"start_span":0,"end_span":3}]}',
        b'{"version":"1.0","prefetch_spans":[]}',
        b'{"version":"1.0"}',
        b'{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":0}]}',
        b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":2147483648}]}',
        b'{"version":"1.0","prefetch_spans":[{"start_span":0}]}',
        b'{"version":"1.0","prefetch_spans":[{"start_span":"0","end_span":1}]}',
        b'{"version":"1.0","prefetch_spans":[7]}',
    ],
)
def test_what_is_not_read(data: bytes) -> None:
    """Other versions, empty lists and ranges that are none are `InvalidManifest`."""
    with pytest.raises(InvalidManifest):
        parse_prefetch(data)


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ([], []),
        ([(3, 5)], [(3, 5)]),
        ([(0, 3), (2, 6)], [(0, 6)]),
        ([(0, 3), (4, 6)], [(0, 6)]),
        ([(0, 3), (5, 6)], [(0, 3), (5, 6)]),
        ([(5, 6), (0, 0), (1, 1), (0, 0)], [(0, 1), (5, 6)]),
        ([(0, 9), (2, 3)], [(0, 9)]),
    ],
    ids=["empty", "single", "overlapping", "adjacent", "disjoint", "unsorted", "contained"],
)
def test_merging(given: list[tuple[int, int]], merged: list[tuple[int, int]]) -> None:
    """Ranges that overlap or touch become one; the order is ascending."""
    assert [(one.start, one.end) for one in merge(SpanRange(*pair) for pair in given)] == merged


def test_the_most_urgent_priority_survives_merging() -> None:
    """Of merged ranges the lower priority counts."""
    assert merge([SpanRange(0, 3, 4), SpanRange(2, 5, 2)]) == (SpanRange(0, 5, 2),)


@pytest.mark.parametrize(
    ("name", "path"),
    [("a/b", b"a/b"), ("/a/b", b"a/b"), ("./a//b/", b"a/b"), ("//a/./c/../b", b"a/b"), ("/../a", b"a"), ("/", b"")],
)
def test_names_are_cleaned(name: str, path: bytes) -> None:
    """Every spelling of a path is the same one."""
    assert clean(name) == path


def layer(digest: str, *members: TocEntry) -> LayerFiles:
    """A plain layer of ten spans."""
    size = 10 * SPAN
    spans = tuple("sha256:" + "00" * 32 for _ in range(10))
    zinfo = encode_tar_zinfo(TarZinfo(SPAN, size))
    ztoc = Ztoc("0.9", "x", size, size, members, "uncompressed", 9, spans, zinfo)
    return LayerFiles.of(parse_digest(digest), ztoc)


def reg(name: str, offset: int, size: int = 100) -> TocEntry:
    return TocEntry(name.encode(), "reg", offset, size)


def link(name: str, target: str, kind: str = "symlink") -> TocEntry:
    return TocEntry(name.encode(), kind, 9 * SPAN, 0, target.encode())  # type: ignore[arg-type]


LAYERS = [
    layer(
        LOWER,
        TocEntry(b"etc", "dir", 0, 0),
        reg("etc/a", 512),
        reg("etc/gone", 2 * SPAN),
        reg("data/x", 3 * SPAN),
        reg("./usr/lib/libc.so", 4 * SPAN, 2 * SPAN),
        reg("both", 6 * SPAN),
        reg("hidden/f", 7 * SPAN),
        reg("wall/f", 7 * SPAN + 512),
    ),
    layer(
        UPPER,
        reg("both", SPAN),
        reg("etc/.wh.gone", 0, 0),
        reg("hidden/.wh..wh..opq", 0, 0),
        reg("wall", 512),
        reg("exact", 2 * SPAN, SPAN),
        reg("twice", 0),
        reg("twice", 5 * SPAN),
        link("lib", "usr/lib"),
        link("abs", "/etc/a"),
        link("etc/up", "../data/x"),
        link("etc/dots", "./../lib/./libc.so"),
        link("hard", "exact", "hardlink"),
        link("harder", "./hard", "hardlink"),
        link("lost", "nothing", "hardlink"),
        link("ring", "ring", "hardlink"),
        link("loop", "pool"),
        link("pool", "loop"),
        link("dangling", "no/where"),
    ),
]


@pytest.mark.parametrize(
    ("name", "where", "spans"),
    [
        ("etc/a", LOWER, (0, 0)),
        ("/etc/a", LOWER, (0, 0)),
        ("usr/lib/libc.so", LOWER, (4, 6)),  # ends on a border: the span after it counts too, as ever
        ("both", UPPER, (1, 1)),
        ("exact", UPPER, (2, 3)),
        ("twice", UPPER, (5, 5)),
        ("etc", LOWER, (0, 0)),
        ("lib/libc.so", LOWER, (4, 6)),
        ("abs", LOWER, (0, 0)),
        ("etc/up", LOWER, (3, 3)),
        ("etc/dots", LOWER, (4, 6)),
        ("hard", UPPER, (2, 3)),
        ("harder", UPPER, (2, 3)),
    ],
)
def test_names_are_found_as_a_container_sees_them(name: str, where: str, spans: tuple[int, int]) -> None:
    """The topmost file of a name, through links in any part of it, gives its layer's spans."""
    assert Finder(LAYERS).find(name) == Hit(parse_digest(where), SpanRange(*spans))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "no such file"),
        ("etc/gone", "no such file"),
        ("hidden/f", "no such file"),
        ("wall/f", "no such file"),
        ("dangling", "no such file"),
        ("lost", "hard link to nothing"),
        ("ring", "too many links"),
        ("loop", "too many links"),
        ("/", "not the name"),
        ("x" * 5000, "not the name"),
    ],
)
def test_names_that_no_container_sees(name: str, why: str) -> None:
    """What was taken away, hidden or never there is refused, and the reason said."""
    with pytest.raises(InvalidInput, match=why):
        Finder(LAYERS).find(name)


def test_hits_are_collected_by_layer() -> None:
    """Each layer has its own merged ranges."""
    hits = [Hit(LOWER, SpanRange(4, 6)), Hit(UPPER, SpanRange(1, 1)), Hit(LOWER, SpanRange(0, 3))]
    assert collect(hits) == {LOWER: (SpanRange(0, 6),), UPPER: (SpanRange(1, 1),)}
