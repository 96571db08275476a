# SPDX-License-Identifier: Apache-2.0
r"""Regular expressions that cannot take long: what a client sends as one must not hold up the service. Pure.

Python's own `re` backtracks, and a pattern of twenty characters can keep it busy for ever. This is a set of states
that is moved over the text once: time grows with text times pattern, whatever the pattern. The language is that of
RE2, as far as names and labels need it: ``. [] [^] | () (?:) * + ? {m,n} ^ $ \A \z \b \B \d \w \s`` and their
opposites, and escaped characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from soci.errors import InvalidInput

PROGRAM_LIMIT = 1000
"""Steps that a pattern may be compiled to."""
DEPTH_LIMIT = 50
"""Groups inside one another."""
REPEAT_LIMIT = 1000
"""The largest number in ``{m,n}`` (RE2's own limit)."""

_ESCAPED = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_PERL = {"d": "0-9", "w": "0-9A-Za-z__", "s": "\t-\n\f-\r  "}
_FOREIGN = "pPQECxKGXR"
"""Escapes that RE2 or others know and we do not."""

Accepts = Callable[[str], bool]


class BadPatternError(Exception):
    """Not a regular expression: it matches nothing."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the program: take a character, go on at both places, or hold at a border of the text."""

    kind: Literal["take", "split", "start", "end", "word", "not-word", "found"]
    accepts: Accepts | None = None
    ways: tuple[int, ...] = ()


Node = tuple[str, "tuple[Node, ...]", Accepts | None, int, int | None]


def _node(kind: str, *below: Node, accepts: Accepts | None = None, least: int = 0, most: int | None = None) -> Node:
    return kind, below, accepts, least, most


def _one_of(ranges: list[tuple[str, str]], *, negated: bool = False) -> Accepts:
    def accepts(character: str) -> bool:
        return any(low <= character <= high for low, high in ranges) != negated

    return accepts


def _perl(letter: str) -> Accepts:
    text = _PERL[letter.lower()]
    pairs: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if text[at + 1 : at + 2] == "-":
            pairs.append((text[at], text[at + 2]))
            at += 3
        else:
            pairs.append((text[at], text[at]))
            at += 1
    return _one_of(pairs, negated=letter.isupper())


class _Parser:
    """Pattern to tree."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    def parse(self) -> Node:
        tree = self._alternatives(0)
        if self._at < len(self._text):
            raise BadPatternError("unexpected )")
        return tree

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        found = self._peek()
        if not found:
            raise BadPatternError("ends too soon")
        self._at += 1
        return found

    def _alternatives(self, depth: int) -> Node:
        if depth > DEPTH_LIMIT:
            raise InvalidInput(f"a regular expression with more than {DEPTH_LIMIT} groups inside one another")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence(depth))
        return _node("any-of", *branches)

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self._peek() not in {"", "|", ")"}:
            part = self._atom(depth)
            repeats = self._repeat()
            if repeats:
                part = _node("repeat", part, least=repeats[0], most=repeats[1])
                if self._peek() == "?":  # as few as possible: the same for a search
                    self._at += 1
                if self._peek() in {"*", "+", "?"} and self._peek():
                    raise BadPatternError("nothing to repeat")
            parts.append(part)
        return _node("all-of", *parts)

    def _repeat(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple:
            return simple[self._next()]
        if self._peek() != "{":
            return None
        inside, brace, _ = self._text[self._at + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        if not brace or not _number(low) or (high and not _number(high)):
            return None  # a brace that stands for itself
        self._at += len(inside) + 2
        least = int(low)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > REPEAT_LIMIT or (most is not None and most < least):
            raise BadPatternError("repeat count")
        return least, most

    def _atom(self, depth: int) -> Node:  # noqa: C901  one case a character
        character = self._next()
        match character:
            case ".":
                return _node("take", accepts=lambda one: one != "\n")
            case "^":
                return _node("start")
            case "$":
                return _node("end")
            case "(":
                if self._peek() == "?":
                    if not self._text.startswith("?:", self._at):
                        raise InvalidInput("flags and names of groups are not supported in regular expressions here")
                    self._at += 2
                inner = self._alternatives(depth + 1)
                if self._next() != ")":
                    raise BadPatternError("missing )")
                return inner
            case "[":
                return _node("take", accepts=self._set())
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                raise BadPatternError("nothing to repeat")
            case _:
                return _node("take", accepts=_one_of([(character, character)]))

    def _escape(self) -> Node:
        letter = self._next()
        if letter in {"A", "z", "b", "B"}:
            return _node({"A": "start", "z": "end", "b": "word", "B": "not-word"}[letter])
        if letter.lower() in _PERL:
            return _node("take", accepts=_perl(letter))
        character = _plain(letter)
        return _node("take", accepts=_one_of([(character, character)]))

    def _set(self) -> Accepts:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[str, str]] = []
        others: list[Accepts] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._next()
            if low == "[" and self._peek() == ":":
                raise InvalidInput("[:classes:] are not supported in regular expressions here")
            if low == "\\":
                letter = self._next()
                if letter.lower() in _PERL:
                    others.append(_perl(letter))
                    continue
                low = _plain(letter)
            high = low
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in {"]", ""}:
                self._at += 1
                high = self._next()
                if high == "\\":
                    high = _plain(self._next())
                if high < low:
                    raise BadPatternError("range")
            ranges.append((low, high))
        self._at += 1
        plain = _one_of(ranges)
        return lambda one: (plain(one) or any(accepts(one) for accepts in others)) != negated


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _plain(letter: str) -> str:
    """The character that an escape stands for."""
    if letter in _ESCAPED:
        return _ESCAPED[letter]
    if letter in _FOREIGN:
        raise InvalidInput(f"\\{letter} is not supported in regular expressions here")
    if letter.isalnum():
        raise BadPatternError("escape")
    return letter


def _compile(tree: Node, program: list[_Step]) -> None:  # noqa: C901  one case a node
    """Append the steps of a tree; each goes on at the step behind it unless it says otherwise."""
    kind, below, accepts, least, most = tree
    if len(program) > PROGRAM_LIMIT:
        raise InvalidInput(f"a regular expression of more than {PROGRAM_LIMIT} steps")
    match kind:
        case "all-of":
            for part in below:
                _compile(part, program)
        case "any-of":
            _alternatives(below, program)
        case "repeat":
            for _ in range(least):
                before = len(program)
                _compile(below[0], program)
                if len(program) == before:
                    break  # nothing, however often
            if most is None:
                at = len(program)
                program.append(_Step("split"))
                _compile(below[0], program)
                program.append(_Step("split", ways=(at,)))
                program[at] = _Step("split", ways=(at + 1, len(program)))
            else:
                _optional(below[0], most - least, program)
        case "take":
            program.append(_Step("take", accepts))
        case "start" | "end" | "word" | "not-word":
            program.append(_Step(kind))


def _optional(part: Node, times: int, program: list[_Step]) -> None:
    places = []
    for _ in range(times):
        places.append(len(program))
        program.append(_Step("split"))
        _compile(part, program)
    for at in places:
        program[at] = _Step("split", ways=(at + 1, len(program)))


def _alternatives(branches: tuple[Node, ...], program: list[_Step]) -> None:
    ends = []
    for number, branch in enumerate(branches):
        last = number == len(branches) - 1
        at = len(program)
        if not last:
            program.append(_Step("split"))
        _compile(branch, program)
        if not last:
            ends.append(len(program))
            program.append(_Step("split"))
            program[at] = _Step("split", ways=(at + 1, len(program)))
    for at in ends:
        program[at] = _Step("split", ways=(len(program),))


class Pattern:
    """A compiled pattern."""

    def __init__(self, pattern: str) -> None:
        """`BadPatternError` for what is no regular expression, `InvalidInput` for one that we do not take."""
        self._program: list[_Step] = []
        _compile(_Parser(pattern).parse(), self._program)
        self._program.append(_Step("found"))
        if len(self._program) > PROGRAM_LIMIT:
            raise InvalidInput(f"a regular expression of more than {PROGRAM_LIMIT} steps")

    def found_in(self, text: str) -> bool:
        """Does it match anywhere in ``text``?"""
        states: set[int] = set()
        for at in range(len(text) + 1):
            reached: set[int] = set()
            if self._follow(states | {0}, text, at, reached):
                return True
            if at < len(text):
                states = {place + 1 for place in reached if self._accepts(place, text[at])}
        return False

    def _accepts(self, place: int, character: str) -> bool:
        accepts = self._program[place].accepts
        return accepts is not None and accepts(character)

    def _follow(self, places: set[int], text: str, at: int, reached: set[int]) -> bool:
        """Collect in ``reached`` the steps that take a character, from ``places`` on; True where the end is found."""
        waiting = list(places)
        seen = set(waiting)
        while waiting:
            place = waiting.pop()
            step = self._program[place]
            match step.kind:
                case "found":
                    return True
                case "take":
                    reached.add(place)
                    continue
                case "split":
                    further = step.ways
                case _:
                    further = (place + 1,) if _holds(step.kind, text, at) else ()
            for one in further:
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)
        return False


def _holds(kind: str, text: str, at: int) -> bool:
    match kind:
        case "start":
            return at == 0
        case "end":
            return at == len(text)
        case _:
            word = _perl("w")
            border = (at > 0 and word(text[at - 1])) != (at < len(text) and word(text[at]))
            return border == (kind == "word")
