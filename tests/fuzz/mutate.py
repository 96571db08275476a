# SPDX-License-Identifier: Apache-2.0
"""Changes bytes in the ways that break parsers: numbers at their limits, pieces lost, doubled and swapped."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

MAX_BYTES = 1 << 18
NUMBERS = [
    0,
    1,
    3,
    4,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    1 << 20,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 64) - 1,
]
WORDS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 400, b"[" * 2000,
    b'{"a":' * 500, b'"\\ud800"', b"\xff", b"\0", b"\\", b"/", b"..", b"@", b"@sha256:", b"%2f", b"\xc3\xa9", b"\n",
    b"11 path=a\n", b"GNU.sparse.major=1\n", b"0000777\0", b"\x80\xff\xff", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd",
]  # fmt: skip


def mutate(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of ``seeds``, changed in one to five places."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        _once(data, seeds, rng)
    return bytes(data[:MAX_BYTES])


def _once(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    at = _place(data, rng)
    kind = rng.randrange(9)
    if kind == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and data:
        data[at] = rng.randrange(256)
    elif kind in (2, 3):
        width = rng.choice((2, 4, 4, 8))
        number = (rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1))) % (1 << 8 * width)
        data[at : at + width] = struct.pack("<Q", number)[:width]
    elif kind == 4:
        del data[at : at + rng.choice((1, 2, 16, 512, 5000))]
    elif kind == 5:
        length = rng.choice((1, 8, 64, 512))
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 20))
    elif kind == 6:
        data[at:at] = rng.choice(WORDS)
    elif kind == 7:
        other = rng.choice(seeds)
        begin = rng.randrange(len(other) + 1)
        data[at:] = other[begin:]
    else:
        word = rng.choice(WORDS)
        data[at : at + len(word)] = word


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, but rather near the start or the end, where a format says what follows."""
    if not data:
        return 0
    return (
        min(
            rng.randrange(len(data)),
            *([rng.randrange(600)] if rng.random() < 0.4 else []),
            len(data) - 1,
        )
        if rng.random() < 0.7
        else max(0, len(data) - 1 - rng.randrange(3000))
    )
