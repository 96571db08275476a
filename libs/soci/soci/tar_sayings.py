# SPDX-License-Identifier: Apache-2.0
"""What the extension headers of many members say, read together: PAX records, GNU long names and long links.

The rules are those of `soci.tar_header`. Whatever is not of a form that is read here (a record that changes where data
lies, a sparse file, a time before 1970, a broken record) ends the run before its member. Layers that have records have
them on nearly every member and with the same keys, so what the keys ask for is found out once, and times are looked
at all together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from soci import tar_pax
from soci.entries import BLOCK
from soci.errors import InvalidTar
from soci.tar_blocks import GID, UID

_RECORDS: Final = ord("x")
_LONG_NAME: Final = ord("L")
_WORD: Final = 1 << 32
_SPARSE: Final = b"GNU.sparse."
_OWNERS: Final = ((b"uid", UID), (b"gid", GID))
_TEXTS: Final = (b"path", b"linkpath", b"uname", b"gname")
_TIMES: Final = (b"mtime", b"atime", b"ctime")
_TIME: Final = rb"[0-9]{1,11}(?:\.[0-9]*)?"  # eleven digits of seconds: the year 5138
_A_TIME: Final = re.compile(_TIME).fullmatch
_ALL_TIMES: Final = re.compile(rb"%b(?:\n%b)*" % (_TIME, _TIME)).fullmatch
_PLACES: Final = 9  # digits of nanoseconds; what is behind them is dropped

Parse = Callable[[bytes], Mapping[bytes, bytes]]
"""Takes the payload of an ``x`` header, gives its records or raises `InvalidTar`."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What records with certain keys ask for."""

    possible: bool  # whether they are of a form that is read here
    acting: bool  # whether some put a text or an owner in the place of the header's
    mtime: bool
    times: tuple[bytes, ...]  # keys of the other times


class Sayings:
    """What is said of the first ``count`` members, by their numbers; ``count`` becomes less where a run must end."""

    def __init__(self, piece: bytes, extensions: list[tuple[int, int, int]], count: int, parse: Parse) -> None:
        """``extensions``: number of the member, place of the header in ``piece``, bytes of its payload; ascending."""
        self.count = count
        self.names: dict[int, bytes] = {}
        self.links: dict[int, bytes] = {}
        self.unames: dict[int, bytes] = {}
        self.gnames: dict[int, bytes] = {}
        self.owners: dict[tuple[int, int], int] = {}  # by member and column of `soci.tar_blocks.check`
        self.moments: dict[int, tuple[int, bytes]] = {}  # of modification: seconds, and the fraction's digits
        self.pax: dict[int, Mapping[bytes, bytes]] = {}
        if not extensions:
            return
        long_names: dict[int, bytes] = {}
        long_links: dict[int, bytes] = {}
        self._read(piece, extensions, parse, long_names, long_links)
        self._act()
        # They go over records. An empty one says nothing.
        self.names.update((number, text) for number, text in long_names.items() if text)
        self.links.update((number, text) for number, text in long_links.items() if text)
        if self.count < count:
            self._cut()

    def _read(
        self,
        piece: bytes,
        extensions: list[tuple[int, int, int]],
        parse: Parse,
        long_names: dict[int, bytes],
        long_links: dict[int, bytes],
    ) -> None:
        pax, count = self.pax, self.count
        for number, place, size in extensions:
            if number >= count:
                break
            kind, payload = piece[place + 156], piece[place + BLOCK : place + BLOCK + size]
            if kind == _RECORDS:
                try:
                    pax[number] = parse(payload)
                except InvalidTar:
                    self.count = number
                    break
            else:
                (long_names if kind == _LONG_NAME else long_links)[number] = payload.partition(b"\0")[0]

    def _act(self) -> None:
        """Do what the records ask for."""
        plans: dict[tuple[bytes, ...], _Plan] = {}
        numbers: list[int] = []
        mtimes: list[bytes] = []
        others: list[bytes] = []
        for number, records in self.pax.items():
            keys = tuple(records)
            plan = plans.get(keys)
            if plan is None:
                plan = plans[keys] = _plan(keys)
            if not plan.possible:
                self.count = min(number, self.count)
                break
            if plan.acting and not self._replace(number, records):
                self.count = min(number, self.count)
                break
            if plan.mtime:
                numbers.append(number)
                mtimes.append(records[b"mtime"])
            if plan.times:
                others += map(records.__getitem__, plan.times)
        if not _all_times(mtimes + others):
            self._find_odd_time()
            within = sum(number < self.count for number in numbers)
            del numbers[within:], mtimes[within:]
        parts = [text.partition(b".") for text in mtimes]
        self.moments = {
            number: (int(seconds), fraction[:_PLACES].rstrip(b"0"))
            for number, (seconds, _, fraction) in zip(numbers, parts, strict=True)
        }

    def _replace(self, number: int, records: Mapping[bytes, bytes]) -> bool:
        """Note what goes in the place of the header's fields; whether all of it is of a form that is read here."""
        for key, column in zip(_TEXTS, (self.names, self.links, self.unames, self.gnames), strict=True):
            if text := records.get(key):
                column[number] = text
        try:
            for key, field in _OWNERS:
                if text := records.get(key):
                    self.owners[number, field] = tar_pax.parse_int(text) % _WORD
        except InvalidTar:
            return False
        return True

    def _find_odd_time(self) -> None:
        """End before the first member that has a time of another form."""
        for number, records in self.pax.items():
            if not all(_A_TIME(records[key]) for key in _TIMES if key in records):
                self.count = min(number, self.count)
                return

    def _cut(self) -> None:
        """Forget what is said of members that are not of the run."""
        for column in (self.names, self.links, self.unames, self.gnames, self.moments, self.pax):
            _keep(column, self.count)
        self.owners = {place: owner for place, owner in self.owners.items() if place[0] < self.count}


def _plan(keys: tuple[bytes, ...]) -> _Plan:
    sparse = any(key.startswith(_SPARSE) for key in keys)
    return _Plan(
        possible=bool(keys) and not sparse and b"size" not in keys,
        acting=any(key in keys for key in (*_TEXTS, *(key for key, _ in _OWNERS))),
        mtime=b"mtime" in keys,
        times=tuple(key for key in _TIMES[1:] if key in keys),
    )


def _all_times(texts: list[bytes]) -> bool:
    """Whether all ``texts`` are times of the form that is read here."""
    if not texts:
        return True
    joined = b"\n".join(texts)
    return joined.count(b"\n") == len(texts) - 1 and _ALL_TIMES(joined) is not None


def _keep(column: dict[int, Any], count: int) -> None:
    for number in [number for number in column if number >= count]:
        del column[number]
