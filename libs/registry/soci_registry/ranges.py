# SPDX-License-Identifier: Apache-2.0
"""Is this the range that was asked for? The rules for answers to Range requests (RFC 9110 §14), as pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from soci_registry.failure import Kind, TryError

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A parsed Content-Range: first byte, end (exclusive), size of the whole or None where the server says ``*``."""

    start: int
    end: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Heads:
    """The headers of an answer that decide what its body is."""

    status: int
    content_range: str | None
    content_length: str | None
    content_type: str | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """The header's value, or None where it is absent, malformed or contradicts itself."""
    found = _CONTENT_RANGE.fullmatch((value or "").strip())
    if not found:
        return None
    start, end = int(found[1]), int(found[2]) + 1
    total = None if found[3] == "*" else int(found[3])
    if end <= start or (total is not None and end > total):
        return None
    return ContentRange(start, end, total)


def parse_length(value: str | None) -> int | None:
    """A Content-Length, or None where it is absent or malformed."""
    return int(value) if value and re.fullmatch(r"[0-9]{1,19}", value) else None


def skip_for(heads: Heads, start: int, end: int, skip_max: int) -> int:
    """How many bytes of the body come before byte ``start``; the next ``end - start`` are the range.

    206 must name exactly [start, end). 200 is the whole blob: bytes are skipped, up to ``skip_max``.
    Raises `TryError` (`BAD_ANSWER`) for everything else.
    """
    length = parse_length(heads.content_length)
    if heads.status == 200:
        if start > skip_max:
            raise _bad(f"the server ignores Range and sends the whole blob; byte {start} is too far to skip to")
        if length is not None and length < end:
            raise _bad(f"the whole blob was sent, of {length} bytes, but bytes up to {end} were asked for")
        return start
    if (heads.content_type or "").lower().startswith("multipart/"):
        raise _bad("a multipart answer to a single range")
    found = parse_content_range(heads.content_range)
    if found is None:
        raise _bad("206 without a valid Content-Range")
    if (found.start, found.end) != (start, end):
        raise _bad(f"Content-Range is {found.start}-{found.end - 1}, asked for {start}-{end - 1}")
    if length is not None and length != end - start:
        raise _bad(f"Content-Length is {length}, the range has {end - start} bytes")
    return 0


def resume_for(heads: Heads, offset: int, size: int | None) -> tuple[int, int | None]:
    """Where a stream goes on from ``offset``: (bytes to skip, size of the whole blob where it is known).

    ``size`` is what earlier answers said; an answer that says otherwise is a `TryError` (`BAD_ANSWER`).
    """
    if heads.status == 200:
        skip, total = offset, parse_length(heads.content_length)
    else:
        found = parse_content_range(heads.content_range)
        if found is None or found.start != offset or (found.total is not None and found.end != found.total):
            raise _bad(f"the answer does not go on from byte {offset}")
        skip, total = 0, found.total
    if size is not None and total is not None and size != total:
        raise _bad(f"the blob had {size} bytes and now has {total}")
    return skip, size if total is None else total


def _bad(message: str) -> TryError:
    return TryError(Kind.BAD_ANSWER, message)
