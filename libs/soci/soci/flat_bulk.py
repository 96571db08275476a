# SPDX-License-Identifier: Apache-2.0
"""Reading many FlatBuffers tables of one type at once: a column a field.

The checks are those of `soci.flat`, over whole columns: nothing is read that was not compared with the buffer's size
before, and nothing but `InvalidZtoc` is raised. numpy is imported only when there is something to read.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from soci.entries import Slices
from soci.errors import InvalidZtoc
from soci.flat import MAX_LAYOUTS, FlatBuffer, Schema, Tables

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

_TYPES: Final = {"I": "<u4", "i": "<i4", "q": "<i8"}


class Bulk:
    """A buffer whose tables are read by columns. Positions are arrays of int64."""

    def __init__(self, buffer: FlatBuffer) -> None:
        import numpy as np  # noqa: PLC0415  (a twentieth of a second that only readers of zTOCs need)

        self._np = np
        self._buffer = buffer
        self.octets = np.frombuffer(buffer.data, np.uint8)

    def column(self, at: Numbers, code: str) -> Numbers:
        """The numbers (`struct` code ``I``, ``i`` or ``q``) at ``at``, which must all be inside."""
        np = self._np
        kind = np.dtype(_TYPES[code])
        width = kind.itemsize
        if not len(at):
            return at
        if not np.any(at % width):
            whole = np.frombuffer(self._buffer.data, kind, self._buffer.size // width)
            found: Numbers = whole[at // width].astype(np.int64)
        else:
            found = self.octets[at[:, None] + np.arange(width)].view(kind).ravel().astype(np.int64)
        return found

    def follow(self, at: Numbers) -> Numbers:
        """Where the offsets at ``at`` point; ``at`` must be inside."""
        return at + self.column(at, "I")

    def rows(self, kind: Schema, tables: Numbers) -> list[tuple[Numbers, Numbers]]:
        """Values, and places from the tables' starts (0 where absent), of each slot of the tables at ``tables``."""
        np = self._np
        self._inside(tables, 4, "table")
        vtables = tables - self.column(tables, "i")
        distinct, group = np.unique(vtables, return_inverse=True)
        reader = Tables(self._buffer, kind)
        if len(distinct) > MAX_LAYOUTS:  # no real zTOC has so many
            return self._row_by_row(reader, kind, tables)
        found = [
            (np.full(len(tables), default, np.int64), np.zeros(len(tables), np.int64)) for default in kind.defaults
        ]
        for number, vtable in enumerate(distinct.tolist()):
            layout = reader.layout(vtable)
            rows = slice(None) if len(distinct) == 1 else np.flatnonzero(group == number)
            starts = tables[rows]
            self._inside(starts, layout.end, "table")
            for (values, places), offset, code in zip(found, layout.offsets, kind.codes, strict=True):
                if offset:
                    values[rows] = self.column(starts + offset, code)
                    places[rows] = offset
        return found

    def strings(self, tables: Numbers, field: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
        """Starts and ends of the strings of one field, empty where absent; their lengths are taken from the budget."""
        np = self._np
        values, places = field
        there = np.flatnonzero(values)
        at = (tables + places + values)[there]
        self._inside(at, 4, "string")
        lengths = self.column(at, "I")
        if np.any(at + 4 + lengths > self._buffer.size):
            raise InvalidZtoc(f"cut short: a string that does not fit in {self._buffer.size} bytes")
        self._buffer.spend(int(lengths.sum()))
        starts, ends = np.zeros(len(tables), np.int64), np.zeros(len(tables), np.int64)
        starts[there] = at + 4
        ends[there] = at + 4 + lengths
        return starts, ends

    def slices(self, starts: Numbers, ends: Numbers) -> Slices:
        """The texts between ``starts`` and ``ends``."""
        return Slices(self._buffer.data, numbers(starts), numbers(ends))

    def _inside(self, at: Numbers, width: int, name: str) -> None:
        if len(at) and (at.min() < 0 or at.max() + width > self._buffer.size):
            raise InvalidZtoc(f"cut short: a {name} outside {self._buffer.size} bytes")

    def _row_by_row(self, reader: Tables, kind: Schema, tables: Numbers) -> list[tuple[Numbers, Numbers]]:
        np = self._np
        values = np.empty((len(kind.codes), len(tables)), np.int64)
        places = np.empty((len(kind.codes), len(tables)), np.int64)
        for row, table in enumerate(tables.tolist()):
            found, offsets = reader.row(table)
            values[:, row] = found[:-1]
            places[:, row] = offsets
        return list(zip(values, places, strict=True))


def numbers(column: Numbers, code: str = "q") -> array[int]:
    """``column`` as a standard array, whose elements are plain Python numbers."""
    found = array(code)
    found.frombytes(column.astype({"q": "<i8", "I": "<u4"}[code]).tobytes())
    return found
