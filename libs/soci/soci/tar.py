# SPDX-License-Identifier: Apache-2.0
"""Walking a tar stream: pushed into a `TarWalker`, or pulled from a file by `iter_members`.

Neither holds more than one extension header of the archive in memory, whatever the archive says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Final

from soci.entries import BLOCK, TYPES, Draft, Entries
from soci.errors import InvalidTar, LimitExceeded
from soci.tar_header import MAX_PAYLOAD_BYTES, Headers
from soci.tar_run import MIN_RUN, read_run
from soci.toc import MAX_ENTRIES, TocEntry

__all__ = ["BLOCK", "CHUNK_BYTES", "MAX_PAYLOAD_BYTES", "Member", "TarWalker", "iter_members"]

CHUNK_BYTES: Final = 1 << 18
"""Largest piece of a member's data that `Member.chunks` hands out."""
MAX_TOC_BYTES: Final = 256 << 20
"""Bytes of a zTOC that members may take, about; they take some times more in memory."""
ENTRY_BYTES: Final = 200
"""About what a member takes in a zTOC beside its names and records."""
RECORD_BYTES: Final = 40
"""About what a PAX record takes beside its key and value."""
LONGEST_RUN: Final = 4096
"""Members that are read together at most, and that are read one by one at most after one that spoiled a run."""
REGULAR: Final = TYPES.index("reg")


class TarWalker:
    """Collects the table of contents of a tar that is pushed through it.

    ``compat`` lets sparse members through, as other builders do, though nothing can serve them. Raises `InvalidTar`
    for a broken archive, `Unsupported` for a sparse member, `LimitExceeded` for a table beyond `MAX_ENTRIES` or
    `MAX_TOC_BYTES`.
    """

    def __init__(self, *, compat: bool = False) -> None:
        self._members = Draft()
        self._headers = Headers(sparse=compat)
        self._buffer = bytearray()  # of what the headers want next
        self._table_bytes = 0
        self._careful = 0  # members to be read one by one before the next run
        self._penalty = MIN_RUN

    @property
    def entries(self) -> Entries:
        """The members so far."""
        return self._members.entries()

    @property
    def ended(self) -> bool:
        """Whether the end-of-archive blocks were seen; what comes behind them is not looked at."""
        return self._headers.ended

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes of the tar, however many."""
        headers, view, at = self._headers, memoryview(chunk), 0
        raw: bytes | None = None
        while at < len(view) and not headers.ended:
            if headers.data or headers.padding:
                at += headers.skip(len(view) - at)
                continue
            if not self._careful and not self._buffer and headers.plain and len(view) - at >= MIN_RUN * BLOCK:
                raw = bytes(view) if raw is None else raw
                at = self._run(raw, at)
                continue
            piece = view[at : at + headers.wanted - len(self._buffer)]
            at += len(piece)
            self._buffer += piece
            if len(self._buffer) == headers.wanted:
                whole = bytes(self._buffer)
                self._buffer.clear()
                entry = headers.give(whole)
                if entry is not None:
                    self._add(entry)

    def skip(self) -> int:
        """Pass over what is left of the member at hand, which says nothing of any other; how many bytes."""
        return self._headers.skip(self._headers.data + self._headers.padding)

    def finish(self) -> int:
        """The tar's size, end-of-archive blocks included; `InvalidTar` where it stops in a member or header."""
        if self._buffer or not self._headers.may_end():
            raise InvalidTar(f"tar cut short behind byte {self._headers.position}")
        return self._headers.position

    def _run(self, piece: bytes, start: int) -> int:
        """Take the members from ``start`` on that can be read together; where they and their data end in ``piece``."""
        run, seen = read_run(piece, start, LONGEST_RUN, self._headers.parse)
        if seen < MIN_RUN:
            self._careful = seen + 1
            return start
        taken = len(run.names) if run else 0
        if taken == seen:
            self._penalty = MIN_RUN
        else:  # where many members are of other forms, looking ahead in vain must not cost much
            self._careful = self._penalty
            self._penalty = min(2 * self._penalty, LONGEST_RUN)
        if run is None:
            return start
        origin = self._headers.position - start
        self._members.extend(run, origin)
        extra = _record_bytes(run.pax.values()) if run.pax else 0
        self._account(taken, sum(map(len, run.names)) + sum(map(len, run.links)) + extra)
        end = run.places[-1] + BLOCK
        self._headers.jump(origin + end, run.sizes[-1] if run.types[-1] == REGULAR else 0)
        return end + self._headers.skip(len(piece) - end)

    def _add(self, entry: TocEntry) -> None:
        self._careful = max(0, self._careful - 1)
        self._members.add(entry)
        self._account(1, len(entry.name) + len(entry.linkname) + _record_bytes([entry.pax]))

    def _account(self, members: int, texts: int) -> None:
        self._table_bytes += ENTRY_BYTES * members + texts
        if len(self._members.names) > MAX_ENTRIES:
            raise LimitExceeded(f"more than {MAX_ENTRIES} members in a layer (MAX_ENTRIES)")
        if self._table_bytes > MAX_TOC_BYTES:
            raise LimitExceeded(f"table of contents of more than {MAX_TOC_BYTES} bytes (MAX_TOC_BYTES)")


class Member:
    """One member of a tar that is being pulled by `iter_members`."""

    def __init__(self, entry: TocEntry, headers: Headers, read: Callable[[int], bytes]) -> None:
        self.entry = entry
        self._headers = headers
        self._read = read
        self._over = False

    def chunks(self) -> Iterator[bytes]:
        """The member's data, in pieces of at most `CHUNK_BYTES`, once, while the walk stands at this member.

        What is not taken is skipped by the walk. Raises `InvalidTar` where the archive ends too soon, and where the
        walk has gone on.
        """
        while True:
            if self._over:
                raise InvalidTar(f"the walk has left member {self.entry.name[:100]!r}")
            if not self._headers.data:
                return
            piece = self._read(min(self._headers.data, CHUNK_BYTES))
            if not piece:
                raise InvalidTar(f"tar cut short in member {self.entry.name[:100]!r}")
            self._headers.skip(len(piece))
            yield piece

    def leave(self) -> None:
        """End the member: `iter_members` does."""
        self._over = True


def iter_members(read: Callable[[int], bytes]) -> Iterator[Member]:
    """Walk a tar through a file-like ``read(n)``, which may return fewer bytes and returns none at its end.

    Nothing behind the end-of-archive blocks is read. PAX global headers are skipped, as containerd does. Raises
    `InvalidTar`, and `Unsupported` for a sparse member; what ``read`` raises goes through.
    """
    headers = Headers(global_pax="skip")
    while not headers.ended:
        block = _read_fully(read, headers.wanted)
        if not block and headers.may_end():
            return
        if len(block) < headers.wanted:
            raise InvalidTar(f"tar cut short behind byte {headers.position}")
        entry = headers.give(block)
        if entry is not None:
            member = Member(entry, headers, read)
            yield member
            for _ in member.chunks():
                pass
            member.leave()
        while headers.padding:
            piece = read(headers.padding)
            if not piece:
                return
            headers.skip(len(piece))


def _record_bytes(pax: Collection[Mapping[bytes, bytes]]) -> int:
    """About what the PAX records of some members take in a zTOC."""
    keys, values = chain.from_iterable(pax), chain.from_iterable([records.values() for records in pax])
    return RECORD_BYTES * sum(map(len, pax)) + sum(map(len, keys)) + sum(map(len, values))


def _read_fully(read: Callable[[int], bytes], count: int) -> bytes:
    pieces: list[bytes] = []
    while count:
        piece = read(count)
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
