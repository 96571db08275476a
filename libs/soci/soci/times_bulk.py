# SPDX-License-Identifier: Apache-2.0
"""The times of all members of a layer at once, to and from their RFC 3339 text, by `soci.toc_time`'s rules."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from soci.entries import Slices
from soci.toc_time import NS, parse_rfc3339_ns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

TEXT_BYTES: Final = 20
"""Bytes of a time in UTC without a fraction."""

_SHORTEST: Final = 20
_LONGEST: Final = 30  # nine digits of fraction
_PATTERN: Final = b"dddd-dd-ddTdd:dd:dd"  # d: a digit
_DIGITS: Final = ((0, 4), (5, 2), (8, 2), (11, 2), (14, 2), (17, 2))
_PAIRS: Final = (0, 2, 5, 8, 11, 14, 17)
_DAY: Final = 86_400
_ERA_DAYS: Final = 146_097  # of 400 years, after which the calendar repeats
_DAYS_TO_EPOCH: Final = 719_468  # from 0000-03-01, with which the years of the arithmetic begin


def parse_times(texts: Slices) -> tuple[Numbers, Numbers]:
    """Whole seconds and nanoseconds since the epoch of each text, 0 and 0 for what is before it or no time at all.

    In two columns, because the year 9999 does not fit into 64 bits of nanoseconds.
    """
    import numpy as np  # noqa: PLC0415

    octets = np.frombuffer(texts.data, np.uint8)
    starts = np.frombuffer(texts.starts, np.int64)
    lengths = np.frombuffer(texts.ends, np.int64) - starts
    seconds, fractions = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    done = np.zeros(len(starts), np.bool_)
    for length in range(_SHORTEST, _LONGEST + 1):
        rows = np.flatnonzero(lengths == length)
        if len(rows) and length != _SHORTEST + 1:  # a point needs a digit behind it
            good, whole, rest = _utc(octets, starts[rows], length)
            rows = rows[good]
            seconds[rows], fractions[rows], done[rows] = whole[good], rest[good], True
    for row in np.flatnonzero(~done).tolist():  # other forms: offsets, and what is no time
        moment = max(0, parse_rfc3339_ns(texts[row].decode("utf-8", "surrogateescape")))
        seconds[row], fractions[row] = divmod(moment, NS)
    fractions[seconds < 0] = 0
    return np.maximum(seconds, 0), fractions


def _utc(octets: NDArray[np.uint8], starts: Numbers, length: int) -> tuple[NDArray[np.bool_], Numbers, Numbers]:
    """Which of the texts of ``length`` bytes at ``starts`` are times that end in ``Z``; their seconds and ns."""
    import numpy as np  # noqa: PLC0415

    good = octets[starts + length - 1] == ord("Z")
    fraction = length - _SHORTEST - 1  # digits
    pattern = _PATTERN + (b"." + b"d" * fraction if fraction > 0 else b"")
    digits: dict[int, Numbers] = {}
    for at, wanted in enumerate(pattern):
        octet = octets[starts + at].astype(np.int64)
        if wanted == ord("d"):
            digits[at] = octet - ord("0")
            good &= (digits[at] >= 0) & (digits[at] <= 9)
        else:
            good &= octet == wanted

    def number(first: int, count: int) -> Numbers:
        found = digits[first]
        for at in range(first + 1, first + count):
            found = found * 10 + digits[at]
        return found

    year, month, day, hour, minute, second = (number(*field) for field in _DIGITS)
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    last = np.array((0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31))[np.clip(month, 0, 12)] + (leap & (month == 2))
    good &= (month >= 1) & (month <= 12) & (day >= 1) & (day <= last)
    good &= (hour <= 23) & (minute <= 59) & (second <= 59)
    # Days by a year that begins in March: then the leap day is the last one.
    shifted = year - (month <= 2)
    days = shifted * 365 + shifted // 4 - shifted // 100 + shifted // 400
    days += (153 * ((month + 9) % 12) + 2) // 5 + day - 1 - _DAYS_TO_EPOCH
    rest = number(20, fraction) * 10 ** (9 - fraction) if fraction > 0 else np.zeros(len(starts), np.int64)
    return good, days * _DAY + hour * 3600 + minute * 60 + second, rest


def format_times(seconds: Numbers) -> list[bytes]:
    """RFC 3339 text in UTC of each moment, which must be of the years 1970 to 9999."""
    import numpy as np  # noqa: PLC0415

    days, rest = np.divmod(seconds, _DAY)
    days = days + _DAYS_TO_EPOCH
    era, day = np.divmod(days, _ERA_DAYS)
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    day = day - (365 * year + year // 4 - year // 100)
    month = (5 * day + 2) // 153
    day = day - (153 * month + 2) // 5 + 1
    year = year + 400 * era + (month >= 10)
    month = (month + 2) % 12 + 1
    text = np.empty((len(seconds), TEXT_BYTES), np.uint8)
    text[:] = np.frombuffer(b"0000-00-00T00:00:00Z", np.uint8)
    century, year = np.divmod(year, 100)
    parts = (century, year, month, day, rest // 3600, rest // 60 % 60, rest % 60)
    pairs = _pairs()
    for first, value in zip(_PAIRS, parts, strict=True):
        text[:, first : first + 2] = pairs[value]
    found: list[bytes] = text.view(f"S{TEXT_BYTES}").ravel().tolist()
    return found


@cache
def _pairs() -> NDArray[np.uint8]:
    """The two digits of each number below 100."""
    import numpy as np  # noqa: PLC0415

    return np.frombuffer(b"".join(b"%02d" % number for number in range(100)), np.uint8).reshape(100, 2)
