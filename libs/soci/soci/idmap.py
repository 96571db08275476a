# SPDX-License-Identifier: Apache-2.0
"""Which owner of the host stands for which owner of a container with a user namespace: the pure part of it.

An image's files belong to the container's numbers; on the host they must be shown as owned by the numbers that the
user namespace gives these. A map is a list of extents ``(container id, host id, length)``, as in
``/proc/<pid>/uid_map`` and in the label ``<container id>:<host id>:<length>[,…]``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from soci.errors import InvalidInput

Extent = tuple[int, int, int]

NO_ID = (1 << 32) - 1
"""The one number that is nobody's: the kernel knows it as the invalid owner, and shows 65534 in its place. Nobody on
the host can be it, whereas a real "nobody" of 65534 may have processes, or be in a container's map himself."""
MAX_EXTENTS = 340
"""Extents of one map: what the kernel takes."""
ID_DIGITS = 10
"""Digits of the largest number of 32 bits."""


@dataclass(frozen=True, slots=True)
class IdMap:
    """A map of users, or of groups. Made by `of` and `parse_id_map`, which check it."""

    extents: tuple[Extent, ...]  # sorted by container id, none overlapping
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(inside for inside, _, _ in self.extents))

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> IdMap:
        """A checked map: `InvalidInput` for none or too many extents, empty or overlapping ones, ids beyond 32 bits."""
        found = tuple(sorted(extents))
        if not 0 < len(found) <= MAX_EXTENTS:
            raise InvalidInput(f"{len(found)} extents; a map has 1 to {MAX_EXTENTS} (MAX_EXTENTS)")
        for inside, outside, length in found:
            if length <= 0 or inside < 0 or outside < 0 or max(inside, outside) + length > NO_ID:
                raise InvalidInput(f"{inside}:{outside}:{length} is not a range of ids below {NO_ID}")
        for side, what in ((0, "container"), (1, "host")):
            ranges = sorted((extent[side], extent[side] + extent[2]) for extent in found)
            for (_, end), (start, _) in pairwise(ranges):
                if start < end:
                    raise InvalidInput(f"{what} id {start} is mapped twice")
        return cls(found)

    def host(self, inside: int) -> int:
        """The host's number for the container's; `NO_ID` where it has none."""
        place = bisect_right(self._starts, inside) - 1
        if place < 0:
            return NO_ID
        start, outside, length = self.extents[place]
        return outside + inside - start if inside - start < length else NO_ID

    def has_host(self, outside: int) -> bool:
        """Does this number of the host stand for one of the container?"""
        return any(0 <= outside - start < length for _, start, length in self.extents)

    def text(self, between: str = ":", after: str = ",") -> str:
        """The extents as text: as in a label, or, with a blank and a line feed, as the kernel wants them."""
        return after.join(between.join(map(str, extent)) for extent in self.extents)


def parse_id_map(text: str) -> IdMap:
    """The map in ``<container id>:<host id>:<length>[,…]``; raises `InvalidInput`."""
    parts = text.split(",")
    if len(parts) > MAX_EXTENTS:
        raise InvalidInput(f"{len(parts)} extents; a map has 1 to {MAX_EXTENTS} (MAX_EXTENTS)")
    return IdMap.of(_extent(part) for part in parts)


def _extent(text: str) -> Extent:
    numbers = text.split(":")
    if len(numbers) != 3 or not all(
        number.isascii() and number.isdigit() and len(number) <= ID_DIGITS for number in numbers
    ):
        raise InvalidInput(f"{text[:80]!r} is not <container id>:<host id>:<length>")
    inside, outside, length = map(int, numbers)
    return inside, outside, length
