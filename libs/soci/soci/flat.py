# SPDX-License-Identifier: Apache-2.0
"""Bounds-checked reading of FlatBuffers tables, without generated code.

A zTOC comes from a registry: every offset in it is a stranger's word. `FlatBuffer` checks each one against the
buffer and raises `InvalidZtoc`; it never raises anything else, reads outside the buffer or trusts a count before
it has compared it with the bytes that are there. Rows of a table type are read with one `struct` call, because a
large layer has tens of thousands of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

from soci.errors import InvalidZtoc

MAX_LAYOUTS: Final = 1024
"""Vtables remembered at a time. A real zTOC has a few dozen; one made to have millions must not cost memory."""

_UINT32: Final = struct.Struct("<I")
_INT32: Final = struct.Struct("<i")
_UINT16_PAIR: Final = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields of a table type in slot order.

    ``codes`` has one `struct` code a slot; ``I`` doubles as the code of an offset to a string, vector or table.
    ``defaults`` are the values of absent fields.
    """

    codes: str
    defaults: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What one vtable says: where in its tables the fields lie."""

    unpack: Callable[[bytes, int], tuple[int, ...]]
    pick: Callable[[tuple[int, ...]], tuple[int, ...]]  # slot order, with one spare value at the end
    defaults: tuple[int, ...]
    offsets: tuple[int, ...]  # of each slot from the table's start, 0 where the field is absent
    end: int  # of the last field


def schema(codes: str, **defaults_by_slot: int) -> Schema:
    """A `Schema`; defaults are 0 but for those given as ``slot_3=1``."""
    defaults = [0] * len(codes)
    for slot, value in defaults_by_slot.items():
        defaults[int(slot.removeprefix("slot_"))] = value
    return Schema(codes, tuple(defaults))


class FlatBuffer:
    """A FlatBuffers buffer that is being read.

    ``budget`` is what is left of the bytes that strings and byte vectors may still come to: no more than the
    buffer's own size in sum, so that offsets which point at the same bytes again and again cannot multiply memory.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.budget = self.size

    def uint32(self, at: int) -> int:
        """The unsigned 32-bit number at ``at``, which must not be negative."""
        if at + 4 > self.size:
            raise InvalidZtoc(f"cut short: offset {at} of {self.size} bytes")
        return int(_UINT32.unpack_from(self.data, at)[0])

    def root(self) -> int:
        """Position of the root table."""
        return self.uint32(0)

    def follow(self, at: int) -> int:
        """The position that the offset stored at ``at`` points to."""
        return at + self.uint32(at)

    def vector(self, at: int, width: int, name: str) -> tuple[int, int]:
        """First position and count of the vector at ``at``; its elements (``width`` bytes each) are all inside."""
        count = self.uint32(at)
        if count * width > self.size - at - 4:
            raise InvalidZtoc(f"cut short: {count} {name} do not fit in {self.size} bytes")
        return at + 4, count

    def bytes_at(self, at: int) -> bytes:
        """The string or byte vector at ``at``, taken from the budget."""
        start = at + 4
        if start > self.size:
            raise InvalidZtoc(f"cut short: offset {at} of {self.size} bytes")
        length = _UINT32.unpack_from(self.data, at)[0]
        end = start + length
        if end > self.size:
            raise InvalidZtoc(f"cut short: {length} bytes at {at} of {self.size}")
        self.spend(length)
        return self.data[start:end]

    def spend(self, count: int) -> None:
        """Take ``count`` bytes from the budget."""
        self.budget -= count
        if self.budget < 0:
            raise InvalidZtoc("it uses the same bytes over and over")


class Tables:
    """All tables of one type in a buffer."""

    def __init__(self, buffer: FlatBuffer, kind: Schema) -> None:
        self._buffer = buffer
        self._kind = kind
        self._layouts: dict[int, Layout] = {}  # by the vtable's position

    def row(self, table: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Values and field offsets of the table at ``table``, each in slot order (the values end with a spare one).

        The target of an offset field is ``table + offsets[slot] + values[slot]``; absent where the value is 0.
        """
        data = self._buffer.data
        if table + 4 > len(data):
            raise InvalidZtoc(f"cut short: table at {table} of {len(data)} bytes")
        vtable = table - _INT32.unpack_from(data, table)[0]
        layout = self._layouts.get(vtable) or self.layout(vtable)
        try:
            values = layout.unpack(data, table)
        except struct.error as error:
            raise InvalidZtoc(f"cut short: table at {table} of {len(data)} bytes") from error
        return layout.pick(values + layout.defaults), layout.offsets

    def target(self, table: int, slot: int, name: str) -> int:
        """Where the offset field ``slot`` points; `InvalidZtoc` where it is absent."""
        values, offsets = self.row(table)
        if not values[slot]:
            raise InvalidZtoc(f"no {name}")
        return table + offsets[slot] + values[slot]

    def layout(self, vtable: int) -> Layout:
        """What the vtable at ``vtable`` says."""
        data = self._buffer.data
        if vtable < 0 or vtable + 4 > len(data):
            raise InvalidZtoc(f"cut short: vtable at {vtable} of {len(data)} bytes")
        vtable_size, table_size = _UINT16_PAIR.unpack_from(data, vtable)
        if vtable_size < 4 or vtable_size % 2 or vtable + vtable_size > len(data):
            raise InvalidZtoc(f"broken vtable at {vtable}")
        codes = self._kind.codes
        slots = min((vtable_size - 4) // 2, len(codes))
        present = struct.unpack_from(f"<{slots}H", data, vtable + 4)
        made = _compile(self._kind, present + (0,) * (len(codes) - slots), table_size)
        if len(self._layouts) >= MAX_LAYOUTS:
            self._layouts.clear()
        self._layouts[vtable] = made
        return made


def _compile(kind: Schema, offsets: Sequence[int], table_size: int) -> Layout:
    """One `struct` format that reads all present fields of a table, in the order in which they lie."""
    order = sorted((offset, slot) for slot, offset in enumerate(offsets) if offset)
    form, end = "<", 0
    pick = [len(order) + slot for slot in range(len(kind.codes))]
    for number, (offset, slot) in enumerate(order):
        if offset < max(end, 4):
            raise InvalidZtoc("fields that overlap")
        form += f"{offset - end}x{kind.codes[slot]}"
        end = offset + struct.calcsize("<" + kind.codes[slot])
        pick[slot] = number
    if end > table_size:
        raise InvalidZtoc("a field outside its table")
    return Layout(struct.Struct(form).unpack_from, itemgetter(*pick, -1), kind.defaults, tuple(offsets), end)
