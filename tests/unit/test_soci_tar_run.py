# SPDX-License-Identifier: Apache-2.0
"""Headers read many at once: the same members, or the same refusal, as read one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import soci.tar
import soci.tar_pax
from soci.errors import SociError
from soci.tar import TarWalker
from soci.tar_pax import Parser, parse_records
from soci.tar_run import MIN_RUN, read_run
from soci.tar_sayings import Parse
from soci.toc import TocEntry
from support.tars import END, extension, header, padded, pax, record

NUMBERS = [
    b"0000644\0",
    b"0000644 ",
    b"644\0\0\0\0\0",
    b"    644\0",
    b"\0" * 8,
    b"0000648\0",
    b"\x80\0\0\0\0\0\1\0",
    b"00006440",
]


EXTREMES = [b"", b"-1", b"-0.5", b"+7", b"1.", b"1.5\n1", b"1.000000000", b"1.1234567899", b"0", b"99999999999", b"100000000000",
            b"253402300800", b"x", b"1.x", b"1..5", b" 1", b"1\0"]  # fmt: skip


def rechecked(block: bytes, form: bytes) -> bytes:
    """A header with its right checksum written in another form."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return block[:148] + form % total + block[156:]


def random_records(rng: random.Random, number: int, odd: float) -> bytes:
    """PAX records as layers have them, but for some odd ones."""
    records = {b"mtime": b"%d.%09d" % (rng.randrange(1 << 34), rng.randrange(10) ** rng.randrange(9))}
    if rng.random() < 0.5:
        records |= {key: b"%d.%d" % (rng.randrange(1 << 34), rng.randrange(1000)) for key in (b"atime", b"ctime")}
    if rng.random() < 0.3:
        records[rng.choice([b"path", b"linkpath", b"uname", b"gname"])] = rng.choice(
            [b"", b"long/" * 30 + b"%d" % number]
        )
    if rng.random() < 0.2:
        records[b"SCHILY.xattr.user.a"] = rng.choice([b"", b"=", b"\n", b"\0\0", b"value", rng.randbytes(8)])
    if rng.random() < 0.1:
        records[rng.choice([b"uid", b"gid"])] = rng.choice([b"", b"2097152", b"4294967297"])
    if rng.random() < odd:
        odd_ones: list[tuple[bytes, bytes]] = [
            (b"size", rng.choice([b"", b"512", b"0"])), (rng.choice([b"mtime", b"atime", b"ctime"]), rng.choice(EXTREMES)),
            (b"uid", rng.choice([b"-1", b"x", b"9" * 20])), (b"path", b"a\0b"), (b"k\0", b"v"), (b"comment", b"\0"),
            (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.map", rng.choice([b"", b"0,1"])),
            (b"GNU.sparse.offset", b"1"), (b"GNU.sparse.numbytes", b"1"), (b"GNU.sparse.name", b"n"),
        ]  # fmt: skip
        records |= dict(rng.sample(odd_ones, 2))
    keys = list(records)
    if rng.random() < 0.1:
        rng.shuffle(keys)
    if rng.random() < odd / 2:
        keys.append(rng.choice(keys))
    payload = b"".join(record(key, records[key]) for key in keys)
    if rng.random() < odd / 4:
        at = rng.randrange(len(payload))
        payload = payload[:at] + rng.choice([b"", b"\n", b"9", b" ", b"="]) + payload[at + 1 :]
    return payload


def random_extensions(rng: random.Random, number: int, odd: float) -> bytes:
    """Extension headers of one member."""
    found = []
    for kind in rng.choice([b"x", b"x", b"x", b"L", b"K", b"LK", b"xL", b"Kx"]):
        payload = random_records(rng, number, odd)
        if kind != ord("x"):
            payload = b"long-%d/" % number * rng.randrange(1, 30) + rng.choice([b"\0", b"\0", b"", b"\0behind"])
        found.append(extension(bytes([kind]), payload))
    if rng.random() < odd:
        found += rng.choice([
            [extension(b"x", b"")], [extension(b"L", b"")], [extension(b"L", b"\0")], [extension(b"g", b"")],
            [extension(b"x", record(b"mtime", b"3"))], [extension(b"L", b"other")], 5 * [extension(b"x", record(b"mtime", b"3"))],
            [header(b"ext", b"x", 1 << 21)], [header(b"ext", b"x", b"-0000000001\0")], [header(b"ext", b"x", 3, dialect="v7") + padded(b"abc")],
            [header(b"ext", b"L", 3, dialect="star") + padded(b"abc")], [header(b"ext", b"L", 3, checksum_off_by=1) + padded(b"abc")],
            [header(b"ext", b"L", 3, mode=b"0000648\0") + padded(b"abc")], [header(b"ext", b"L", 3, uid=b"\x80\0\0\0\0\0\1\0") + padded(b"abc")],
        ])  # fmt: skip
    return b"".join(found)


def walk(tar: bytes, step: int) -> tuple[list[TocEntry], int] | type[SociError]:
    """What walking ``tar`` in pieces of ``step`` bytes gives."""
    walker = TarWalker()
    try:
        for at in range(0, len(tar), step):
            walker.feed(tar[at : at + step])
        return list(walker.entries), walker.finish()
    except SociError as error:
        return type(error)


def random_member(rng: random.Random, number: int, odd: float) -> bytes:
    """A member, plain but for some odd ones."""
    name = b"usr/share/d%d/file-%d" % (number % 7, number)
    size = rng.choice([0, 1, 511, 512, 513])
    data = padded(rng.randbytes(size))
    if rng.random() >= odd:
        kind = rng.choice(b"0000015")
        prefix: dict[str, Any] = {"at_345": b"some/prefix"} if rng.random() < 0.1 else {}
        dialect = "ustar" if prefix else rng.choice(["ustar", "gnu"])
        devices: dict[str, Any] = rng.choice(
            [{}, {"at_329": b"0000003\0", "at_337": b"0000005\0"}, {"at_329": b"0000000\0"}]
        )
        return header(
            name, bytes([kind]), size, dialect=dialect, linkname=rng.choice([b"", b"to"]), mtime=b"%011o\0" % rng.randrange(1 << 33),
            uid=b"%07o\0" % rng.randrange(1 << 21), at_265=rng.choice([b"", b"root"]), at_297=b"staff", **prefix, **devices,
        ) + (data if kind == ord("0") else b"")  # fmt: skip
    odd_ones: list[Callable[[], bytes]] = [
        lambda: header(name, size=size, mode=rng.choice(NUMBERS)) + data,
        lambda: header(name, size=size, uid=rng.choice(NUMBERS)) + data,
        lambda: header(name, size=size, dialect=rng.choice(["v7", "star"])) + data,
        lambda: header(name, b"\0", size) + data,
        lambda: header(name, rng.choice([b"7", b"S", b"x"])),
        lambda: header(name, size=b"%011o " % size) + data,
        lambda: header(name, size=b"%10o \0" % size) + data,
        lambda: header(name, size=rng.choice([b"-0000000001\0", b"0o000000001\0", b"0000_000001\0", b"+0000000001\0"])),
        lambda: header(name, size=b"\x80" + size.to_bytes(11, "big")) + data,
        lambda: header(name + b"\0behind", size=size) + data,
        lambda: header(name, size=size, at_265=b"us\0er") + data,
        lambda: header(b"\xff" * 40, size=size, signed=True) + data,
        lambda: header(name, size=size, checksum_off_by=1) + data,
        lambda: rechecked(header(name, size=size), rng.choice([b"%07o\0", b"%6o\0 ", b"%06o \0", b"%8o"])) + data,
        lambda: header(name, size=size, dialect="gnu", at_345=b"12345670123\0") + data,
        lambda: header(name, size=size, dialect="gnu", at_345=b"old/prefix") + data,
        lambda: header(name, size=size, at_345=b"pre\0fix") + data,
        lambda: pax(path=b"long/" * 30 + name) + header(b"short", size=size) + data,
        lambda: pax(mtime=b"1.5") + header(name, size=size) + data,
    ]
    return rng.choice(odd_ones)()


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([0, 0, 0.02, 0.2]))
def test_runs_change_nothing(seed: int, odd: float) -> None:
    """Plain headers among odd and broken ones give the same members, or the same error, in large pieces as in small."""
    rng = random.Random(seed)
    tar = b"".join(random_member(rng, i, odd) for i in range(rng.randrange(120)))
    tar += rng.choice([END, END, b"", bytes(512), b"\1" * 512])
    tar = tar[: rng.choice([len(tar), rng.randrange(len(tar) + 1)])]
    assert walk(tar, 1 << 20) == walk(tar, rng.choice([5000, 20_000])) == walk(tar, 511)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.sampled_from([0, 0, 0.02, 0.2]), st.sampled_from([0.3, 0.9, 1]))
