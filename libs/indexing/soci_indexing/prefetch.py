# SPDX-License-Identifier: Apache-2.0
"""Prefetch lists: the spans of a layer that a container needs first, as a small JSON blob beside the zTOCs.

Made from names of files: each is looked up as the container will see it, through links and below whiteouts.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from soci.digest import Digest
from soci.errors import InvalidInput, InvalidManifest, InvalidZtoc
from soci.oci_json import encode_json, load
from soci.span import Spans
from soci.zinfo import MAX_SPANS
from soci.ztoc import TocEntry, Ztoc

VERSION: Final = "1.0"
MAX_PREFETCH_BYTES: Final = 4 << 20
"""Bytes of a prefetch list."""
MAX_LINKS: Final = 40
"""Links that one name may lead through, as in the kernel."""
MAX_PATH_BYTES: Final = 4096
"""Bytes of a name to look up (PATH_MAX)."""
MAX_SPAN_ID: Final = 2**31 - 1

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"


@dataclass(frozen=True, slots=True, order=True)
class SpanRange:
    """Spans ``start`` to ``end``, both included; of two ranges the one with the lower ``priority`` is more urgent."""

    start: int
    end: int
    priority: int = 0


def encode_prefetch(ranges: Sequence[SpanRange]) -> bytes:
    """The exact bytes of a list; `InvalidInput` where it is empty or a range is none."""
    if not ranges:
        raise InvalidInput("a prefetch list without spans")
    for one in ranges:
        if not 0 <= one.start <= one.end <= MAX_SPAN_ID:
            raise InvalidInput(f"not a range of spans: {one.start} to {one.end}")
    return encode_json({"version": VERSION, "prefetch_spans": [_range_json(one) for one in ranges]})


def _range_json(one: SpanRange) -> dict[str, int]:
    members = {"start_span": one.start, "end_span": one.end}
    return members | {"priority": one.priority} if one.priority else members


def parse_prefetch(data: bytes) -> tuple[SpanRange, ...]:
    """A list that anyone wrote; `InvalidManifest` for all that is none, or an empty one."""
    document = load(data, "prefetch list", MAX_PREFETCH_BYTES)
    if document.text("version", "") != VERSION:
        document.refuse("version", f"is not {VERSION}", document.text("version", ""))
    found = []
    for entry in document.members("prefetch_spans", MAX_SPANS):
        one = SpanRange(
            entry.integer("start_span"),
            entry.integer("end_span"),
            entry.integer("priority") if "priority" in entry else 0,
        )
        if not one.start <= one.end <= MAX_SPAN_ID:
            raise InvalidManifest(f"prefetch list: not a range of spans: {one.start} to {one.end}")
        found.append(one)
    if not found:
        raise InvalidManifest("prefetch list: no spans")
    return tuple(found)


def merge(ranges: Iterable[SpanRange]) -> tuple[SpanRange, ...]:
    """The same spans in ascending order, as few ranges: those that overlap or touch become one.

    The most urgent priority of what was merged counts.
    """
    merged: list[SpanRange] = []
    for one in sorted(ranges):
        if merged and one.start <= merged[-1].end + 1:
            last = merged[-1]
            merged[-1] = SpanRange(last.start, max(last.end, one.end), min(last.priority, one.priority))
        else:
            merged.append(one)
    return tuple(merged)


def clean(name: str | bytes) -> bytes:
    """A name as a path from the root, without leading slash: ``./a//b/../c`` is ``a/c``; the root itself is empty."""
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return posixpath.normpath(b"/" + raw).lstrip(b"/")


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """What a lookup needs of one layer: its members by clean name (the last of a name counts), and what it hides."""

    layer: Digest
    ztoc: Ztoc
    entries: Mapping[bytes, TocEntry]
    whiteouts: frozenset[bytes]
    opaque: frozenset[bytes]

    @classmethod
    def of(cls, layer: Digest, ztoc: Ztoc) -> LayerFiles:
        """The files of a layer."""
        entries: dict[bytes, TocEntry] = {}
        whiteouts, opaque = set(), set()
        for entry in ztoc.entries:
            path = clean(entry.name)
            parent, _, base = path.rpartition(b"/")
            if base == _OPAQUE:
                opaque.add(parent)
            elif base.startswith(_WHITEOUT):
                whiteouts.add((parent + b"/" if parent else b"") + base[len(_WHITEOUT) :])
            else:
                entries[path] = entry
        return cls(layer, ztoc, entries, frozenset(whiteouts), frozenset(opaque))

    def hides(self, path: bytes) -> bool:
        """Whether nothing of lower layers is seen at ``path``: taken away, or behind something put in its way."""
        if path in self.whiteouts:
            return True
        for ancestor in _ancestors(path):
            found = self.entries.get(ancestor)
            if ancestor in self.whiteouts or ancestor in self.opaque or (found is not None and found.type != "dir"):
                return True
        return False


