# SPDX-License-Identifier: Apache-2.0
"""Reading the members of a zTOC, all at once, into columns.

Everything is checked before anything is handed out: later, when a `soci.toc.TocEntry` is made of the columns, nothing
can go wrong any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from soci.entries import TYPE_NAMES, Entries, Records, Slices
from soci.errors import InvalidZtoc
from soci.flat import FlatBuffer, schema
from soci.flat_bulk import Bulk, numbers
from soci.tar_pax import is_sparse
from soci.toc import MAX_NAME_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from soci.flat_bulk import Numbers

MIN_ENTRY_BYTES: Final = 36
"""What a member takes at least: its place in the vector, and a table of seven offsets."""
MIN_RECORD_BYTES: Final = 16
"""What a PAX record takes at least: its place in the vector, and a table of two offsets."""

_ENTRY: Final = schema("IIqqIqIIIIIqqI")
_RECORD: Final = schema("II")
_BLOCK: Final = 512
_SPARSE: Final = b"GNU.sparse."
_MOST: Final = 2**63 - 1 - _BLOCK
_REGULAR: Final = TYPE_NAMES.index(b"reg")


def parse_members(buffer: FlatBuffer, first: int, count: int, tar_size: int) -> Entries:
    """The members of the vector whose ``count`` elements begin at ``first``, all inside; ``tar_size`` in bytes.

    They come back in ascending order of their offsets. Raises `InvalidZtoc`.
    """
    import numpy as np  # noqa: PLC0415  (see `soci.flat_bulk`)

    bulk = Bulk(buffer)
    tables = bulk.follow(np.arange(first, first + 4 * count, 4, dtype=np.int64))
    name, kind, offset, size, link, mode, uid, gid, uname, gname, time, major, minor, pax = bulk.rows(_ENTRY, tables)
    types = _types(bulk, *bulk.strings(tables, kind))
    texts = [bulk.strings(tables, field) for field in (name, link, uname, gname, time)]
    counts, keys, values = _records(bulk, buffer, tables, pax)

    offsets, sizes = offset[0], size[0]
    order = None
    if count and np.any(offsets[1:] < offsets[:-1]):
        order = np.argsort(offsets, kind="stable")
        offsets, sizes, types = offsets[order], sizes[order], types[order]
        texts = [(starts[order], ends[order]) for starts, ends in texts]

    def arrange(column: Numbers) -> Numbers:
        return column if order is None else column[order]

    names, links, unames, gnames, times = (bulk.slices(starts, ends) for starts, ends in texts)
    _check_places(names, offsets, sizes, types == _REGULAR, tar_size)
    for starts, ends in texts[:2]:
        if np.any(ends - starts > MAX_NAME_BYTES):
            raise InvalidZtoc(f"name of more than {MAX_NAME_BYTES} bytes")
    records = _by_place(counts, order, keys, values)
    if _SPARSE in buffer.data:
        for at in records:
            if is_sparse(records[at]):
                raise InvalidZtoc(f"sparse member {names[at][:100]!r}: its data is not its content")
    return Entries(
        names, types.astype(np.uint8).tobytes(), numbers(offsets), numbers(sizes), links, numbers(arrange(mode[0])),
        numbers(arrange(uid[0]), "I"), numbers(arrange(gid[0]), "I"), unames, gnames, times,
        numbers(arrange(major[0])), numbers(arrange(minor[0])), records if len(records) else {},
    )  # fmt: skip


def _types(bulk: Bulk, starts: Numbers, ends: Numbers) -> Numbers:
    """The codes of the member types that are written between ``starts`` and ``ends``."""
    import numpy as np  # noqa: PLC0415

    codes = np.full(len(starts), -1, np.int64)
    lengths = ends - starts
    for code, word in enumerate(TYPE_NAMES):
        rows = np.flatnonzero(lengths == len(word))
        for at, octet in enumerate(word):
            rows = rows[bulk.octets[starts[rows] + at] == octet]
        codes[rows] = code
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        word = bulk.slices(starts[unknown[:1]], ends[unknown[:1]])[0]
        raise InvalidZtoc(f"member of the unknown type {word[:20]!r}")
    return codes


def _records(
    bulk: Bulk, buffer: FlatBuffer, tables: Numbers, field: tuple[Numbers, Numbers]
) -> tuple[Numbers, Slices, Slices]:
    """How many PAX records each member has, and the keys and values of all."""
    import numpy as np  # noqa: PLC0415

    values, places = field
    there = np.flatnonzero(values)
    vectors = (tables + places + values)[there]
    if len(vectors) and vectors.max() + 4 > buffer.size:
        raise InvalidZtoc(f"cut short: PAX records outside {buffer.size} bytes")
    lengths = bulk.column(vectors, "I")
    if np.any(lengths * 4 > buffer.size - vectors - 4):
        raise InvalidZtoc(f"cut short: PAX records do not fit in {buffer.size} bytes")
    total = int(lengths.sum())
    if total > buffer.size // MIN_RECORD_BYTES:
        raise InvalidZtoc("it uses the same PAX records over and over")
    counts = np.zeros(len(tables), np.int64)
    counts[there] = lengths
    before = np.cumsum(lengths) - lengths
    elements = np.repeat(vectors + 4 - 4 * before, lengths) + 4 * np.arange(total, dtype=np.int64)
    rows = bulk.follow(elements)
    key, value = bulk.rows(_RECORD, rows)
    return counts, bulk.slices(*bulk.strings(rows, key)), bulk.slices(*bulk.strings(rows, value))


def _by_place(counts: Numbers, order: Numbers | None, keys: Slices, values: Slices) -> Records:
    """The records by their members' places after these were put in ``order``."""
    import numpy as np  # noqa: PLC0415

    ends = np.cumsum(counts)
    if order is not None:
        counts, ends = counts[order], ends[order]
    there = np.flatnonzero(counts)
    spans = zip((ends - counts)[there].tolist(), ends[there].tolist(), strict=True)
    return Records(dict(zip(there.tolist(), spans, strict=True)), keys, values)


def _check_places(names: Slices, offsets: Numbers, sizes: Numbers, regular: NDArray[np.bool_], tar_size: int) -> None:
    """Refuse members that could not be served from where they say their data is."""
    import numpy as np  # noqa: PLC0415

    wrong = (sizes < 0) | (offsets < 0) | (offsets > _MOST) | (sizes > _MOST - np.maximum(offsets, 0))
    ends = np.where(wrong, 0, offsets + np.where(wrong, 0, sizes))
    # The size of a member without data is words: nothing is ever read by it.
    wrong |= np.where(regular, ends, offsets) > tar_size
    wrong[1:] |= offsets[1:] < -(-ends[:-1] // _BLOCK) * _BLOCK
    bad = np.flatnonzero(wrong)
    if len(bad):
        at = int(bad[0])
        raise InvalidZtoc(
            f"member {names[at][:100]!r} at {offsets[at]} with {sizes[at]} bytes: overlaps another, "
            f"or the tar's end at {tar_size}"
        )
