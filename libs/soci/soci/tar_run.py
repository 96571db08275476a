# SPDX-License-Identifier: Apache-2.0
"""Many plain tar headers read at once.

Nearly every header of a layer has the same form: USTAR or GNU, numbers in zero-padded octal, no extension before it.
`read_run` walks over such members in a piece of the archive and reads their headers together. It stops before the
first header that is not quite of that form, and leaves it to `soci.tar_header`, which knows every form there is;
so it can only be faster, never different.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from soci.entries import BLOCK, TYPES
from soci.times_bulk import format_times

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Octets = NDArray[np.uint8]

MIN_RUN: Final = 16
"""Headers that are worth reading together."""

_KINDS: Final = frozenset(b"0123456")
_REGULAR: Final = ord("0")
_CODES: Final = bytes(TYPES.index(word) for word in ("reg", "hardlink", "symlink", "char", "block", "dir", "fifo"))
# Number fields: first byte and digits. Behind the digits a NUL or a space (two behind the checksum's).
_NUMBERS: Final = ((100, 7), (108, 7), (116, 7), (124, 11), (136, 11), (148, 6), (329, 7), (337, 7))
_MODE, _UID, _GID, _SIZE, _MTIME, _CHECKSUM, _MAJOR, _MINOR = range(len(_NUMBERS))
_PARTS: Final = ((100, 156), (329, 345))  # where the number fields lie, side by side
_DEVICES: Final = ((329, 56), (337, 64))  # the fields that may be empty, and their places in the parts
_DIGIT: Final = 1
_END: Final = 2
_CLASSES: Final = bytes(_DIGIT if chr(c) in "01234567" else _END if c in b"\0 " else 0 for c in range(256))


@dataclass(frozen=True, slots=True)
class Run:
    """Members in a row, a column a field; places are those of their headers in the piece."""

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


def read_run(piece: bytes, start: int, most: int) -> tuple[Run | None, int]:
    """The members in ``piece`` from ``start``, where a header begins, and how many headers were looked at.

    At most ``most`` of them. The last one's data may reach beyond the piece. None where there are too few to be worth
    it (`MIN_RUN`), or the first header is of another form.
    """
    places = _walk(piece, start, most)
    if len(places) < MIN_RUN:
        return None, len(places)
    import numpy as np  # noqa: PLC0415

    blocks = np.frombuffer(b"".join([piece[at : at + BLOCK] for at in places]), np.uint8).reshape(-1, BLOCK)
    good, values = _check(blocks)
    count = len(places) if good.all() else int(good.argmin())
    run = _columns(places[:count], blocks[:count], values[:count]) if count else None
    return run, len(places)


def _walk(piece: bytes, at: int, most: int) -> list[int]:
    """Where the headers of plain members begin, going by their types and sizes alone."""
    places: list[int] = []
    last = len(piece) - BLOCK
    while at <= last and len(places) < most:
        kind = piece[at + 156]
        if kind not in _KINDS:
            break
        places.append(at)
        at += BLOCK
        if kind == _REGULAR:
            try:
                size = int(piece[at - 388 : at - 377], 8)  # the size field's digits
            except ValueError:
                places.pop()
                break
            if size < 0:
                break  # "-1" is no digits: `_check` will not let it pass
            at += size + 511 & -512
    return places


def _check(blocks: Octets) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which headers are of the plain form, and the numbers in them (nonsense in the others)."""
    import numpy as np  # noqa: PLC0415

    weights, wanted = _weights()
    fields = np.concatenate([blocks[:, start:end] for start, end in _PARTS], axis=1)
    for field, column in _DEVICES:  # GNU tar leaves these empty where they mean nothing
        empty = ~blocks[:, field : field + 8].any(axis=1)
        fields[empty, column : column + 7] = ord("0")
    good = ((np.frombuffer(_CLASSES, np.uint8)[fields] & wanted) != 0).all(axis=1)
    values = ((fields - np.uint8(ord("0"))).astype(np.float64) @ weights).astype(np.int64)  # below 2**33: exact
    good &= _sums(blocks) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ") == values[:, _CHECKSUM]

    magic = blocks[:, 257:265]
    ustar = (magic[:, :6] == np.frombuffer(b"ustar\0", np.uint8)).all(axis=1)
    ustar &= (blocks[:, 508:512] != np.frombuffer(b"tar\0", np.uint8)).any(axis=1)  # else STAR
    gnu = (magic == np.frombuffer(b"ustar  \0", np.uint8)).all(axis=1)
    gnu &= (blocks[:, 345] == 0) & (blocks[:, 357] == 0)  # no times, in the prefix's place
    return good & (ustar | gnu), values


@cache
def _weights() -> tuple[NDArray[np.float64], Octets]:
    """What each byte of the number fields counts for in each number, and of which class it must be."""
    import numpy as np  # noqa: PLC0415

    columns = [at for start, end in _PARTS for at in range(start, end)]
    weights = np.zeros((len(columns), len(_NUMBERS)))
    wanted = np.full(len(columns), _END, np.uint8)
    for number, (first, count) in enumerate(_NUMBERS):
        at = columns.index(first)
        weights[at : at + count, number] = 8.0 ** np.arange(count - 1, -1, -1)
        wanted[at : at + count] = _DIGIT
    return weights, wanted


def _sums(blocks: Octets) -> NDArray[np.int64]:
    """The sum of each block's bytes, eight bytes at a time: four 16-bit sums of at most 64 pairs in each word."""
    import numpy as np  # noqa: PLC0415

    words, low = blocks.view("<u8"), np.uint64(0x00FF00FF00FF00FF)
    pairs = ((words & low) + (words >> np.uint64(8) & low)).sum(axis=1, dtype=np.uint64)
    lanes = [(pairs >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    sums: NDArray[np.int64] = np.add.reduce(lanes).astype(np.int64)
    return sums


def _columns(places: list[int], blocks: Octets, values: NDArray[np.int64]) -> Run | None:
    import numpy as np  # noqa: PLC0415

    names, links = _texts(blocks, 0, 100), _texts(blocks, 157, 257)
    unames, gnames = _texts(blocks, 265, 297), _texts(blocks, 297, 329)
    prefixed = np.flatnonzero(blocks[:, 345]).tolist()
    prefixes = _texts(blocks[prefixed], 345, 500) if prefixed else []
    if any(b"\0" in b"".join(texts) for texts in (names, links, unames, gnames, prefixes)):
        return None  # something stands behind a text's end
    for at, prefix in zip(prefixed, prefixes, strict=True):
        names[at] = prefix + b"/" + names[at]
    return Run(
        places, names, np.frombuffer(_CODES, np.uint8)[blocks[:, 156] - _REGULAR].tobytes(), _array(values, _SIZE),
        links, _array(values, _MODE), _array(values, _UID, "I"), _array(values, _GID, "I"), unames, gnames,
        format_times(values[:, _MTIME]), _array(values, _MAJOR), _array(values, _MINOR),
    )  # fmt: skip


def _texts(blocks: Octets, start: int, end: int) -> list[bytes]:
    """A text field of each block, without the NULs at its end."""
    found: list[bytes] = blocks[:, start:end].copy().view(f"S{end - start}").ravel().tolist()
    return found


def _array(values: NDArray[np.int64], column: int, code: str = "q") -> array[int]:
    found = array(code)
    found.frombytes(values[:, column].astype({"q": "<i8", "I": "<u4"}[code]).tobytes())
    return found
