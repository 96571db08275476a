# SPDX-License-Identifier: Apache-2.0
"""Whether a failed try is repeated, and when: a pure function of what happened."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from soci_registry.failure import Kind, TryError
from soci_registry.settings import Retry

# A status that another try can change. 501 says that it never will; other 4xx say that we are wrong.
_PASSING = frozenset({408, 425, 429})
# Only these give Retry-After the meaning "come back then" (RFC 9110 §10.2.3, RFC 6585 §4).
_HONOURED = frozenset({429, 503})
_TRANSIENT = frozenset({Kind.CONNECT, Kind.STALL, Kind.SHORT})
_BAD = frozenset({Kind.BAD_ANSWER, Kind.MISMATCH})
_SECONDS_DIGITS_MAX = 9

TOO_MANY_SECONDS = 0.5
"""The pause after "too many requests" where the host does not say how long."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Try again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not try again."""


def decide(retry: Retry, failure: TryError, tried: int, chance: float) -> Wait | GiveUp:
    """What follows the failed try number ``tried`` (from 1). ``chance`` is a random number in [0, 1)."""
    if not is_repeatable(failure):
        return GiveUp()
    allowed = min(retry.tries, retry.bad_answer_tries) if failure.kind in _BAD else retry.tries
    if tried >= allowed:
        return GiveUp()
    return Wait(wait_of(retry, tried, failure.retry_after) * (1 + retry.jitter * chance))


def wait_of(retry: Retry, tried: int, retry_after: float | None) -> float:
    """Seconds before the next try, without jitter: exponential and capped, but never before Retry-After."""
    # An exponent above 62 would only be cut down again, and leaves the floats in the end.
    grown = min(retry.min_wait * 2.0 ** min(tried - 1, 62), retry.max_wait)
    if retry_after is None:
        return grown
    return max(grown, min(retry_after, retry.retry_after_max))


def common_pause(failure: TryError, most: float) -> float:
    """Seconds for which a host is to be left alone by all our requests after one of them failed so; 0: not at all."""
    if failure.retry_after is not None:
        return min(failure.retry_after, most)
    return TOO_MANY_SECONDS if failure.status == 429 else 0.0


def is_repeatable(failure: TryError) -> bool:
    """Whether another try at the same host can end better."""
    if failure.kind is Kind.STATUS:
        return failure.status in _PASSING or (failure.status >= 500 and failure.status != 501)
    return failure.kind in _TRANSIENT or failure.kind in _BAD


def parse_retry_after(status: int, value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 §10.2.3: digits, or a date); None where it says nothing."""
    if value is None or status not in _HONOURED:
        return None
    text = value.strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text[:_SECONDS_DIGITS_MAX])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    if date.tzinfo is None:  # "-0000": a date in UTC of unknown origin
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
