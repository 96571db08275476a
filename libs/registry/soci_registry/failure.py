# SPDX-License-Identifier: Apache-2.0
"""What one try of a request can come to, and how the last try becomes an error of `soci.errors`.

`TryError` never leaves this library: the clients' own exceptions become a `TryError` at the wires, `policy.decide`
looks at it, and `final_error` turns the last one into what callers see.
"""

from __future__ import annotations

from enum import StrEnum

from soci.errors import Mismatch, NotFound, RegistryUnavailable, SociError, Unauthorized


class Kind(StrEnum):
    """Why a try failed."""

    CONNECT = "no connection"
    TLS = "certificate refused"
    STALL = "stalled"
    SHORT = "connection broken"
    STATUS = "status"
    BAD_ANSWER = "not what was asked for"
    MISMATCH = "wrong digest"
    REDIRECT = "redirect refused"
    MALFORMED = "unusable URL"


class TryError(Exception):
    """One failed try. The message holds no secret: URLs in it are redacted."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        status: int = 0,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after


def final_error(failure: TryError, what: str, tries: int) -> SociError:
    """The error for callers. ``what`` is the request, redacted; ``tries`` how many were made."""
    after = f" after {tries} tries" if tries > 1 else ""
    text = f"{what}: {failure}{after}"
    if failure.kind is Kind.MISMATCH:
        return Mismatch(text)
    if failure.status in {401, 403}:
        return Unauthorized(text)
    if failure.status == 404:
        return NotFound(text)
    return RegistryUnavailable(text)
