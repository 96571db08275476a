# SPDX-License-Identifier: Apache-2.0
"""What our own wire takes for HTTP and what it refuses, and when an answer is too slow: decisions as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_registry.failure import Kind, TryError
from soci_registry.http1 import (
    CHUNK_LINE_MAX,
    FIELDS_MAX,
    TRAILER_BYTES_MAX,
    Chunks,
    Framing,
    Head,
    framing_of,
    parse_head,
    request_head,
)
from soci_registry.pace import Limits, Pace


@pytest.mark.parametrize(
    ("text", "status", "fields"),
    [
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5", 206, {"content-length": "5"}),
        (b"HTTP/1.1 206\r\nA:b", 206, {"a": "b"}),
        (b"HTTP/1.0 200 ", 200, {}),
        (b"HTTP/1.1 200 OK\r\nA: \t b c \t\r\nB:", 200, {"a": "b c", "b": ""}),
        (b"HTTP/1.1 200 OK\r\nVia: x\r\nvia: y", 200, {"via": "x, y"}),
        (b"HTTP/1.1 307 Go\r\nLocation: \xff", 307, {"location": "\xff"}),
    ],
)
def test_sound_heads(text: bytes, status: int, fields: dict[str, str]) -> None:
    """Names are compared without their case, values lose the space around them, repeated fields are one list."""
    found = parse_head(text)
    assert (found.status, found.fields) == (status, fields)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"SSH-2.0-OpenSSH",
        b"HTTP/2 200 OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 099 Low",
        b" HTTP/1.1 200 OK",
        b"HTTP/1.1 200 O\nK",
        b"HTTP/1.1 200 OK\r\nA: b\nC: d",
        b"HTTP/1.1 200 OK\r\nA: b\rC: d",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded",
        b"HTTP/1.1 200 OK\r\n\tfolded: x",
        b"HTTP/1.1 200 OK\r\nA : b",
        b"HTTP/1.1 200 OK\r\n: b",
        b"HTTP/1.1 200 OK\r\nA",
        b"HTTP/1.1 200 OK\r\nA: b\x00",
        b"HTTP/1.1 200 OK\r\nA: b\x7f",
        b"HTTP/1.1 200 OK\r\n\xc3\xa4: b",
        b"HTTP/1.1 200 OK" + b"\r\nA: b" * (FIELDS_MAX + 1),
    ],
)
def test_heads_that_are_refused(text: bytes) -> None:
    """What two readers could understand differently is no HTTP: bare line ends, folded lines, spaces before a colon."""
    with pytest.raises(TryError) as caught:
        parse_head(text)
    assert caught.value.kind is Kind.BAD_ANSWER


@pytest.mark.parametrize(
    ("status", "minor", "fields", "framing"),
    [
        (206, 1, {"content-length": "10"}, Framing(10)),
        (200, 1, {"transfer-encoding": "Chunked"}, Framing(chunked=True)),
        (200, 0, {}, Framing()),
        (200, 1, {}, Framing()),
        (304, 1, {"content-length": "10"}, Framing(0)),
        (204, 1, {}, Framing(0)),
        (200, 1, {"content-length": "10, 10"}, None),
        (200, 1, {"content-length": "10, 11"}, None),
        (200, 1, {"content-length": "-1"}, None),
        (200, 1, {"content-length": "+1"}, None),
        (200, 1, {"content-length": "1_0"}, None),
        (200, 1, {"content-length": "\u0661"}, None),
        (200, 1, {"content-length": ""}, None),
        (200, 1, {"content-length": "9" * 30}, None),
        (200, 1, {"content-length": "10", "transfer-encoding": "chunked"}, None),
        (200, 0, {"transfer-encoding": "chunked"}, None),
        (200, 1, {"transfer-encoding": "gzip, chunked"}, None),
        (200, 1, {"transfer-encoding": "chunked, chunked"}, None),
        (200, 1, {"transfer-encoding": "identity"}, None),
    ],
)
def test_how_a_body_ends(status: int, minor: int, fields: dict[str, str], framing: Framing | None) -> None:
    """One clear length, the chunked coding alone, or the connection's end; whatever contradicts itself is refused."""
    head = Head(status, minor, fields)
    if framing is None:
        with pytest.raises(TryError):
            framing_of(head)
    else:
        assert framing_of(head) == framing


