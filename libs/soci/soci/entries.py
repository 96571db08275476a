# SPDX-License-Identifier: Apache-2.0
"""A layer's members as columns.

A large layer has tens of thousands of members, and a mount looks at few of them. So they are kept as they are found,
a column a field, and a `TocEntry` is made when somebody asks for one. Texts stay where they are in the zTOC's bytes
until then (`Slices`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, SupportsIndex, get_args, overload

from soci.errors import InvalidZtoc
from soci.toc import EntryType, TocEntry

if TYPE_CHECKING:
    from soci.tar_run import Run

TYPES: Final[tuple[EntryType, ...]] = get_args(EntryType)
"""The member types; a type's place here is its code in `Entries.types`."""
TYPE_CODES: Final[Mapping[str, int]] = {kind: code for code, kind in enumerate(TYPES)}
TYPE_NAMES: Final = tuple(kind.encode() for kind in TYPES)
BLOCK: Final = 512
"""Bytes of a tar header, and what a member's data is padded to."""
NO_RECORDS: Final[Mapping[bytes, bytes]] = {}

Row = tuple[bytes, bytes, int, int, bytes, int, int, int, bytes, bytes, bytes, int, int, Mapping[bytes, bytes]]
"""A member's fields in the order of the zTOC's schema, every text as bytes."""


class Slices(Sequence[bytes]):
    """Texts that lie in one buffer, cut out when they are asked for. ``starts`` and ``ends`` are arrays of int64."""

    __slots__ = ("data", "ends", "starts")

    def __init__(self, data: bytes, starts: array[int], ends: array[int]) -> None:
        self.data = data
        self.starts = starts
        self.ends = ends

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Slices:
        """``texts`` side by side in one buffer; what is `Slices` already comes back as it is."""
        if isinstance(texts, Slices):
            return texts
        starts, ends, at = array("q"), array("q"), 0
        for length in map(len, texts):
            starts.append(at)
            at += length
            ends.append(at)
        return cls(b"".join(texts), starts, ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: SupportsIndex) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: SupportsIndex | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self.data[self.starts[at] : self.ends[at]]

    def __iter__(self) -> Iterator[bytes]:
        data = self.data
        return iter([data[start:end] for start, end in zip(self.starts, self.ends, strict=True)])