def test_runs_with_extension_headers_change_nothing(seed: int, odd: float, dense: float) -> None:
    """Where most members have records or long names, large pieces and small ones give the same, errors included."""
    rng = random.Random(seed)
    tar = b"".join(
        (random_extensions(rng, i, odd) if rng.random() < dense else b"") + random_member(rng, i, odd / 4)
        for i in range(rng.randrange(100))
    )
    tar += rng.choice([END, END, b"", bytes(512), b"\1" * 512])
    tar = tar[: rng.choice([len(tar), rng.randrange(len(tar) + 1)])]
    assert walk(tar, 1 << 20) == walk(tar, rng.choice([10_000, 40_000])) == walk(tar, 511)


DENSE = (
    pax(mtime=b"1.5"), pax(mtime=b"1.123456789", atime=b"2", ctime=b"3.25"), pax(path=b"p" * 120, mtime=b"7.5"),
    pax(SCHILY_xattr_user_a=b"value"), extension(b"L", b"l" * 120 + b"\0"),
)  # fmt: skip
ODD_EXTENSIONS = {
    **{f"{key} {text!r}": extension(b"x", record(key.encode(), text)) for key in ("mtime", "atime", "ctime") for text in EXTREMES},
    **{f"payload {text!r}": extension(b"x", text) for text in (
        b"", b"9 mtime=1", b"11 mtime=1\n", b"10 mtime=1\n\n", b"12 mtime=1.5 \n", b"12 mtime=1.5\0", b"12 Mtime=1.5\n", b"+12 mtime=1.5\n",
        b"012 mtime=1.5\n", b"12 mtime=1.5\n12 mtime=2.5\n", b"12 =time=1.5\n", b"12  time=1.5\n", b"12 mt\0me=1.5\n", b"4 k\n", b"5 k=\n",
    )},
    **{f"record {key!r} {text!r}": extension(b"x", record(key, text)) for key, text in (
        (b"size", b"512"), (b"size", b""), (b"size", b"x"), (b"uid", b"4294967297"), (b"gid", b"-1"), (b"uid", b"x"), (b"path", b"p" * 60 + b"\0" + b"p" * 59),
        (b"path", b""), (b"linkpath", b"a\0"), (b"uname", b"u"), (b"gname", b""), (b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.name", b"n"),
        (b"GNU.sparse.offset", b"1"), (b"comment", b"a\0b"), (b"comment", b"a=b\nc"),
    )},
    "two": pax(mtime=b"5.5") + pax(atime=b"6"), "broken behind good": pax(mtime=b"5.5") + extension(b"x", b"x"),
    "sparse 1.0": pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0"),
    "sparse 0.0": extension(b"x", record(b"GNU.sparse.offset", b"0") + record(b"GNU.sparse.numbytes", b"1")),
    "name over path": pax(path=b"path") + extension(b"L", b"name\0"), "path under name": extension(b"L", b"name") + pax(path=b"path"),
    "no name": pax(path=b"path") + extension(b"L", b"\0name"), "link over linkpath": pax(linkpath=b"path") + extension(b"K", b"link\0"),
    "names": extension(b"L", b"one") + extension(b"L", b"two") + extension(b"K", b"link"), "many": pax(mtime=b"3") * 5,
    "no size": header(b"ext", b"L", 0), "large": header(b"ext", b"x", (1 << 20) + 1), "negative": header(b"ext", b"x", b"-0000000001\0"),
    **{f"header {changes}": header(b"ext", b"L", 3, **changes) + padded(b"abc") for changes in (
        {"dialect": "v7"}, {"dialect": "star"}, {"checksum_off_by": 1}, {"mode": b"0000648\0"}, {"uid": b"\x80\0\0\0\0\0\1\0"}, {"at_329": b"x"},
        {"dialect": "star", "at_476": b"x"}, {"dialect": "gnu", "at_345": b"x"}, {"at_257": b"x"}, {"at_0": b"a\0b"},
    )},
    "global": extension(b"g", record(b"mtime", b"3")),
}  # fmt: skip


@pytest.mark.parametrize("extensions", ODD_EXTENSIONS.values(), ids=ODD_EXTENSIONS)
@pytest.mark.parametrize(
    "member", [{}, {"kind": b"5"}, {"dialect": "star", "at_476": b"x"}], ids=["file", "folder", "broken"]
)
def test_an_odd_one_among_many(extensions: bytes, member: dict[str, Any]) -> None:
    """What is odd in one member's headers is seen, in that member alone, wherever it stands in a run."""
    usual = [before + header(b"f%d" % i, size=3) + padded(b"abc") for before in DENSE for i in range(20)]
    odd = extensions + header(b"odd", **member)
    for tar in (b"".join(usual) + odd + b"".join(usual) + END, odd + b"".join(usual) + END, b"".join(usual) + odd):
        assert walk(tar, len(tar)) == walk(tar, 511)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.sampled_from([0, 0.1, 0.5]))