@pytest.mark.parametrize(
    ("minor", "connection", "keeps"),
    [(1, "", True), (1, "keep-alive", True), (1, "Close", False), (1, "x, close", False), (0, "keep-alive", False)],
)
def test_which_connections_are_kept(minor: int, connection: str, *, keeps: bool) -> None:
    """A connection is used again only where the server said nothing against it."""
    assert Head(200, minor, {"connection": connection}).keeps_open is keeps


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://reg/v2/x?a=%2F&b", "GET /v2/x?a=%2F&b HTTP/1.1\r\nHost: reg\r\n"),
        ("http://reg:80/x", "GET /x HTTP/1.1\r\nHost: reg\r\n"),
        ("https://reg:443/x", "GET /x HTTP/1.1\r\nHost: reg\r\n"),
        ("https://reg:80/x", "GET /x HTTP/1.1\r\nHost: reg:80\r\n"),
        ("http://[::1]:5000", "GET / HTTP/1.1\r\nHost: [::1]:5000\r\n"),
    ],
)
def test_requests(url: str, line: str) -> None:
    """A target is sent as it is spelled, for a signature covers that; the default port is not named."""
    assert request_head("GET", url, {"Range": "bytes=0-1"}) == f"{line}Range: bytes=0-1\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://reg/x y", {}),
        ("http://reg/\u00e4", {}),
        ("http://reg/x", {"A": "b\r\nC: d"}),
        ("http://reg/x", {"A": "b\n"}),
        ("http://reg/x", {"A: b\r\nC": "d"}),
        ("http://reg/x", {"A": "\u00e4"}),
        ("http://reg/x", {"": "d"}),
    ],
)
def test_requests_that_cannot_be_sent(url: str, headers: dict[str, str]) -> None:
    """Nothing that is put into a request begins a line of its own."""
    with pytest.raises(TryError) as caught:
        request_head("GET", url, headers)
    assert caught.value.kind is Kind.MALFORMED


def decoded(coded: bytes, cuts: list[int]) -> tuple[bytes, bool]:
    coding, out, at = Chunks(), b"", 0
    for end in [*sorted(cut % (len(coded) + 1) for cut in cuts), len(coded)]:
        out += b"".join(map(bytes, coding.feed(memoryview(coded)[at:end])))
        at = end
    return out, coding.done


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 1000), max_size=8))
def test_chunks_are_put_together(pieces: list[bytes], cuts: list[int]) -> None:
    """However the bytes of a chunked body are cut when they arrive, the body is the same."""
    coded = b"".join(b"%x ;x=y\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nA: b\r\n\r\n"
    assert decoded(coded, cuts) == (b"".join(pieces), True)


@pytest.mark.parametrize(
    "coded",
    [
        b"zz\r\n",
        b"-1\r\n",
        b"0x5\r\n",
        b"\r\n",
        b"5\nabcde\r\n",
        b"5\r\nabcdef\r\n",
        b"5\r\nabcde\n0\r\n\r\n",
        b"0\r\n\r\nx",
        b"0\r\nno field\r\n\r\n",
        b"f" * 16 + b"\r\n",
        b"5;" + b"x" * CHUNK_LINE_MAX + b"\r\n",
        b"5;\x00\r\n",
        b"0\r\n" + b"A: b\r\n" * TRAILER_BYTES_MAX,
    ],
)
def test_chunks_that_are_refused(coded: bytes) -> None:
    """Sizes that are none, chunks longer than they say, endless lines and trailers, bytes after the end."""
    for cuts in ([], list(range(len(coded)))[:3000]):
        with pytest.raises(TryError) as caught:
            decoded(coded, cuts)
        assert caught.value.kind is Kind.BAD_ANSWER


LIMITS = Limits(head=10, stall=5, min_rate=100, total=60)


@pytest.mark.parametrize(("now", "found"), [(0.0, 10.0), (9.9, 10.0), (10.0, "no answer within 10 s")])
def test_a_head_has_its_time(now: float, found: str | float) -> None:
    """The head has so many seconds from the request on."""
    assert Pace(LIMITS, 0.0).look(now) == found


@pytest.mark.parametrize(
    ("came", "now", "found"),
    [
        ([], 4.0, 5.0),
        ([], 5.0, "no byte for 5 s"),
        ([(10_000, 4.0)], 4.5, 5.0),
        ([(10_000, 4.0)], 5.0, 9.0),
        ([(10_000, 1.0)], 6.0, "no byte for 5 s"),
        ([(100, 1.0), (100, 4.0)], 5.0, "200 bytes in 5 s: too slow"),
        ([(300, 1.0), (200, 4.0)], 5.0, 9.0),
        ([(1 << 30, 59.9)], 60.0, "the answer took more than 60 s"),
    ],
)
def test_a_body_has_its_pace(came: list[tuple[int, float]], now: float, found: str | float) -> None:
    """Silence, a rate below the least over a window, and the whole time are each an end."""
    pace = Pace(LIMITS, 0.0)
    pace.body()
    pace.wait(0.0)
    for size, at in came:
        pace.came(size, at)
    assert pace.look(now) == found


def test_a_slow_head_is_no_slow_body() -> None:
    """The time until the head came is not counted in the body's window."""
    pace = Pace(LIMITS, 0.0)
    pace.wait(0.0)
    pace.rest(9.0)
    pace.body()
    pace.wait(9.0)
    assert pace.look(9.0) == 14.0
    assert pace.look(13.5) == 14.0


def test_the_readers_own_time_is_not_the_servers() -> None:
    """Time in which nobody waits for bytes counts neither as silence nor as slowness."""
    pace = Pace(LIMITS, 0.0)
    pace.body()
    pace.wait(0.0)
    pace.came(400, 3.0)
    pace.rest(3.0)
    pace.wait(50.0)
    assert pace.look(51.0) == 52.0
    pace.came(99, 51.0)
    assert pace.look(52.0) == "499 bytes in 5 s: too slow"
