# SPDX-License-Identifier: Apache-2.0
"""The tar walk: every dialect, every end, and archives that lie."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.tar
from soci.errors import InvalidTar, LimitExceeded, SociError, Unsupported
from soci.tar import CHUNK_BYTES, MAX_PAYLOAD_BYTES, TarWalker, iter_members
from soci.tar_header import format_time
from soci.toc import TocEntry
from support.tars import END, extension, header, padded, pax, record


def walk(tar: bytes, *, compat: bool = False, step: int = 1 << 20) -> tuple[list[TocEntry], int]:
    walker = TarWalker(compat=compat)
    for start in range(0, len(tar), step):
        walker.feed(tar[start : start + step])
    return list(walker.entries), walker.finish()


def pull(tar: bytes) -> list[tuple[TocEntry, bytes]]:
    return [(member.entry, b"".join(member.chunks())) for member in iter_members(io.BytesIO(tar).read)]


def only(*pieces: bytes, compat: bool = False) -> TocEntry:
    """The one member of an archive made of ``pieces``."""
    entries, _ = walk(b"".join(pieces) + END, compat=compat)
    (entry,) = entries
    return entry


def made_by_tarfile(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number, (name, kind) in enumerate(
            [
                ("usr/", tarfile.DIRTYPE),
                ("usr/" + "long/" * 40 + "name", tarfile.REGTYPE),
                ("link", tarfile.SYMTYPE),
                ("hard", tarfile.LNKTYPE),
                ("dev", tarfile.CHRTYPE),
                ("pipe", tarfile.FIFOTYPE),
                ("über", tarfile.REGTYPE),
            ]
        ):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid = kind, 0o4755, 1000 + number, 7
            info.uname, info.gname, info.mtime = "root", "wheel", 1_600_000_000 + number
            data = b"x" * 700 * number if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            info.linkname = ("target/" * 30 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "")[:99]
            info.devmajor, info.devminor = (5, 1) if kind == tarfile.CHRTYPE else (0, 0)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_another_reader(form: int) -> None:
    """Names, sizes, data offsets and attributes are those that Python's own reader finds."""
    tar = made_by_tarfile(form)
    entries, size = walk(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as other:
        members = other.getmembers()
    assert [
        (e.name.rstrip(b"/").decode(), e.size, e.offset, e.mode, e.uid, e.uname, e.linkname.decode()) for e in entries
    ] == [(m.name, m.size, m.offset_data, m.mode, m.uid, m.uname.encode(), m.linkname) for m in members]
    assert [e.type for e in entries] == ["dir", "reg", "symlink", "hardlink", "char", "fifo", "reg"]
    last = entries[-1]
    assert size == last.offset + -(-last.size // 512) * 512 + 1024


@pytest.mark.parametrize("step", [1, 7, 512, 513])
def test_chunks_do_not_matter(step: int) -> None:
    """However the tar is cut for feeding, the table is the same."""
    tar = made_by_tarfile(tarfile.PAX_FORMAT)
    assert walk(tar, step=step) == walk(tar)


@pytest.mark.parametrize(
    ("tail", "size"),
    [
        (b"", 512),
        (bytes(512), 1024),
        (bytes(1024), 1536),
        (bytes(9000), 1536),
        (bytes(1024) + b"anything", 1536),
        (extension(b"x", record(b"path", b"p")), 1536),
        (extension(b"x", record(b"path", b"p"))[:600], 1112),
    ],
)
def test_ends_of_an_archive(tail: bytes, size: int) -> None:
    """An archive may end at a header or in padding; nothing behind two zero blocks counts."""
    entries, found = walk(header() + tail)
    assert (len(entries), found) == (1, size)
    assert len(list(iter_members(io.BytesIO(header() + tail).read))) == 1


def test_padding_of_the_last_member_may_be_missing() -> None:
    """A tar that stops right behind its last member's data is whole."""
    tar = header(size=5) + b"hello"
    assert walk(tar)[1] == 517
    assert [b"".join(m.chunks()) for m in iter_members(io.BytesIO(tar).read)] == [b"hello"]


@pytest.mark.parametrize(
    "tar",
    [
        header()[:511],
        header(size=5) + b"hell",
        header() + bytes(100),
        header() + bytes(512) + bytes(100),
        header() + bytes(512) + header(),
        extension(b"x", record(b"path", b"p"))[:520],
        header(checksum_off_by=1),
        header(kind=b"7"),
        header(kind=b"S"),
        header(kind=b"V"),
        header(size=b"\xff" * 12),
        header(size=b"0000000000x\0"),
        header(size=b"-1"),
        header(size=b"1_0"),
        header(size=b"\x80\x00\x00\x00\xff" + bytes(7)),
        header(dialect="star", at_476=b"junk"),
        extension(b"x", b"5 a=b"),
        extension(b"x", b"6 a\0=\n"),
        extension(b"x", b"9 path=\0\n"),
        extension(b"x", b"7 a=b\n"),
        extension(b"x", b"6 a=b\n "),
        extension(b"x", b"6 =bb\n"),
        extension(b"x", b"x a=b\n"),
        extension(b"x", b"4 =\n"),
        pax(size=b"1.5") + header(),
        pax(size=b"9223372036854775808") + header(),
        pax(size=b"-1") + header(),
        pax(size=b"1") + header(size=b"\xff" * 12),
        pax(mtime=b"1.x") + header(),
        pax(atime=b"soon") + header(),
        header(b"big", b"x", MAX_PAYLOAD_BYTES + 1),
        header(b"big", b"L", b"\xff" * 12),
        b"\xff" * 512,
    ],
)
def test_broken_archives_are_refused(tar: bytes) -> None:
    """What no reader of layers takes, neither walk takes."""
    whole = tar + END if len(tar) % 512 == 0 else tar
    with pytest.raises(InvalidTar):
        walk(whole)
    with pytest.raises(InvalidTar):
        pull(whole)


@pytest.mark.parametrize(
    ("tar", "wanted"),
    [
        (header(b"d/", b"\0", dialect="v7"), {"name": b"d/", "type": "dir"}),
        (header(b"d", b"\0", dialect="v7", at_265=b"ignored"), {"type": "reg", "uname": b""}),
        (header(b"n" * 100), {"name": b"n" * 100}),
        (header(b"./../a//b"), {"name": b"./../a//b"}),
        (header(b"n", at_345=b"some/prefix"), {"name": b"some/prefix/n"}),
        (header(b"n", at_345=b"p" * 155), {"name": b"p" * 155 + b"/n"}),
        (header(b"n", dialect="star", at_345=b"p" * 131), {"name": b"p" * 131 + b"/n"}),
        (header(b"n", dialect="gnu", at_345=b"00000000001\0"), {"name": b"n"}),
        (header(b"n", dialect="gnu", at_345=b"not/a/time"), {"name": b"not/a/time/n"}),
        (header(b"n", dialect="gnu", at_345=b"n\xc3\xb6"), {"name": b"n"}),
        (header(b"\xff\xfe", signed=True), {"name": b"\xff\xfe"}),
        (header(mode=b"0100755\0"), {"mode": 0o100755}),
        (header(mode=b" 644 \0\0\0"), {"mode": 0o644}),
        (header(mode=bytes(8)), {"mode": 0}),
        (header(uid=b"\x80\x00\x00\x00\x80\x00\x00\x05"), {"uid": 2**31 + 5}),
        (header(uid=b"\xff" * 8), {"uid": 2**32 - 1}),
        (header(kind=b"1", size=600, linkname=b"t"), {"type": "hardlink", "size": 600, "offset": 512}),
        (header(b"n", at_329=b"0000007\0", at_337=b"0000011\0"), {"devmajor": 7, "devminor": 9}),
        (header(mtime=b"\xff" * 12), {"mod_time": "1969-12-31T23:59:59Z"}),
        (header(mtime=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7), {"mod_time": ""}),
        (pax(path=b"p", linkpath=b"l", uname=b"u", gname=b"g", uid=b"-1", gid=b"+8") + header(linkname=b"x"),
         {"name": b"p", "linkname": b"l", "uname": b"u", "gname": b"g", "uid": 2**32 - 1, "gid": 8}),
        (pax(path=b"", uid=b"", mtime=b"") + header(b"kept"), {"name": b"kept", "pax": {b"path": b"", b"uid": b"", b"mtime": b""}}),
        (pax(mtime=b"-1.5") + header(), {"mod_time": "1969-12-31T23:59:58.5Z"}),
        (pax(mtime=b"-0.25") + header(), {"mod_time": "1969-12-31T23:59:59.75Z"}),
        (pax(mtime=b"1.1234567899") + header(), {"mod_time": "1970-01-01T00:00:01.123456789Z"}),
        (pax(mtime=b"1.") + header(), {"mod_time": "1970-01-01T00:00:01Z"}),
        (pax(a=b"1") + pax(b=b"2") + header(), {"pax": {b"b": b"2"}, "offset": 2560}),
        (extension(b"x", record(b"a", b"1") + record(b"a", b"2")) + header(), {"pax": {b"a": b"2"}}),
        (extension(b"x", record(b"SCHILY.xattr.a", b"\0\n=")) + header(), {"pax": {b"SCHILY.xattr.a": b"\0\n="}}),
        (extension(b"L", b"long\0rest") + extension(b"K", b"target") + pax(path=b"p") + header(b"n", b"2"),
         {"name": b"long", "linkname": b"target", "pax": {b"path": b"p"}}),
        (pax(path=b"dir/") + header(b"n", b"\0"), {"type": "dir"}),
        (extension(b"x", b"") + header(b"n"), {"name": b"n", "pax": {}}),
    ],
)  # fmt: skip
def test_members_are_read_by_the_rules(tar: bytes, wanted: dict[str, Any]) -> None:
    """Each dialect's fields come out as the format's rules say."""
    entry = only(tar)
    assert {key: getattr(entry, key) for key in wanted} == wanted
    assert [m.entry for m in iter_members(io.BytesIO(tar + END).read)] == [entry]


def test_a_pax_size_moves_the_next_member() -> None:
    """A PAX size replaces the header's, for finding what follows too."""
    entries, _ = walk(pax(size=b"600") + header(b"a", size=3) + bytes(1024) + header(b"b") + END)
    assert [(e.name, e.offset, e.size) for e in entries] == [(b"a", 1536, 600), (b"b", 3072, 0)]


def test_extension_headers_serve_one_member() -> None:
    """Long names and records do not leak to the member after."""
    entries, _ = walk(extension(b"L", b"long") + pax(uname=b"u") + header(b"a") + header(b"b") + END)
    assert [(e.name, e.uname) for e in entries] == [(b"long", b"u"), (b"b", b"")]


def test_global_headers() -> None:
    """A PAX global header fails a table of contents, and is skipped by a walk over members."""
    tar = extension(b"g", record(b"comment", b"x")) + header(b"a") + END
    with pytest.raises(InvalidTar, match="global"):
        walk(tar)
    assert [m.entry.name for m in iter_members(io.BytesIO(tar).read)] == [b"a"]


SPARSE: dict[str, Callable[[bytes], bytes]] = {
    "0.0": lambda count: (
        extension(
            b"x",
            record(b"GNU.sparse.numblocks", count)
            + record(b"GNU.sparse.offset", b"0")
            + record(b"GNU.sparse.numbytes", b"5")
            + record(b"GNU.sparse.size", b"1000"),
        )
        + header(b"a", size=5)
    ),
    "0.1": lambda count: (
        extension(
            b"x",
            record(b"GNU.sparse.map", b"0,5")
            + record(b"GNU.sparse.numblocks", count)
            + record(b"GNU.sparse.name", b"real")
            + record(b"GNU.sparse.size", b"1000"),
        )
        + header(b"a", size=5)
    ),
    "1.0": lambda count: (
        extension(
            b"x",
            record(b"GNU.sparse.major", b"1")
            + record(b"GNU.sparse.minor", b"0")
            + record(b"GNU.sparse.realsize", b"1000"),
        )
        + header(b"a", size=517)
        + padded(count + b"\n0\n5\n")
    ),
}


@pytest.mark.parametrize("version", SPARSE)
def test_sparse_members(version: str) -> None:
    """A sparse member is refused, or in compat mode recorded with its true size; a wrong map is refused anyway."""
    tar = SPARSE[version](b"1") + padded(b"hello") + END
    with pytest.raises(Unsupported):
        walk(tar)
    with pytest.raises(Unsupported):
        list(iter_members(io.BytesIO(tar).read))
    ((entry,), size) = walk(tar, compat=True)
    assert (entry.size, entry.offset, size) == (1000, len(tar) - 1536, len(tar))
    assert entry.name == (b"real" if version == "0.1" else b"a")
    if version == "0.0":
        assert entry.pax[b"GNU.sparse.map"] == b"0,5"
        assert b"GNU.sparse.offset" not in entry.pax
    for count in (b"2", b"-1", b"x", b"99999999999999999999"):
        with pytest.raises(InvalidTar):
            walk(SPARSE[version](count) + padded(b"hello") + END, compat=True)


@pytest.mark.parametrize("regions", [b"5,5,0,1", b"0,5,4,1", b"0,1001", b"-1,1", b"0,-1", b"1000,1", b"x,1"])
def test_sparse_maps_out_of_order(regions: bytes) -> None:
    """The regions of a sparse file ascend, do not overlap and lie within the file."""
    records = record(b"GNU.sparse.map", regions) + record(b"GNU.sparse.size", b"1000")
    records += record(b"GNU.sparse.numblocks", b"%d" % ((regions.count(b",") + 1) // 2))
    with pytest.raises(InvalidTar):
        walk(extension(b"x", records) + header() + END, compat=True)


def test_table_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with more members, or more text, than a zTOC may have stops the walk."""
    monkeypatch.setattr(soci.tar, "MAX_ENTRIES", 2)
    with pytest.raises(LimitExceeded, match="MAX_ENTRIES"):
        walk(header() * 3)
    monkeypatch.undo()
    monkeypatch.setattr(soci.tar, "MAX_TOC_BYTES", 5000)
    with pytest.raises(LimitExceeded, match="MAX_TOC_BYTES"):
        walk((extension(b"x", record(b"k", b"v" * 1000)) + header()) * 5)


def test_the_largest_extension_header() -> None:
    """A payload of exactly the limit is taken."""
    name = b"n" * MAX_PAYLOAD_BYTES
    assert only(extension(b"L", name), header()).name == name


def test_members_give_their_data() -> None:
    """Every member's data comes in bounded pieces, from a reader that returns as little as it likes."""
    data = {b"a": b"", b"b": random.Random(1).randbytes(CHUNK_BYTES + 700), b"c": b"x" * 512}
    tar = b"".join(header(name, size=len(content)) + padded(content) for name, content in data.items()) + bytes(9000)
    source, sizes = io.BytesIO(tar), random.Random(2)

    def read(count: int) -> bytes:
        return source.read(min(count, sizes.randrange(1, 50_000)))

    found = {}
    for member in iter_members(read):
        pieces = list(member.chunks())
        assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)
        found[member.entry.name] = b"".join(pieces)
    assert found == data
    assert source.tell() == len(tar) - 9000 + 1024


def test_members_left_alone_are_skipped() -> None:
    """Data that nobody takes, or only the first piece of, does not disturb the next member."""
    tar = b"".join(header(name, size=600_000) + padded(name * 600_000) for name in (b"a", b"b", b"c")) + END
    kept = []
    for member in iter_members(io.BytesIO(tar).read):
        kept.append(member)
        if member.entry.name == b"b":
            assert next(member.chunks()) == b"b" * CHUNK_BYTES
    assert [m.entry.name for m in kept] == [b"a", b"b", b"c"]
    with pytest.raises(InvalidTar, match="has left"):
        next(kept[0].chunks())


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "text"),
    [
        (0, 0, "1970-01-01T00:00:00Z"),
        (0, 120_000_000, "1970-01-01T00:00:00.12Z"),
        (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
        (-62_135_596_800, 0, "0001-01-01T00:00:00Z"),
        (-62_135_596_801, 0, "0000-12-31T23:59:59Z"),
        (-62_167_219_200, 0, "0000-01-01T00:00:00Z"),
        (-62_167_219_201, 999_999_999, ""),
        (253_402_300_799, 999_999_999, "9999-12-31T23:59:59.999999999Z"),
        (253_402_300_800, 0, ""),
        (-(2**63), 0, ""),
        (2**63 - 1, 0, ""),
    ],
)
def test_times_are_written_in_utc(seconds: int, nanoseconds: int, text: str) -> None:
    """Times are RFC 3339 in UTC; none for years of more than four digits."""
    assert format_time(seconds, nanoseconds) == text


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_archives_raise_nothing_foreign(data: st.DataObject) -> None:
    """Whatever happens to an archive's bytes, both walks end alike: with its members, or with a `SociError`."""
    base = data.draw(st.sampled_from(_BASES))
    tar = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tar) - 1))
        tar[at : at + 1] = data.draw(st.binary(max_size=3))
    ours = bytes(tar[: data.draw(st.integers(0, len(tar)))])
    results: list[Any] = []
    for step in (1 << 20, data.draw(st.integers(1, 600))):
        try:
            results.append(walk(ours, compat=True, step=step))
        except SociError as error:
            results.append(type(error))
    assert results[0] == results[1]
    try:
        pulled = [m.entry for m in iter_members(io.BytesIO(ours).read)]
    except SociError:
        return
    if not isinstance(results[0], type):
        assert pulled == results[0][0]


# Blocks whose checksum a mutation breaks are the easy case, so some archives have only extension payloads to break.
_BASES = [
    made_by_tarfile(tarfile.PAX_FORMAT),
    b"".join([extension(b"x", record(b"path", b"p" * 300) * 5), header(), END]),
    b"".join([SPARSE["1.0"](b"1"), padded(b"hello"), END]),
    b"".join([SPARSE["0.1"](b"1"), padded(b"hello"), END]),
    random.Random(3).randbytes(3000),
]
