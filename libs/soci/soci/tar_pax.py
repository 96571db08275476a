# SPDX-License-Identifier: Apache-2.0
"""PAX records of tar's extension headers (POSIX pax, "Extended Header"), and GNU's sparse maps that hide in them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from soci.errors import InvalidTar

MAX_PAYLOAD_BYTES: Final = 1 << 20
"""Bytes of one extension header's payload, and of one sparse map."""
MAX_FORMS: Final = 1024
"""Forms of payloads that a `Parser` remembers."""

_LONGEST_FORM: Final = 1024  # bytes of a payload whose form is remembered
_BEGINNING: Final = 8  # bytes that tell forms of one length apart
_DECIMAL: Final = re.compile(rb"[+-]?[0-9]+")
_FRACTION: Final = re.compile(rb"[0-9]*")
_TEXTS: Final = frozenset((b"path", b"linkpath", b"uname", b"gname"))
_MAX_DIGITS: Final = 19  # of a 64-bit number
_BILLION: Final = 1_000_000_000

_SPARSE_OFFSET: Final = b"GNU.sparse.offset"
_SPARSE_LENGTH: Final = b"GNU.sparse.numbytes"
_SPARSE_MAP: Final = b"GNU.sparse.map"
_SPARSE_COUNT: Final = b"GNU.sparse.numblocks"
_SPARSE_MAJOR: Final = b"GNU.sparse.major"
_SPARSE_MINOR: Final = b"GNU.sparse.minor"
_SPARSE_NAME: Final = b"GNU.sparse.name"
_SPARSE_SIZES: Final = (b"GNU.sparse.size", b"GNU.sparse.realsize")


def parse_records(payload: bytes) -> dict[bytes, bytes]:
    r"""The records of an ``x`` header: ``LEN KEY=VALUE\n`` each, the last one of a key wins. Raises `InvalidTar`.

    Pairs of GNU sparse 0.0 records, which repeat their keys, become one ``GNU.sparse.map``.
    """
    found: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(payload):
        key, value, at = _record(payload, at)
        if key in (_SPARSE_OFFSET, _SPARSE_LENGTH):
            expected = _SPARSE_LENGTH if len(sparse) % 2 else _SPARSE_OFFSET
            if key != expected or b"," in value:
                raise InvalidTar("sparse records out of order")
            sparse.append(value)
        else:
            found[key] = value
    if sparse:
        found[_SPARSE_MAP] = b",".join(sparse)
    return found


class Parser:
    """Parses payloads as `parse_records` does, faster where many are alike.

    A layer's members have records with the same keys, and values of few lengths. So where the last payload of some
    length had its lengths, keys and ends of records, the next one most likely has them too: then its values are there.
    """

    def __init__(self) -> None:
        self._forms: dict[tuple[int, bytes], _Form] = {}

    def __call__(self, payload: bytes) -> dict[bytes, bytes]:
        """The records of a payload; raises `InvalidTar`."""
        look = (len(payload), payload[:_BEGINNING])
        form = self._forms.get(look)
        if form is not None:
            words = form.unpack(payload)
            if words[::2] == form.fixed and not (form.texts and b"\0" in payload):
                return dict(zip(form.keys, words[1::2]))  # noqa: B905  (of one length; saying so takes as long as the rest)
        records = parse_records(payload)
        if len(payload) <= _LONGEST_FORM:
            form = _form(payload, records)
            if form is not None and (look in self._forms or len(self._forms) < MAX_FORMS):
                self._forms[look] = form
        return records


@dataclass(frozen=True, slots=True)
class _Form:
    """All of a payload but its values."""

    unpack: Callable[[bytes], tuple[bytes, ...]]  # what is fixed, and between that the values
    fixed: tuple[bytes, ...]
    keys: tuple[bytes, ...]
    texts: bool  # whether some values must have no NUL


def _form(payload: bytes, records: Mapping[bytes, bytes]) -> _Form | None:
    """The form of ``payload``, whose records are ``records``; None where they are not simply one behind the other."""
    fixed, code, at, between = [], "", 0, b""
    for key, value in records.items():
        length = payload.find(b"=", at) + 1 - at
        end = at + length + len(value)
        head = payload[at : at + length]
        if head.partition(b" ")[2] != key + b"=" or payload[at + length : end + 1] != value + b"\n":
            return None  # a key came twice, or sparse records were put together
        fixed.append(between + head)
        code += f"{len(between) + length}s{len(value)}s"
        between = b"\n"
        at = end + 1
    if at != len(payload) or not records:
        return None
    fixed.append(between)
    return _Form(struct.Struct(code + "1s").unpack, tuple(fixed), tuple(records), not _TEXTS.isdisjoint(records))


def parse_int(text: bytes) -> int:
    """A signed decimal number of 64 bits; raises `InvalidTar`."""
    if _DECIMAL.fullmatch(text) is None:
        raise InvalidTar(f"not a decimal number: {text[:40]!r}")
    digits = text.lstrip(b"+-").lstrip(b"0")
    number = int(digits or b"0") if len(digits) <= _MAX_DIGITS else 1 << 64
    number = -number if text.startswith(b"-") else number
    if not -(1 << 63) <= number < 1 << 63:
        raise InvalidTar(f"number beyond 64 bits: {text[:40]!r}")
    return number


