# SPDX-License-Identifier: Apache-2.0
"""JSON of registries: hostile text to checked values, and values to the one canonical text.

Reading: `load` bounds the text before it is parsed, and a `Fields` hands out an object's members checked by type, so
that no parser built on it raises anything but `InvalidManifest`.
Writing: the bytes of a document decide its digest, so `encode_json` writes what Go's standard encoder would: compact,
members in the order given, and a few characters escaped that JSON would let pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from soci.digest import Digest, parse_digest
from soci.errors import InvalidDigest, InvalidInput, InvalidManifest

MAX_JSON_PARTS: Final = 200_000
"""Commas, brackets and braces of one document: bounds the objects that parsing makes of few bytes."""
MAX_INTEGER: Final = 2**63 - 1
_WHAT_SHOWN: Final = 80  # characters of a foreign value in an error message

_ESCAPES: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# What JSON cannot hold (half a surrogate pair, and bytes that were no UTF-8) becomes the replacement character.
_ESCAPES.update(dict.fromkeys(range(0xD800, 0xE000), "\\ufffd"))


def encode_json(value: object) -> bytes:
    """The canonical JSON of strings, integers, booleans, None, lists, tuples and string-keyed mappings.

    No white space, no final newline; members in the order of the mapping; non-ASCII text as UTF-8, but ``<``, ``>``,
    ``&``, U+2028 and U+2029 as escapes. Raises `InvalidInput` for any other value.
    """
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"not a value that JSON can hold: {error}") from error
    return text.translate(_ESCAPES).encode()  # the escaped characters occur in strings only


def load(data: bytes, what: str, max_bytes: int) -> Fields:
    """The object that ``data`` holds as JSON; ``what`` names the document in errors. Raises `InvalidManifest`.

    A member named twice is refused: two readers could take different ones of them.
    """
    if len(data) > max_bytes:
        raise InvalidManifest(f"{what} of {len(data):,} bytes is over the limit of {max_bytes:,}")
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_PARTS:
        raise InvalidManifest(f"{what} has more than {MAX_JSON_PARTS:,} parts")
    try:
        value = json.loads(str(data, "utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"{what} is not JSON: {error}") from error
    return Fields(value, what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two members of one name")
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


class Fields:
    """The members of one JSON object, each checked when it is asked for. ``null`` counts as absent, as in Go.

    Every method raises `InvalidManifest`, which names the member by its path in the document.
    """

    __slots__ = ("_members", "_what")

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise InvalidManifest(f"{what}: not an object but {_shown(value)}")
        self._members: dict[str, Any] = value
        self._what = what

    def __contains__(self, name: str) -> bool:
        return self._members.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A string; ``default`` where it is absent, and a refusal where there is none."""
        value = self._members.get(name)
        if value is None and default is not None:
            return default
        return self._text(value, name)

    def integer(self, name: str) -> int:
        """A whole number from 0 to 2**63 - 1."""
        value = self._members.get(name)
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            self.refuse(name, "is not a size", value)
        return value

    def digest(self, name: str) -> Digest:
        """A digest."""
        return self._digest(self._members.get(name), name)

    def digests(self, name: str) -> tuple[Digest, ...]:
        """A list of digests; empty where it is absent."""
        return tuple(self._digest(item, name) for item in self._list(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where it is absent."""
        return tuple(self._text(item, name) for item in self._list(name))

    def text_map(self, name: str) -> dict[str, str]:
        """An object of strings; empty where it is absent."""
        value = self._members.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "is not an object", value)
        return {self._text(key, name): self._text(item, name) for key, item in value.items()}

    def member(self, name: str) -> Fields:
        """An object."""
        return Fields(self._members.get(name), f"{self._what}, {name}")

    def members(self, name: str, limit: int) -> Iterable[Fields]:
        """A list of at most ``limit`` objects; empty where it is absent."""
        items = self._list(name)
        if len(items) > limit:
            raise InvalidManifest(f"{self._what}: {len(items):,} {name} are over the limit of {limit:,}")
        return [Fields(item, f"{self._what}, {name}[{at}]") for at, item in enumerate(items)]

    def refuse(self, name: str, why: str, value: object) -> NoReturn:
        """Raise `InvalidManifest` about member ``name``."""
        raise InvalidManifest(f"{self._what}: {name} {why}: {_shown(value)}")

    def _list(self, name: str) -> list[Any]:
        value = self._members.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(name, "is not a list", value)
        return value

    def _text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(name, "is not a string", value)
        if not value.isascii() and any("\ud800" <= character < "\ue000" for character in value):
            self.refuse(name, "has half a surrogate pair", value)
        return value

    def _digest(self, value: object, name: str) -> Digest:
        try:
            return parse_digest(self._text(value, name))
        except InvalidDigest as error:
            raise InvalidManifest(f"{self._what}: {name}: {error}") from error


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    return ascii(value if not isinstance(value, str) else value[:_WHAT_SHOWN])[:_WHAT_SHOWN]
