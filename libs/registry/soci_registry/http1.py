# SPDX-License-Identifier: Apache-2.0
"""What HTTP/1.1 says on the wire (RFC 9112), as pure functions with limits: requests written, answers' heads and chunks
read. Strict: what two readers could understand differently is refused, as is what no sound server sends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from soci_registry.failure import Kind, TryError
from soci_registry.urls import ORIGINS_CACHED, origin_of

HEAD_BYTES_MAX = 64 * 1024
"""Of an answer: a Location with a signature and a session token is long, and there is one."""
FIELDS_MAX = 128
INTERIM_MAX = 8
"""Answers (1xx) that may come before the one that counts."""
CHUNK_LINE_MAX = 256
"""Bytes of a chunk's size line, extensions included."""
TRAILER_BYTES_MAX = 4096
"""Of what may follow the last chunk; nobody reads it."""

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SENT_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SENT_VALUE = re.compile(r"[\t -~]*")
_TARGET = re.compile(r"[!-~]+")
_NO_BODY = frozenset({204, 304})
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Head:
    """Status line and fields of an answer. Names are in lower case; repeated fields are joined by commas."""

    status: int
    minor: int
    fields: Mapping[str, str]

    @property
    def keeps_open(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.minor == 1 and "close" not in self.fields.get("connection", "").lower()


@dataclass(frozen=True, slots=True)
class Framing:
    """How the body ends: after ``size`` bytes, with the last chunk, or (neither) with the connection."""

    size: int | None = None
    chunked: bool = False


@lru_cache(maxsize=ORIGINS_CACHED)
def _target(url: str) -> str:
    """Path and query of a URL as they stand, and its Host line: a signature covers the exact spelling."""
    origin = origin_of(url)
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    if origin.port != _DEFAULT_PORTS[origin.scheme]:
        host = f"{host}:{origin.port}"
    if not _TARGET.fullmatch(target) or not _TARGET.fullmatch(host):
        raise TryError(Kind.MALFORMED, "not a URL that can be sent")
    return f"{target} HTTP/1.1\r\nHost: {host}\r\n"


def request_head(method: str, url: str, headers: Mapping[str, str]) -> bytes:
    """A request without a body; `TryError` where a name, a value or the URL cannot be sent as it stands."""
    lines = [f"{method} {_target(url)}"]
    for name, value in headers.items():
        if not _SENT_NAME.fullmatch(name) or not _SENT_VALUE.fullmatch(value):
            raise TryError(Kind.MALFORMED, f"the header {name[:40]!r} cannot be sent")
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("ascii")


def parse_head(data: bytes) -> Head:
    """The head in ``data``, which ends before the empty line; `TryError` where it is none."""
    lines = data.split(b"\r\n")
    status = _STATUS_LINE.fullmatch(lines[0])
    if not status:
        raise _bad("no HTTP/1.1 status line")
    if len(lines) - 1 > FIELDS_MAX:
        raise _bad(f"more than {FIELDS_MAX} header fields")
    fields: dict[str, str] = {}
    for line in lines[1:]:
        found = _FIELD.fullmatch(line)  # neither a bare CR or LF nor a folded line is a field
        if not found:
            raise _bad("a header field that is none")
        name, value = found[1].decode("ascii").lower(), found[2].decode("latin-1").rstrip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return Head(int(status[2]), int(status[1]), fields)


def framing_of(head: Head) -> Framing:
    """How the body of an answer to GET ends (RFC 9112 §6.3); `TryError` where it contradicts itself."""
    coding = head.fields.get("transfer-encoding")
    length = head.fields.get("content-length")
    if coding is not None:
        if length is not None or head.minor == 0 or coding.lower() != "chunked":
            raise _bad("a body of no clear length")
        return Framing(chunked=True)
    if length is not None and not _LENGTH.fullmatch(length):  # two lengths are one with a comma, even if equal
        raise _bad("a Content-Length that is none")
    if head.status in _NO_BODY:
        return Framing(0)
    return Framing(None if length is None else int(length))


class Chunks:
    """Takes the chunked coding off a body."""

    def __init__(self) -> None:
        self.done = False
        self._line = b""
        self._left = 0  # bytes of the current chunk
        self._after = False  # the chunk's own CRLF is to come
        self._trailer: int | None = None  # bytes of the trailer so far

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        """The body's bytes in ``data``, as views of it; `TryError` for what breaks the coding or follows its end."""
        at = 0
        while at < len(data):
            if self.done:
                raise _bad("bytes after the last chunk")
            if self._left:
                piece = data[at : at + self._left]
                self._left -= len(piece)
                self._after = not self._left
                at += len(piece)
                yield piece
                continue
            at = self._take_line(data, at)

    def _take_line(self, data: memoryview, at: int) -> int:
        limit = CHUNK_LINE_MAX - len(self._line)
        window = bytes(data[at : at + limit])
        end = window.find(b"\n")
        self._line += window if end < 0 else window[: end + 1]
        if end < 0:
            if len(self._line) >= CHUNK_LINE_MAX:
                raise _bad("a chunk's line that does not end")
            return at + len(window)
        line, self._line = self._line, b""
        if not line.endswith(b"\r\n"):
            raise _bad("a chunk's line that ends in a bare LF")
        self._read_line(line[:-2])
        return at + end + 1

    def _read_line(self, line: bytes) -> None:
        if self._after:
            if line:
                raise _bad("a chunk that is longer than it says")
            self._after = False
        elif self._trailer is not None:
            self._trailer += len(line) + 2
            if self._trailer > TRAILER_BYTES_MAX or (line and not _FIELD.fullmatch(line)):
                raise _bad("a trailer that is none")
            self.done = not line
        else:
            found = _CHUNK.fullmatch(line)
            if not found:
                raise _bad("a chunk without a size")
            self._left = int(found[1], 16)
            if not self._left:
                self._trailer = 0


def _bad(text: str) -> TryError:
    return TryError(Kind.BAD_ANSWER, f"not HTTP: {text}")