class Records(Mapping[int, Mapping[bytes, bytes]]):
    """The PAX records of the members that have some, by the members' places; a mapping is made when asked for."""

    __slots__ = ("_keys", "_places", "_values")

    def __init__(self, places: Mapping[int, tuple[int, int]], keys: Slices, values: Slices) -> None:
        self._places = places  # of the first record and the one behind the last
        self._keys = keys
        self._values = values

    def __getitem__(self, at: int) -> Mapping[bytes, bytes]:
        first, end = self._places[at]
        return dict(zip(self._keys[first:end], self._values[first:end], strict=True))

    def mention(self, word: bytes) -> bool:
        """Whether some key may hold ``word``; False only where none does."""
        return word in self._keys.data

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Entries(Sequence[TocEntry]):
    """The members, in tar order. Equal to any tuple, list or `Entries` of equal members.

    The columns are as long as there are members; ``pax`` holds only the members that have records.
    """

    __slots__ = (
        "gids",
        "gnames",
        "links",
        "majors",
        "minors",
        "modes",
        "names",
        "offsets",
        "pax",
        "sizes",
        "times",
        "types",
        "uids",
        "unames",
    )
    __hash__ = None  # type: ignore[assignment]  # a list of dictionaries, as it were

    def __init__(  # noqa: PLR0913, PLR0917  (a column each)
        self,
        names: Sequence[bytes],
        types: bytes | bytearray,  # codes: places in `TYPES`
        offsets: array[int],  # int64, as are sizes, modes, majors, minors
        sizes: array[int],
        links: Sequence[bytes],
        modes: array[int],
        uids: array[int],  # uint32, as are gids
        gids: array[int],
        unames: Sequence[bytes],
        gnames: Sequence[bytes],
        times: Sequence[bytes],
        majors: array[int],
        minors: array[int],
        pax: Mapping[int, Mapping[bytes, bytes]],
    ) -> None:
        self.names, self.types, self.offsets, self.sizes, self.links = names, types, offsets, sizes, links
        self.modes, self.uids, self.gids, self.unames, self.gnames = modes, uids, gids, unames, gnames
        self.times, self.majors, self.minors, self.pax = times, majors, minors, pax

    @classmethod
    def of(cls, entries: Iterable[TocEntry]) -> Entries:
        """``entries`` in columns; `InvalidZtoc` for a number that its column cannot hold, or an unknown type."""
        if isinstance(entries, cls):
            return entries
        draft = Draft()
        try:
            for entry in entries:
                draft.add(entry)
        except (OverflowError, KeyError, TypeError) as error:
            raise InvalidZtoc(f"a member that a zTOC cannot hold: {error}") from error
        return draft.entries()

    def rows_backwards(self) -> Iterator[Row]:
        """The members' fields, from the last to the first."""
        pax: list[Mapping[bytes, bytes]] = [NO_RECORDS] * len(self)
        for at in self.pax:
            pax[at] = self.pax[at]
        columns: tuple[Sequence[Any], ...] = (
            self.names, [TYPE_NAMES[code] for code in self.types], self.offsets, self.sizes, self.links, self.modes,
            self.uids, self.gids, self.unames, self.gnames, self.times, self.majors, self.minors, pax,
        )  # fmt: skip
        # Not a list of rows: one tuple can then serve all of them.
        return zip(*(reversed(list(c) if isinstance(c, Slices) else c) for c in columns), strict=True)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, at: SupportsIndex) -> TocEntry: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[TocEntry, ...]: ...
    def __getitem__(self, at: SupportsIndex | slice) -> TocEntry | tuple[TocEntry, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        i = range(len(self))[at]
        return TocEntry(
            self.names[i],
            TYPES[self.types[i]],
            self.offsets[i],
            self.sizes[i],
            self.links[i],
            self.modes[i],
            self.uids[i],
            self.gids[i],
            self.unames[i],
            self.gnames[i],
            self.times[i].decode("utf-8", "surrogateescape"),
            self.majors[i],
            self.minors[i],
            self.pax.get(i, NO_RECORDS),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entries | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} members>"


class Draft:
    """Columns that grow, member by member or many at once; never handed out of this library."""

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.types = bytearray()
        self.offsets, self.sizes, self.modes = array("q"), array("q"), array("q")
        self.majors, self.minors = array("q"), array("q")
        self.uids, self.gids = array("I"), array("I")
        self.links: list[bytes] = []
        self.unames: list[bytes] = []
        self.gnames: list[bytes] = []
        self.times: list[bytes] = []
        self.pax: dict[int, Mapping[bytes, bytes]] = {}

    def add(self, entry: TocEntry) -> None:
        """Append one member."""
        code = TYPE_CODES[entry.type]
        if entry.pax:
            self.pax[len(self.names)] = entry.pax
        self.offsets.append(entry.offset)
        self.sizes.append(entry.size)
        self.modes.append(entry.mode)
        self.uids.append(entry.uid)
        self.gids.append(entry.gid)
        self.majors.append(entry.devmajor)
        self.minors.append(entry.devminor)
        self.names.append(entry.name)
        self.types.append(code)
        self.links.append(entry.linkname)
        self.unames.append(entry.uname)
        self.gnames.append(entry.gname)
        self.times.append(entry.mod_time.encode("utf-8", "surrogateescape"))

    def extend(self, run: Run, position: int) -> None:
        """Append the members of ``run``; ``position`` is that of its piece in the tar."""
        first = len(self.names)
        self.offsets.extend([position + place + BLOCK for place in run.places])
        self.names += run.names
        self.types += run.types
        self.sizes += run.sizes
        self.links += run.links
        self.modes += run.modes
        self.uids += run.uids
        self.gids += run.gids
        self.unames += run.unames
        self.gnames += run.gnames
        self.times += run.times
        self.majors += run.majors
        self.minors += run.minors
        if run.pax:
            self.pax.update(zip([first + at for at in run.pax], run.pax.values(), strict=True))

    def entries(self) -> Entries:
        """The members so far, in columns that may still grow."""
        return Entries(
            self.names, self.types, self.offsets, self.sizes, self.links, self.modes, self.uids, self.gids,
            self.unames, self.gnames, self.times, self.majors, self.minors, self.pax,
        )  # fmt: skip


def rows_backwards(entries: Sequence[TocEntry]) -> Iterator[Row]:
    """The fields of ``entries`` from the last to the first, whatever the sequence; nothing is checked."""
    if isinstance(entries, Entries):
        return entries.rows_backwards()
    return (
        (
            entry.name, _raw(entry.type), entry.offset, entry.size, entry.linkname, entry.mode, entry.uid, entry.gid,
            entry.uname, entry.gname, _raw(entry.mod_time), entry.devmajor, entry.devminor, entry.pax,
        )
        for entry in reversed(entries)
    )  # fmt: skip


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
