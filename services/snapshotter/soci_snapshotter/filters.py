# SPDX-License-Identifier: Apache-2.0
"""containerd's filter language, as List speaks it. Pure.

filter    = selector *("," selector)            all must match
selector  = fieldpath [ operator value ]        without one: the field is there
fieldpath = field *("." field)                  a field may be quoted: labels."containerd.io/snapshot.ref"
operator  = "==" / "!=" / "~="
value     = quoted / what has no space and no comma;  behind ~= also /pattern/ or |pattern|

Spaces may stand between all of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from soci.errors import InvalidInput
from soci_snapshotter.regex import BadPatternError, Pattern
from soci_snapshotter.state import Snapshot

FILTER_LIMIT = 16_384
"""Characters of one filter."""
FILTERS_LIMIT = 256
"""Filters of one call."""

Matches = Callable[[Snapshot], bool]
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_PLAIN = re.compile(r"[^\s,]+")
_OPERATOR = re.compile(r"==|!=|~=")
_SLASHED = re.compile(r"/((?:[^/\\]|\\.)*)/|\|((?:[^|\\]|\\.)*)\|")
QUOTES = '"/|'
"""What no plain value begins with: the last two quote patterns, after ``~=`` only."""
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\\"])|([0-3][0-7]{2})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.?))", re.DOTALL
)
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


class _Reader:
    """A place in the text of one filter."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def done(self) -> bool:
        self._pass_spaces()
        return self.at >= len(self.text)

    def take_sign(self, sign: str) -> bool:
        self._pass_spaces()
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) * found
        return found

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self._pass_spaces()
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def _pass_spaces(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at

    def wrong(self, expected: str) -> InvalidInput:
        return InvalidInput(f"filter {self.text[:200]!r}: expected {expected} at character {self.at + 1}")

    def field(self) -> str:
        found = self.take(_QUOTED)
        if found:
            return self.unquote(found[0])
        plain = self.take(_FIELD)
        if not plain:
            raise self.wrong("a field")
        return plain[0]

    def unquote(self, quoted: str) -> str:
        """A Go string's text. Bytes (octal and hexadecimal escapes) stand for characters below 256."""

        def one(found: re.Match[str]) -> str:
            letter, octal, *hexadecimal, other = found.groups()
            if letter:
                return _LETTERS[letter]
            if other is not None:
                raise self.wrong("a well-formed quoted string")
            number = int(octal, 8) if octal else int(next(digits for digits in hexadecimal if digits), 16)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise self.wrong("a well-formed quoted string")
            return chr(number)

        return _ESCAPE.sub(one, quoted[1:-1])

    def value(self, operator: str) -> str:
        if operator == "~=":
            found = self.take(_SLASHED)
            if found:
                return found[1] if found[1] is not None else found[2]
        quoted = self.take(_QUOTED)
        if quoted:
            return self.unquote(quoted[0])
        plain = self.take(_PLAIN)
        if not plain or plain[0][0] in QUOTES:
            raise self.wrong("a value")
        return plain[0]


def value_of(snapshot: Snapshot, path: Sequence[str]) -> str | None:
    """The field's text, or None where it is absent."""
    match path:
        case ["name"]:
            return snapshot.name
        case ["parent"]:
            return snapshot.parent
        case ["kind"]:
            return snapshot.kind
        case ["labels", *rest] if rest:
            return snapshot.labels.get(".".join(rest))
        case _:
            return None


def _selector(path: list[str], operator: str, wanted: str) -> Matches:
    match operator:
        case "":
            return lambda snapshot: value_of(snapshot, path) is not None
        case "==":
            return lambda snapshot: value_of(snapshot, path) == wanted
        case "!=":
            return lambda snapshot: (value_of(snapshot, path) or "") != wanted
        case _:
            try:
                pattern = Pattern(wanted)
            except BadPatternError:
                return lambda _snapshot: False
            return lambda snapshot: pattern.found_in(value_of(snapshot, path) or "")


def parse_filter(text: str) -> Matches:
    """One filter as a predicate; `InvalidInput` says where it breaks the grammar."""
    if len(text) > FILTER_LIMIT:
        raise InvalidInput(f"a filter of {len(text)} characters; {FILTER_LIMIT} are allowed")
    selectors: list[Matches] = []
    reader = _Reader(text)
    while not reader.done():
        path = [reader.field()]
        while reader.take_sign("."):
            path.append(reader.field())
        operator = reader.take(_OPERATOR)
        selectors.append(
            _selector(path, operator[0], reader.value(operator[0])) if operator else _selector(path, "", "")
        )
        end = reader.at
        if reader.done():
            break
        if not reader.text.startswith(",", end):  # a space before it is refused, as containerd refuses it
            raise reader.wrong("a comma")
        reader.take_sign(",")
        if reader.done():
            raise reader.wrong("a selector")
    return lambda snapshot: all(selector(snapshot) for selector in selectors)


def parse_filters(texts: Sequence[str]) -> Matches:
    """Several filters, of which one must match; none at all match everything."""
    if len(texts) > FILTERS_LIMIT:
        raise InvalidInput(f"{len(texts)} filters; {FILTERS_LIMIT} are allowed")
    filters = [parse_filter(text) for text in texts]
    return lambda snapshot: not filters or any(matches(snapshot) for matches in filters)
