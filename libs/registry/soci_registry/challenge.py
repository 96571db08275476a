# SPDX-License-Identifier: Apache-2.0
"""``WWW-Authenticate`` read as values (RFC 9110 §11), and when an answer is a question for credentials at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

HEADER_LENGTH_MAX = 16 * 1024
CHALLENGES_MAX = 16

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110's token, not a secret
_PARAMETER = re.compile(rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_SCHEME = re.compile(rf"({_TOKEN})(?:\s+|$)")
_TOKEN68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*(?=\s*(?:,|$))")

# ECR says this in the body of a 403 where others would say 401.
_ECR_EXPIRED = b"Your authorization token has expired. Reauthenticate and try again."


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate that a server offers. ``scheme`` and parameter names are lower-case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(header: str | None) -> tuple[Challenge, ...]:
    """All challenges of a (comma-joined) header, in order; what does not parse ends the reading."""
    text = (header or "")[:HEADER_LENGTH_MAX]
    found: list[Challenge] = []
    at = 0
    while len(found) < CHALLENGES_MAX:
        at = _skip(text, at)
        scheme = _SCHEME.match(text, at)
        if not scheme:
            break
        parameters, at = _parameters(text, scheme.end())
        found.append(Challenge(scheme[1].lower(), parameters))
    return tuple(found)


def _parameters(text: str, at: int) -> tuple[dict[str, str], int]:
    parameters: dict[str, str] = {}
    at = _skip(text, at)
    while pair := _PARAMETER.match(text, at):
        value = re.sub(r"\\(.)", r"\1", pair[2]) if pair[2] is not None else pair[3]
        parameters.setdefault(pair[1].lower(), value)
        at = _skip(text, pair.end())
    if not parameters and (token68 := _TOKEN68.match(text, at)):
        at = token68.end()
    return parameters, at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in ", \t":
        at += 1
    return at


def choose(challenges: tuple[Challenge, ...]) -> Challenge | None:
    """The challenge that we can answer: Bearer with a realm before Basic."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((challenge for challenge in challenges if challenge.scheme == "basic"), None)


def asks_for_credentials(status: int, body: bytes) -> bool:
    """Whether an answer of the registry itself asks to authenticate: 401 always, 403 only where ECR means 401."""
    return status == 401 or (status == 403 and _ECR_EXPIRED in body)


def implied_challenge(status: int, host: str) -> Challenge | None:
    """The challenge that ECR's 403 leaves out."""
    if status != 403:
        return None
    return Challenge("basic", {"realm": f"https://{host}/", "service": "ecr.amazonaws.com"})


def target_expired(status: int, content_type: str | None, body: bytes) -> bool:
    """Whether a redirect target's refusal may end by asking the registry for a new target.

    Object stores answer 401, 403 or 404 to an outdated signature, and S3 a 400 with the code ExpiredToken.
    """
    if status == 400:
        return (content_type or "").lower().startswith("application/xml") and b"<Code>ExpiredToken</Code>" in body
    return status in {401, 403, 404, 410}