def test_a_parser_that_remembers_parses_the_same(seed: int, odd: float) -> None:
    """Payload by payload, what is remembered of those before changes neither records nor refusals."""
    rng = random.Random(seed)
    parse = Parser()
    for number in range(60):
        payload = random_records(rng, number % 3, odd)
        assert outcome(parse, payload) == outcome(parse_records, payload)


@pytest.mark.parametrize(("key", "good", "bad"), [(b"path", b"ab", b"a\0"), (b"GNU.sparse.offset", b"1", b",")])
def test_what_is_remembered_lets_nothing_broken_pass(key: bytes, good: bytes, bad: bytes) -> None:
    """A broken record is refused behind a good one that looked the same but for its value."""
    parse = Parser()
    for text in (good, good, bad):
        assert outcome(parse, record(key, text)) == outcome(parse_records, record(key, text))


def outcome(parse: Parse, payload: bytes) -> list[tuple[bytes, bytes]] | type[SociError]:
    """Records in their order, or the error's type."""
    try:
        return list(parse(payload).items())
    except SociError as error:
        return type(error)


def test_what_a_parser_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many forms there are, few are kept, and none of a large payload."""
    monkeypatch.setattr(soci.tar_pax, "MAX_FORMS", 5)
    parse = Parser()
    for number in range(30):
        assert parse(record(b"k" * (number + 1), b"v")) == {b"k" * (number + 1): b"v"}
        parse(record(b"k", b"v" * (2000 + number)))
    assert len(parse._forms) == 5


@pytest.mark.parametrize(
    "extension_headers",
    [
        pax(mtime=b"1.5"),
        pax(mtime=b"1", atime=b"2.5", ctime=b"3"),
        pax(path=b"p" * 200),
        extension(b"L", b"l" * 200 + b"\0"),
    ],
)
def test_members_with_extension_headers_are_read_together(extension_headers: bytes) -> None:
    """The forms that layers are written in do not end a run."""
    members = b"".join(extension_headers + header(b"f%d" % i, size=3) + padded(b"abc") for i in range(50))
    run, seen = read_run(members, 0, 1000)
    assert run is not None
    assert (len(run.names), seen) == (50, 50)
    run, seen = read_run(members + pax(size=b"3") + header() + members, 0, 1000)
    assert run is not None
    assert (len(run.names), seen) == (50, 101)


def test_plain_headers_are_read_together() -> None:
    """A run takes all plain members there are, and stops before the first of another form."""
    plain = b"".join(header(b"f%d" % i) for i in range(50))
    run, seen = read_run(plain, 0, 1000)
    assert run is not None
    assert (len(run.names), seen) == (50, 50)
    run, seen = read_run(plain[: 512 * 30] + header(b"v", dialect="v7") + plain, 512, 1000)
    assert run is not None
    assert (len(run.names), seen) == (29, 80)
    assert read_run(plain[: 512 * (MIN_RUN - 1)], 0, 1000) == (None, MIN_RUN - 1)


def test_looking_ahead_in_vain_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every second header spoils a run, few headers are looked at twice."""
    looked = 0

    def counting(piece: bytes, start: int, most: int, parse: Parse) -> object:
        nonlocal looked
        found = read_run(piece, start, most, parse)
        looked += found[1]
        return found

    monkeypatch.setattr(soci.tar, "read_run", counting)
    tar = b"".join(header(b"f%d" % i, mode=NUMBERS[i % 2 * 3]) for i in range(20_000)) + END
    walker = TarWalker()
    walker.feed(tar)
    assert len(walker.entries) == 20_000
    assert looked < 100_000


def test_times_of_all_years() -> None:
    """The whole range of a header's time field is written as reading headers one by one writes it."""
    tar = b"".join(header(b"f", mtime=b"%011o\0" % (i * (1 << 33) // 500)) for i in range(500)) + END
    assert walk(tar, len(tar)) == walk(tar, 512)