def _ancestors(path: bytes) -> Iterable[bytes]:
    parts = path.split(b"/")
    return (b"/".join(parts[:count]) for count in range(len(parts)))


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a name's bytes are: spans of a layer."""

    layer: Digest
    spans: SpanRange


@dataclass(slots=True)
class Finder:
    """Looks names up in the layers of an image, lowest first, of which a zTOC is known."""

    layers: Sequence[LayerFiles]
    _spans: dict[Digest, Spans] = field(default_factory=dict)

    def find(self, name: str) -> Hit:
        """The spans of a file. Raises `InvalidInput`, which says why there are none."""
        path = clean(name)
        if not path or len(path) > MAX_PATH_BYTES:
            raise InvalidInput(f"prefetch {name[:200]!r}: not the name of a file")
        files, entry = self._follow(name, path)
        try:
            spans = self._spans.get(files.layer) or self._spans.setdefault(files.layer, Spans.of(files.ztoc))
        except InvalidZtoc as error:
            raise InvalidInput(f"prefetch {name!r}: layer {files.layer} cannot be loaded lazily: {error}") from error
        if not spans.count:
            raise InvalidInput(f"prefetch {name!r}: layer {files.layer} is empty")
        # The end is that of the byte after the last one: lists have always been made so, and their digests are known.
        first, last = (spans.covering(at, 1).start for at in (entry.offset, entry.offset + entry.size))
        return Hit(files.layer, SpanRange(first, last))

    def _follow(self, name: str, path: bytes) -> tuple[LayerFiles, TocEntry]:
        """The member behind ``path``, through symbolic links in any of its parts, and through hard links."""
        done: list[bytes] = []
        todo = path.split(b"/")
        links = 0
        found: tuple[LayerFiles, TocEntry] | None = None
        while todo:
            part = todo.pop(0)
            if part == b"..":
                done = done[:-1]
                continue
            found = self._seen(b"/".join([*done, part]))
            if found is None or found[1].type != "symlink":
                done.append(part)  # what no layer lists may be a directory all the same
                continue
            links += 1
            target = found[1].linkname
            if links > MAX_LINKS or len(target) > MAX_PATH_BYTES:
                raise InvalidInput(f"prefetch {name!r}: too many links")
            if target.startswith(b"/"):
                done = []
            todo = [piece for piece in target.split(b"/") if piece not in (b"", b".")] + todo
            found = None
        found = found or self._seen(b"/".join(done))
        if found is None:
            raise InvalidInput(f"prefetch {name!r}: no such file in a layer that has a zTOC")
        return self._through_hard_links(name, *found)

    def _seen(self, path: bytes) -> tuple[LayerFiles, TocEntry] | None:
        for files in reversed(self.layers):
            entry = files.entries.get(path)
            if entry is not None:
                return files, entry
            if files.hides(path):
                return None
        return None

    def _through_hard_links(self, name: str, files: LayerFiles, entry: TocEntry) -> tuple[LayerFiles, TocEntry]:
        for _ in range(MAX_LINKS):
            if entry.type != "hardlink":
                return files, entry
            target = files.entries.get(clean(entry.linkname))
            if target is None:
                raise InvalidInput(f"prefetch {name!r}: a hard link to nothing")
            entry = target
        raise InvalidInput(f"prefetch {name!r}: too many links")


def collect(hits: Iterable[Hit]) -> dict[Digest, tuple[SpanRange, ...]]:
    """Merged ranges by layer."""
    by_layer: dict[Digest, list[SpanRange]] = {}
    for hit in hits:
        by_layer.setdefault(hit.layer, []).append(hit.spans)
    return {layer: merge(ranges) for layer, ranges in by_layer.items()}
