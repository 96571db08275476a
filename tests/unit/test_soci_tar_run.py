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
from soci.errors import SociError
from soci.tar import TarWalker
from soci.tar_run import MIN_RUN, read_run
from soci.toc import TocEntry
from support.tars import END, header, padded, pax

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
        lambda: header(name, size=size, at_148=b"1234567\0") + data,
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

    def counting(piece: bytes, start: int, most: int) -> object:
        nonlocal looked
        found = read_run(piece, start, most)
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
