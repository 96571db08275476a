# SPDX-License-Identifier: Apache-2.0
"""Writing FlatBuffers as the stock builder does, byte for byte, at many times its speed.

The format is written from its end to its front: what is made last comes first. An object is named by its *mark*, the
distance from its first byte to the buffer's end. A table's layout depends on which fields are there and on the
alignment at which it begins, so it is compiled once for each such pair and is one `struct` call from then on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from soci.errors import LimitExceeded

OBJECT: Final = "I"
"""The code of a field that points to a string, a vector or a table."""

_UINT32: Final = struct.Struct("<I")
_ENDS: Final = (b"\0\0\0\0", b"\0\0\0", b"\0\0", b"\0")  # of a string, by its length modulo 4: a NUL, then padding


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table looks that begins at one alignment and has certain fields."""

    pack: Any  # of the offset to the vtable, then the present fields from the last added to the first
    pick: Any  # the present ones of all fields in that same order, the offset to the vtable before them
    places: tuple[int, ...]  # of all fields in the order they are added: bytes from the mark before the table, or 0
    length: int  # bytes, padding behind its last field included
    vtable: bytes
    align: int  # bytes: of its widest field


def layout(fields: Sequence[tuple[int, str]], present: Sequence[bool], state: int) -> Layout:
    """Lay out a table of ``fields`` (slot, `struct` code), in the order they are added.

    ``state`` is the mark, modulo 8, of what was written before.
    """
    at, places, form, align = state, [], "", 4
    slots = [0] * (1 + max(slot for slot, _ in fields))
    for (slot, code), there in zip(fields, present, strict=True):
        if there:
            width = struct.calcsize("<" + code)
            padding = -at % width
            at += padding + width
            slots[slot] = at
            align = max(align, width)
            form = f"{code}{padding}x{form}" if padding else code + form
        places.append(at - state if there else 0)
    padding = -at % 4
    at += padding + 4
    form = f"<i{padding}x{form}" if padding else "<i" + form
    while slots and not slots[-1]:
        slots.pop()
    words = [2 * len(slots) + 4, at - state, *(at - place if place else 0 for place in slots)]
    chosen = [0] + [len(fields) - number for number in reversed(range(len(fields))) if present[number]]
    pick = itemgetter(*chosen) if len(chosen) > 1 else itemgetter(slice(0, 1))
    return Layout(
        struct.Struct(form).pack, pick, tuple(places), at - state, struct.pack(f"<{len(words)}H", *words), align
    )


def text(raw: bytes) -> bytes:
    """A string as it stands in the buffer, where what was written before it ends at a multiple of 4."""
    return _UINT32.pack(len(raw)) + raw + _ENDS[len(raw) & 3]


class Writer:
    """A buffer that is being written, of at most ``limit`` bytes (`LimitExceeded`, which names ``setting``)."""

    def __init__(self, limit: int, setting: str) -> None:
        self.mark = 0  # bytes written so far
        self.align = 4  # bytes: of the widest field so far
        self.vtables: dict[bytes, int] = {}  # marks of those that are there
        self._pieces: list[bytes] = []
        self._limit = limit
        self._setting = setting

    def put(self, piece: bytes) -> int:
        """Write ``piece`` before what is there; its mark. Alignment is the caller's business."""
        self._pieces.append(piece)
        self.mark += len(piece)
        if self.mark > self._limit:
            raise LimitExceeded(f"zTOC of more than {self._limit} bytes ({self._setting})")
        return self.mark

    def string(self, raw: bytes) -> int:
        """Write a string."""
        return self._sized(raw, b"\0")

    def blob(self, raw: bytes) -> int:
        """Write a vector of bytes."""
        return self._sized(raw, b"")

    def vector(self, marks: Sequence[int]) -> int:
        """Write a vector of offsets to objects, in the order of ``marks``."""
        padding = -self.mark % 4
        at = self.mark + padding + 4 * len(marks)
        offsets = [at - 4 * number - mark for number, mark in enumerate(marks)]
        return self.put(struct.pack(f"<I{len(marks)}I", len(marks), *offsets) + bytes(padding))

    def table(self, fields: Sequence[tuple[int, str]], values: Sequence[int]) -> int:
        """Write a table; ``values`` beside ``fields``, the marks of objects among them; 0 leaves a field out."""
        base = self.mark
        made = layout(fields, [bool(value) for value in values], base % 8)
        self.align = max(self.align, made.align)
        words = [
            base + place - value if code == OBJECT and value else value
            for (_, code), value, place in zip(fields, values, made.places, strict=True)
        ]
        mark = base + made.length
        self.put(made.pack(*made.pick((self.vtable(made.vtable, mark), *reversed(words)))))
        self.put_vtable(made.vtable)
        return mark

    def vtable(self, vtable: bytes, mark: int) -> int:
        """What a table at ``mark`` says of where its vtable is, or will be once `put_vtable` has written it."""
        return self.vtables.get(vtable, mark + len(vtable)) - mark

    def put_vtable(self, vtable: bytes) -> None:
        """Write a vtable right before its first table, unless the buffer has the same already."""
        if vtable not in self.vtables:
            self.vtables[vtable] = self.put(vtable)

    def finish(self, root: int) -> bytes:
        """The whole buffer, whose root table is at mark ``root``, aligned as its widest field is."""
        padding = -(self.mark + 4) % self.align
        self.put(_UINT32.pack(self.mark + padding + 4 - root) + bytes(padding))
        self._pieces.reverse()
        return b"".join(self._pieces)

    def _sized(self, raw: bytes, end: bytes) -> int:
        padding = -(self.mark + len(raw) + len(end)) % 4
        return self.put(b"".join((_UINT32.pack(len(raw)), raw, end, bytes(padding))))
