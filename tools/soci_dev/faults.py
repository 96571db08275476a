# SPDX-License-Identifier: Apache-2.0
"""What the proxy can do to a request on purpose, as plain values. A hook chooses: ``(Seen) -> Fault | None``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as the hook sees it. ``number`` counts from 1 since the last reset; header names in lower case."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    query: str = ""

    @property
    def range(self) -> str:
        """The ``Range`` header, empty if there is none."""
        return self.headers.get("range", "")

    @property
    def is_blob(self) -> bool:
        """A read of blob content (not an upload)."""
        return self.method == "GET" and "/blobs/sha256:" in self.path


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status instead of asking the registry."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True, slots=True)
class Short:
    """Promise the whole body, send its first ``keep`` bytes, close the connection."""

    keep: int


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Flip every bit of the body's byte at offset ``at``."""

    at: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Send the head and the first ``keep`` bytes, then nothing for ``seconds``, then close the connection."""

    seconds: float
    keep: int = 0


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait ``seconds`` before the answer, which is then sound."""

    seconds: float


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer 200 with the whole blob though a range was asked for, as some registries do."""


@dataclass(frozen=True, slots=True)
class Slow:
    """Send a sound answer at ``rate`` bytes a second, a twentieth of a second's worth at a time."""

    rate: int


@dataclass(frozen=True, slots=True)
class ShiftRange:
    """Answer a request for a range with the range ``by`` bytes further on, and say so in ``Content-Range``."""

    by: int = 1


@dataclass(frozen=True, slots=True)
class Raw:
    """Send these bytes in place of an answer, then close the connection: in order, or with a reset."""

    content: bytes
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Endless:
    """Answer with the registry's status and headers but without a length, its body again and again for ever."""


Fault = Status | Drop | Short | Corrupt | Stall | Delay | IgnoreRange | Slow | ShiftRange | Raw | Endless
Hook = Callable[[Seen], Fault | None]


def first(count: int, fault: Fault, *, blobs_only: bool = True) -> Hook:
    """A hook that gives ``fault`` to the first ``count`` requests (for blobs), then lets all pass."""
    left = count

    def hook(seen: Seen) -> Fault | None:
        nonlocal left
        if left <= 0 or (blobs_only and not seen.is_blob):
            return None
        left -= 1
        return fault

    return hook


def always(fault: Fault, *, blobs_only: bool = True) -> Hook:
    """A hook that gives ``fault`` to every request (for blobs)."""
    return lambda seen: fault if seen.is_blob or not blobs_only else None
