# SPDX-License-Identifier: Apache-2.0
"""What a table of contents says against what the tar itself says, member by member."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from soci.toc import TocEntry
from soci.ztoc import mtime_ns, xattrs

_XATTR: Final = b"SCHILY.xattr."
_FIELDS: Final = (
    ("name", "name"),
    ("type", "type"),
    ("size", "size"),
    ("link target", "linkname"),
    ("owner", "uid"),
    ("group", "gid"),
    ("owner's name", "uname"),
    ("group's name", "gname"),
    ("device major", "devmajor"),
    ("device minor", "devminor"),
)


def shown(text: bytes) -> str:
    """A name of a stranger's tar, fit for a terminal and for JSON: what is not printable is escaped."""
    readable = text.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in readable)


def differences(table: Sequence[TocEntry], walked: Sequence[TocEntry]) -> Iterator[tuple[bytes, str]]:
    """Each difference as (name in the tar, or the table's where the tar has none; what differs).

    Both are in ascending order of offsets. Members are the same if their data is at the same place; of the others,
    those of one name have another offset. Times are compared as moments, whatever zone they are written in.
    """
    strange: dict[bytes, list[TocEntry]] = {}  # of the table, by name
    missing: list[TocEntry] = []
    ours, theirs = iter(table), iter(walked)
    claim, truth = next(ours, None), next(theirs, None)
    while claim is not None or truth is not None:
        if truth is None or (claim is not None and claim.offset < truth.offset):
            assert claim is not None  # noqa: S101  (for the type checker: one of the two is there)
            strange.setdefault(claim.name, []).append(claim)
            claim = next(ours, None)
        elif claim is None or truth.offset < claim.offset:
            missing.append(truth)
            truth = next(theirs, None)
        else:
            yield from _member(claim, truth)
            claim, truth = next(ours, None), next(theirs, None)
    for entry in missing:
        same = strange.get(entry.name)
        if not same:
            yield entry.name, "is in the tar, not in the table of contents"
            continue
        other = same.pop(0)
        yield entry.name, _says("offset", other.offset, entry.offset)
        yield from _member(other, entry)
    for name, entries in strange.items():
        for entry in entries:
            yield name, f"is in the table of contents (at {entry.offset}), not in the tar"


def _member(claim: TocEntry, truth: TocEntry) -> Iterator[tuple[bytes, str]]:
    if claim == truth:
        return
    name = truth.name
    for word, field in _FIELDS:
        said, is_ = getattr(claim, field), getattr(truth, field)
        if said != is_:
            yield name, _says(word, said, is_)
    if claim.mode != truth.mode:
        yield name, _says("mode", oct(claim.mode), oct(truth.mode))
    if mtime_ns(claim) != mtime_ns(truth):
        yield name, _says("mtime", claim.mod_time, truth.mod_time)
    said_xattrs, xattrs_are = xattrs(claim), xattrs(truth)
    for key in sorted(said_xattrs.keys() | xattrs_are.keys()):
        if said_xattrs.get(key) != xattrs_are.get(key):
            yield name, _says(f"xattr {shown(key)}", said_xattrs.get(key), xattrs_are.get(key))
    for key in sorted(claim.pax.keys() | truth.pax.keys()):
        if not key.startswith(_XATTR) and claim.pax.get(key) != truth.pax.get(key):
            yield name, _says(f"PAX record {shown(key)}", claim.pax.get(key), truth.pax.get(key))


MAX_SHOWN: Final = 100
"""Characters of a value in a message."""


def _says(word: str, said: object, is_: object) -> str:
    return f"{word} is {_value(is_)}, the table of contents says {_value(said)}"


def _value(value: object) -> str:
    if value is None:
        return "absent"
    text = repr(shown(value)) if isinstance(value, bytes) else repr(value) if value == "" else str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
