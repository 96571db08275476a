# SPDX-License-Identifier: Apache-2.0
"""The pure decisions of libs/registry: retries, Retry-After, ranges, challenges."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import Mismatch, NotFound, RegistryUnavailable, Unauthorized
from soci_registry import RegistrySettings
from soci_registry.challenge import Challenge, asks_for_credentials, choose, parse_challenges, target_expired
from soci_registry.failure import Kind, TryError, final_error
from soci_registry.policy import (
    TOO_MANY_SECONDS,
    GiveUp,
    Wait,
    common_pause,
    decide,
    parse_retry_after,
    wait_of,
)
from soci_registry.ranges import ContentRange, Heads, parse_content_range, resume_for, skip_for

RETRY = RegistrySettings().retry
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def status(code: int, retry_after: float | None = None) -> TryError:
    return TryError(Kind.STATUS, f"status {code}", status=code, retry_after=retry_after)


@pytest.mark.parametrize(
    ("code", "again"),
    [
        *((code, True) for code in (408, 429, 500, 502, 503, 504, 599)),
        *((code, False) for code in (400, 401, 403, 404, 410, 416, 501)),
    ],
)
def test_which_statuses_are_tried_again(code: int, *, again: bool) -> None:
    """429 and server errors are tried again, what is our own fault or 501 is not."""
    assert isinstance(decide(RETRY, status(code), 1, 0.0), Wait) is again


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.STATUS])
def test_which_failures_are_tried_again(kind: Kind) -> None:
    """Broken connections and wrong bytes are tried again; refused certificates, redirects and URLs are not."""
    again = kind not in {Kind.TLS, Kind.REDIRECT, Kind.MALFORMED}
    assert isinstance(decide(RETRY, TryError(kind, "x"), 1, 0.0), Wait) is again


def test_tries_end() -> None:
    """There are exactly as many tries as the settings say, fewer for wrong answers."""
    for failure, tries in ((status(503), RETRY.tries), (TryError(Kind.MISMATCH, "x"), RETRY.bad_answer_tries)):
        assert isinstance(decide(RETRY, failure, tries - 1, 0.0), Wait)
        assert decide(RETRY, failure, tries, 0.0) == GiveUp()


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e9), st.floats(0, 1, exclude_max=True))
def test_waits_are_bounded(tried: int, after: float | None, chance: float) -> None:
    """A wait is never shorter than Retry-After (up to its cap) nor longer than the greater cap and its jitter."""
    wait = wait_of(RETRY, tried, after)
    assert RETRY.min_wait <= wait <= max(RETRY.max_wait, RETRY.retry_after_max)
    assert wait >= min(after or 0.0, RETRY.retry_after_max)
    verdict = decide(RETRY, status(429, after), 1, chance)
    assert isinstance(verdict, Wait)
    assert wait_of(RETRY, 1, after) <= verdict.seconds <= wait_of(RETRY, 1, after) * (1 + RETRY.jitter)


def test_waits_grow() -> None:
    """Waits double from the least to the greatest."""
    waits = [wait_of(RETRY, tried, None) for tried in range(1, 5)]
    assert waits == [RETRY.min_wait * 2**step for step in range(4)]


@pytest.mark.parametrize(
    ("code", "value", "seconds"),
    [
        (429, "7", 7.0),
        (503, " 0 ", 0.0),
        (429, "Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        (429, "Thu, 01 Jan 2026 00:00:30 -0000", 30.0),
        (429, "Wed, 31 Dec 2025 00:00:00 GMT", 0.0),
        (429, "9" * 400, 999_999_999.0),
        (429, "soon", None),
        (429, "-3", None),
        (429, "Thu, 99 Jan 99999 00:00:00 GMT", None),
        (429, None, None),
        (500, "7", None),
        (200, "7", None),
    ],
)
def test_retry_after(code: int, value: str | None, seconds: float | None) -> None:
    """Seconds and dates are understood, on 429 and 503 only; nonsense asks for nothing."""
    assert parse_retry_after(code, value, NOW) == seconds


@given(st.text(max_size=60))
def test_retry_after_takes_any_text(value: str) -> None:
    """No Retry-After text raises, and none asks for the past."""
    assert (parse_retry_after(429, value, NOW) or 0.0) >= 0.0


def test_retry_after_date_is_relative_to_now() -> None:
    """A date counts from the clock that is given."""
    assert parse_retry_after(503, "Thu, 01 Jan 2026 00:00:30 GMT", NOW + timedelta(seconds=20)) == 10.0


@pytest.mark.parametrize(
    ("code", "after", "seconds"),
    [
        (429, 7.0, 7.0),
        (503, 7.0, 7.0),
        (429, 500.0, 60.0),
        (429, None, TOO_MANY_SECONDS),
        (503, None, 0.0),
        (0, None, 0.0),
    ],
)
def test_how_long_all_leave_a_host_alone(code: int, after: float | None, seconds: float) -> None:
    """As long as it asks for, up to the limit; a moment after 429 without a word of that; else not at all."""
    failure = TryError(Kind.STATUS if code else Kind.CONNECT, "", status=code, retry_after=after)
    assert common_pause(failure, 60.0) == seconds


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (status(401), Unauthorized),
        (status(403), Unauthorized),
        (status(404), NotFound),
        (status(500), RegistryUnavailable),
        (status(416), RegistryUnavailable),
        (TryError(Kind.MISMATCH, "x"), Mismatch),
        (TryError(Kind.REDIRECT, "x"), RegistryUnavailable),
        (TryError(Kind.CONNECT, "x"), RegistryUnavailable),
    ],
)
def test_errors_for_callers(failure: TryError, error: type[Exception]) -> None:
    """Each last failure becomes the class of the error tree that callers decide by."""
    assert type(final_error(failure, "GET https://r/v2/", 3)) is error


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("bytes 0-0/1", ContentRange(0, 1, 1)),
        ("bytes 10-19/*", ContentRange(10, 20, None)),
        (" bytes 0-9/10 ", ContentRange(0, 10, 10)),
        ("bytes 0-10/10", None),
        ("bytes 9-8/10", None),
        ("bytes */10", None),
        ("bytes=0-9/10", None),
        ("octets 0-9/10", None),
        ("bytes 0-9", None),
        ("bytes -1-9/10", None),
        ("bytes 0-9/10, bytes 0-9/10", None),
        ("bytes \u0661-\u0662/\u0663", None),
        ("bytes 0-" + "9" * 30 + "/*", None),
        (None, None),
    ],
)
def test_content_range(value: str | None, parsed: ContentRange | None) -> None:
    """A Content-Range is read only if it is complete, in ASCII digits and free of contradiction."""
    assert parse_content_range(value) == parsed


def heads(code: int, content_range: str | None = None, length: str | None = None, kind: str | None = None) -> Heads:
    return Heads(code, content_range, length, kind)


@pytest.mark.parametrize(
    ("given_heads", "skip"),
    [
        (heads(206, "bytes 100-199/1000", "100"), 0),
        (heads(206, "bytes 100-199/*"), 0),
        (heads(200, length="1000"), 100),
        (heads(200), 100),
        (heads(206, "bytes 100-198/1000"), None),
        (heads(206, "bytes 99-199/1000"), None),
        (heads(206, "bytes 0-99/1000"), None),
        (heads(206, "bytes 100-199/1000", "99"), None),
        (heads(206, None, "100"), None),
        (heads(206, "bytes 100-199/1000", "100", "Multipart/Byteranges"), None),
        (heads(200, length="199"), None),
    ],
)
def test_only_the_asked_range_is_accepted(given_heads: Heads, skip: int | None) -> None:
    """An answer is the range [100, 200), or the whole blob to skip into, or refused."""
    if skip is not None:
        assert skip_for(given_heads, 100, 200, 100) == skip
        return
    with pytest.raises(TryError) as caught:
        skip_for(given_heads, 100, 200, 100)
    assert caught.value.kind is Kind.BAD_ANSWER


def test_skipping_is_bounded() -> None:
    """A whole blob is skipped into no further than allowed."""
    with pytest.raises(TryError, match="ignores Range"):
        skip_for(heads(200), 100, 200, 99)


@pytest.mark.parametrize(
    ("given_heads", "offset", "size", "expected"),
    [
        (heads(200, length="1000"), 0, None, (0, 1000)),
        (heads(200), 0, None, (0, None)),
        (heads(206, "bytes 10-999/1000"), 10, 1000, (0, 1000)),
        (heads(206, "bytes 10-999/*"), 10, 1000, (0, 1000)),
        (heads(200, length="1000"), 10, 1000, (10, 1000)),
        (heads(206, "bytes 11-999/1000"), 10, 1000, None),
        (heads(206, "bytes 10-998/1000"), 10, 1000, None),
        (heads(206, "bytes 10-1000/1001"), 10, 1000, None),
        (heads(206), 10, 1000, None),
    ],
)
def test_resuming(given_heads: Heads, offset: int, size: int | None, expected: tuple[int, int | None] | None) -> None:
    """A stream goes on exactly where it broke off, in a blob of the same size, or not at all."""
    if expected is not None:
        assert resume_for(given_heads, offset, size) == expected
        return
    with pytest.raises(TryError):
        resume_for(given_heads, offset, size)


# --- challenges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "parsed"),
    [
        (
            'Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push"',
            [
                (
                    "bearer",
                    {"realm": "https://auth.example/token", "service": "reg", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        ('Basic realm="a \\"quoted\\" realm"', [("basic", {"realm": 'a "quoted" realm'})]),
        (
            'Basic realm="x", Bearer realm=unquoted , error="invalid_token"',
            [("basic", {"realm": "x"}), ("bearer", {"realm": "unquoted", "error": "invalid_token"})],
        ),
        ("Negotiate", [("negotiate", {})]),
        ("NTLM abc==, Basic realm=x", [("ntlm", {}), ("basic", {"realm": "x"})]),
        ("BEARER REALM=x", [("bearer", {"realm": "x"})]),
        ("", []),
        (None, []),
        ('"', []),
    ],
)
def test_challenges(header: str | None, parsed: list[tuple[str, dict[str, str]]]) -> None:
    """Schemes and parameters are read in order, quoted or not, also several in one header."""
    assert [(one.scheme, one.parameters) for one in parse_challenges(header)] == parsed


@given(st.text(alphabet=st.sampled_from('ab="\\, \t=xBearer\x00é'), max_size=300))
def test_challenges_of_any_text(header: str) -> None:
    """No header raises or is read for ever."""
    parse_challenges(header)


def test_bearer_is_preferred() -> None:
    """Bearer with a realm wins over Basic; Bearer without one cannot be answered."""
    basic, bearer = Challenge("basic"), Challenge("bearer", {"realm": "https://x"})
    assert choose((basic, bearer)) is bearer
    assert choose((Challenge("bearer"), basic)) is basic
    assert choose((Challenge("bearer"), Challenge("negotiate"))) is None


def test_what_asks_for_credentials() -> None:
    """401 asks, 403 only in ECR's words; a store's refusals and S3's ExpiredToken make its URL outdated."""
    expired = b'{"errors":[{"message":"Your authorization token has expired. Reauthenticate and try again."}]}'
    assert asks_for_credentials(401, b"")
    assert asks_for_credentials(403, expired)
    assert not asks_for_credentials(403, b"denied")
    assert not asks_for_credentials(400, expired)
    s3 = b"<Error><Code>ExpiredToken</Code></Error>"
    assert target_expired(400, "application/xml; charset=utf-8", s3)
    assert not target_expired(400, "text/plain", s3)
    assert not target_expired(400, "application/xml", b"<Code>InvalidArgument</Code>")
    assert all(target_expired(code, None, b"") for code in (401, 403, 404))
    assert not target_expired(500, None, b"")
