# SPDX-License-Identifier: Apache-2.0
"""Where each member's tar header is, and whether it says what the table of contents says.

The table of contents says which bytes are a file's. Before a file's bytes are served for the first time, the tar
header right before them is compared with its entry: content under a wrong name would be a wrong byte, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence

from soci.entries import Entries
from soci.errors import FailedPrecondition, Mismatch, SociError
from soci.tar import BLOCK, MAX_PAYLOAD_BYTES, TarWalker
from soci.toc import TocEntry
from soci.toc_time import parse_rfc3339_ns
from soci_mounter.numbers import compact

HEADER_LIMIT = 4 * MAX_PAYLOAD_BYTES
"""Bytes of one member's header: extended records, long name and long link target, and their blocks."""
XATTR_RECORD = b"SCHILY.xattr."


class Headers:
    """The headers of one layer's members. Their places are always known, their entries after `ready`."""

    def __init__(self, entries: Sequence[TocEntry], load: Callable[[], Awaitable[Entries]] | None = None) -> None:
        """``load`` brings the entries again after `forget`, without which they stay."""
        self._load = load
        known = Entries.of(entries)  # columns: no member is made before somebody reads it
        self._entries: Entries | None = known
        self._offsets, self._sizes = compact(known.offsets), compact(known.sizes)

    @classmethod
    def of(cls, entries: Sequence[TocEntry]) -> Headers:
        """For a layer's members in tar order."""
        return cls(entries)

    async def ready(self) -> None:
        """Have the entries; raises what loading them raises."""
        if self._entries is None and self._load:
            self._entries = await self._load()

    def forget(self) -> None:
        """Let go of the entries, until `ready`."""
        if self._load:
            self._entries = None

    def place(self, data_offset: int) -> tuple[int, int]:
        """``(start, end)`` in the uncompressed tar of the header of the member whose data is at ``data_offset``.

        A zTOC does not record it: it begins where the member before ends, rounded up to a block.
        """
        index = self._index(data_offset)
        start = 0
        if index:
            start = -(-(self._offsets[index - 1] + self._sizes[index - 1]) // BLOCK) * BLOCK
        if not BLOCK <= data_offset - start <= HEADER_LIMIT:
            raise Mismatch(f"a tar header of {data_offset - start} bytes before {data_offset}")
        return start, data_offset

    def check(self, data_offset: int, header: bytes) -> None:
        """Compare the header of the member whose data is at ``data_offset`` with its entry; raises `Mismatch`."""
        if self._entries is None:
            raise FailedPrecondition("the layer's entries were forgotten")
        promised = self._entries[self._index(data_offset)]
        walker = TarWalker(compat=True)
        try:
            walker.feed(header)
        except SociError as error:
            raise Mismatch(f"the tar header of {promised.name[:200]!r} does not parse: {error}") from error
        if len(walker.entries) != 1 or walker.entries[0].offset != len(header):
            raise Mismatch(f"the {len(header)} bytes before {promised.name[:200]!r} are not its tar header")
        wanted, found = _facts(promised), _facts(walker.entries[0])
        differing = [key for key, value in wanted.items() if found[key] != value]
        if differing:
            raise Mismatch(f"the tar header of {promised.name[:200]!r} has another {', '.join(differing)}")

    def _index(self, data_offset: int) -> int:
        index = bisect_left(self._offsets, data_offset)
        if index == len(self._offsets) or self._offsets[index] != data_offset:
            raise Mismatch(f"no member of the layer has its data at {data_offset}")
        return index


def _facts(entry: TocEntry) -> dict[str, object]:
    """What a header and its entry must agree on. Type bits inside the mode field mean nothing."""
    return {
        "name": entry.name,
        "type": entry.type,
        "size": entry.size,
        "link target": entry.linkname,
        "mode": entry.mode & 0o7777,
        "owner": (entry.uid, entry.gid),
        "device": (entry.devmajor, entry.devminor),
        "mtime": parse_rfc3339_ns(entry.mod_time),
        "xattrs": {key: value for key, value in entry.pax.items() if key.startswith(XATTR_RECORD)},
    }
