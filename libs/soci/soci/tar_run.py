# SPDX-License-Identifier: Apache-2.0
"""Many tar headers read at once.

Nearly every header of a layer has the same form (`soci.tar_blocks`), and so have the extension headers before it:
PAX records, GNU long names. `read_run` walks over such members in a piece of the archive and reads their headers
together. It stops before the first member that is not quite of that form, and leaves it to `soci.tar_header`, which
knows every form there is; so it can only be faster, never different.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from soci.entries import BLOCK, TYPES
from soci.tar_blocks import GID, MAJOR, MINOR, MODE, MTIME, SIZE, UID, check, numbers, texts
from soci.tar_pax import MAX_PAYLOAD_BYTES, parse_records
from soci.tar_sayings import Parse, Sayings
from soci.times_bulk import format_times

if TYPE_CHECKING:
    from soci.tar_blocks import Numbers, Octets

MIN_RUN: Final = 16
"""Members that are worth reading together."""
MAX_EXTENSIONS: Final = 3
"""Extension headers before one member: records, a long name, a long link."""

_KINDS: Final = frozenset(b"0123456")
_EXTENSIONS: Final = frozenset(b"xLK")
_REGULAR: Final = ord("0")
_CODES: Final = bytes(TYPES.index(word) for word in ("reg", "hardlink", "symlink", "char", "block", "dir", "fifo"))


@dataclass(frozen=True, slots=True)
class Run:
    """Members in a row, a column a field; places are those of their own headers in the piece."""

    places: list[int]
    names: list[bytes]
    types: bytes
    sizes: array[int]
    links: list[bytes]
    modes: array[int]
    uids: array[int]
    gids: array[int]
    unames: list[bytes]
    gnames: list[bytes]
    times: list[bytes]
    majors: array[int]
    minors: array[int]
    pax: Mapping[int, Mapping[bytes, bytes]]  # of the members that have records, by their places in the columns


@dataclass(slots=True)
class _Walk:
    """What lies in a row, going by types and sizes alone."""

    places: list[int] = field(default_factory=list)  # of the members' own headers
    extensions: list[tuple[int, int, int]] = field(default_factory=list)  # the member's number, place, payload bytes


def read_run(piece: bytes, start: int, most: int, parse: Parse = parse_records) -> tuple[Run | None, int]:
    """The members in ``piece`` from ``start``, where a header begins, and how many members were looked at.

    At most ``most`` of them. The last one's data may reach beyond the piece. None where there are too few to be worth
    it (`MIN_RUN`), or the first member is of another form.
    """
    walk = _walk(piece, start, most)
    count = len(walk.places)
    if count < MIN_RUN:
        return None, count
    import numpy as np  # noqa: PLC0415

    heads = walk.places + [at for _, at, _ in walk.extensions]
    blocks = np.frombuffer(b"".join([piece[at : at + BLOCK] for at in heads]), np.uint8).reshape(-1, BLOCK)
    good, values = check(blocks)
    if not good.all():
        members = [*range(count), *(number for number, _, _ in walk.extensions)]
        count = min(members[at] for at in np.flatnonzero(~good).tolist())
    sayings = Sayings(piece, walk.extensions, count, parse)
    count = sayings.count
    run = _columns(walk.places[:count], blocks[:count], values[:count], sayings) if count else None
    return run, len(walk.places)


def _walk(piece: bytes, at: int, most: int) -> _Walk:
    walk = _Walk()
    before: list[tuple[int, int, int]] = []
    places, extensions = walk.places, walk.extensions
    last = len(piece) - BLOCK
    while at <= last and len(places) < most:
        kind = piece[at + 156]
        size = 0
        if kind == _REGULAR or kind in _EXTENSIONS:
            try:
                size = int(piece[at + 124 : at + 135], 8)
            except ValueError:
                break
            if size < 0:
                break  # "-1" is no digits: `check` would not let it pass
        elif kind not in _KINDS:
            break
        if kind in _EXTENSIONS:
            if size > MAX_PAYLOAD_BYTES or at + BLOCK + size > len(piece) or len(before) == MAX_EXTENSIONS:
                break
            before.append((len(places), at, size))
        else:
            places.append(at)
            if before:
                extensions += before
                before.clear()
        at += BLOCK + (size + 511 & -512)
    return walk


def _columns(places: list[int], blocks: Octets, values: Numbers, sayings: Sayings) -> Run | None:
    import numpy as np  # noqa: PLC0415

    names, links = texts(blocks, 0, 100), texts(blocks, 157, 257)
    unames, gnames = texts(blocks, 265, 297), texts(blocks, 297, 329)
    prefixed = np.flatnonzero(blocks[:, 345]).tolist()
    prefixes = texts(blocks[prefixed], 345, 500) if prefixed else []
    if any(b"\0" in b"".join(found) for found in (names, links, unames, gnames, prefixes)):
        return None  # something stands behind a text's end
    for at, prefix in zip(prefixed, prefixes, strict=True):
        names[at] = prefix + b"/" + names[at]
    columns = (names, sayings.names), (links, sayings.links), (unames, sayings.unames), (gnames, sayings.gnames)
    for found, said in columns:
        for at, text in said.items():
            found[at] = text
    if sayings.owners or sayings.moments:
        values = values.copy()
    for (at, column), owner in sayings.owners.items():
        values[at, column] = owner
    moments = sayings.moments
    if moments:
        values[list(moments), MTIME] = [seconds for seconds, _ in moments.values()]
    times = format_times(values[:, MTIME])
    for at, (_, fraction) in moments.items():
        if fraction:
            times[at] = b"%b.%bZ" % (times[at][:-1], fraction)
    return Run(
        places, names, np.frombuffer(_CODES, np.uint8)[blocks[:, 156] - _REGULAR].tobytes(), numbers(values, SIZE),
        links, numbers(values, MODE), numbers(values, UID, "I"), numbers(values, GID, "I"), unames, gnames, times,
        numbers(values, MAJOR), numbers(values, MINOR), sayings.pax,
    )  # fmt: skip
