# SPDX-License-Identifier: Apache-2.0
"""A launch and its trace: the launch id *is* the trace id (W3C Trace Context, 128 bits)."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import NewType

from soci.errors import InvalidInput

LaunchId = NewType("LaunchId", str)
"""32 lower-case hex digits, not all zero."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LAUNCH = re.compile(r"[0-9a-f]{32}")


def new_launch_id() -> LaunchId:
    """A fresh random launch id."""
    return LaunchId(secrets.token_hex(16))


def parse_launch_id(text: str) -> LaunchId:
    """Check ``text``; raises `InvalidInput`."""
    if not _LAUNCH.fullmatch(text) or text == "0" * 32:
        raise InvalidInput(f"not a launch id (32 hex digits): {text[:80]!r}")
    return LaunchId(text)


@dataclass(frozen=True, slots=True)
class TraceParent:
    """Where a step hangs in its trace: the W3C ``traceparent`` header as a value."""

    launch: LaunchId
    step: str  # 16 hex digits: the parent step's id
    sampled: bool = True

    def __str__(self) -> str:
        return f"00-{self.launch}-{self.step}-{'01' if self.sampled else '00'}"


def parse_traceparent(text: str | None) -> TraceParent | None:
    """The header's value, or None where it is absent or malformed (W3C §3.2.2: then start anew)."""
    found = _TRACEPARENT.fullmatch(text or "")
    if not found or found[1] == "0" * 32 or found[2] == "0" * 16:
        return None
    return TraceParent(LaunchId(found[1]), found[2], bool(int(found[3], 16) & 1))


def new_traceparent(launch: LaunchId | None = None) -> TraceParent:
    """The root of a launch's trace, for a launch that nobody traced before us."""
    return TraceParent(launch or new_launch_id(), secrets.token_hex(8))
