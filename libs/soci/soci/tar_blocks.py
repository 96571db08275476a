# SPDX-License-Identifier: Apache-2.0
"""Many header blocks of a tar looked at together: which are of the plain form, and what their fields hold.

Plain is the form that nearly every header has: USTAR or GNU, numbers in zero-padded octal, the checksum of unsigned
bytes. What is of another form is for `soci.tar_header`, which knows every form there is.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Octets = NDArray[np.uint8]
    Numbers = NDArray[np.int64]

# Number fields: first byte and digits. Behind the digits a NUL or a space (two behind the checksum's).
_NUMBERS: Final = ((100, 7), (108, 7), (116, 7), (124, 11), (136, 11), (148, 6), (329, 7), (337, 7))
MODE, UID, GID, SIZE, MTIME, CHECKSUM, MAJOR, MINOR = range(len(_NUMBERS))
_PARTS: Final = ((100, 156), (329, 345))  # where the number fields lie, side by side
_DEVICES: Final = ((329, 56), (337, 64))  # the fields that may be empty, and their places in the parts
_MAGIC: Final = 257
_TRAILER: Final = 508
_USTAR: Final = int.from_bytes(b"ustar\0", "little")
_GNU: Final = int.from_bytes(b"ustar  \0", "little")
_STAR: Final = int.from_bytes(b"tar\0", "little")
_ODD: Final = 0x00FF00FF00FF00FF  # every other byte of a word
_EVEN: Final = 0x0000FFFF0000FFFF  # every other pair of them


def check(blocks: Octets) -> tuple[NDArray[np.bool_], Numbers]:
    """Which of ``blocks`` (n, 512) are plain headers, and the numbers in them (n, 8), nonsense in the others."""
    import numpy as np  # noqa: PLC0415

    weights, base, spare = _weights()
    fields = np.concatenate([blocks[:, start:end] for start, end in _PARTS], axis=1)
    for field, column in _DEVICES:  # GNU tar leaves these empty where they mean nothing
        fields[_words(blocks, field) == 0, column : column + 7] = ord("0")
    good = ~((fields ^ base) & ~spare).view("<u8").any(axis=1)
    values = ((fields - np.uint8(ord("0"))).astype(np.float64) @ weights).astype(np.int64)  # below 2**33: exact
    good &= _sums(blocks) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ") == values[:, CHECKSUM]

    magic = _words(blocks, _MAGIC)
    ustar = magic & np.uint64((1 << 48) - 1) == _USTAR
    ustar &= blocks[:, _TRAILER : _TRAILER + 4].copy().view("<u4").ravel() != _STAR
    gnu = (magic == _GNU) & (blocks[:, 345] == 0) & (blocks[:, 357] == 0)  # no times, in the prefix's place
    return good & (ustar | gnu), values


def texts(blocks: Octets, start: int, end: int) -> list[bytes]:
    """A text field of each block, without the NULs at its end."""
    found: list[bytes] = blocks[:, start:end].copy().view(f"S{end - start}").ravel().tolist()
    return found


def numbers(values: Numbers, column: int, code: str = "q") -> array[int]:
    """A column of `check`'s numbers as an array of int64, or with ``code`` "I" of uint32."""
    found = array(code)
    found.frombytes(values[:, column].astype({"q": "<i8", "I": "<u4"}[code]).tobytes())
    return found


@cache
def _weights() -> tuple[NDArray[np.float64], Octets, Octets]:
    """What each byte of the number fields counts for in each number; what it must be, and the bits that are free."""
    import numpy as np  # noqa: PLC0415

    columns = [at for start, end in _PARTS for at in range(start, end)]
    weights = np.zeros((len(columns), len(_NUMBERS)))
    # Behind the digits a NUL or a space.
    base, spare = np.zeros(len(columns), np.uint8), np.full(len(columns), ord(" "), np.uint8)
    for number, (first, count) in enumerate(_NUMBERS):
        at = columns.index(first)
        weights[at : at + count, number] = 8.0 ** np.arange(count - 1, -1, -1)
        base[at : at + count], spare[at : at + count] = ord("0"), 7
    return weights, base, spare


def _words(blocks: Octets, start: int) -> NDArray[np.uint64]:
    """The eight bytes from ``start`` of each block, as one number."""
    found: NDArray[np.uint64] = blocks[:, start : start + 8].copy().view("<u8").ravel()
    return found


def _sums(blocks: Octets) -> Numbers:
    """The sum of each block's bytes, eight bytes at a time: four 16-bit sums of at most 64 pairs in each word."""
    import numpy as np  # noqa: PLC0415

    words = blocks.view("<u8")
    pairs = words >> np.uint64(8)
    pairs &= np.uint64(_ODD)
    pairs += words & np.uint64(_ODD)
    lanes = pairs.sum(axis=1, dtype=np.uint64)
    # Together the lanes may be more than 16 bits hold, two by two they are not more than 32 bits hold.
    halves = (lanes & np.uint64(_EVEN)) + (lanes >> np.uint64(16) & np.uint64(_EVEN))
    sums: Numbers = ((halves >> np.uint64(32)) + (halves & np.uint64(0xFFFFFFFF))).astype(np.int64)
    return sums
