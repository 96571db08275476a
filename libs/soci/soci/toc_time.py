# SPDX-License-Identifier: Apache-2.0
"""Times of tar members, as a zTOC writes them: RFC 3339 text to nanoseconds.

`datetime` is no help: it knows neither nanoseconds nor the year 0, and both occur in layers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

NS: Final = 1_000_000_000
ZERO_INSTANT_NS: Final = -62_135_596_800 * NS
"""0001-01-01T00:00:00Z, what a zTOC's reader shows for a time that does not parse. It needs more than 64 bits."""

_FORM = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII)
_DAYS_TO_EPOCH: Final = 719_162  # days from 0001-01-01 to 1970-01-01
_DAYS_IN_MONTH: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_DAYS_BEFORE_MONTH: Final = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_DATE_CACHE_ENTRIES: Final = 1024  # a layer's members share few dates


def parse_rfc3339_ns(text: str) -> int:
    """Nanoseconds since 1970-01-01T00:00:00Z of an RFC 3339 time (§5.6) in the years 0000 to 9999.

    Takes up to nine fraction digits and any offset up to 24 hours. Text of another form, and a moment that no
    calendar has (30 February, second 60), is `ZERO_INSTANT_NS`: a strange time must not cost a container its layer.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        return ZERO_INSTANT_NS
    date, hour, minute, second, fraction, sign, offset_hours, offset_minutes = found.groups()
    days = _days_since_epoch(date)
    hours, minutes, seconds = int(hour), int(minute), int(second)
    if days is None or hours > 23 or minutes > 59 or seconds > 59:
        return ZERO_INSTANT_NS
    moment = days * 86_400 + hours * 3_600 + minutes * 60 + seconds
    if sign:
        ahead = int(offset_hours) * 3_600 + int(offset_minutes) * 60
        if ahead > 86_400 or int(offset_minutes) > 59:
            return ZERO_INSTANT_NS
        moment -= ahead if sign == "+" else -ahead
    return moment * NS + (int(fraction.ljust(9, "0")) if fraction else 0)


@lru_cache(maxsize=_DATE_CACHE_ENTRIES)
def _days_since_epoch(date: str) -> int | None:
    """Days from 1970-01-01 to ``YYYY-MM-DD`` in the proleptic Gregorian calendar; None where there is no such day."""
    year, month, day = int(date[:4]), int(date[5:7]), int(date[8:])
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if not 1 <= month <= 12 or not 1 <= day <= _DAYS_IN_MONTH[month - 1] + (leap and month == 2):
        return None
    past = year - 1  # whole years since year 1; -1 for year 0, where floor division still counts right
    days = past * 365 + past // 4 - past // 100 + past // 400
    return days + _DAYS_BEFORE_MONTH[month - 1] + (leap and month > 2) + day - 1 - _DAYS_TO_EPOCH