def parse_time(text: bytes) -> tuple[int, int]:
    """``SECONDS[.FRACTION]`` as whole seconds and nanoseconds (0 to 999,999,999) since the epoch.

    Digits beyond the ninth are dropped. For a negative number the fraction counts backwards: -1.5 is (-2, 500000000).
    """
    whole, _, fraction = text.partition(b".")
    seconds = parse_int(whole)
    if _FRACTION.fullmatch(fraction) is None:
        raise InvalidTar(f"not a time: {text[:40]!r}")
    nanoseconds = int(fraction[:9].ljust(9, b"0"))
    if whole.startswith(b"-") and nanoseconds:
        return seconds - 1, _BILLION - nanoseconds
    return seconds, nanoseconds


def is_sparse(records: Mapping[bytes, bytes]) -> bool:
    """Whether a member with these records is a sparse file, of which the archive holds only the parts with data."""
    major, minor = _version(records)
    if major or minor:
        return (major, minor) in ((b"0", b"0"), (b"0", b"1"), (b"1", b"0"))
    return bool(records.get(_SPARSE_MAP))


def has_map_in_data(records: Mapping[bytes, bytes]) -> bool:
    """Whether a sparse member's map is the start of its data (version 1.0), and not among its records."""
    return _version(records) == (b"1", b"0")


def sparse_name(records: Mapping[bytes, bytes]) -> bytes:
    """The sparse member's true name; empty where the header's own holds."""
    return records.get(_SPARSE_NAME, b"")


def sparse_size(records: Mapping[bytes, bytes]) -> int | None:
    """The sparse member's true size; None where the header's own holds."""
    text = records.get(_SPARSE_SIZES[0]) or records.get(_SPARSE_SIZES[1])
    return parse_int(text) if text else None


def check_map_in_records(records: Mapping[bytes, bytes], size: int) -> None:
    """Check the sparse map among the records against the true ``size``; raises `InvalidTar`."""
    count = parse_int(records.get(_SPARSE_COUNT, b""))
    numbers = records.get(_SPARSE_MAP, b"").split(b",")
    if numbers == [b""]:
        numbers = []
    if count < 0 or len(numbers) != 2 * count:
        raise InvalidTar("sparse map of another length than it says")
    _check_map([parse_int(number) for number in numbers], size)


class MapReader:
    """The sparse map at the start of a version 1.0 member's data: lines of decimal numbers, in whole blocks."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._lines = 0
        self._count: int | None = None  # of regions, once the first line is whole

    def feed(self, block: bytes) -> bool:
        """Add one block; says whether the map is whole now. Raises `InvalidTar`."""
        self._text += block
        self._lines += block.count(b"\n")
        if len(self._text) > MAX_PAYLOAD_BYTES:
            raise InvalidTar(f"sparse map of more than {MAX_PAYLOAD_BYTES} bytes")
        if self._count is None and self._lines:
            self._count = parse_int(bytes(self._text[: self._text.index(b"\n")]))
            if self._count < 0:
                raise InvalidTar("sparse map of a negative length")
        return self._count is not None and self._lines >= 1 + 2 * self._count

    def check(self, size: int) -> None:
        """Check the whole map against the member's true ``size``; raises `InvalidTar`."""
        numbers = bytes(self._text).split(b"\n")[1 : 1 + 2 * (self._count or 0)]
        _check_map([parse_int(number) for number in numbers], size)


def override(records: Mapping[bytes, bytes], key: bytes, parse: Callable[[bytes], int], kept: int) -> int:
    """The number that a record puts in a header field's place; an empty or absent record keeps the field's."""
    text = records.get(key)
    return parse(text) if text else kept


def _version(records: Mapping[bytes, bytes]) -> tuple[bytes, bytes]:
    return records.get(_SPARSE_MAJOR, b""), records.get(_SPARSE_MINOR, b"")


def _record(payload: bytes, start: int) -> tuple[bytes, bytes, int]:
    """Key, value and end of the record at ``start``."""
    space = payload.find(b" ", start)
    if space < 0:
        raise InvalidTar("PAX record without a length")
    length = parse_int(payload[start:space])
    end = start + length
    if length < 5 or end > len(payload) or end <= space + 1 or payload[end - 1 : end] != b"\n":
        raise InvalidTar(f"PAX record of {length} bytes does not fit")
    key, equals, value = payload[space + 1 : end - 1].partition(b"=")
    if not equals or not key or b"\0" in (value if key in _TEXTS else key):
        raise InvalidTar(f"PAX record with a broken key: {key[:40]!r}")
    return key, value, end


def _check_map(numbers: list[int], size: int) -> None:
    """Regions must ascend without overlap and lie within the file."""
    before = 0
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if length < 0 or offset < before or offset + length > size:
            raise InvalidTar("sparse map with a region out of place")
        before = offset + length
    if size < 0:
        raise InvalidTar("sparse file of a negative size")
